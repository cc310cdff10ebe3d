"""`ucxgossip bench startup`: how long a rank takes until it can train, beyond importing torch.

Each repeat starts the ranks of a job anew. A rank imports torch, starts the clock and goes on as a
user's script does: ``import ucxgossip``, `join`, `attach`. Of the ranks the slowest in all is
reported, of the repeats the median. A first start is made and not counted, for it may have to
compile; `compiled` says how many functions the counted starts compiled all the same, which is to
be 0: it counts what numba's cache on disk did not have. `alone_s` is ``import ucxgossip`` in a
process of its own that has numpy and numba, and not torch.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from ucxgossip.bench.arguments import at_least_one
from ucxgossip.bench.report import Report
from ucxgossip.bench.spawn import run_ranks
from ucxgossip.bench.table import Column
from ucxgossip.errors import ArgumentError, BenchError

COLUMNS = (
    Column("ranks", "ranks", "", "d", 5),
    Column("import_s", "import", "s", ".2f", 8),
    Column("join_s", "join", "s", ".2f", 8),
    Column("attach_s", "attach", "s", ".2f", 8),
    Column("total_s", "in all", "s", ".2f", 8),
    Column("spread", "spread", "%", ".0f", 7),
    Column("compiled", "compiled", "", "d", 9),
    Column("alone_s", "import alone", "s", ".2f", 13),
)
_DEADLINE_S = 300.0
_ALONE = """
import time, numpy, numba
begun = time.perf_counter()
import ucxgossip
print(time.perf_counter() - begun)
"""
_PARTS = ("import_s", "join_s", "attach_s")

Row = dict[str, Any]


def run(
    transport: str, ranks: Sequence[int], repeats: int = 5
) -> tuple[dict[str, object], list[Row]]:
    """Print the table, return (environment, rows): one for each number of ranks."""
    if not ranks or min(ranks) < 1:
        raise ArgumentError(f"bench startup: ranks are {list(ranks)}; at least 1 each")
    at_least_one("bench startup", repeats=repeats)
    report = Report(
        "bench startup: until a rank can train, beyond importing torch",
        COLUMNS,
        {"transport": transport, "repeats": repeats},
    )
    for count in ranks:
        starts = [_start(transport, count, report.take) for _ in range(repeats + 1)][1:]
        alone = [_alone() for _ in range(repeats)]
        report.row({**make_row(starts, alone), "transport": transport})
    return report.facts, report.rows


def _start(transport: str, ranks: int, on_line: Callable[[str], object]) -> list[Row]:
    """Start a job; what each rank found."""
    script = Path(__file__).with_name("startup_rank.py")
    with tempfile.TemporaryDirectory(prefix="ucxgossip-startup-") as folder:
        run_ranks(
            # Not with -m, which would import the package before the clock starts, and without the
            # script's folder in the path, whose modules have names that others may have too.
            ["-P", str(script), transport, folder],
            ranks,
            on_line=on_line,
            deadline_s=_DEADLINE_S,
        )
        found = [json.loads(path.read_text()) for path in Path(folder).iterdir()]
    if len(found) != ranks:
        raise BenchError(f"bench startup: {len(found)} of {ranks} ranks said how long they took")
    return found


def _alone() -> float:
    """Seconds of ``import ucxgossip`` in a process that has numpy and numba."""
    try:
        ended = subprocess.run(
            [sys.executable, "-c", _ALONE],
            capture_output=True,
            text=True,
            timeout=_DEADLINE_S,
            check=True,
        )
    except subprocess.SubprocessError as error:
        raise BenchError(f"bench startup: import ucxgossip, alone: {error}") from None
    return float(ended.stdout)


def make_row(starts: Sequence[Sequence[Row]], alone: Sequence[float]) -> Row:
    """A row out of what each rank found at each start."""
    slowest = [max(ranks, key=lambda rank: sum(rank[part] for part in _PARTS)) for ranks in starts]
    totals = [sum(rank[part] for part in _PARTS) for rank in slowest]
    return {
        "bench": "startup",
        "ranks": len(starts[0]),
        **{part: median(rank[part] for rank in slowest) for part in _PARTS},
        "total_s": median(totals),
        "spread": 100 * (max(totals) - min(totals)) / median(totals),
        "compiled": sum(rank["compiled"] for ranks in starts for rank in ranks),
        "alone_s": median(alone),
    }
