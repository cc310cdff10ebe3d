"""bench.step: ratios of paired repeats; ranks that stand in take part and hold nobody up."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from ucxgossip.bench import step
from ucxgossip.cli import main
from ucxgossip.errors import ArgumentError

KEYS = {
    "bench", "transport", "model", "ranks", "method", "step_ms", "local_ms", "ratio", "spread",
    "exchange_ms", "hidden", "computing", "device",
}  # fmt: skip


def test_row_compares_paired_repeats() -> None:
    row = step.make_row(
        {
            "model": "gpt",
            "method": "allreduce",
            "step_ms": [11.0, 30.0, 24.0],
            "local_ms": [10.0, 20.0, 20.0],
            "exchange_ms": None,
            "hidden": None,
        },
        "tcp",
        2,
    )
    assert set(row) == KEYS - {"computing", "device"}
    assert (row["step_ms"], row["local_ms"], row["ratio"]) == (24.0, 20.0, 1.2)
    assert row["spread"] == pytest.approx(100 * 0.4 / 1.2)


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"ranks": 1}, "at least 2"),
        ({"models": ["orca"]}, "unknown model"),
        ({"models": []}, "model"),
        ({"models": ["gpt", "gpt"]}, "twice"),
        ({"methods": ["allreduce", "allreduce"]}, "twice"),
        ({"methods": ["telepathy"]}, "unknown method"),
        ({"methods": ["gossip-deferred"]}, "simulation only"),
        ({"cores": 3}, "cores"),
        ({"cores": 1, "ranks": 100_000}, "too few"),
        ({"batch": 0}, "batch"),
        ({"steps": 0}, "steps"),
        ({"repeats": 0}, "repeats"),
        ({"device": "tpu"}, "tpu"),
        ({"methods": ["allreduce-nccl"]}, "--device cuda"),
        ({"device": "cuda", "cores": 2, "ranks": 100_000}, "too few|leave --cores out"),
    ],
    ids=str,
)
def test_bad_arguments_start_nothing(changed: dict[str, Any], word: str) -> None:
    pytest.importorskip("torch")
    arguments: dict[str, Any] = {"transport": "tcp", "models": ["gpt"], "ranks": 2, "methods": []}
    with pytest.raises(ArgumentError, match=word):
        step.run(**(arguments | changed))


def test_places(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    from ucxgossip.bench.step_rank import placed

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {4, 5, 6, 7})
    assert placed(1, 2, None, 2) == ({4, 5, 6, 7}, {4, 5, 6, 7})
    assert placed(1, 2, 1, 2) == ({5}, {5})
    assert placed(1, 2, 2, 2) == ({6}, {7})
    assert [placed(rank, 3, 2, 1) for rank in (0, 2)] == [({4}, {5, 6, 7}), ({5, 6, 7}, {5, 6, 7})]


@pytest.mark.spawn
@pytest.mark.usefixtures("forked_ranks")
@pytest.mark.parametrize(
    ("transport", "cores", "model"), [("tcp", None, "gpt"), ("shm", 2, "convnet")]
)
def test_command(
    transport: str,
    cores: int | None,
    model: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("sklearn")
    if cores is not None and len(os.sched_getaffinity(0)) < cores:
        pytest.skip(f"fewer than {cores} cores")
    path = tmp_path / "rows.json"
    methods = "lockstep,gossip-both-atc,gossip-weights-atc+stale1,allreduce"
    shape = ["--models", model, "--methods", methods, "--steps", "4", "--repeats", "2"]
    pinned = [] if cores is None else ["--cores", str(cores)]
    command = ["bench", "step", "--transport", transport, "--batch", "4", *shape, *pinned]
    assert main([*command, "--json", str(path)]) == 0
    document = json.loads(path.read_text())
    assert document["environment"]["pinned"] == cores
    found = {row["method"]: row for row in document["rows"]}
    assert list(found) == ["local", *methods.split(",")]
    for method, row in found.items():
        assert set(row) == KEYS
        assert row["model"] == model and row["step_ms"] > 0 < row["local_ms"]
        assert (row["exchange_ms"] is None) is not method.startswith("gossip")
        assert row["hidden"] is None or 0 <= row["hidden"] <= 1
    assert found["local"]["ratio"] == 1.0 and found["local"]["spread"] == 0.0
    lines = [line for line in capsys.readouterr().out.splitlines() if line[0] != "#"]
    assert len(lines) == 5
