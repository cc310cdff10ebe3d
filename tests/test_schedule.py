"""ucxgossip.schedule: rounds are consistent on all ranks, and spread what they promise."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ucxgossip import schedule as module
from ucxgossip.errors import ScheduleError
from ucxgossip.schedule import (
    ALONE,
    Broadcast,
    Dissemination,
    GlobalAverage,
    Rotated,
    Round,
    Schedule,
)

SMALL = range(1, 65)
LARGE = (100, 127, 128, 129, 511, 1000, 1023, 1024)

few = settings(max_examples=30, deadline=None)


def rounds(schedule: Schedule, step: int) -> list[Round]:
    return [schedule.round(rank, step) for rank in range(schedule.size)]


def is_partial_permutation(parts: list[Round]) -> bool:
    """Each put has its receiver and the other way round; nobody exchanges with itself."""
    puts = {(rank, part.to) for rank, part in enumerate(parts) if part.to is not None}
    takes = {(part.sender, rank) for rank, part in enumerate(parts) if part.sender is not None}
    return puts == takes and all(source != target for source, target in puts)


def mixed(values: NDArray[np.float64], parts: list[Round]) -> NDArray[np.float64]:
    """One step on every rank: row i becomes row i + weight * (row of its sender - row i)."""
    senders = [rank if part.sender is None else part.sender for rank, part in enumerate(parts)]
    weights = np.array([0.0 if part.sender is None else part.weight for part in parts])[:, None]
    return (1 - weights) * values + weights * values[senders]


def spread(schedule: Schedule, start: int = 0) -> NDArray[np.float64]:
    """Product of one period's mixing matrices: row i says what rank i holds of whom."""
    values = np.eye(schedule.size)
    for step in range(start, start + schedule.period):
        values = mixed(values, rounds(schedule, step))
    return values


# --- every schedule ----------------------------------------------------------------------------


def every_kind(size: int) -> list[Schedule]:
    return [
        Dissemination(size),
        Rotated(Dissemination(size), seed=7),
        Broadcast(size, root=size // 3),
        GlobalAverage(size),
        Rotated(GlobalAverage(size), seed=7),
    ]


@pytest.mark.parametrize("size", SMALL)
def test_each_round_is_a_partial_permutation(size: int) -> None:
    for schedule in every_kind(size):
        for step in range(3 * schedule.period + 1):
            assert is_partial_permutation(rounds(schedule, step)), (schedule, step)


@pytest.mark.parametrize("size", LARGE)
def test_each_round_of_a_large_job_is_a_partial_permutation(size: int) -> None:
    for schedule in every_kind(size):
        for step in range(schedule.period + 1):
            assert is_partial_permutation(rounds(schedule, step)), (schedule, step)


@few
@given(size=st.integers(2, 300), step=st.integers(0, 1 << 60), seed=st.integers(0, 1 << 100))
def test_gossip_rounds_leave_nobody_alone(size: int, step: int, seed: int) -> None:
    for schedule in (Dissemination(size), Rotated(Dissemination(size), seed)):
        parts = rounds(schedule, step)
        assert is_partial_permutation(parts)
        assert {part.to for part in parts} == {part.sender for part in parts} == set(range(size))
        assert {part.weight for part in parts} == {0.5}


@pytest.mark.parametrize("size", [1, 2, 7])
def test_description_is_the_expression_that_makes_it(size: int) -> None:
    for schedule in every_kind(size):
        twin = eval(schedule.describe(), dict(vars(module)))
        assert type(twin) is type(schedule)
        assert twin.describe() == schedule.describe()
        assert rounds(twin, 1) == rounds(schedule, 1)


@pytest.mark.parametrize("kind", [Dissemination, Broadcast, GlobalAverage])
@pytest.mark.parametrize("size", [0, -1, True, 2.5, "4", None])
def test_bad_size(kind: type, size: object) -> None:
    with pytest.raises(ScheduleError, match=f"{kind.__name__}: size is {size!r}"):
        kind(size)


@pytest.mark.parametrize("index", range(len(every_kind(4))))
@pytest.mark.parametrize(("rank", "step"), [(-1, 0), (4, 0), (0, -1), (1, -(1 << 70))])
def test_bad_place(index: int, rank: int, step: int) -> None:
    schedule = every_kind(4)[index]
    with pytest.raises(ScheduleError) as raised:
        schedule.round(rank, step)
    assert str(raised.value).startswith(schedule.describe() + ": ")
    assert str(step if step < 0 else rank) in str(raised.value)


# --- Dissemination -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "period"), [(1, 1), (2, 1), (3, 2), (4, 2), (5, 3), (8, 3), (9, 4), (1024, 10)]
)
def test_dissemination_takes_log2_steps(size: int, period: int) -> None:
    assert Dissemination(size).period == period
    assert Broadcast(size).period == period


def assert_spread(schedule: Schedule, start: int) -> None:
    held = spread(schedule, start)
    assert (held > 0).all()
    np.testing.assert_allclose(held.sum(axis=1), 1, rtol=1e-12)
    np.testing.assert_allclose(held.sum(axis=0), 1, rtol=1e-12)  # the mean of all is kept
    if schedule.size & (schedule.size - 1) == 0:
        assert (held == 1 / schedule.size).all()


@pytest.mark.parametrize("size", [*SMALL, *LARGE])
def test_dissemination_reaches_all_in_one_period(size: int) -> None:
    assert_spread(Dissemination(size), start=0)


@pytest.mark.parametrize("size", [2, 3, 8, 13])
def test_dissemination_reaches_all_from_any_step_on(size: int) -> None:
    for start in range(1, 5):
        assert_spread(Dissemination(size), start)


# --- Rotated -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [*SMALL, 100, 128])
def test_rotated_reaches_all_in_each_period(size: int) -> None:
    schedule = Rotated(Dissemination(size), seed=3)
    for turn in (0, 1, 63, 64, 1_000_000):
        assert_spread(schedule, turn * schedule.period)


@few
@given(
    size=st.integers(1, 40),
    seed=st.integers(0, 1 << 70),
    steps=st.lists(st.integers(0, 5000), min_size=1, max_size=20),
)
def test_rotated_is_equal_for_equal_seeds_in_any_order(
    size: int, seed: int, steps: list[int]
) -> None:
    one, other = Rotated(Dissemination(size), seed), Rotated(Dissemination(size), seed)
    expected = {step: rounds(one, step) for step in sorted(steps)}
    assert {step: rounds(other, step) for step in steps} == expected
    assert {step: rounds(one, step) for step in reversed(steps)} == expected


def shuffle_of(schedule: Rotated, turn: int) -> list[tuple[Round, ...]]:
    """Each step of a period as the unshuffled places see it."""
    start = turn * schedule.period
    return [tuple(rounds(schedule, start + k)) for k in range(schedule.period)]


@pytest.mark.parametrize("size", [5, 8, 33])
def test_rotated_shuffle_stays_through_a_period(size: int) -> None:
    """All steps of a period are the inner rounds under one relabelling of the ranks.

    Following the puts of step 0 (distance 1) around the ring gives the ranks in their places;
    step k must then put 2**k places further.
    """
    schedule = Rotated(Dissemination(size), seed=11)
    for turn in (0, 1, 2, 63, 64, 65):
        first, *others = shuffle_of(schedule, turn)
        ring = [0]
        while (following := first[ring[-1]].to) != 0:
            assert following is not None
            ring.append(following)
        assert sorted(ring) == list(range(size))
        for k, parts in enumerate(others, start=1):
            puts = {rank: parts[rank].to for rank in range(size)}
            assert puts == {rank: ring[(i + (1 << k)) % size] for i, rank in enumerate(ring)}


@pytest.mark.parametrize("size", [16, 33])  # in smaller jobs equal shuffles come up by chance
def test_rotated_shuffles_anew_each_period(size: int) -> None:
    schedule = Rotated(Dissemination(size), seed=11)
    shuffles = {tuple(shuffle_of(schedule, turn)) for turn in range(200)}
    assert len(shuffles) == 200


def test_rotated_differs_between_seeds() -> None:
    described = {
        tuple(part for step in range(30) for part in rounds(Rotated(Dissemination(8), seed), step))
        for seed in range(20)
    }
    assert len(described) == 20


def test_rotated_lets_everybody_meet_everybody() -> None:
    schedule = Rotated(Dissemination(8), seed=0)
    met = {
        (rank, part.to) for step in range(600) for rank, part in enumerate(rounds(schedule, step))
    }
    assert len(met) == 8 * 7


def test_rotated_serves_a_thousand_ranks() -> None:
    schedule = Rotated(Dissemination(1000), seed=1)
    for step in (0, 9, 10, 12_345):
        parts = rounds(schedule, step)
        assert is_partial_permutation(parts)
        assert all(part.to is not None for part in parts)


def test_rotated_keeps_what_the_inner_schedule_does() -> None:
    schedule = Rotated(GlobalAverage(6), seed=5)
    assert schedule.period == GlobalAverage(6).period
    np.testing.assert_allclose(spread(schedule), 1 / 6, rtol=1e-12)


@pytest.mark.parametrize("inner", [None, 8, "Dissemination(8)", Dissemination, object()])
def test_rotated_of_what_is_no_schedule(inner: object) -> None:
    with pytest.raises(ScheduleError, match="Rotated: .* is not a schedule"):
        Rotated(inner)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [-1, True, 0.5, "0", None])
def test_rotated_with_a_bad_seed(seed: object) -> None:
    with pytest.raises(ScheduleError, match=f"Rotated: seed is {seed!r}"):
        Rotated(Dissemination(8), seed)  # type: ignore[arg-type]


# --- Broadcast and GlobalAverage ---------------------------------------------------------------


@pytest.mark.parametrize("size", [*range(1, 18), 31, 32, 33, 64])
def test_broadcast_brings_every_roots_values_to_all(size: int) -> None:
    for root in range(size):
        assert (spread(Broadcast(size, root)) == np.eye(size)[root]).all()


@pytest.mark.parametrize("size", [2, 5, 8, 13])
def test_broadcast_puts_only_what_has_come(size: int) -> None:
    for root in range(size):
        schedule, holders = Broadcast(size, root), {root}
        for step in range(schedule.period):
            parts = rounds(schedule, step)
            assert {part.sender for part in parts if part.sender is not None} <= holders
            holders |= {rank for rank, part in enumerate(parts) if part.sender is not None}
        assert holders == set(range(size))


@pytest.mark.parametrize("root", [-1, 4, True, 1.5, "0", None])
def test_broadcast_from_a_bad_root(root: object) -> None:
    with pytest.raises(ScheduleError, match="Broadcast"):
        Broadcast(4, root)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [*SMALL, 100, 1000])
def test_global_average_is_exact(size: int) -> None:
    np.testing.assert_allclose(spread(GlobalAverage(size)), 1 / size, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("size", "period"), [(1, 1), (2, 1), (3, 3), (4, 2), (5, 4), (6, 4), (8, 3), (1000, 11)]
)
def test_global_average_takes_log2_steps_and_two_for_odd_sizes(size: int, period: int) -> None:
    assert GlobalAverage(size).period == period


@pytest.mark.parametrize("schedule", [Broadcast(5), Broadcast(8, 3), GlobalAverage(5)])
@pytest.mark.parametrize("after", [0, 1, 1000, 1 << 80])
def test_finite_schedules_end(schedule: Schedule, after: int) -> None:
    assert rounds(schedule, schedule.period + after) == [ALONE] * schedule.size
