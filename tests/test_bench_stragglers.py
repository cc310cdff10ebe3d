"""bench.stragglers: rows are what the ranks found; those who wait are held up as they must be."""

import json
from pathlib import Path
from typing import Any

import pytest

from ucxgossip.bench import stragglers
from ucxgossip.cli import main
from ucxgossip.errors import ArgumentError

KEYS = {
    "bench", "transport", "ranks", "slow", "method", "step_ms", "slowed_ms", "cost_percent",
    "cost_low", "cost_high", "accuracy", "slowed_accuracy", "slow_accuracy", "slow_mass", "skipped",
}  # fmt: skip


def test_row_compares_paired_repeats() -> None:
    found = {
        "method": "gossip-push_sum",
        "even": {
            "step_ms": [10.0, 20.0, 10.0],
            "accuracies": [90.0, 92.0, 94.0, 10.0],
            "mass": 1.0,
            "skipped": 0.0,
        },
        "slowed": {
            "step_ms": [11.0, 20.0, 15.0],
            "accuracies": [80.0, 81.0, 82.0, 50.0],
            "mass": 2.5,
            "skipped": 7.0,
        },
    }
    row = stragglers.make_row(found, 4, 5.0, "tcp")
    assert set(row) == KEYS
    assert (row["step_ms"], row["slowed_ms"]) == (10.0, 15.0)
    costs = [row[key] for key in ("cost_low", "cost_percent", "cost_high")]
    assert costs == pytest.approx([0.0, 10.0, 50.0])
    assert (row["accuracy"], row["slowed_accuracy"], row["slow_accuracy"]) == (92.0, 81.0, 50.0)
    assert (row["slow_mass"], row["skipped"]) == (2.5, 7.0)


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"ranks": 1}, "at least 2"),
        ({"slow": 0.5}, "from 1 on"),
        ({"slow": float("nan")}, "from 1 on"),
        ({"compute_ms": 0.0}, "positive"),
        ({"steps": 0}, "steps"),
        ({"repeats": 0}, "repeats"),
        ({"methods": []}, "at least one"),
        ({"methods": ["local", "local"]}, "twice"),
        ({"methods": ["gossip-deferred"]}, "simulation only"),
        ({"methods": ["telepathy"]}, "unknown method"),
    ],
    ids=str,
)
def test_bad_arguments_start_nothing(changed: dict[str, Any], word: str) -> None:
    arguments = {"transport": "tcp", "ranks": 2, "slow": 5.0, "methods": ["allreduce"]} | changed
    with pytest.raises(ArgumentError, match=word):
        stragglers.run(**arguments)


@pytest.mark.spawn
@pytest.mark.usefixtures("forked_ranks")
def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    path, methods = tmp_path / "rows.json", "allreduce,gossip-both-atc+stale1,gossip-push_sum"
    shape = ["--ranks", "3", "--slow", "3", "--compute", "30", "--steps", "9", "--repeats", "2"]
    command = ["bench", "stragglers", "--transport", "tcp", *shape, "--methods", methods]
    assert main([*command, "--json", str(path)]) == 0
    document = json.loads(path.read_text())
    assert document["environment"]["compute_ms"] == 30.0
    found = {row["method"]: row for row in document["rows"]}
    assert list(found) == methods.split(",")
    for row in found.values():
        assert set(row) == KEYS
        assert row["step_ms"] >= 30.0
        assert row["cost_low"] <= row["cost_percent"] <= row["cost_high"]
        assert 0 <= row["slow_accuracy"] <= 100
    assert found["allreduce"]["slowed_ms"] > 60.0  # it waits for 90 ms in each step
    assert found["allreduce"]["slow_mass"] == 1.0
    lines = [line for line in capsys.readouterr().out.splitlines() if line[0] != "#"]
    assert len(lines) == 3


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", "stragglers", "--help"])
    assert ended.value.code == 0
    assert "--slow" in capsys.readouterr().out
