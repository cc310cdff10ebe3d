"""ucxgossip.bench.exchange: what it measures is right, what it cannot measure it says."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest

from ucxgossip.bench import exchange, mpirun
from ucxgossip.bench.blocks import in_order
from ucxgossip.bench.exchange_rank import check
from ucxgossip.bench.payloads import parse
from ucxgossip.bench.peer import Arrays, Gossip
from ucxgossip.bench.spawn import run_ranks
from ucxgossip.cli import main
from ucxgossip.errors import ArgumentError, BenchError

pytestmark = [pytest.mark.spawn, pytest.mark.usefixtures("forked_ranks")]

pytest.importorskip("torch")

SHORT = ["--ranks", "2", "--repeats", "2", "--seconds", "0.01"]


def measured(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    document = json.loads(path.read_text())
    return document["environment"], document["rows"]


def test_floors_in_one_run_with_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    path, figure = tmp_path / "rows.json", tmp_path / "curves.png"
    command = ["bench", "exchange", "--transport", "shm", "--sizes", "8,lenet", *SHORT]
    command += ["--against", "sockets,copy,gloo_gossip,fixed", "--plot", str(figure)]
    assert main([*command, "--json", str(path)]) == 0
    facts, rows = measured(path)
    assert "FENCE_MODE=ep_based" in facts["settings"].split()
    assert "window=16" in facts["tuning"].split()
    assert facts["tuning"] in capsys.readouterr().out
    assert [(row["bytes"], row["peer"]) for row in rows] == [
        (nbytes, peer)
        for nbytes in (8, 79_016)
        for peer in ("sockets", "copy", "gloo_gossip", "fixed")
    ]
    for row in rows:
        assert row["ours_us"] == pytest.approx(median(row["ours_blocks_us"]))
        assert row["peer_us"] == pytest.approx(median(row["peer_blocks_us"]))
        assert row["tensors"] == 1 and row["peer_p99_us"] > 0
        assert row["speedup"] == pytest.approx(row["peer_us"] / row["ours_us"])
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_mpi_in_one_run_with_ours(tmp_path: Path) -> None:
    why = mpirun.why_absent()
    if why is not None:
        pytest.skip(why)
    path = tmp_path / "rows.json"
    command = ["bench", "exchange", "--transport", "tcp", "--sizes", "64K", *SHORT]
    peers = ["mpi_allreduce", "mpi_gossip", "mpi_put", "gloo_allreduce", "sockets"]
    assert main([*command, "--against", ",".join(peers), "--json", str(path)]) == 0
    facts, rows = measured(path)
    assert facts["mpi"].startswith("Open MPI ") and "btl=self,tcp" in facts["mpi_settings"]
    assert [row["peer"] for row in rows] == peers


def test_absent_mpi_is_left_out_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mpirun, "why_absent", lambda: f"no mpirun; {mpirun.INSTALL}")
    path = tmp_path / "rows.json"
    command = ["bench", "exchange", "--sizes", "8", *SHORT, "--json", str(path), "--against"]
    assert main([*command, "mpi_gossip"]) == 0
    facts, rows = measured(path)
    assert [row["peer"] for row in rows] == [None] and rows[0]["ours_us"] > 0
    assert facts["skipped"].startswith("mpi_gossip: no mpirun; install")
    capsys.readouterr()
    assert main([*command, "mpi_gossip,copy,mpi_put"]) == 0
    facts, rows = measured(path)
    assert [row["peer"] for row in rows] == ["copy"]
    assert facts["skipped"].startswith("mpi_gossip, mpi_put: no mpirun; install")
    assert capsys.readouterr().out.count(facts["skipped"]) == 1


OURS = """
import numpy as np
import torch.distributed as dist
from ucxgossip.bench.exchange_rank import OneArray, Ours, allocate, check
from ucxgossip.bench.gloo import gloo_job
from ucxgossip.bench.payloads import Payload
from ucxgossip.bench.report import in_force
from ucxgossip.group import join

with join(transport="shm") as group, gloo_job(60):
    for arrays in ((4,), (8, 1_200_000, 4, 280_000)):
        data = allocate(group, Payload("some", arrays))
        assert [each.nbytes for each in data.arrays] == list(arrays)
        ours = Ours(group, data)
        for _ in range(3):
            check(ours.name, ours, data, dist.barrier)
        one = OneArray(group, data)
        assert [each.nbytes for each in one.data.arrays] == [sum(arrays)]
        check(one.name, one, one.data, dist.barrier)
    assert "TLS=posix" in in_force(group)["settings"].split()
    if group.rank == 0:
        print("well")
"""


@pytest.mark.parametrize("ranks", [2, 3])
def test_ours_by_tensor(ranks: int) -> None:
    printed: list[str] = []
    run_ranks(["-c", OURS], ranks, on_line=printed.append, deadline_s=120)
    assert printed == ["well"]


class Wrong(Gossip):
    """Leaves all but one element as they should be."""

    def __init__(self, data: Arrays, place: int) -> None:
        super().__init__(data)
        self._data, self._place = data, place

    def once(self) -> None:
        self.turn()
        (array,) = self._data.arrays
        array += np.float32(0.5)
        array[self._place] += 1


def test_a_wrong_mean_is_an_error() -> None:
    data = Arrays(0, 2, [np.empty(1000, np.float32)])
    with pytest.raises(BenchError, match=r"wrong, 2 ranks: element 700 .* is 199.5 .*198.5"):
        check("wrong", Wrong(data, 700), data, lambda: None)
    with pytest.raises(ArgumentError, match="at least 2 ranks"):
        Gossip(Arrays(0, 1, []))


def test_jobs_hold_what_fits_together() -> None:
    batches = exchange._batches(parse("8,64K,resnet50,resnet50/tensors,gpt2,8"))
    assert [[each.name for each in batch] for batch in batches] == [
        ["8", "65536", "resnet50", "resnet50/tensors"],
        ["gpt2"],
        ["8"],
    ]


def test_more_memory_than_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", "exchange", "--ranks", "100000", "--sizes", "gpt2", "--against", "mpi_put"]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(mpirun, "why_absent", lambda: None)
        assert main(command) == 2
    assert "take fewer ranks" in capsys.readouterr().err


def test_no_method_always_comes_after_the_same_other() -> None:
    orders = [in_order("abcd", repeat) for repeat in range(9)]
    assert all(sorted(order) == list("abcd") for order in orders)
    assert orders == [in_order("abcd", repeat) for repeat in range(9)]  # as on another rank
    for method in "abcd":
        before = {order[order.index(method) - 1] for order in orders if order[0] != method}
        assert len(before) > 1
