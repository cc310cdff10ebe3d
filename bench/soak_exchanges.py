"""`soak exchanges`: blocking exchanges of two processes, while memory, descriptors and threads are
watched.

Each rank samples itself; the second half of the samples must not grow by more than a margin over
the sample in the middle. The first half is left to caches and pools that fill up: UCX's, Python's.
Every result is compared with the mean that it must be.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from ucxgossip.bench.spawn import run_ranks
from ucxgossip.bench.table import Column, Table
from ucxgossip.errors import BenchError
from ucxgossip.group import Group, join

COLUMNS = (
    Column("transport", "transport", "", "", 9),
    Column("rank", "rank", "", "d", 4),
    Column("exchanges", "exchanges", "", "d", 10),
    Column("resident", "resident", "KiB", "d", 10),
    Column("descriptors", "fds", "", "d", 5),
    Column("threads", "threads", "", "d", 8),
    Column("wrong", "wrong", "", "d", 6),
    Column("seconds", "time", "s", ".1f", 8),
)
SIZES = (8, 64, 512, 4096)
"""Bytes of the arrays, in turn."""

SAMPLES = 20
MARGINS = {"resident": 1024, "descriptors": 0, "threads": 0}
"""What the second half may grow by: KiB, descriptors, threads."""

RANKS = 2


def sample() -> dict[str, int]:
    """What this process holds: resident memory (KiB), open descriptors, threads."""
    with open("/proc/self/statm", encoding="ascii") as statm:
        pages = int(statm.read().split()[1])
    return {
        "resident": pages * os.sysconf("SC_PAGE_SIZE") // 1024,
        # Less the one by which the folder is read.
        "descriptors": len(os.listdir("/proc/self/fd")) - 1,
        "threads": len(os.listdir("/proc/self/task")),
    }


def growth(samples: Sequence[dict[str, Any]], what: str) -> int:
    """By how much the largest of the second half exceeds the sample in the middle."""
    later = [int(each[what]) for each in samples[len(samples) // 2 :]]
    return max(later) - later[0]


def grown(samples: Sequence[dict[str, Any]]) -> list[str]:
    """What grew by more than its margin, in words."""
    return [
        f"{what} by {growth(samples, what)} (margin {margin})"
        for what, margin in MARGINS.items()
        if growth(samples, what) > margin
    ]


def as_rank(group: Group, exchanges: int) -> list[dict[str, Any]]:
    """Exchange, and sample every twentieth of the way; this rank's rows."""
    boxes = [group.mailbox(nbytes, ring=True) for nbytes in SIZES]
    arrays = [np.zeros(nbytes // 4, np.float32) for nbytes in SIZES]
    due = {round(exchanges * (k + 1) / SAMPLES) for k in range(SAMPLES)}
    other, wrong = 1 - group.rank, 0
    rows: list[dict[str, Any]] = []
    begun = time.monotonic()
    for number in range(exchanges):
        which = number % len(SIZES)
        array, first = arrays[which], float(number % 4096)
        array[:] = first + group.rank
        group.exchange(array, mailbox=boxes[which])
        wrong += int((array != first + 0.5 * (group.rank + other)).sum())
        if number + 1 in due:
            seconds = time.monotonic() - begun
            place = {"rank": group.rank, "exchanges": number + 1}
            rows.append({**place, **sample(), "wrong": wrong, "seconds": seconds})
    return rows


def _joined(blobs: list[bytes]) -> bytes:
    return json.dumps([row for blob in blobs for row in json.loads(blob)]).encode()


def run(
    transports: Sequence[str],
    exchanges: int,
    facts: dict[str, object],
    deadline_s: float = 3600.0,
) -> list[dict[str, Any]]:
    """`exchanges` over each transport; print the samples of both ranks and return them as rows."""
    table = Table(COLUMNS)
    table.header(f"ucxgossip soak exchanges: {RANKS} processes, 8 B to 4 KiB in turn", facts)
    rows = []
    for transport in transports:
        said: list[str] = []
        run_ranks(
            ["-m", "ucxgossip.bench.soak_exchanges", transport, str(exchanges)],
            RANKS,
            on_line=said.append,
            deadline_s=deadline_s,
        )
        lines = [line for line in said if line.startswith("[")]
        if len(lines) != 1:
            raise BenchError(f"soak exchanges: {len(lines)} results where one was due")
        for found in json.loads(lines[0]):
            rows.append({"soak": "exchanges", "transport": transport, **found})
            table.row(rows[-1])
    return rows


def faults(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What is not as it must be, by transport and rank."""
    found = []
    for transport, rank in sorted({(row["transport"], row["rank"]) for row in rows}):
        mine = [row for row in rows if (row["transport"], row["rank"]) == (transport, rank)]
        said = grown(mine)
        if mine[-1]["wrong"]:
            said.append(f"{mine[-1]['wrong']} elements wrong")
        found += [f"{transport}, rank {rank}: {each}" for each in said]
    return found


def main() -> None:
    """One rank, started by `run`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("transport")
    parser.add_argument("exchanges", type=int)
    options = parser.parse_args()
    with join(transport=options.transport) as group:
        mine = as_rank(group, options.exchanges)
        rows = group.share("samples", json.dumps(mine).encode(), _joined)
        if group.rank == 0:
            print(rows.decode(), flush=True)


if __name__ == "__main__":
    main()
