"""Schedules that end, exactly: `Broadcast`, `GlobalAverage`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ucxgossip.errors import ScheduleError
from ucxgossip.schedule.base import ALONE, Round, check_place, check_size, rounds_to_reach


@dataclass(frozen=True)
class Broadcast:
    """Rank `root`'s values to all in ceil(log2 size) steps, by a binomial tree.

    In step k the ranks less than ``2**k`` after the root, who hold the values, put them ``2**k``
    further. The weight is 1: what is received replaces what was there.
    """

    size: int
    root: int = 0
    repeats: ClassVar[bool] = False
    endless: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_size("Broadcast", self.size)
        if type(self.root) is not int or not 0 <= self.root < self.size:
            raise ScheduleError(f"Broadcast: no rank {self.root!r}; ranks are 0 to {self.size - 1}")

    @property
    def period(self) -> int:
        """ceil(log2 size) steps."""
        return rounds_to_reach(self.size)

    def round(self, rank: int, step: int) -> Round:
        """The part of `rank` in `step`; alone from step `period` on."""
        check_place(self, rank, step)
        if step >= self.period:
            return ALONE
        place, distance = (rank - self.root) % self.size, 1 << step
        if place < distance and place + distance < self.size:
            return Round((rank + distance) % self.size, None)
        if distance <= place < 2 * distance:
            return Round(None, (rank - distance) % self.size, 1.0)
        return ALONE

    def describe(self) -> str:
        """``Broadcast(8, root=0)``."""
        return f"Broadcast({self.size}, root={self.root})"


@dataclass(frozen=True)
class GlobalAverage:
    """The exact mean of all ranks, on all ranks, for every size.

    Recursive doubling over the largest power of two, P; the other ranks first fold their values
    into a partner, which then counts twice, and last take the mean from it (Thakur, Rabenseifner,
    Gropp 2005, section 4.5). log2 P steps, and two more where `size` is no power of two.
    """

    size: int
    repeats: ClassVar[bool] = False
    endless: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_size("GlobalAverage", self.size)

    @property
    def _doublings(self) -> int:
        return self.size.bit_length() - 1

    @property
    def _extra(self) -> int:
        return self.size - (1 << self._doublings)

    @property
    def period(self) -> int:
        """Steps until the mean is exact."""
        return max(1, self._doublings + (2 if self._extra else 0))

    def _count(self, place: int, step: int) -> int:
        """How many ranks' values `place` has averaged before doubling step `step`."""
        first = place >> step << step
        block = range(first, first + (1 << step))
        return len(block) + sum(1 for member in block if member < self._extra)

    def round(self, rank: int, step: int) -> Round:
        """The part of `rank` in `step`; alone from step `period` on."""
        check_place(self, rank, step)
        power, doubling = 1 << self._doublings, step - (1 if self._extra else 0)
        if doubling == -1:
            return self._fold(rank, power)
        if doubling < self._doublings:
            if rank >= power:
                return ALONE
            partner = rank ^ (1 << doubling)
            own, other = self._count(rank, doubling), self._count(partner, doubling)
            return Round(partner, partner, other / (own + other))
        if doubling == self._doublings and self._extra:
            return self._unfold(rank, power)
        return ALONE

    def _fold(self, rank: int, power: int) -> Round:
        if rank >= power:
            return Round(rank - power, None)
        return Round(None, rank + power) if rank < self._extra else ALONE

    def _unfold(self, rank: int, power: int) -> Round:
        if rank >= power:
            return Round(None, rank - power, 1.0)
        return Round(rank + power, None) if rank < self._extra else ALONE

    def describe(self) -> str:
        """``GlobalAverage(6)``."""
        return f"GlobalAverage({self.size})"
