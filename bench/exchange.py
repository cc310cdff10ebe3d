"""`ucxgossip bench exchange`: one whole round, put and in-place mean, beside the peers'.

Each job of `ranks` processes runs ours and every peer in the same processes, in turn, size by
size, so that a figure and the one beside it saw the same machine. A repeat is a block of rounds
between two barriers; its time is that of the slowest rank, divided by the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import numpy as np

from ucxgossip.bench.environment import environment
from ucxgossip.bench.spawn import run_ranks
from ucxgossip.bench.summary import summarize
from ucxgossip.bench.table import Column, Table
from ucxgossip.errors import ArgumentError, BenchError
from ucxgossip.ucp import lib

PEERS = ("gloo_allreduce", "gloo_gossip")
COLUMNS = (
    Column("bytes", "size", "B", "d", 11),
    Column("ranks", "ranks", "", "d", 5),
    Column("ours_us", "ours", "us", ".1f", 11),
    Column("ours_p99_us", "p99", "us", ".1f", 11),
    Column("spread", "spread", "%", ".0f", 6),
    Column("peer", "peer", "", "", 15),
    Column("peer_us", "time", "us", ".1f", 11),
    Column("speedup", "speedup", "", ".2f", 8),
)
_DEADLINE_S = 600.0


def run(
    transport: str,
    ranks: Sequence[int],
    sizes: Sequence[int],
    against: Sequence[str],
    repeats: int = 9,
    seconds: float = 0.2,
) -> tuple[dict[str, object], list[dict[str, Any]]]:
    """Measure, print the table as it grows, return (environment, rows).

    One row for each (ranks, size, peer); without peers one for each (ranks, size). seconds: about
    how long each method runs in each repeat. spread: (max - min) / median of our repeats.
    """
    unknown = [peer for peer in against if peer not in PEERS]
    if unknown:
        raise ArgumentError(
            f"bench exchange: unknown peer {unknown[0]!r}; choose of {', '.join(PEERS)}"
        )
    odd = [size for size in sizes if size % 4]
    if odd:
        raise ArgumentError(f"bench exchange: {odd[0]} bytes are no whole number of float32")
    if min(ranks) < 2:
        raise ArgumentError("bench exchange: an exchange needs at least 2 ranks")
    library = lib.load()
    facts = environment(".".join(map(str, library.version)), library.path)
    facts["transport"] = transport
    table = Table(COLUMNS)
    table.header(f"ucxgossip bench exchange, float32, {repeats} repeats, medians", facts)
    rows: list[dict[str, Any]] = []

    def take(line: str) -> None:
        if line.startswith("{"):
            row = json.loads(line)
            table.row(row)
            rows.append(row)

    for count in ranks:
        run_ranks(
            ["-m", "ucxgossip.bench.exchange", "--transport", transport]
            + ["--sizes", ",".join(map(str, sizes)), "--against", ",".join(against)]
            + ["--repeats", str(repeats), "--seconds", str(seconds)],
            count,
            on_line=take,
            deadline_s=_DEADLINE_S * len(sizes),
        )
    expected = len(ranks) * len(sizes) * max(1, len(against))
    if len(rows) != expected:
        raise BenchError(f"bench exchange: {len(rows)} rows where {expected} were due")
    return facts, rows


class _Job:
    """One rank of the job: all methods of one size, measured in turn."""

    def __init__(self, group: Any, repeats: int, seconds: float) -> None:
        import torch.distributed as dist

        self.group, self.repeats, self.seconds, self.dist = group, repeats, seconds, dist

    def _slowest(self, value: float) -> float:
        """The largest of all ranks' values."""
        import torch

        tensor = torch.tensor([value], dtype=torch.float64)
        self.dist.all_reduce(tensor, op=self.dist.ReduceOp.MAX)
        return float(tensor[0])

    def _block(self, once: Callable[[], object], rounds: int) -> tuple[float, list[float]]:
        """Mean seconds a round of the slowest rank, and this rank's single rounds."""
        self.dist.barrier()
        times = []
        begun = before = time.perf_counter()
        for _ in range(rounds):
            once()
            now = time.perf_counter()
            times.append(now - before)
            before = now
        return self._slowest((before - begun) / rounds), times

    def measure(self, methods: dict[str, Callable[[], object]]) -> dict[str, dict[str, float]]:
        """Median and p99 (us) and spread (%) of each method, blocks in turn."""
        rounds = {}
        for name, once in methods.items():
            self._block(once, 3)
            rounds[name] = max(2, min(20000, round(self.seconds / self._block(once, 3)[0])))
        blocks: dict[str, list[float]] = {name: [] for name in methods}
        singles: dict[str, list[float]] = {name: [] for name in methods}
        for _ in range(self.repeats):
            for name, once in methods.items():
                block, times = self._block(once, rounds[name])
                blocks[name].append(block)
                singles[name] += times
        return {
            name: {
                "us": median(times) * 1e6,
                "p99_us": summarize(singles[name]).p99_us,
                "spread": 100 * (max(times) - min(times)) / median(times),
            }
            for name, times in blocks.items()
        }


def main() -> None:
    """One rank, started by `run`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--transport")
    parser.add_argument("--sizes")
    parser.add_argument("--against")
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--seconds", type=float)
    options = parser.parse_args()
    from ucxgossip.bench.gloo import GlooAllreduce, GlooGossip, gloo_job
    from ucxgossip.group import join

    peers = {each.name: each for each in (GlooAllreduce, GlooGossip)}
    chosen = [name for name in options.against.split(",") if name]
    with join(transport=options.transport) as group, gloo_job(_DEADLINE_S):
        job = _Job(group, options.repeats, options.seconds)
        for nbytes in map(int, options.sizes.split(",")):
            array = np.full(nbytes // 4, float(group.rank), np.float32)
            mailbox = group.mailbox(nbytes)

            def ours(array: Any = array, mailbox: Any = mailbox) -> None:
                group.exchange(array, mailbox=mailbox)

            methods: dict[str, Callable[[], object]] = {"ours": ours}
            methods |= {name: peers[name](nbytes).once for name in chosen}
            result = job.measure(methods)
            if not np.isfinite(array).all() or not 0 <= array[0] <= group.size:
                raise BenchError(f"the exchange of {nbytes} bytes gave wrong values")
            if os.environ["RANK"] == "0":
                for name in chosen or [""]:
                    row = {
                        "bench": "exchange",
                        "transport": options.transport,
                        "ranks": group.size,
                        "bytes": nbytes,
                        "ours_us": result["ours"]["us"],
                        "ours_p99_us": result["ours"]["p99_us"],
                        "spread": result["ours"]["spread"],
                        "peer": name or None,
                        "peer_us": result[name]["us"] if name else None,
                        "speedup": result[name]["us"] / result["ours"]["us"] if name else None,
                    }
                    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
