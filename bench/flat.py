"""`ucxgossip bench flat`: the time of an exchange against the number of ranks, on equal links.

One partner a step, whatever the number of ranks, should take the same time on 2 ranks as on 8.
Ranks that share two cores cannot show it: all their copies go through the same memory. Here each
rank has a link of its own, shaped to a rate at which the cores have time to spare (`network`), so
that a round takes what the busiest link takes. An all-reduce around a ring sends and receives
``2 (p - 1) / p`` payloads over each link: once the payload on 2 ranks, 1.75 times on 8.

A row's `ours_idle` and `allreduce_idle` say which share of all cores was idle during the blocks:
where that nears nothing, the cores and not the links were measured. `wire_us` is the payload's
time at the rate, without headers (with them, some 5 % more). Each number of ranks is a job of its
own, as its users would have it, so growth compares figures minutes apart; within a row ours and
all-reduce take turns.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ucxgossip.bench.arguments import at_least_one, positive
from ucxgossip.bench.network import MOST_RANKS, Network, bits_per_second
from ucxgossip.bench.network import check as check_network
from ucxgossip.bench.plot import check as check_plot
from ucxgossip.bench.report import Report
from ucxgossip.bench.spawn import run_ranks
from ucxgossip.bench.table import Column
from ucxgossip.errors import ArgumentError, BenchError

COLUMNS = (
    Column("bytes", "size", "B", "d", 11),
    Column("ranks", "ranks", "", "d", 5),
    Column("wire_us", "at rate", "us", ".0f", 10),
    Column("ours_us", "ours", "us", ".0f", 10),
    Column("ours_growth", "growth", "", ".2f", 7),
    Column("ours_spread", "spread", "%", ".0f", 6),
    Column("ours_idle", "idle", "%", ".0f", 5),
    Column("allreduce_us", "allreduce", "us", ".0f", 10),
    Column("allreduce_growth", "growth", "", ".2f", 7),
    Column("allreduce_spread", "spread", "%", ".0f", 6),
    Column("allreduce_idle", "idle", "%", ".0f", 5),
)
_START_S = 180.0
_ROUNDS_AT_LEAST = 8
"""Rounds of a method before its first repeat, and some."""
_SLACK = 20.0
"""How many times as long as at the rate a round may take, for the deadline only."""

Row = dict[str, Any]


def run(
    ranks: Sequence[int],
    sizes: Sequence[int],
    rate: str = "200mbit",
    repeats: int = 7,
    seconds: float = 1.0,
    plot: str | None = None,
    keep_windows: bool = False,
    congestion: str | None = None,
) -> tuple[dict[str, object], list[Row]]:
    """Measure, print the table as it grows, return (environment, rows): one for (ranks, size).

    keep_windows, congestion: as for `Network`.
    """
    _check(ranks, sizes, repeats, seconds)
    bits = bits_per_second(rate)
    if plot is not None:
        check_plot("bench flat", plot)
    check_network(congestion)
    facts: dict[str, object] = {"transport": "tcp", "rate": rate, "keep_windows": keep_windows}
    facts |= {"repeats": repeats, "seconds": seconds}
    if congestion is not None:
        facts["tcp_congestion_control"] = congestion
    report = Report("bench flat: one round on links of one rate, float32, medians", COLUMNS, facts)

    def take(line: str) -> None:
        found = report.take(line)
        if found is not None:
            report.row(make_row(found, rate, report.rows))

    job = {"sizes": list(sizes), "repeats": repeats, "seconds": seconds}
    wire_s = sum(8 * size / bits for size in sizes)
    rounds_s = 2 * (repeats + 1) * (seconds * len(sizes) + _ROUNDS_AT_LEAST * _SLACK * wire_s)
    with (
        Network(max(ranks), rate, keep_windows, congestion) as network,
        tempfile.TemporaryDirectory(prefix="ucxgossip-flat-") as folder,
    ):
        path = Path(folder) / "job.json"
        path.write_text(json.dumps(job))
        for count in sorted(ranks):
            run_ranks(
                ["-m", "ucxgossip.bench.flat_rank", str(path)],
                count,
                on_line=take,
                deadline_s=_START_S + rounds_s,
                variables=network.variables,
                through=network.command,
            )
    due = len(ranks) * len(sizes)
    if len(report.rows) != due:
        raise BenchError(f"bench flat: {len(report.rows)} rows where {due} were due")
    if plot is not None:
        draw(report.rows, plot)
    return report.facts, report.rows


def _check(ranks: Sequence[int], sizes: Sequence[int], repeats: int, seconds: float) -> None:
    """`ArgumentError` for what cannot be measured."""
    if not ranks or min(ranks) < 2 or max(ranks) > MOST_RANKS or len(set(ranks)) != len(ranks):
        raise ArgumentError(
            f"bench flat: ranks are {list(ranks)}; different numbers from 2 to {MOST_RANKS}"
        )
    odd = [size for size in sizes if size < 4 or size % 4]
    if odd or not sizes or len(set(sizes)) != len(sizes):
        raise ArgumentError(
            f"bench flat: sizes are {list(sizes)} bytes; different whole numbers of float32"
        )
    at_least_one("bench flat", repeats=repeats)
    positive("bench flat", seconds=seconds)


def make_row(found: Row, rate: str, before: Sequence[Row]) -> Row:
    """A row out of what the ranks found; grown since the first row of its size, if there is one."""
    first = next((row for row in before if row["bytes"] == found["bytes"]), found)
    growth = {
        f"{name}_growth": found[f"{name}_us"] / first[f"{name}_us"]
        for name in ("ours", "allreduce")
    }
    wire_us = 8e6 * found["bytes"] / bits_per_second(rate)
    return {"bench": "flat", "rate": rate, "wire_us": wire_us, **found, **growth}


def draw(rows: Sequence[Row], path: str) -> None:
    """Write a PNG: a panel a size, time over ranks for ours, all-reduce and the bare link."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sizes = list(dict.fromkeys(row["bytes"] for row in rows))
    figure, panels = plt.subplots(
        1, len(sizes), figsize=(4.6 * len(sizes), 3.6), layout="constrained", squeeze=False
    )
    for panel, size in zip(panels[0], sizes, strict=True):
        chosen = [row for row in rows if row["bytes"] == size]
        ranks = [row["ranks"] for row in chosen]
        for key, label, style in (
            ("ours_us", "gossip exchange", "o-"),
            ("allreduce_us", "all-reduce (gloo)", "s-"),
            ("wire_us", "payload at the link's rate", ":"),
        ):
            panel.plot(ranks, [row[key] / 1e3 for row in chosen], style, label=label)
        panel.set_xscale("log", base=2)
        panel.set_xticks(ranks, [str(count) for count in ranks])
        panel.set_ylim(bottom=0)
        panel.set_xlabel("ranks")
        panel.set_ylabel("time of a round (ms)")
        panel.set_title(f"{size / 1e6:g} MB, links of {chosen[0]['rate']}")
        panel.legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
