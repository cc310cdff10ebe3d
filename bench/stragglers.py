"""`ucxgossip bench stragglers`: what one slow rank costs the others, by method.

Every rank is a process that trains a real model under a real hook; only the length of the compute
is made up. Each step begins with a pause on a timer, `--compute` milliseconds, on the slow rank
`--slow` times that: a slow device beside others, without taking their cores, which computing for
longer on a shared machine would. Blocks of steps of all methods, with the slow rank and without,
are run in turn in the same processes; every method has two replicas, one for each, so that the
accuracies reached can be compared as well.

Ranks that wait for each other make the same number of steps. Under push-sum nobody waits, and the
slow rank makes as many as it can in the others' time: 1 in `--slow`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from ucxgossip.bench.arguments import at_least_one
from ucxgossip.bench.environment import environment
from ucxgossip.bench.methods import parse
from ucxgossip.bench.spawn import run_ranks
from ucxgossip.bench.table import Column, Table
from ucxgossip.errors import ArgumentError, BenchError

METHODS = "allreduce,gossip-both-atc,gossip-weights-atc,gossip-weights-atc+stale2,gossip-push_sum"
COLUMNS = (
    Column("method", "method", "", "", 28),
    Column("step_ms", "even", "ms", ".1f", 8),
    Column("slowed_ms", "slowed", "ms", ".1f", 8),
    Column("cost_percent", "cost", "%", ".1f", 8),
    Column("cost_low", "least", "%", ".1f", 8),
    Column("cost_high", "most", "%", ".1f", 8),
    Column("accuracy", "even", "% right", ".1f", 8),
    Column("slowed_accuracy", "slowed", "% right", ".1f", 8),
    Column("slow_accuracy", "slow one", "% right", ".1f", 9),
    Column("slow_mass", "its mass", "", ".2f", 9),
    Column("skipped", "skipped", "%", ".0f", 8),
)
_START_S = 120.0
_OVERHEAD_MS = 200.0
"""Beside the compute of a step, generously: for the deadline only."""


def run(
    transport: str,
    ranks: int,
    slow: float,
    methods: Sequence[str],
    compute_ms: float = 20.0,
    steps: int = 40,
    repeats: int = 5,
) -> tuple[dict[str, object], list[dict[str, Any]]]:
    """Print the table, return (environment, rows): one row a method.

    A row's costs are of the ranks that are not slow: their time a step with the slow rank over
    that without it, in percent more, for each repeat; median, least and most of those.
    """
    from ucxgossip.ucp import lib

    _check(ranks, slow, methods, compute_ms, steps, repeats)
    library = lib.load()
    facts = environment(".".join(map(str, library.version)), library.path)
    facts |= {"transport": transport, "ranks": ranks, "slow": slow, "compute_ms": compute_ms}
    facts |= {"steps": steps, "repeats": repeats}
    table = Table(COLUMNS)
    table.header(f"ucxgossip bench stragglers: {ranks} ranks, one {slow:g} times slower", facts)
    job = {
        "transport": transport,
        "slow": slow,
        "methods": list(methods),
        "compute_ms": compute_ms,
        "steps": steps,
        "repeats": repeats,
    }
    rows: list[dict[str, Any]] = []

    def take(line: str) -> None:
        if line.startswith("{"):
            rows.append(make_row(json.loads(line), ranks, slow, transport))
            table.row(rows[-1])

    blocks = repeats * len(methods) * steps * 1e-3
    with tempfile.TemporaryDirectory(prefix="ucxgossip-stragglers-") as folder:
        path = Path(folder) / "job.json"
        path.write_text(json.dumps(job))
        run_ranks(
            ["-m", "ucxgossip.bench.straggler_rank", str(path)],
            ranks,
            on_line=take,
            deadline_s=_START_S + blocks * (compute_ms * (1 + slow) + 2 * _OVERHEAD_MS),
        )
    if len(rows) != len(methods):
        raise BenchError(f"bench stragglers: {len(rows)} rows where {len(methods)} were due")
    return facts, rows


def _check(
    ranks: int, slow: float, methods: Sequence[str], compute_ms: float, steps: int, repeats: int
) -> None:
    """`ArgumentError` for what cannot be measured."""
    if ranks < 2:
        raise ArgumentError(f"bench stragglers: {ranks} ranks; at least 2, one of them slow")
    if not 1 <= slow < float("inf"):
        raise ArgumentError(f"bench stragglers: slow is {slow:g}; a factor from 1 on")
    if not 0 < compute_ms < float("inf"):
        raise ArgumentError(f"bench stragglers: compute is {compute_ms:g} ms; must be positive")
    at_least_one("bench stragglers", steps=steps, repeats=repeats)
    if not methods or len(set(methods)) != len(methods):
        raise ArgumentError("bench stragglers: name at least one method, and none twice")
    for name in methods:
        if parse(name).simulated_only:
            raise ArgumentError(f"bench stragglers: method {name!r} exists in simulation only")


def make_row(found: dict[str, Any], ranks: int, slow: float, transport: str) -> dict[str, Any]:
    """A row out of what the ranks found: step times by repeat, and by condition the rest."""
    even, slowed = found["even"], found["slowed"]
    costs = [
        100 * (with_ms / without_ms - 1)
        for without_ms, with_ms in zip(even["step_ms"], slowed["step_ms"], strict=True)
    ]
    return {
        "bench": "stragglers",
        "transport": transport,
        "ranks": ranks,
        "slow": slow,
        "method": found["method"],
        "step_ms": median(even["step_ms"]),
        "slowed_ms": median(slowed["step_ms"]),
        "cost_percent": median(costs),
        "cost_low": min(costs),
        "cost_high": max(costs),
        "accuracy": median(even["accuracies"][:-1]),
        "slowed_accuracy": median(slowed["accuracies"][:-1]),
        "slow_accuracy": slowed["accuracies"][-1],
        "slow_mass": slowed["mass"],
        "skipped": slowed["skipped"],
    }
