"""Exact operations over all ranks: the first weights, the mean, the distance of the replicas.

In O(log p) rounds through a small mailbox of their own, piece by piece: not for each step. A
collective of another library was rejected: it would need a second set of connections.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ucxgossip.buffer import Buffer
from ucxgossip.group import Group
from ucxgossip.mailbox import Mailbox
from ucxgossip.schedule import Broadcast, GlobalAverage, Schedule

PIECE = 1 << 22
"""Bytes that `Collective` moves at a time; its mailbox holds two such pieces."""


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

    def table(self, row: NDArray[np.int64]) -> NDArray[np.int64]:
        """Every rank's 1-D `row` of whole numbers below 2**40, shape (ranks, len(row))."""
        values = np.zeros((self.group.size, len(row)), np.float64)
        values[self.group.rank] = row
        flat = values.reshape(-1)
        self.average(flat)
        return np.rint(values * self.group.size).astype(np.int64)

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
