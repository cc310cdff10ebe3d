"""A schedule re-drawn over those of its ranks that live: `Living`, `resized`.

The members keep their numbers; the schedule of the same kind for as many ranks as there are
members is laid over them in ascending order. All ranks that agree on the members compute the same
rounds. Rejected: leaving the holes in (a dead rank would cost its partners a round for ever, and
cut a ring in two).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ucxgossip.errors import ScheduleError
from ucxgossip.schedule.base import ALONE, Round, Rounds, Schedule, endless, many, repeats
from ucxgossip.schedule.circulant import Dissemination, Ring
from ucxgossip.schedule.finite import Broadcast, GlobalAverage
from ucxgossip.schedule.nested import Strided
from ucxgossip.schedule.pairs import BaseTwo, Hypercube
from ucxgossip.schedule.shuffled import RandomMatching, Rotated


def resized(schedule: Schedule, size: int) -> Schedule:
    """The schedule of the same kind for `size` ranks.

    A schedule of the user's own may have a method ``resized(size)``. Where there is none
    (`Hypercube` of no power of two, `Hierarchical`), `Dissemination`, which serves any number,
    rotated if the schedule does not repeat.
    """
    if schedule.size == size:
        return schedule
    own = getattr(schedule, "resized", None)
    if callable(own):
        found: Schedule = own(size)
        return found
    if isinstance(schedule, Dissemination | Ring | BaseTwo | GlobalAverage):
        return type(schedule)(size)
    if isinstance(schedule, Rotated):
        return Rotated(resized(schedule.inner, size), schedule.seed)
    if isinstance(schedule, RandomMatching):
        return RandomMatching(size, schedule.seed)
    if isinstance(schedule, Strided):
        return Strided(resized(schedule.inner, size), schedule.stride, schedule.start)
    if isinstance(schedule, Hypercube) and size & (size - 1) == 0:
        return Hypercube(size)
    spread = Dissemination(size)
    return spread if repeats(schedule) else Rotated(spread, seed=0)


class Living:
    """`schedule` over `members`, which keep their numbers; the other ranks are alone."""

    def __init__(self, schedule: Schedule, members: Sequence[int]) -> None:
        if not members or len(set(members)) != len(members) or max(members) >= schedule.size:
            raise ScheduleError(
                f"Living: {list(members)} are no ranks of {schedule.describe()}, each once"
            )
        self.schedule, self.members = schedule, tuple(sorted(members))
        self._places = {rank: place for place, rank in enumerate(self.members)}
        self._inner = self._resized()

    def _resized(self) -> Schedule:
        if isinstance(self.schedule, Broadcast) and len(self.members) < self.schedule.size:
            if self.schedule.root not in self._places:
                raise ScheduleError(
                    f"Living: rank {self.schedule.root}, from which "
                    f"{self.schedule.describe()} starts, is not one of {list(self.members)}"
                )
            return Broadcast(len(self.members), self._places[self.schedule.root])
        return resized(self.schedule, len(self.members))

    @property
    def size(self) -> int:
        """Number of ranks, the dead included."""
        return self.schedule.size

    @property
    def period(self) -> int:
        """The period over the members."""
        return self._inner.period

    @property
    def repeats(self) -> bool:
        """Whether the rounds repeat."""
        return repeats(self._inner)

    @property
    def endless(self) -> bool:
        """Whether the rounds go on for ever."""
        return endless(self._inner)

    def round(self, rank: int, step: int) -> Round:
        """The part of `rank` in `step`; alone if it is no member."""
        place = self._places.get(rank)
        if place is None:
            return ALONE
        part = self._inner.round(place, step)
        if len(self.members) == self.schedule.size:
            return part
        return Round(
            None if part.to is None else self.members[part.to],
            None if part.sender is None else self.members[part.sender],
            part.weight,
        )

    def rounds(self, ranks: NDArray[np.int64], steps: NDArray[np.int64]) -> Rounds:
        """As `schedule.many`."""
        if len(self.members) == self.schedule.size:
            return many(self._inner, ranks, steps)
        members = np.array(self.members, np.int64)
        place_of = np.full(self.schedule.size, -1, np.int64)
        place_of[members] = np.arange(len(members))
        places = place_of[ranks]
        to, sender, weights = many(self._inner, np.maximum(places, 0), steps)
        dead = places < 0
        return (
            np.where((to < 0) | dead, -1, members[to]),
            np.where((sender < 0) | dead, -1, members[sender]),
            np.where(dead, ALONE.weight, weights),
        )

    def describe(self) -> str:
        """``Living(Dissemination(4), [0, 1, 3])``."""
        return f"Living({self.schedule.describe()}, {list(self.members)})"

    def __repr__(self) -> str:
        return self.describe()
