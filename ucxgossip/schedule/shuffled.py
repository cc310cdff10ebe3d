"""Partners by lot, the same lot on all ranks: `Rotated`, `RandomMatching`."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ucxgossip.schedule.base import (
    ALONE,
    Round,
    Rounds,
    Schedule,
    check_inner,
    check_place,
    check_size,
    check_whole,
    endless,
    many,
    rounds_to_reach,
)

_LONGEST, _NUMBERS = 512, 8192
"""Shuffles drawn together at most, and numbers in them: to begin a draw costs 15 us, a step over
shared memory 3."""

_KEPT = 2048
"""Shuffles remembered for two ranks, for many streams whose next rounds are laid out in turn; fewer
by the period, of which each shuffle serves one."""


class Shuffles:
    """An endless list of shuffles of `size` ranks, equal wherever `seed` is equal."""

    def __init__(self, size: int, seed: int) -> None:
        self._size, self._seed = size, seed
        self._length = min(_LONGEST, max(1, _NUMBERS // size))
        self._kept = max(2, _KEPT // (self._length * rounds_to_reach(size)))
        self._sorted = np.tile(np.arange(size), (self._length, 1))
        self._blocks: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}

    def _block(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Block `number` of shuffles: ranks by place, and places by rank."""
        if number not in self._blocks:
            if len(self._blocks) == self._kept:
                del self._blocks[min(self._blocks)]
            places = self._sorted
            ranks = np.random.default_rng((self._seed, number)).permuted(places, axis=1)
            places_of = np.empty_like(ranks)
            places_of[np.arange(self._length)[:, None], ranks] = places
            self._blocks[number] = ranks, places_of
        return self._blocks[number]

    def at(self, turn: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Which rank stands at each place in shuffle `turn`, and each rank's place."""
        number, index = divmod(turn, self._length)
        ranks_at, places_of = self._block(number)
        return ranks_at[index], places_of[index]

    def many(
        self, turns: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Two tables as `at`, and the row in them of each of `turns`."""
        numbers, rows = np.divmod(turns, self._length)
        distinct, which = np.unique(numbers, return_inverse=True)
        blocks = [self._block(number) for number in distinct.tolist()]
        if len(blocks) == 1:
            return (*blocks[0], rows)
        ranks_at, places_of = (np.concatenate(each) for each in zip(*blocks, strict=True))
        return ranks_at, places_of, rows + self._length * which


class Rotated:
    """`inner` over a fresh shuffle of the ranks for each of its periods.

    The shuffle is drawn from `seed` and the period's number, so that it is the same on all ranks,
    and never changes within a period. GossipGraD's partner rotation (arXiv 1803.05880, section 5).
    Over a `Hierarchical` it would mix up which ranks share a node: rotate inside that one instead.
    """

    repeats: ClassVar[bool] = False

    def __init__(self, inner: Schedule, seed: int = 0) -> None:
        check_inner("Rotated", inner)
        check_whole("Rotated", "seed", seed, 0)
        self.inner, self.seed = inner, seed
        self._shuffles = Shuffles(inner.size, seed)

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.inner.size

    @property
    def period(self) -> int:
        """The inner schedule's period."""
        return self.inner.period

    @property
    def endless(self) -> bool:
        """Whether the inner schedule goes on for ever."""
        return endless(self.inner)

    def round(self, rank: int, step: int) -> Round:
        """The part of `rank` in `step`."""
        check_place(self, rank, step)
        rank_at, place_of = self._shuffles.at(step // self.period)
        place = self.inner.round(int(place_of[rank]), step)
        return Round(
            None if place.to is None else int(rank_at[place.to]),
            None if place.sender is None else int(rank_at[place.sender]),
            place.weight,
        )

    def rounds(self, ranks: NDArray[np.int64], steps: NDArray[np.int64]) -> Rounds:
        """As `schedule.many`."""
        ranks_at, places_of, rows = self._shuffles.many(steps // self.period)
        to, sender, weights = many(self.inner, places_of[rows, ranks], steps)
        # A place of -1 takes the last column, and is none again.
        return (
            np.where(to < 0, -1, ranks_at[rows, to]),
            np.where(sender < 0, -1, ranks_at[rows, sender]),
            weights,
        )

    def describe(self) -> str:
        """``Rotated(Dissemination(8), seed=0)``."""
        return f"Rotated({self.inner.describe()}, seed={self.seed})"

    def __repr__(self) -> str:
        return self.describe()


class RandomMatching:
    """Ranks exchange in pairs drawn anew for each step; where `size` is odd one rank is alone.

    The pairs are drawn from `seed` and the step, so that they are the same on all ranks, and every
    matching is equally likely. Randomized gossip (Boyd, Ghosh, Prabhakar, Shah 2006), with all
    pairs of a step at once.
    """

    repeats: ClassVar[bool] = False
    endless: ClassVar[bool] = True

    def __init__(self, size: int, seed: int = 0) -> None:
        check_size("RandomMatching", size)
        check_whole("RandomMatching", "seed", seed, 0)
        self._size, self.seed = size, seed
        self._shuffles = Shuffles(size, seed)

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self._size

    @property
    def period(self) -> int:
        """ceil(log2 size) steps: the fewest in which any exchange in pairs can reach all.

        Nothing repeats and nothing is complete by then: random pairs meet twice now and again, so
        that what a rank knows reaches all a few steps later. It is the unit to compare by.
        """
        return rounds_to_reach(self._size)

    def round(self, rank: int, step: int) -> Round:
        """The part of `rank` in `step`: to and from the same partner, or alone."""
        check_place(self, rank, step)
        rank_at, place_of = self._shuffles.at(step)
        place = int(place_of[rank]) ^ 1
        if place == self._size:
            return ALONE
        partner = int(rank_at[place])
        return Round(partner, partner)

    def describe(self) -> str:
        """``RandomMatching(8, seed=0)``."""
        return f"RandomMatching({self._size}, seed={self.seed})"

    def __repr__(self) -> str:
        return self.describe()
