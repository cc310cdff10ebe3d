"""Partners by lot, the same lot on all ranks: `Rotated`, `RandomMatching`."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ucxgossip import jit
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

_NUMBERS = 8192
"""Numbers in the shuffles that are drawn together where one after the other is asked for."""

_HALF = 0xFFFFFFFF
_TURNS = (1 << 62) - 1
"""Shuffles come again after so many: turns are int64, and steps have no end."""


@jit.njit
def _scramble(number: int) -> int:
    """A permutation of the numbers below 2**32 that leaves no pattern ("lowbias32", Wellons 2018).

    Masked, so that compiled and interpreted code agree.
    """
    number ^= number >> 16
    number = (number * 0x7FEB352D) & _HALF
    number ^= number >> 15
    number = (number * 0x846CA68B) & _HALF
    return number ^ (number >> 16)


@jit.njit
def _draw(key: int, turns: Any, rank_at: Any, place_of: Any) -> None:
    """Fill each row of the tables with the shuffle of one of `turns` (Fisher and Yates)."""
    size = rank_at.shape[1]
    for row in range(len(turns)):
        turn = int(turns[row])
        state = _scramble(key ^ _scramble((turn & _HALF) ^ _scramble(turn >> 32)))
        for place in range(size):
            rank_at[row, place] = place
        for place in range(size - 1, 0, -1):
            state = _scramble((state + 0x9E3779B9) & _HALF)
            other = (state * (place + 1)) >> 32
            rank = rank_at[row, other]
            rank_at[row, other] = rank_at[row, place]
            rank_at[row, place] = rank
        for place in range(size):
            place_of[row, rank_at[row, place]] = place


class Shuffles:
    """An endless list of shuffles of `size` ranks, equal wherever `seed` is equal.

    Rejected: NumPy's generators, which take 15 us to begin and 0.2 us a shuffle of two ranks: a
    tenth of a round over shared memory.
    """

    def __init__(self, size: int, seed: int) -> None:
        self._size = size
        self._key = int(np.random.SeedSequence(seed).generate_state(1)[0])
        self._length = max(1, _NUMBERS // size)
        self._block = self._span = (0, *self._drawn(np.arange(0)))

    def _drawn(self, turns: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        rank_at = np.empty((len(turns), self._size), np.int64)
        place_of = np.empty_like(rank_at)
        _draw(self._key, turns, rank_at, place_of)
        return rank_at, place_of

    def at(self, turn: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Which rank stands at each place in shuffle `turn`, and each rank's place."""
        turn &= _TURNS
        first, ranks_at, places_of = self._block
        if not first <= turn < first + len(ranks_at):
            first = turn - turn % self._length
            ranks_at, places_of = self._drawn(np.arange(first, first + self._length))
            self._block = first, ranks_at, places_of
        return ranks_at[turn - first], places_of[turn - first]

    def many(
        self, turns: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Two tables as `at`, and the row in them of each of `turns`."""
        if not len(turns):
            return (*self._drawn(turns), turns)
        turns = turns & _TURNS
        least, past = int(turns.min()), int(turns.max()) + 1
        if past - least > len(turns):
            distinct, rows = np.unique(turns, return_inverse=True)
            return (*self._drawn(distinct), rows)
        # Many streams lay out the same turns one after the other.
        first, ranks_at, places_of = self._span
        if not first <= least <= past <= first + len(ranks_at):
            first = least
            ranks_at, places_of = self._drawn(np.arange(least, past))
            self._span = first, ranks_at, places_of
        return ranks_at, places_of, turns - first


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
