"""Schedules over the ranks that live."""

import random
from collections.abc import Callable

import pytest

from ucxgossip.errors import ScheduleError
from ucxgossip.schedule import (
    ALONE,
    BaseTwo,
    Broadcast,
    Dissemination,
    GlobalAverage,
    Hierarchical,
    Hypercube,
    Living,
    RandomMatching,
    Ring,
    Rotated,
    Round,
    Schedule,
    Strided,
    resized,
)

MAKERS: dict[str, Callable[[], Schedule]] = {
    "dissemination": lambda: Dissemination(8),
    "rotated": lambda: Rotated(Dissemination(8), seed=3),
    "hypercube": lambda: Hypercube(8),
    "rotated hypercube": lambda: Rotated(Hypercube(8), seed=1),
    "base two": lambda: BaseTwo(8),
    "ring": lambda: Ring(8),
    "matching": lambda: RandomMatching(8, seed=2),
    "hierarchical": lambda: Hierarchical(2, Dissemination(4)),
    "strided": lambda: Strided(Dissemination(8), 2, 1),
    "mean": lambda: GlobalAverage(8),
}


class Own:
    """A schedule of a user's own, which knows nothing of sizes."""

    size, period = 8, 1

    def round(self, rank: int, step: int) -> Round:
        return Round((rank + 3) % 8, (rank - 3) % 8)

    def describe(self) -> str:
        return "Own()"


class Grown(Own):
    """One that does."""

    def __init__(self, size: int = 8) -> None:
        self.size = size

    def round(self, rank: int, step: int) -> Round:
        return Round((rank + 1) % self.size, (rank - 1) % self.size, 0.25)

    def resized(self, size: int) -> "Grown":
        return Grown(size)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("seed", range(12))
def test_rounds_are_permutations_of_the_living(name: str, seed: int) -> None:
    chance = random.Random(seed)
    members = sorted(chance.sample(range(8), chance.randrange(1, 9)))
    living = Living(MAKERS[name](), members)
    assert living.size == 8
    for step in range(3 * living.period + 2):
        rounds = {rank: living.round(rank, step) for rank in range(8)}
        for rank, part in rounds.items():
            if rank not in members:
                assert part == ALONE
            if part.to is not None:
                assert part.to in members and part.to != rank
                assert rounds[part.to].sender == rank
            if part.sender is not None:
                assert rounds[part.sender].to == rank


@pytest.mark.parametrize("name", MAKERS)
def test_where_all_live_nothing_changes(name: str) -> None:
    schedule = MAKERS[name]()
    living = Living(schedule, range(8))
    assert living.period == schedule.period
    for step in range(20):
        for rank in range(8):
            assert living.round(rank, step) == schedule.round(rank, step)


def test_the_mean_over_the_living_is_exact() -> None:
    members = [0, 2, 3, 7, 5]
    living = Living(GlobalAverage(8), members)
    values = {rank: float(rank) for rank in range(8)}
    for step in range(living.period):
        rounds = {rank: living.round(rank, step) for rank in members}
        before = dict(values)
        for rank, part in rounds.items():
            if part.sender is not None:
                values[rank] += part.weight * (before[part.sender] - before[rank])
    assert {round(values[rank], 12) for rank in members} == {sum(members) / len(members)}


def test_broadcast_starts_from_a_root_that_lives() -> None:
    living = Living(Broadcast(8, root=3), [1, 3, 6])
    assert {living.round(3, 0).to, living.round(3, 1).to} == {1, 6}
    with pytest.raises(ScheduleError, match="rank 3, from which"):
        Living(Broadcast(8, root=3), [1, 6])


@pytest.mark.parametrize("members", [[], [1, 1], [8], [0, 9]])
def test_members_that_are_none(members: list[int]) -> None:
    with pytest.raises(ScheduleError, match="no ranks of"):
        Living(Dissemination(8), members)


def test_kinds_after_a_loss() -> None:
    assert resized(Dissemination(8), 7) == Dissemination(7)
    assert resized(Hypercube(8), 4) == Hypercube(4)
    assert resized(Hypercube(8), 7) == Dissemination(7)
    assert (
        resized(Rotated(Hypercube(8), 5), 7).describe() == Rotated(Dissemination(7), 5).describe()
    )
    assert resized(Strided(Ring(8), 3, 1), 5) == Strided(Ring(5), 3, 1)
    assert resized(Own(), 5).describe() == "Rotated(Dissemination(5), seed=0)"
    assert resized(Own(), 8).describe() == "Own()"
    assert resized(Grown(), 5).round(4, 0) == Round(0, 3, 0.25)
    assert Living(Grown(), [1, 4, 6]).round(6, 0) == Round(1, 4, 0.25)
