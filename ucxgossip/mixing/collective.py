"""Exact operations over all ranks: the first weights, the mean, the distance of the replicas.

In O(log p) rounds through a small mailbox of their own, piece by piece: not for each step. A
collective of another library was rejected: it would need a second set of connections.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ucxgossip.buffer import Buffer
from ucxgossip.group import Group
from ucxgossip.mailbox import Mailbox
from ucxgossip.quarantine import Quarantine
from ucxgossip.schedule import Broadcast, GlobalAverage, Schedule

PIECE = 1 << 22
"""Bytes that `Collective` moves at a time; its mailbox holds two such pieces."""

_ROUNDING = 1e-9


class Collective:
    """Exact operations over all ranks, each rank's arrays of the same shapes. All collective.

    quarantine: what `average` does about values that are not finite; mixed by default.
    """

    def __init__(self, group: Group, quarantine: Quarantine | None = None) -> None:
        self.group, self.quarantine = group, quarantine or Quarantine("allow")
        self._mailbox: Mailbox | None = None
        # Made once: the group keeps what it has laid over its members, by schedule.
        self._everyone = GlobalAverage(group.size)
        self._from: dict[int, Broadcast] = {}

    def _run(self, array: NDArray[Any], schedule: Callable[[], Schedule], mix: bool) -> int:
        """Run `schedule` on the array, from the start again where members are lost meanwhile.

        How many members took part.
        """
        if self.group.size == 1:
            return 1
        before = array.copy()
        count = 0

        def operation(epoch: int) -> bool:
            nonlocal count
            count = len(self.group.members)  # those of `epoch`, or nothing is run
            return self._once(array, schedule(), mix, epoch)

        def undo() -> None:
            array[:] = before

        self.open()
        self.group.together(operation, undo)
        return count

    def open(self) -> Mailbox:
        """The mailbox, made at the first call. Collective then."""
        if self._mailbox is None:
            self._mailbox = self.group.mailbox(PIECE)
        return self._mailbox

    def give_back(self) -> None:
        """Others may have the mailbox; the next call makes one again."""
        if self._mailbox is not None:
            self.group.give_back(self._mailbox)
            self._mailbox = None

    def _once(self, array: NDArray[Any], schedule: Schedule, mix: bool, epoch: int) -> bool:
        """Run `schedule` on the array in `epoch`; whether all its rounds ended there."""
        mailbox, step = self.open(), PIECE // array.itemsize
        return all(
            self.group.run(mailbox, Buffer.of(array[start : start + step]), schedule, mix, epoch)
            for start in range(0, len(array), step)
        )

    def broadcast(self, array: NDArray[Any], root: int = 0) -> None:
        """`root`'s values into everyone's 1-D contiguous `array`, of any dtype.

        Those of the lowest member where `root` is lost.
        """

        def schedule() -> Schedule:
            members = self.group.members
            first = root if root in members else members[0]
            return self._from.setdefault(first, Broadcast(self.group.size, first))

        self._run(array, schedule, mix=False)

    def mean(self, array: NDArray[Any]) -> int:
        """The mean over all ranks into the array, whatever it holds; how many ranks took part."""
        return self._run(array, lambda: self._everyone, mix=True)

    def average(self, array: NDArray[Any], mass: float = 1.0) -> None:
        """The mean over all ranks into everyone's 1-D contiguous float array, to rounding.

        mass: this rank's weight in it. In quarantine a rank whose array holds a NaN or an infinity
        counts nothing and gets the mean of the others; where no rank is left, arrays stay. With
        the policy ``"raise"`` such a rank raises `NonFiniteError` afterwards.
        """
        if self.group.size == 1:
            return
        values = array.copy()  # an array whose mean broke off is as it was
        left_out = self.quarantine.whole and not np.isfinite(array).all()
        if left_out:
            mass = 0.0
            values[:] = 0
        elif mass != 1.0:
            values *= array.dtype.type(mass)
        share = np.array([mass])
        self.mean(share)
        self.mean(values)
        if abs(share[0] - 1.0) > _ROUNDING and share[0] != 0:
            values /= array.dtype.type(share[0])
        if share[0] != 0 or not left_out:
            array[:] = values
        if left_out:
            here = self.group.rank
            self.quarantine.left_out(here, {here: 1}, "part of a mean over all ranks")

    def table(self, row: NDArray[np.int64]) -> NDArray[np.int64]:
        """Every rank's 1-D `row` of whole numbers below 2**40, shape (ranks, len(row)).

        The rows of ranks that are no members are zero.
        """
        values = self._with_row(row)
        count = self.mean(values.reshape(-1))
        return np.rint(values * count).astype(np.int64)

    def table_within(self, row: NDArray[np.int64], epoch: int) -> NDArray[np.int64] | None:
        """As `table`, within an operation of `Group.together`; None where `epoch` ends before."""
        values, count = self._with_row(row), len(self.group.members)
        if not self._once(values.reshape(-1), self._everyone, True, epoch):
            return None
        return np.rint(values * count).astype(np.int64)

    def _with_row(self, row: NDArray[np.int64]) -> NDArray[np.float64]:
        values = np.zeros((self.group.size, len(row)), np.float64)
        values[self.group.rank] = row
        return values

    def consensus_distance(self, arrays: Iterable[NDArray[Any]]) -> float:
        """``sqrt(mean_i |w_i - w|**2) / |w|`` with w the mean over ranks i; 0 where w is 0.

        NaN where a rank's values are not finite, whatever the quarantine.
        """
        apart, norm = 0.0, 0.0
        for array in arrays:
            mean = array.copy()
            self.mean(mean)
            with np.errstate(invalid="ignore"):
                difference = (array - mean).astype(np.float64)
            apart += float(difference @ difference)
            mean = mean.astype(np.float64)
            norm += float(mean @ mean)
        spread = np.array([apart])
        self.mean(spread)
        if not math.isfinite(norm):
            return math.nan
        return math.sqrt(float(spread[0]) / norm) if norm > 0 else 0.0
