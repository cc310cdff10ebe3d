"""ucxgossip.bench.soak: short forms of the long runs, and that they notice what they are for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ucxgossip.bench import soak, soak_chunks, soak_exchanges
from ucxgossip.bench import soak_loops as loops
from ucxgossip.bench.engines import Engines
from ucxgossip.bench.soak_chunks import Case, in_one_thread
from ucxgossip.engine import words as w
from ucxgossip.errors import ArgumentError, BenchError
from ucxgossip.ucp import abi

CASE = Case("shm", "thread", ranks=2, depth=1, chunk=64, window=2, rounds=200, seed=1)


@pytest.mark.slow
def test_chunks_of_every_transport_are_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.json"
    assert soak.main(["chunks", "--chunks", "4000", "--seed", "3", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert {row["transport"] for row in rows} == {"tcp", "shm"}
    assert {(row["ranks"], row["depth"]) for row in rows} >= {(2, 1), (3, 3), (4, 2)}
    assert {row["chunk"] for row in rows} == {64, 512, 4096}
    for row in rows:
        assert [row[name] for name in soak_chunks.FAULTS] == [0] * 4
        assert row["chunks"] > row["rounds"] > 0
    for transport in ("tcp", "shm"):
        done = sum(row["chunks"] for row in rows if row["transport"] == transport)
        assert 4000 <= done < 4500
    assert "0 torn, 0 doubled, 0 lost, 0 canaries" in capsys.readouterr().out


@pytest.mark.spawn
@pytest.mark.usefixtures("forked_ranks")
@pytest.mark.parametrize(("transport", "way"), [("tcp", "processes"), ("shm", "stops")])
def test_chunks_between_processes_are_whole(transport: str, way: str) -> None:
    case = replace(CASE, transport=transport, way=way, ranks=3, depth=2)
    row = soak_chunks.in_processes(case, 100.0)
    assert row["rounds"] == 3 * case.rounds
    assert [row[name] for name in soak_chunks.FAULTS] == [0] * 4


WATCHER = """
import os
while "State:\\tT" not in open(f"/proc/{os.getppid()}/status").read():
    pass
"""


@pytest.mark.spawn
def test_a_process_is_stopped_at_random_and_goes_on() -> None:
    """Another child sees it stopped; the one that stops it is gone afterwards."""
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    before = children.read_text()
    with soak_chunks.stopped_at_random(1):
        assert children.read_text() != before
        subprocess.run([sys.executable, "-c", WATCHER], timeout=60.0, check=True)
    assert children.read_text() == before


@pytest.mark.spawn
@pytest.mark.usefixtures("forked_ranks")
def test_exchanges_leave_nothing_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.json"
    arguments = ["exchanges", "--exchanges", "3000", "--transport", "shm", "--json", str(path)]
    assert soak.main(arguments) == 0
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) == 2 * soak_exchanges.SAMPLES
    assert [row["exchanges"] for row in rows[:20]] == list(range(150, 3001, 150))
    assert all(row["resident"] > 10_000 and row["threads"] >= 2 for row in rows)
    assert "# flat" in capsys.readouterr().out


@pytest.mark.parametrize("operation", [w.COPY, w.MIX_FLOAT32, w.MIX_FLOAT64])
def test_a_round_that_is_not_whole_is_noticed(operation: int) -> None:
    """What `check` says of a right payload, of another round's, and of a mixture of both."""
    nbytes, chunk, words = 512, 128, loops.CANARY // 8

    def payload(rank: int, number: int) -> np.ndarray:
        raw = np.zeros(nbytes // 8 + 2 * words, np.int64)
        loops.fill(raw.ctypes.data + loops.CANARY, nbytes, operation, rank, number)
        values = raw[words:-words]
        return {w.MIX_FLOAT32: values.view(np.float32), w.MIX_FLOAT64: values.view(np.float64)}.get(
            operation, values
        )

    def taken(received: np.ndarray) -> list[int]:
        own = payload(0, 7)
        result = received.copy() if operation == w.COPY else own + (received - own) / 2
        tally = np.zeros(loops.TALLY, np.int64)
        loops.check(tally, chunk, result.ctypes.data, nbytes, operation, 0, 1, 7)
        assert tally[loops.CHUNKS] == 4 and tally[loops.BYTES] == nbytes
        return [int(tally[loops.TORN]), int(tally[loops.DOUBLED])]

    right, stale = payload(1, 7), payload(1, 5)
    assert taken(right) == [0, 0]
    assert taken(stale) == [0, 4]
    assert taken(payload(2, 7)) == [0, 4]
    each = len(right) // 4
    mixture = np.concatenate([right[:each], stale[each : 2 * each], right[2 * each :]])
    assert taken(mixture) == [0, 1]
    mixture[0] = stale[0]
    mixture[-1] = stale[-1]
    assert taken(mixture) == [2, 1]
    if operation != w.COPY:
        assert taken(right + (right - payload(0, 7)) / 2) == [0, 4]  # mixed twice


def tampered(case: Case, tamper: object) -> dict[str, object]:
    """`case` with engines that `tamper` has changed."""
    made = soak_chunks.Engines

    class Tampered(Engines):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            tamper(self)  # type: ignore[operator]

    soak_chunks.Engines = Tampered  # type: ignore[misc]
    try:
        return in_one_thread(case)
    finally:
        soak_chunks.Engines = made  # type: ignore[misc]


def give_all_credits(all_ranks: Engines) -> None:
    for box in all_ranks.boxes:
        box.credits[:] = 1 << 40


def test_rounds_put_without_credit_are_noticed() -> None:
    case = replace(CASE, ranks=3, rounds=2000, patience_s=1.0)
    row = tampered(case, give_all_credits)
    assert sum(row[name] for name in soak_chunks.FAULTS) > 0  # type: ignore[misc]


def test_rounds_that_never_end_are_lost_and_the_run_ends() -> None:
    def close_the_signals(all_ranks: Engines) -> None:
        all_ranks.engines[1].words[w.EPOCH] = 1  # rank 1 takes no word of epoch 0

    row = tampered(replace(CASE, patience_s=0.5), close_the_signals)
    assert row["lost"] == 2 * CASE.rounds
    assert row["chunks"] == 0


def test_a_guard_that_is_overwritten_is_noticed() -> None:
    row = tampered(CASE, lambda all_ranks: all_ranks.boxes[0].region.bytes.__setitem__(3, 1))
    assert row["canaries"] == 1 and row["lost"] == 0


def test_a_failed_put_is_an_error() -> None:
    tally = np.zeros(loops.TALLY, np.int64)
    tally[loops.FAILED] = abi.Status.ERR_TIMED_OUT
    with pytest.raises(BenchError, match="a round failed with"):
        soak_chunks._report(CASE, tally, 2, True, 1.0)


def rows_of(**grows: list[int]) -> list[dict[str, object]]:
    flat: dict[str, object] = {"resident": 5000, "descriptors": 9, "threads": 3}
    flat |= {"wrong": 0, "transport": "shm", "rank": 0}
    rows = [dict(flat) for _ in range(4)]
    for what, values in grows.items():
        for row, value in zip(rows, values, strict=True):
            row[what] = value
    return rows


@pytest.mark.parametrize(
    ("grows", "said"),
    [
        ({}, []),
        ({"descriptors": [1, 9, 9, 9], "resident": [1, 2, 5000, 6024]}, []),
        ({"descriptors": [9, 9, 9, 10]}, ["shm, rank 0: descriptors by 1 (margin 0)"]),
        ({"threads": [3, 3, 3, 4]}, ["shm, rank 0: threads by 1 (margin 0)"]),
        ({"resident": [0, 0, 5000, 6025]}, ["shm, rank 0: resident by 1025 (margin 1024)"]),
        ({"wrong": [0, 0, 1, 2]}, ["shm, rank 0: 2 elements wrong"]),
    ],
)
def test_growth_and_wrong_values_are_told(grows: dict[str, list[int]], said: list[str]) -> None:
    assert soak_exchanges.faults(rows_of(**grows)) == said


def test_what_broke_is_the_exit_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(soak_exchanges, "run", lambda *_: rows_of(threads=[3, 3, 3, 9]))
    assert soak.main(["exchanges"]) == 1
    assert "threads by 6" in capsys.readouterr().err
    row = {"chunks": 5, "torn": 1, "doubled": 0, "lost": 0, "canaries": 0}
    monkeypatch.setattr(soak_chunks, "run", lambda *_: [row])
    assert soak.main(["chunks"]) == 1
    assert "soak: 1 torn" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["chunks", "--transport", "rdma"], "--transport 'rdma': write one or more of"),
        (
            ["chunks", "--way", "tasks"],
            "--way 'tasks': write one or more of thread,proc",
        ),
        (["chunks", "--chunks", "1"], "--chunks is 1; must be 100 to"),
        (["chunks", "--seed", "-1"], "--seed is -1; must be 0 to"),
        (["exchanges", "--exchanges", "3"], "--exchanges is 3; must be 20 to"),
        (["exchanges", "--transport", ""], "--transport '': write one or more of"),
    ],
)
def test_arguments_that_cannot_be_served(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert soak.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_second_close_does_nothing() -> None:
    with Engines("shm", 2, 64, 1, CASE.tuning) as all_ranks:
        assert all_ranks.intact()
    all_ranks.close()


def test_engines_that_cannot_be_made_leave_nothing_behind() -> None:
    with pytest.raises(ArgumentError, match="transport"):
        Engines("rdma", 2, 64, 1, CASE.tuning)
