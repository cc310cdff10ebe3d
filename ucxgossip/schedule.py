"""Who exchanges with whom: pure functions of (rank, step).

A schedule maps each rank's step to a `Round`: the rank to put to, the rank to receive from, and
the weight of what is received. Every round is a partial permutation: nobody receives two. All
ranks compute the same schedule from the same arguments; nothing is communicated.

`Dissemination` (with `Rotated` over it) is for training. `Broadcast` and `GlobalAverage` are
finite: they end exactly, after `period` steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from ucxgossip.errors import ScheduleError


@dataclass(frozen=True, slots=True)
class Round:
    """One rank's part in one step.

    to: rank that gets this rank's payload; sender: rank whose payload comes in (either may be
    None). weight: of what is received, ``x += weight * (received - x)``.
    """

    to: int | None
    sender: int | None
    weight: float = 0.5


@runtime_checkable
class Schedule(Protocol):
    """What `attach` and `exchange` take: `size` ranks, rounds that repeat in shape by `period`."""

    @property
    def size(self) -> int:
        """Number of ranks."""

    @property
    def period(self) -> int:
        """Steps after which what a rank knows has reached all; at least 1."""

    def round(self, rank: int, step: int) -> Round:
        """The part of `rank` in `step`."""

    def describe(self) -> str:
        """The schedule as an expression; ranks compare it when they meet."""


ALONE = Round(None, None)

_BLOCK = 64
"""Periods whose shuffles are drawn together: one draw costs 15 us, a step over shared memory 5."""


def _check_size(name: str, size: int) -> None:
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ScheduleError(f"{name}: size is {size!r}; must be a positive whole number of ranks")


def _check_place(schedule: Schedule, rank: int, step: int) -> None:
    if not 0 <= rank < schedule.size:
        raise ScheduleError(f"{schedule.describe()}: no rank {rank}; ranks are 0 to size - 1")
    if step < 0:
        raise ScheduleError(f"{schedule.describe()}: step is {step}; must not be negative")


def _rounds_to_reach(size: int) -> int:
    """ceil(log2 size), and 1 for a single rank."""
    return max(1, (size - 1).bit_length())


@dataclass(frozen=True)
class Dissemination:
    """Put to the rank ``2**k`` further, receive from the one ``2**k`` back, k = step mod period.

    After ceil(log2 size) steps every rank holds a mean of all: the exact mean where `size` is a
    power of two, a positive combination otherwise. GossipGraD (arXiv 1803.05880), section 4;
    Hensgen, Finkel, Manber 1988.
    """

    size: int

    def __post_init__(self) -> None:
        _check_size("Dissemination", self.size)

    @property
    def period(self) -> int:
        """ceil(log2 size) steps."""
        return _rounds_to_reach(self.size)

    def round(self, rank: int, step: int) -> Round:
        """The part of `rank` in `step`; alone where there is one rank."""
        _check_place(self, rank, step)
        if self.size == 1:
            return ALONE
        distance = 1 << (step % self.period)
        return Round((rank + distance) % self.size, (rank - distance) % self.size)

    def describe(self) -> str:
        """``Dissemination(8)``."""
        return f"Dissemination({self.size})"


class Rotated:
    """`inner` over a fresh shuffle of the ranks for each of its periods.

    The shuffle is drawn from `seed` and the period's number, so that it is the same on all ranks,
    and never changes within a period. GossipGraD's partner rotation (arXiv 1803.05880, section 5).
    """

    def __init__(self, inner: Schedule, seed: int = 0) -> None:
        if not isinstance(inner, Schedule):
            raise ScheduleError(f"Rotated: {inner!r} is not a schedule")
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise ScheduleError(f"Rotated: seed is {seed!r}; must be a whole number from 0 on")
        self.inner, self.seed = inner, seed
        self._blocks: dict[int, tuple[list[list[int]], list[list[int]]]] = {}

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.inner.size

    @property
    def period(self) -> int:
        """The inner schedule's period."""
        return self.inner.period

    def _shuffles(self, turn: int) -> tuple[list[int], list[int]]:
        """Which rank stands at each place in period `turn`, and each rank's place."""
        number, index = divmod(turn, _BLOCK)
        if number not in self._blocks:
            if len(self._blocks) > 1:
                del self._blocks[min(self._blocks)]
            places = np.tile(np.arange(self.size), (_BLOCK, 1))
            ranks = np.random.default_rng((self.seed, number)).permuted(places, axis=1)
            self._blocks[number] = ranks.tolist(), np.argsort(ranks, axis=1).tolist()
        ranks_at, places_of = self._blocks[number]
        return ranks_at[index], places_of[index]

    def round(self, rank: int, step: int) -> Round:
        """The part of `rank` in `step`."""
        _check_place(self, rank, step)
        rank_at, place_of = self._shuffles(step // self.period)
        place = self.inner.round(place_of[rank], step)
        return Round(
            None if place.to is None else rank_at[place.to],
            None if place.sender is None else rank_at[place.sender],
            place.weight,
        )

    def describe(self) -> str:
        """``Rotated(Dissemination(8), seed=0)``."""
        return f"Rotated({self.inner.describe()}, seed={self.seed})"

    def __repr__(self) -> str:
        return self.describe()


@dataclass(frozen=True)
class Broadcast:
    """Rank `root`'s values to all in ceil(log2 size) steps, by a binomial tree.

    In step k the ranks less than ``2**k`` after the root, who hold the values, put them ``2**k``
    further. The weight is 1: what is received replaces what was there.
    """

    size: int
    root: int = 0

    def __post_init__(self) -> None:
        _check_size("Broadcast", self.size)
        if type(self.root) is not int or not 0 <= self.root < self.size:
            raise ScheduleError(f"Broadcast: no rank {self.root!r}; ranks are 0 to {self.size - 1}")

    @property
    def period(self) -> int:
        """ceil(log2 size) steps."""
        return _rounds_to_reach(self.size)

    def round(self, rank: int, step: int) -> Round:
        """The part of `rank` in `step`; alone from step `period` on."""
        _check_place(self, rank, step)
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

    def __post_init__(self) -> None:
        _check_size("GlobalAverage", self.size)

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
        _check_place(self, rank, step)
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
