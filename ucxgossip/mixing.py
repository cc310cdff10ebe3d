"""What an exchange does to values: which payloads travel, and exact operations over all ranks.

Averaging gradients alone does not train (the replicas drift apart); averaging the new weights
does; averaging both is what skewed data and Adam need. So `MIXES` names payloads, and `COMBINES`
when the weights are averaged: ``"atc"``, adapt then combine, ``avg(w - u)``; ``"awc"``, adapt
while communicating, ``avg(w) - u``, whose exchange hides under the whole step.

`Collective` computes what must be exact (the first weights, the mean before an evaluation, the
distance of the replicas) in O(log p) rounds through a small mailbox of its own, piece by piece.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ucxgossip.errors import ArgumentError
from ucxgossip.group import Buffer, Group
from ucxgossip.mailbox import Mailbox
from ucxgossip.schedule import Broadcast, GlobalAverage, Schedule

MIXES: dict[str, tuple[bool, bool]] = {
    "both": (True, True),
    "weights": (True, False),
    "gradients": (False, True),
}
"""(weights travel, gradients travel) by name."""

COMBINES = ("atc", "awc")

PIECE = 1 << 22
"""Bytes that `Collective` moves at a time; its mailbox holds two such pieces."""


def check_modes(mix: str, combine: str) -> None:
    """`ArgumentError` for an unknown mix or combine."""
    for name, value, known in (("mix", mix, tuple(MIXES)), ("combine", combine, COMBINES)):
        if value not in known:
            choices = ", ".join(repr(each) for each in known)
            raise ArgumentError(f"unknown {name} {value!r}; choose one of {choices}")


class Collective:
    """Exact operations over all ranks, each rank's arrays of the same shapes. All collective."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self._mailbox: Mailbox | None = None

    def _run(self, array: NDArray[Any], schedule: Schedule, mix: bool) -> None:
        if self.group.size == 1:
            return
        if self._mailbox is None:
            self._mailbox = self.group.mailbox(PIECE)
        step = PIECE // array.itemsize
        for start in range(0, len(array), step):
            piece = Buffer.of(array[start : start + step])
            self.group.run(self._mailbox, piece, schedule, mix)

    def broadcast(self, array: NDArray[Any], root: int = 0) -> None:
        """`root`'s values into everyone's 1-D contiguous `array`, of any dtype."""
        self._run(array, Broadcast(self.group.size, root), mix=False)

    def average(self, array: NDArray[Any]) -> None:
        """The mean over all ranks into everyone's 1-D contiguous float array, to rounding."""
        self._run(array, GlobalAverage(self.group.size), mix=True)

    def consensus_distance(self, arrays: Iterable[NDArray[Any]]) -> float:
        """``sqrt(mean_i |w_i - w|**2) / |w|`` with w the mean over ranks i; 0 where w is 0."""
        apart, norm = 0.0, 0.0
        for array in arrays:
            mean = array.copy()
            self.average(mean)
            difference = (array - mean).astype(np.float64)
            apart += float(difference @ difference)
            mean = mean.astype(np.float64)
            norm += float(mean @ mean)
        spread = np.array([apart])
        self.average(spread)
        return math.sqrt(float(spread[0]) / norm) if norm > 0 else 0.0
