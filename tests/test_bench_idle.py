"""bench.idle: shares of a core out of CPU times; the command measures what it says."""

import json
from pathlib import Path
from typing import Any

import pytest

from ucxgossip.bench import idle
from ucxgossip.cli import main
from ucxgossip.errors import ArgumentError

KEYS = {
    "bench", "transport", "ranks", "seconds", "cpu_percent", "mean_percent", "engine_percent",
}  # fmt: skip


def test_row_is_of_the_busiest_rank() -> None:
    ranks = [
        {"seconds": 10.0, "process_s": 0.1, "engine_s": 0.0},
        {"seconds": 10.0, "process_s": 0.3, "engine_s": 0.1},
    ]
    row = idle.make_row(ranks, "shm")
    assert set(row) == KEYS
    assert (row["ranks"], row["seconds"]) == (2, 10.0)
    shares = [row[key] for key in ("cpu_percent", "mean_percent", "engine_percent")]
    assert shares == pytest.approx([3.0, 2.0, 0.5])


@pytest.mark.parametrize(
    ("changed", "word"),
    [({"ranks": [1]}, "ranks"), ({"ranks": []}, "ranks"), ({"seconds": 0.0}, "seconds")],
    ids=str,
)
def test_bad_arguments_start_nothing(changed: dict[str, Any], word: str) -> None:
    with pytest.raises(ArgumentError, match=word):
        idle.run(**({"transport": "tcp", "ranks": [2]} | changed))


@pytest.mark.spawn
@pytest.mark.usefixtures("forked_ranks")
@pytest.mark.parametrize("transport", ["tcp", "shm"])
def test_command(transport: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    command = ["bench", "idle", "--transport", transport, "--ranks", "2", "--seconds", "0.2"]
    assert main([*command, "--json", str(path)]) == 0
    (row,) = json.loads(path.read_text())["rows"]
    assert set(row) == KEYS
    assert row["bench"] == "idle" and row["transport"] == transport
    assert row["seconds"] >= 0.2
    assert 0 <= row["engine_percent"] <= row["cpu_percent"]
