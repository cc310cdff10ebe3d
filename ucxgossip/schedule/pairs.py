"""Ranks exchange in pairs, and after one period all hold the exact mean: `Hypercube`, `BaseTwo`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

from ucxgossip.errors import ScheduleError
from ucxgossip.schedule.base import ALONE, Round, check_place, check_size, rounds_to_reach


def _pair(partner: int, weight: float = 0.5) -> Round:
    return Round(partner, partner, weight)


@dataclass(frozen=True)
class Hypercube:
    """Exchange with the rank that differs in bit k, k = step mod log2 size.

    The exact mean of all after log2 size steps; `size` must be a power of two. Recursive doubling
    (Thakur, Rabenseifner, Gropp 2005), known to gossip as the one-peer hypercube.
    """

    size: int
    repeats: ClassVar[bool] = True
    endless: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_size("Hypercube", self.size)
        if self.size & (self.size - 1):
            raise ScheduleError(
                f"Hypercube: size is {self.size}, no power of two; take Dissemination({self.size})"
                f", or BaseTwo({self.size}), which is exact for every size"
            )

    @property
    def period(self) -> int:
        """log2 size steps; at least 1."""
        return rounds_to_reach(self.size)

    def round(self, rank: int, step: int) -> Round:
        """The part of `rank` in `step`; alone where there is one rank."""
        check_place(self, rank, step)
        return ALONE if self.size == 1 else _pair(rank ^ (1 << (step % self.period)))

    def describe(self) -> str:
        """``Hypercube(8)``."""
        return f"Hypercube({self.size})"


@dataclass(frozen=True)
class BaseTwo:
    """Exchanges in pairs after which all ranks hold the exact mean, for every size.

    The Base-2 Graph (Takezawa, Sato, Bao, Niwa, Yamada 2023, arXiv 2305.11420): with size =
    ``2**q * odd``, groups of `odd` neighbours first average by the Simple Base-2 Graph, then equal
    places of the ``2**q`` groups by a hypercube. That is never longer than the simple graph over
    all ranks. Both sides of a pair have the same weight, so that the mean of all is kept in every
    step; some weights lie above 1/2, and where `size` is odd some rank is alone in every step.
    """

    size: int
    repeats: ClassVar[bool] = True
    endless: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_size("BaseTwo", self.size)

    @property
    def _odd(self) -> int:
        return self.size // (self.size & -self.size)

    @property
    def _simple_steps(self) -> int:
        return 2 * self._odd.bit_length() - 1 if self._odd > 1 else 0

    @property
    def period(self) -> int:
        """With size = ``2**q * odd``: q steps, and 2 floor(log2 odd) + 1 more where odd > 1."""
        return max(1, self._simple_steps + (self.size & -self.size).bit_length() - 1)

    def round(self, rank: int, step: int) -> Round:
        """The part of `rank` in `step`: to and from the same partner, or alone."""
        check_place(self, rank, step)
        if self.size == 1:
            return ALONE
        group, place = divmod(rank, self._odd)
        step %= self.period
        if step >= self._simple_steps:
            return _pair((group ^ (1 << (step - self._simple_steps))) * self._odd + place)
        part = _simple(self._odd, place, step)
        return part if part.to is None else _pair(part.to + group * self._odd, part.weight)

    def describe(self) -> str:
        """``BaseTwo(6)``."""
        return f"BaseTwo({self.size})"


@lru_cache(maxsize=64)
def _blocks(size: int) -> tuple[tuple[int, int], ...]:
    """(first place, log2 of its length) of each block: one for every binary digit, longest first.

    7 = 4 + 2 + 1: places 0 to 3, 4 and 5, 6.
    """
    found, first = [], 0
    for power in reversed(range(size.bit_length())):
        if size >> power & 1:
            found.append((first, power))
            first += 1 << power
    return tuple(found)


def _in_block(place: int, first: int, power: int, step: int) -> Round:
    """The hypercube among the ``2**power`` places from `first` on, over and over."""
    return _pair(first + ((place - first) ^ (1 << step % power))) if power else ALONE


def _simple(size: int, place: int, step: int) -> Round:
    """The Simple Base-2 Graph of an odd number of places, at least 3.

    First each block averages, so that its places are equal. Then in turn, longest first, a block
    meets those after it: each of their places pairs with one of its own, and the weight is the
    share that this block has of all places from it on. After that the block's places average to
    the mean of all, and those after it do, too. The block spreads it by a hypercube while they go
    on in the same way; the last one is a single place, and has it.
    """
    blocks = _blocks(size)
    longest = blocks[0][1]
    index = max(i for i, (first, _) in enumerate(blocks) if first <= place)
    first, power = blocks[index]
    if step < longest:
        return _in_block(place, first, power, step)
    turn = step - longest
    if turn > index:
        return _in_block(place, first, power, turn - index - 1)
    meets, its_power = blocks[turn]
    following = meets + (1 << its_power)
    weight = (1 << its_power) / (size - meets)
    if place >= following:
        return _pair(place - following + meets, weight)
    offset, needed = place - meets, size - following
    if offset < needed:
        return _pair(following + offset, weight)
    # Equal so far; what they gained since in training they may as well share.
    partner = needed + ((offset - needed) ^ 1)
    return _pair(meets + partner) if partner < 1 << its_power else ALONE
