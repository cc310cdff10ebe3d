"""bench.startup: the slowest rank of each start; what is compiled is counted."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ucxgossip.bench import startup
from ucxgossip.cli import main
from ucxgossip.errors import ArgumentError

KEYS = {
    "bench", "ranks", "import_s", "join_s", "attach_s", "total_s", "spread", "compiled", "alone_s",
}  # fmt: skip


def rank(join_s: float, compiled: int = 0) -> dict[str, Any]:
    return {"import_s": 0.5, "join_s": join_s, "attach_s": 0.5, "compiled": compiled}


def test_row_is_of_the_slowest_rank() -> None:
    starts = [[rank(1.0), rank(3.0)], [rank(2.0), rank(1.0, 4)], [rank(1.0), rank(1.0)]]
    row = startup.make_row(starts, [0.1, 0.3, 0.2])
    assert set(row) == KEYS
    assert (row["ranks"], row["join_s"], row["total_s"]) == (2, 2.0, 3.0)
    assert row["spread"] == pytest.approx(100 * (4.0 - 2.0) / 3.0)
    assert (row["compiled"], row["alone_s"]) == (4, 0.2)


@pytest.mark.parametrize("changed", [{"ranks": []}, {"ranks": [0]}, {"repeats": 0}], ids=str)
def test_bad_arguments_start_nothing(changed: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match="at least 1"):
        startup.run(**({"transport": "auto", "ranks": [1]} | changed))


COUNT = """
import runpy, sys
from ucxgossip import jit
compiled = runpy.run_path(sys.argv[1])["compiled"]

@jit.njit
def doubled(x):
    return 2 * x

before = compiled()
doubled(1)
print(compiled() - before)
"""


def test_a_compilation_is_seen(tmp_path: Path) -> None:
    script, cache = tmp_path / "count.py", {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    script.write_text(COUNT)
    rank_script = str(Path(startup.__file__).with_name("startup_rank.py"))
    printed = [
        subprocess.run(
            [sys.executable, str(script), rank_script],
            env=os.environ | cache,
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        ).stdout.strip()
        for _ in range(2)
    ]
    assert printed == ["1", "0"]


@pytest.mark.spawn
def test_command(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    assert main(["bench", "startup", "--ranks", "2", "--repeats", "1", "--json", str(path)]) == 0
    (row,) = json.loads(path.read_text())["rows"]
    assert set(row) == KEYS | {"transport"}
    assert row["bench"] == "startup" and row["ranks"] == 2
    assert row["compiled"] == 0
    parts = row["import_s"] + row["join_s"] + row["attach_s"]
    assert row["total_s"] == pytest.approx(parts)
    assert row["alone_s"] > 0
