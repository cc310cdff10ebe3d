"""`ucxgossip bench idle`: what a rank's threads take of the cores while nothing is under way.

Ranks do some rounds, meet, and then sleep, as in a long evaluation or a checkpoint. Each reads its
process's CPU time before and after. Columns: the rank that took most, the mean, and of the mean
what its engine took; all in percent of one core. What is left is the wardens' (a pulse every
100 ms, docs/members.md).
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from ucxgossip.bench.arguments import positive
from ucxgossip.bench.report import Report, say_in_force
from ucxgossip.bench.spawn import run_ranks
from ucxgossip.bench.table import Column
from ucxgossip.errors import ArgumentError, BenchError

COLUMNS = (
    Column("transport", "transport", "", "", 9),
    Column("ranks", "ranks", "", "d", 5),
    Column("seconds", "seconds", "s", ".1f", 8),
    Column("cpu_percent", "most", "% of core", ".2f", 9),
    Column("mean_percent", "mean", "% of core", ".2f", 9),
    Column("engine_percent", "engine", "% of core", ".2f", 9),
)
_TIMEOUT_S = 120.0
_ROUNDS = 200
_ELEMENTS = 1 << 14
_ENGINE = "ucxgossip-engine"

Row = dict[str, Any]


def run(
    transport: str, ranks: Sequence[int], seconds: float = 10.0
) -> tuple[dict[str, object], list[Row]]:
    """Print the table, return (environment, rows): one for each number of ranks."""
    if not ranks or min(ranks) < 2:
        raise ArgumentError(f"bench idle: ranks are {list(ranks)}; at least 2 each")
    positive("bench idle", seconds=seconds)
    report = Report(
        "bench idle: CPU time of ranks that have nothing to do", COLUMNS, {"transport": transport}
    )
    for count in ranks:
        with tempfile.TemporaryDirectory(prefix="ucxgossip-idle-") as folder:
            run_ranks(
                ["-m", "ucxgossip.bench.idle", transport, str(seconds), folder],
                count,
                on_line=report.take,
                deadline_s=2 * _TIMEOUT_S + seconds,
            )
            found = [json.loads(path.read_text()) for path in sorted(Path(folder).iterdir())]
        if len(found) != count:
            raise BenchError(f"bench idle: {len(found)} of {count} ranks said what they took")
        report.row(make_row(found, transport))
    return report.facts, report.rows


def make_row(found: Sequence[Row], transport: str) -> Row:
    """A row out of what each rank found: seconds, and CPU seconds of its process and engine."""
    shares = [100 * each["process_s"] / each["seconds"] for each in found]
    engines = [100 * each["engine_s"] / each["seconds"] for each in found]
    return {
        "bench": "idle",
        "transport": transport,
        "ranks": len(found),
        "seconds": fmean(each["seconds"] for each in found),
        "cpu_percent": max(shares),
        "mean_percent": fmean(shares),
        "engine_percent": fmean(engines),
    }


def _engine_s() -> float:
    """CPU seconds of the engine's thread so far: the first word of its schedstat, nanoseconds."""
    thread = next(each for each in threading.enumerate() if each.name == _ENGINE)
    spent = Path(f"/proc/self/task/{thread.native_id}/schedstat").read_text(encoding="ascii")
    return 1e-9 * int(spent.split()[0])


def main() -> None:
    """One rank, started by `run`: ``TRANSPORT SECONDS FOLDER``."""
    from ucxgossip.group import join

    transport, seconds, folder = sys.argv[1], float(sys.argv[2]), Path(sys.argv[3])
    with join(transport=transport, timeout=_TIMEOUT_S) as group:
        say_in_force(group)
        array = np.full(_ELEMENTS, float(group.rank), np.float32)
        for _ in range(_ROUNDS):
            group.exchange(array)
        group.agree("idle", {})
        engine_s, process_s, begun = _engine_s(), time.process_time(), time.perf_counter()
        time.sleep(seconds)
        found = {
            "seconds": time.perf_counter() - begun,
            "process_s": time.process_time() - process_s,
            "engine_s": _engine_s() - engine_s,
        }
        group.agree("done", {})
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
