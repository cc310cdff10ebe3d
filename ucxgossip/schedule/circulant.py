"""Every rank puts the same distance further: `Dissemination`, `Ring`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ucxgossip.schedule.base import (
    ALONE,
    Round,
    Rounds,
    check_place,
    check_size,
    rounds_to_reach,
    shifted,
)


@dataclass(frozen=True)
class Dissemination:
    """Put to the rank ``2**k`` further, receive from the one ``2**k`` back, k = step mod period.

    After ceil(log2 size) steps every rank holds a mean of all: the exact mean where `size` is a
    power of two, a positive combination otherwise. GossipGraD (arXiv 1803.05880), section 4;
    Hensgen, Finkel, Manber 1988.
    """

    size: int
    repeats: ClassVar[bool] = True
    endless: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_size("Dissemination", self.size)

    @property
    def period(self) -> int:
        """ceil(log2 size) steps."""
        return rounds_to_reach(self.size)

    def round(self, rank: int, step: int) -> Round:
        """The part of `rank` in `step`; alone where there is one rank."""
        check_place(self, rank, step)
        if self.size == 1:
            return ALONE
        distance = 1 << (step % self.period)
        return Round((rank + distance) % self.size, (rank - distance) % self.size)

    def rounds(self, ranks: NDArray[np.int64], steps: NDArray[np.int64]) -> Rounds:
        """As `schedule.many`."""
        period = self.period
        return shifted(self.size, ranks, 1 << (steps - steps // period * period))

    def describe(self) -> str:
        """``Dissemination(8)``."""
        return f"Dissemination({self.size})"


@dataclass(frozen=True)
class Ring:
    """Put to the next rank, receive from the one before, in every step.

    Each rank has the same two neighbours for ever, which is kind to a network that is a ring and
    slow everywhere else: values of one rank need ``size - 1`` steps to reach all, and the mean is
    exact for one and two ranks only.
    """

    size: int
    repeats: ClassVar[bool] = True
    endless: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_size("Ring", self.size)

    @property
    def period(self) -> int:
        """``size - 1`` steps, after which what a rank knows has reached all; at least 1."""
        return max(1, self.size - 1)

    def round(self, rank: int, step: int) -> Round:
        """The part of `rank` in `step`; alone where there is one rank."""
        check_place(self, rank, step)
        if self.size == 1:
            return ALONE
        return Round((rank + 1) % self.size, (rank - 1) % self.size)

    def rounds(self, ranks: NDArray[np.int64], steps: NDArray[np.int64]) -> Rounds:
        """As `schedule.many`."""
        return shifted(self.size, ranks, 1)

    def describe(self) -> str:
        """``Ring(8)``."""
        return f"Ring({self.size})"
