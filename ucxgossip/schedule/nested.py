"""Schedules made of others: `Hierarchical`, `Strided`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import gcd

from ucxgossip.schedule.base import (
    ALONE,
    Round,
    Schedule,
    check_inner,
    check_place,
    check_whole,
    endless,
    repeats,
)
from ucxgossip.schedule.circulant import Dissemination
from ucxgossip.schedule.pairs import BaseTwo


@dataclass(frozen=True)
class Hierarchical:
    """First a period within each node, over fast links, then one of `inner` between nodes.

    local_size: ranks of a node; they are consecutive, as torchrun numbers them. `inner` is over
    nodes, and pairs ranks of equal place. Within a node all ranks get their exact mean: by
    `Dissemination` where `local_size` is a power of two, else by `BaseTwo`. A level of one rank
    takes no steps.

    The steps of `inner` are counted without those within nodes, so that a `Rotated` one draws new
    partners once a period of the whole, and never in mid-period.
    """

    local_size: int
    inner: Schedule

    def __post_init__(self) -> None:
        check_whole("Hierarchical", "local_size", self.local_size, 1)
        check_inner("Hierarchical", self.inner)

    @cached_property
    def local(self) -> Schedule:
        """The schedule within a node."""
        odd = self.local_size & (self.local_size - 1)
        return BaseTwo(self.local_size) if odd else Dissemination(self.local_size)

    @cached_property
    def _steps(self) -> tuple[int, int]:
        """Steps of a period within nodes and between them."""
        within = self.local.period if self.local_size > 1 else 0
        return within, self.inner.period if self.inner.size > 1 or not within else 0

    @property
    def size(self) -> int:
        """Number of ranks: of a node times nodes."""
        return self.local_size * self.inner.size

    @property
    def period(self) -> int:
        """A period within nodes and one of `inner`."""
        return sum(self._steps)

    @property
    def repeats(self) -> bool:
        """Whether `inner` does."""
        return repeats(self.inner)

    @property
    def endless(self) -> bool:
        """Whether `inner` goes on for ever; else this ends with its first period."""
        return endless(self.inner)

    def round(self, rank: int, step: int) -> Round:
        """The part of `rank` in `step`: within its node, or between nodes."""
        check_place(self, rank, step)
        within, between = self._steps
        turn, step = divmod(step, within + between)
        if turn and not self.endless:
            return ALONE
        node, place = divmod(rank, self.local_size)
        if step < within:
            part, first, stride = self.local.round(place, step), node * self.local_size, 1
        else:
            part = self.inner.round(node, turn * between + step - within)
            first, stride = place, self.local_size
        return Round(
            None if part.to is None else first + stride * part.to,
            None if part.sender is None else first + stride * part.sender,
            part.weight,
        )

    def describe(self) -> str:
        """``Hierarchical(4, Dissemination(2))``."""
        return f"Hierarchical({self.local_size}, {self.inner.describe()})"


@dataclass(frozen=True)
class Strided:
    """Every `stride`-th round of `inner`, from round `start` on.

    For streams that share one schedule between them. A stride that has a factor in common with
    the inner period leaves out some of its rounds for good, so that values may never reach all
    (``Strided(Hypercube(8), 3)`` pairs the same ranks for ever), unless `inner` is rotated; one
    without takes all of them, in another order, which `BaseTwo` does not stay exact in.
    """

    inner: Schedule
    stride: int = 1
    start: int = 0

    def __post_init__(self) -> None:
        check_inner("Strided", self.inner)
        check_whole("Strided", "stride", self.stride, 1)
        check_whole("Strided", "start", self.start, 0)

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.inner.size

    @property
    def period(self) -> int:
        """Steps until the same place in the inner period comes again, P / gcd(P, stride).

        Over a finite schedule: steps until it has ended, at least 1.
        """
        inner = self.inner.period
        if not self.endless:
            return max(1, -((self.start - inner) // self.stride))
        return inner // gcd(inner, self.stride)

    @property
    def repeats(self) -> bool:
        """Whether `inner` does."""
        return repeats(self.inner)

    @property
    def endless(self) -> bool:
        """Whether `inner` goes on for ever."""
        return endless(self.inner)

    def round(self, rank: int, step: int) -> Round:
        """The part of `rank` in step ``start + stride * step`` of `inner`."""
        check_place(self, rank, step)
        return self.inner.round(rank, self.start + self.stride * step)

    def describe(self) -> str:
        """``Strided(Dissemination(8), stride=2, start=0)``."""
        return f"Strided({self.inner.describe()}, stride={self.stride}, start={self.start})"
