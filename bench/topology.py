"""How fast schedules mix, computed and not measured: ``ucxgossip schedules``.

A round is a matrix that takes what the ranks hold to what they hold after it; a period is the
product of its rounds. Contraction is how much of the distance to the mean of all is left after a
period in the worst case: the largest singular value of that product once the mean is taken off.
0 is exact agreement, 1 none at all.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ucxgossip.bench.table import Column, Table
from ucxgossip.errors import ArgumentError
from ucxgossip.schedule import (
    BaseTwo,
    Dissemination,
    Hierarchical,
    Hypercube,
    RandomMatching,
    Ring,
    Rotated,
    Schedule,
    repeats,
)

EXACT = 1e-9
"""Most that one period's product may deviate from the mean of all, and be called exact."""

PERIODS = 20
"""Periods looked at of a schedule that does not repeat."""

NODE = 4
"""Ranks of a node in the hierarchical rows."""

MOST_RANKS = 1024

COLUMNS = (
    Column("schedule", "schedule", "", "", 53),
    Column("ranks", "ranks", "", "d", 7),
    Column("period", "period", "steps", "d", 8),
    Column("exact", "exact", "", "", 7),
    Column("contraction", "contraction", "a period", ".3f", 12),
    Column("contraction_per_step", "contraction", "a step", ".4f", 12),
)


def schedules(ranks: int) -> list[Schedule]:
    """The endless schedules that there are for so many ranks."""
    found: list[Schedule] = [
        Dissemination(ranks),
        Rotated(Dissemination(ranks)),
        BaseTwo(ranks),
        RandomMatching(ranks),
        Ring(ranks),
    ]
    if ranks & (ranks - 1) == 0:
        found.insert(2, Hypercube(ranks))
    nodes, rest = divmod(ranks, NODE)
    if not rest and nodes > 1:
        found.append(Hierarchical(NODE, Rotated(Dissemination(nodes))))
        found.append(Hierarchical(NODE, BaseTwo(nodes)))
    return found


def mix(held: NDArray[np.float64], schedule: Schedule, step: int) -> NDArray[np.float64]:
    """What the ranks (rows) hold after `step`."""
    parts = [schedule.round(rank, step) for rank in range(schedule.size)]
    senders = [rank if part.sender is None else part.sender for rank, part in enumerate(parts)]
    weights = np.array([0.0 if part.sender is None else part.weight for part in parts])[:, None]
    return held + weights * (held[senders] - held)


def left_after(schedule: Schedule, period: int) -> NDArray[np.float64]:
    """The product of the rounds of one period, less the mean of all."""
    held = np.eye(schedule.size) - 1 / schedule.size
    for step in range(period * schedule.period, (period + 1) * schedule.period):
        held = mix(held, schedule, step)
    return held


def measure(schedule: Schedule) -> tuple[bool, float]:
    """Whether every period is exact, and the contraction of a period.

    Where rounds do not repeat, `PERIODS` of them are looked at, and the contraction is the
    geometric mean: the singular value of the product of them all, to its root. It is below that
    of each one, since what one period leaves need not be what the next one leaves.
    """
    periods = 1 if repeats(schedule) else PERIODS
    whole, logarithm, exact = np.eye(schedule.size), 0.0, True
    for period in range(periods):
        left = left_after(schedule, period)
        exact = exact and float(abs(left).max()) < EXACT
        whole = left @ whole
        length = float(np.linalg.norm(whole))
        if length < EXACT * schedule.size:
            whole, logarithm = np.zeros_like(whole), -math.inf
        else:
            whole, logarithm = whole / length, logarithm + math.log(length)
    if logarithm == -math.inf:
        return exact, 0.0
    value = float(np.linalg.norm(whole, 2))
    return exact, math.exp((logarithm + math.log(value)) / periods)


def figures(schedule: Schedule) -> dict[str, object]:
    """One row: whether a period is exact, and the contraction of a period and of a step."""
    exact, factor = measure(schedule)
    return {
        "bench": "schedules",
        "schedule": schedule.describe(),
        "ranks": schedule.size,
        "period": schedule.period,
        "exact": exact,
        "contraction": factor,
        "contraction_per_step": factor ** (1 / schedule.period),
    }


class _Markdown:
    """Prints rows as a table in Markdown."""

    def header(self) -> None:
        units = [f", {column.unit}" if column.unit else "" for column in COLUMNS]
        self._line([column.heading + unit for column, unit in zip(COLUMNS, units, strict=True)])
        self._line(["---:" if column.format else "---" for column in COLUMNS])

    def row(self, values: Mapping[str, object]) -> None:
        self._line([column.text(values.get(column.key)) for column in COLUMNS])

    @staticmethod
    def _line(cells: Sequence[str]) -> None:
        print(f"| {' | '.join(cells)} |", flush=True)


def run(
    ranks: Sequence[int], markdown: bool = False
) -> tuple[dict[str, object], list[dict[str, object]]]:
    """Print and return the table for these numbers of ranks; nothing of it depends on the machine.

    Raises `ArgumentError` for numbers that are not 2 to `MOST_RANKS`.
    """
    for count in ranks:
        if not 2 <= count <= MOST_RANKS:
            raise ArgumentError(f"ranks is {count}; must be 2 to {MOST_RANKS}")
    facts: dict[str, object] = {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "exact": f"within {EXACT:g} of the mean of all after each period",
        "contraction": "largest singular value of a period's product, less the mean; where rounds "
        f"do not repeat, of {PERIODS} periods' product, to its root",
    }
    table = _Markdown() if markdown else Table(COLUMNS)
    if isinstance(table, Table):
        table.header("schedules: distance to the mean of all that is left", facts)
    else:
        table.header()
    rows = []
    for count in ranks:
        for schedule in schedules(count):
            rows.append(figures(schedule))
            table.row({**rows[-1], "exact": "yes" if rows[-1]["exact"] else "no"})
    return facts, rows
