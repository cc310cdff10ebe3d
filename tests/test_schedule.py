"""ucxgossip.schedule: rounds are consistent on all ranks, and spread what they promise."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ucxgossip import schedule as module
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
    check_rounds,
    endless,
    many,
    repeats,
    resized,
)
from ucxgossip.schedule.check import RANKS, STEPS
from ucxgossip.schedule.shuffled import Shuffles

SMALL = range(1, 65)
LARGE = (100, 127, 128, 129, 511, 1000, 1023, 1024)

few = settings(max_examples=30, deadline=None)


def rounds(schedule: Schedule, step: int) -> list[Round]:
    return [schedule.round(rank, step) for rank in range(schedule.size)]


@pytest.mark.parametrize(
    "made",
    [
        *(Dissemination(size) for size in (1, 2, 3, 8, 13)),
        *(Ring(size) for size in (1, 2, 5)),
        *(Rotated(Dissemination(size), seed=4) for size in (1, 2, 5, 8, 100)),
        Rotated(BaseTwo(12), seed=1),
        RandomMatching(7, seed=2),
        GlobalAverage(6),
        Hypercube(8),
        Living(Rotated(Dissemination(8), seed=0), [0, 2, 3, 6, 7]),
        Living(Rotated(Dissemination(8), seed=0), range(8)),
        Living(RandomMatching(6, seed=0), [1, 2, 5]),
    ],
    ids=lambda each: each.describe(),
)
def test_many_rounds_are_the_rounds(made: Schedule) -> None:
    ranks = np.repeat(np.arange(made.size), 200)
    steps = np.tile(np.arange(200), made.size)
    to, sender, weights = many(made, ranks, steps)
    for found in zip(ranks, steps, to, sender, weights, strict=True):
        part = made.round(int(found[0]), int(found[1]))
        assert found[2:] == (
            -1 if part.to is None else part.to,
            -1 if part.sender is None else part.sender,
            part.weight,
        )


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
    part = next((d for d in range(2, size) if size % d == 0), size)
    cube = [Hypercube(size), Rotated(Hypercube(size), seed=7)] if size & (size - 1) == 0 else []
    return [
        Dissemination(size),
        Rotated(Dissemination(size), seed=7),
        *cube,
        BaseTwo(size),
        Rotated(BaseTwo(size), seed=7),
        Ring(size),
        Rotated(Ring(size), seed=7),
        RandomMatching(size, seed=7),
        Hierarchical(part, Dissemination(size // part)),
        Hierarchical(size // part, Rotated(BaseTwo(part), seed=7)),
        Strided(Rotated(Dissemination(size), seed=7), stride=3, start=1),
        Strided(BaseTwo(size), stride=2),
        *finite_kinds(size),
    ]


def finite_kinds(size: int) -> list[Schedule]:
    part = next((d for d in range(2, size) if size % d == 0), size)
    return [
        Broadcast(size, root=size // 3),
        GlobalAverage(size),
        Rotated(GlobalAverage(size), seed=7),
        Hierarchical(part, GlobalAverage(size // part)),
        Strided(GlobalAverage(size), stride=2, start=1),
    ]


def endless_kinds(size: int) -> list[Schedule]:
    return every_kind(size)[: -len(finite_kinds(size))]


def some_steps(schedule: Schedule, periods: int) -> range:
    """All of so many periods and a step, or the first 40: Ring's period is as long as the job."""
    return range(min(periods * schedule.period, 40) + 1)


@pytest.mark.parametrize("size", SMALL)
def test_each_round_is_a_partial_permutation(size: int) -> None:
    for schedule in every_kind(size):
        for step in some_steps(schedule, periods=3):
            assert is_partial_permutation(rounds(schedule, step)), (schedule, step)


@pytest.mark.parametrize("size", LARGE)
def test_each_round_of_a_large_job_is_a_partial_permutation(size: int) -> None:
    for schedule in every_kind(size):
        for step in range(min(schedule.period, 12) + 1):
            assert is_partial_permutation(rounds(schedule, step)), (schedule, step)


@pytest.mark.parametrize("size", [*SMALL, 100, 127, 128])
def test_endless_rounds_keep_the_mean_of_all(size: int) -> None:
    for schedule in endless_kinds(size):
        for step in some_steps(schedule, periods=2):
            mixing = mixed(np.eye(size), rounds(schedule, step))
            assert (mixing >= 0).all()
            np.testing.assert_allclose(mixing.sum(axis=0), 1, rtol=1e-14, err_msg=str(schedule))
            np.testing.assert_allclose(mixing.sum(axis=1), 1, rtol=1e-14, err_msg=str(schedule))


@pytest.mark.parametrize("size", [1, 2, 3, 6, 8, 12, 16, 30])
def test_repeating_schedules_repeat(size: int) -> None:
    for schedule in filter(repeats, every_kind(size)):
        for step in range(2 * schedule.period + 1):
            for later in (step + schedule.period, step + 1000 * schedule.period):
                assert rounds(schedule, step) == rounds(schedule, later), (schedule, step)


@pytest.mark.parametrize("size", [9, 15])  # two nodes cannot be rotated
def test_only_what_repeats_says_so(size: int) -> None:
    for schedule in every_kind(size):
        first, *others = (
            [rounds(schedule, turn * schedule.period + k) for k in range(schedule.period)]
            for turn in range(20)
        )
        assert repeats(schedule) is all(other == first for other in others), schedule
    random = [Rotated(BaseTwo(size)), RandomMatching(size), Broadcast(size)]
    assert not any(repeats(Hierarchical(2, inner)) or repeats(Strided(inner)) for inner in random)
    assert repeats(Hierarchical(2, BaseTwo(size))) and repeats(Strided(BaseTwo(size)))


@pytest.mark.parametrize("size", [2, 6, 8])
def test_only_what_ends_says_so(size: int) -> None:
    for schedule in every_kind(size):
        after = [rounds(schedule, schedule.period + step) for step in range(2 * schedule.period)]
        assert endless(schedule) is any(parts != [ALONE] * size for parts in after), schedule
    assert [endless(each) for each in finite_kinds(size)] == [False] * len(finite_kinds(size))
    for inner in finite_kinds(size):
        assert not endless(Rotated(inner))
        assert not endless(Strided(inner, 2))
        assert not endless(Hierarchical(3, inner))
        assert not endless(Strided(Rotated(Hierarchical(3, inner))))


@few
@given(size=st.integers(2, 300), step=st.integers(0, 1 << 60), seed=st.integers(0, 1 << 100))
def test_gossip_rounds_leave_nobody_alone(size: int, step: int, seed: int) -> None:
    for schedule in (Dissemination(size), Rotated(Dissemination(size), seed), Ring(size)):
        parts = rounds(schedule, step)
        assert is_partial_permutation(parts)
        assert {part.to for part in parts} == {part.sender for part in parts} == set(range(size))
        assert {part.weight for part in parts} == {0.5}


@pytest.mark.parametrize("size", [1, 2, 4, 6, 7])
def test_description_is_the_expression_that_makes_it(size: int) -> None:
    for schedule in every_kind(size):
        twin = eval(schedule.describe(), dict(vars(module)))
        assert type(twin) is type(schedule)
        assert twin.describe() == schedule.describe()
        assert rounds(twin, 1) == rounds(schedule, 1)


@pytest.mark.parametrize(
    "kind",
    [Dissemination, Ring, Hypercube, BaseTwo, RandomMatching, Broadcast, GlobalAverage],
)
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


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_shuffle_is_as_likely_as_any_other_also_after_each_other(size: int) -> None:
    """Chi square, of single shuffles and of pairs of neighbours, below its 0.9999 quantile."""
    drawn = Shuffles(size, seed=3).many(np.arange(40_000))[0]
    numbers = np.unique(drawn, axis=0, return_inverse=True)[1].reshape(-1)
    kinds = math.factorial(size)
    for found, of in ((numbers, kinds), (kinds * numbers[1:] + numbers[:-1], kinds**2)):
        expected = len(found) / of
        squares = (np.bincount(found, minlength=of) - expected) ** 2 / expected
        freedom = of - 1
        assert squares.sum() < freedom + 4.0 * math.sqrt(2 * freedom) + 10


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_one_shuffle_and_many_are_the_same(size: int) -> None:
    one, many_of = Shuffles(size, seed=5), Shuffles(size, seed=5)
    spans = [np.arange(0), np.arange(3), np.arange(1, 3), np.array([70_000, 2, 2, 0])]
    for turns in (*spans, np.array([2**62 - 1, 2**62, 2**63 - 1])):
        ranks_at, places_of, rows = many_of.many(turns)
        assert len(rows) == len(turns)
        for turn, row in zip(turns.tolist(), rows.tolist(), strict=True):
            expected = one.at(turn)
            assert (ranks_at[row] == expected[0]).all()
            assert (places_of[row] == expected[1]).all()
            assert (expected[0][expected[1]] == np.arange(size)).all()


def test_shuffles_are_those_that_other_ranks_draw() -> None:
    """Pinned: ranks of different machines, and interpreted ones, must agree."""
    assert Shuffles(8, seed=0).at(0)[0].tolist() == [4, 5, 3, 7, 0, 1, 2, 6]
    assert Shuffles(5, seed=2**70).at(10**9)[0].tolist() == [2, 4, 1, 3, 0]


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


INNERS = [
    Dissemination(6),
    BaseTwo(6),
    Ring(6),
    Hypercube(4),
    Hierarchical(2, Dissemination(3)),
    Hierarchical(3, Rotated(Dissemination(2))),
    Strided(BaseTwo(6), 3, 1),
    Rotated(Dissemination(6), seed=2),
]


def relabelled(part: Round, names: tuple[int, ...]) -> Round:
    """The part as it reads where place i is called names[i]."""
    to = None if part.to is None else names[part.to]
    return Round(to, None if part.sender is None else names[part.sender], part.weight)


@pytest.mark.parametrize("inner", INNERS, ids=lambda inner: inner.describe())
def test_rotated_relabels_any_schedule_once_a_period(inner: Schedule) -> None:
    """Some one relabelling turns the inner rounds of a period into the rotated ones."""
    schedule, size, turns = Rotated(inner, seed=1), inner.size, range(30)
    seen = set()
    for turn in turns:
        steps = range(turn * inner.period, (turn + 1) * inner.period)
        found = [rounds(schedule, step) for step in steps]
        plain = [rounds(inner, step) for step in steps]
        assert any(
            all(
                found[k][names[place]] == relabelled(plain[k][place], names)
                for k in range(inner.period)
                for place in range(size)
            )
            for names in permutations(range(size))
        ), turn
        seen.add(tuple(tuple(parts) for parts in found))
    assert len(seen) > 3


@pytest.mark.parametrize(
    "inner",
    [Hypercube(16), BaseTwo(12), BaseTwo(19), Hierarchical(3, BaseTwo(5))],
    ids=lambda inner: inner.describe(),
)
def test_rotated_stays_exact_in_each_period(inner: Schedule) -> None:
    schedule = Rotated(inner, seed=3)
    assert len({tuple(rounds(schedule, turn * inner.period)) for turn in range(20)}) == 20
    for turn in (0, 1, 2, 63, 64, 1_000_000):
        held = spread(schedule, turn * schedule.period)
        np.testing.assert_allclose(held, 1 / schedule.size, rtol=0, atol=1e-12)


@pytest.mark.parametrize("wrap", [Rotated, Strided, lambda inner: Hierarchical(2, inner)])
@pytest.mark.parametrize("inner", [None, 8, "Dissemination(8)", Dissemination, Rotated, object()])
def test_wrapping_what_is_no_schedule(wrap: Callable[[object], Schedule], inner: object) -> None:
    with pytest.raises(ScheduleError, match="(Rotated|Strided|Hierarchical): .* is not a schedule"):
        wrap(inner)


@pytest.mark.parametrize("seed", [-1, True, 0.5, "0", None])
def test_bad_seed(seed: object) -> None:
    with pytest.raises(ScheduleError, match=f"Rotated: seed is {seed!r}"):
        Rotated(Dissemination(8), seed)  # type: ignore[arg-type]
    with pytest.raises(ScheduleError, match=f"RandomMatching: seed is {seed!r}"):
        RandomMatching(8, seed)  # type: ignore[arg-type]


# --- Hypercube and BaseTwo ---------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16, 32, 64, 1024])
def test_hypercube_is_exact_after_log2_steps(size: int) -> None:
    schedule = Hypercube(size)
    assert schedule.period == max(1, size.bit_length() - 1)
    for start in (0, 1, 7):
        assert (spread(schedule, start) == 1 / size).all()


def test_hypercube_pairs_ranks_that_differ_in_one_bit() -> None:
    for step in range(7):
        for rank in range(8):
            partner = rank ^ (1, 2, 4)[step % 3]
            assert Hypercube(8).round(rank, step) == Round(partner, partner)


@pytest.mark.parametrize("size", [3, 5, 6, 7, 12, 1000])
def test_hypercube_of_no_power_of_two_names_what_to_take(size: int) -> None:
    with pytest.raises(ScheduleError, match=f"size is {size}, no power of two") as raised:
        Hypercube(size)
    assert f"Dissemination({size})" in str(raised.value)
    assert f"BaseTwo({size})" in str(raised.value)


@pytest.mark.parametrize("size", [*SMALL, *LARGE, 192, 768, 1001])
def test_base_two_is_exact_and_each_step_symmetric(size: int) -> None:
    schedule = BaseTwo(size)
    for turn in (0, 1) if size <= 64 else (3,):
        held = np.eye(size)
        for step in range(turn * schedule.period, (turn + 1) * schedule.period):
            parts = rounds(schedule, step)
            for rank, part in enumerate(parts):
                assert part.to == part.sender
                if part.to is not None:
                    assert parts[part.to] == Round(rank, rank, part.weight)
                    assert 0.5 <= part.weight < 1
            held = mixed(held, parts)
        np.testing.assert_allclose(held, 1 / size, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("size", "period"),
    [(1, 1), (2, 1), (3, 3), (4, 2), (5, 5), (6, 4), (7, 5), (8, 3), (9, 7), (10, 6), (12, 5)],
)
def test_base_two_takes_the_shorter_graph(size: int, period: int) -> None:
    assert BaseTwo(size).period == period


@pytest.mark.parametrize("size", [*SMALL, *LARGE])
def test_base_two_is_never_longer_than_the_simple_graph(size: int) -> None:
    """2 floor(log2 size) + 1 is the simple graph's length where size is no power of two."""
    assert BaseTwo(size).period <= 2 * (size.bit_length() - 1) + 1
    if size & (size - 1) == 0:
        assert BaseTwo(size).period == Hypercube(size).period


@pytest.mark.parametrize("size", [*range(2, 65), 100, 129, 1001])
def test_base_two_leaves_one_alone_in_each_odd_group(size: int) -> None:
    groups = size & -size
    across = groups.bit_length() - 1
    schedule = BaseTwo(size)
    alone = [rounds(schedule, step).count(ALONE) for step in range(schedule.period)]
    assert alone == [groups] * (schedule.period - across) + [0] * across


# --- Ring --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SMALL)
def test_ring_reaches_all_in_its_period_and_not_before(size: int) -> None:
    schedule = Ring(size)
    assert schedule.period == max(1, size - 1)
    held = np.eye(size)
    for step in range(schedule.period):
        assert size < 3 or (held == 0).any()
        held = mixed(held, rounds(schedule, step))
    assert (held > 0).all()


def test_ring_puts_to_the_next() -> None:
    assert rounds(Ring(4), 9) == [Round(1, 3), Round(2, 0), Round(3, 1), Round(0, 2)]


# --- RandomMatching ----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [*SMALL, *LARGE])
def test_random_matching_pairs_all_but_an_odd_one(size: int) -> None:
    schedule, other = RandomMatching(size, seed=4), RandomMatching(size, seed=4)
    for step in (0, 1, 2, 63, 64, 10**9):
        parts = rounds(schedule, step)
        assert parts.count(ALONE) == size % 2
        for rank, part in enumerate(parts):
            if part.to is not None:
                assert parts[part.to] == Round(rank, rank, 0.5)
        assert [other.round(rank, step) for rank in reversed(range(size))] == parts[::-1]


def test_random_matching_differs_between_steps_and_seeds() -> None:
    schedule = RandomMatching(24, seed=0)
    assert len({tuple(rounds(schedule, step)) for step in range(200)}) == 200
    assert len({tuple(rounds(RandomMatching(24, seed), 5)) for seed in range(50)}) == 50


@pytest.mark.parametrize(("size", "matchings"), [(4, 3), (5, 15), (6, 15)])
def test_random_matching_draws_each_matching_as_often(size: int, matchings: int) -> None:
    draws = 600 * matchings
    schedule, counts = RandomMatching(size, seed=1), dict[tuple[Round, ...], int]()
    for step in range(draws):
        parts = tuple(rounds(schedule, step))
        counts[parts] = counts.get(parts, 0) + 1
    assert len(counts) == matchings
    assert max(abs(count - 600) for count in counts.values()) < 5 * 600**0.5


def test_random_matching_takes_a_few_steps_more_than_its_period() -> None:
    schedule, held = RandomMatching(64, seed=0), np.eye(64)
    for step in range(4 * schedule.period):
        held = mixed(held, rounds(schedule, step))
        assert step >= schedule.period or (held == 0).any()
    assert (held > 0).all()


# --- Hierarchical ------------------------------------------------------------------------------

NODES = [
    (1, Dissemination(5)),
    (2, BaseTwo(3)),
    (3, Rotated(Dissemination(4), seed=2)),
    (4, Dissemination(1)),
    (4, RandomMatching(5, seed=2)),
    (6, Hierarchical(2, Ring(3))),
    (8, Rotated(Dissemination(3), seed=2)),
]


@pytest.mark.parametrize(("local_size", "inner"), NODES, ids=str)
def test_hierarchical_stays_in_the_node_and_then_in_the_place(
    local_size: int, inner: Schedule
) -> None:
    """Between nodes it is `inner`, step by step, without the steps within nodes."""
    schedule = Hierarchical(local_size, inner)
    local = BaseTwo(local_size) if local_size & (local_size - 1) else Dissemination(local_size)
    within = local.period if local_size > 1 else 0
    between = schedule.period - within
    assert schedule.size == local_size * inner.size
    assert between == (0 if inner.size == 1 else inner.period)
    for turn in (0, 1, 2, 70):
        for k in range(schedule.period):
            parts = rounds(schedule, turn * schedule.period + k)
            for rank, part in enumerate(parts):
                node, place = divmod(rank, local_size)
                if k < within:
                    own = local.round(place, k)
                    others = [node * local_size + i for i in range(local_size)]
                else:
                    own = inner.round(node, turn * between + k - within)
                    others = [i * local_size + place for i in range(inner.size)]
                assert part == relabelled(own, tuple(others))


@pytest.mark.parametrize(
    ("local_size", "inner"),
    [
        (1, BaseTwo(7)),
        (2, Hypercube(4)),
        (3, BaseTwo(5)),
        (4, Dissemination(8)),
        (6, GlobalAverage(5)),
        (7, BaseTwo(1)),
        (8, Rotated(BaseTwo(12), seed=1)),
        (8, Hierarchical(3, BaseTwo(3))),
    ],
    ids=str,
)
def test_hierarchical_is_exact_where_both_parts_are(local_size: int, inner: Schedule) -> None:
    schedule = Hierarchical(local_size, inner)
    for turn in (0, 1, 65) if endless(schedule) else (0,):
        held = spread(schedule, turn * schedule.period)
        np.testing.assert_allclose(held, 1 / schedule.size, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("local_size", "inner", "period"),
    [
        (1, Dissemination(1), 1),
        (1, Dissemination(8), 3),
        (8, Dissemination(1), 3),
        (8, Dissemination(5), 6),
        (6, Dissemination(4), 6),
        (2, Ring(9), 9),
    ],
)
def test_hierarchical_takes_both_periods(local_size: int, inner: Schedule, period: int) -> None:
    assert Hierarchical(local_size, inner).period == period


@pytest.mark.parametrize("local_size", [1, 2, 6, 8])
def test_hierarchical_rotates_nodes_once_a_period(local_size: int) -> None:
    """Whom a node puts to in the first step between nodes: the same for all its ranks."""
    schedule = Hierarchical(local_size, Rotated(Dissemination(16), seed=0))
    first = schedule.period - 4
    orders = set()
    for turn in range(100):
        parts = rounds(schedule, turn * schedule.period + first)
        targets = [None if part.to is None else part.to // local_size for part in parts]
        of_nodes = targets[::local_size]
        assert targets == [target for target in of_nodes for _ in range(local_size)]
        orders.add(tuple(of_nodes))
    assert len(orders) == 100


@pytest.mark.parametrize("local_size", [0, -4, True, 2.0, "4", None])
def test_hierarchical_with_a_bad_node(local_size: object) -> None:
    with pytest.raises(ScheduleError, match=f"Hierarchical: local_size is {local_size!r}"):
        Hierarchical(local_size, Dissemination(2))  # type: ignore[arg-type]


# --- Strided -----------------------------------------------------------------------------------


@few
@given(
    size=st.integers(1, 20),
    stride=st.integers(1, 9),
    start=st.integers(0, 99),
    again=st.integers(1, 9),
    later=st.integers(0, 99),
    step=st.integers(0, 1 << 40),
)
def test_strided_takes_every_so_manyth_step(
    size: int, stride: int, start: int, again: int, later: int, step: int
) -> None:
    for inner in every_kind(size):
        one = Strided(inner, stride, start)
        assert rounds(one, step) == rounds(inner, start + stride * step)
        assert rounds(Strided(inner), step) == rounds(inner, step)
        once = Strided(inner, stride * again, start + stride * later)
        assert rounds(Strided(one, again, later), step) == rounds(once, step)


@pytest.mark.parametrize("size", [5, 8, 12])
@pytest.mark.parametrize("stride", range(1, 8))
def test_strided_streams_share_out_the_rounds(size: int, stride: int) -> None:
    inner = Rotated(BaseTwo(size), seed=1)
    streams = [Strided(inner, stride, start) for start in range(stride)]
    for step in range(3 * inner.period):
        turn, stream = divmod(step, stride)
        assert rounds(streams[stream], turn) == rounds(inner, step)


@pytest.mark.parametrize("stride", range(1, 13))
def test_strided_repeats_as_soon_as_it_can(stride: int) -> None:
    inner = Hypercube(64)  # whose six rounds all differ
    schedule = Strided(inner, stride, start=5)
    seen = [tuple(rounds(schedule, step)) for step in range(2 * schedule.period)]
    assert seen[: schedule.period] == seen[schedule.period :]
    assert len(set(seen)) == schedule.period
    assert (schedule.period == inner.period) is (stride in (1, 5, 7, 11))


@pytest.mark.parametrize(
    ("stride", "start", "period"),
    [(1, 0, 5), (2, 0, 3), (2, 1, 2), (3, 1, 2), (7, 0, 1), (1, 4, 1), (1, 5, 1), (2, 99, 1)],
)
def test_strided_over_what_ends(stride: int, start: int, period: int) -> None:
    schedule = Strided(Broadcast(32), stride, start)
    assert schedule.period == period
    assert rounds(schedule, period) == [ALONE] * 32
    assert start > 4 or rounds(schedule, period - 1) != [ALONE] * 32


@pytest.mark.parametrize("value", [-1, True, 1.0, "1", None])
def test_strided_with_bad_numbers(value: object) -> None:
    with pytest.raises(ScheduleError, match=f"Strided: stride is {value!r}"):
        Strided(Ring(4), stride=value)  # type: ignore[arg-type]
    with pytest.raises(ScheduleError, match=f"Strided: start is {value!r}"):
        Strided(Ring(4), start=value)  # type: ignore[arg-type]
    with pytest.raises(ScheduleError, match="stride is 0"):
        Strided(Ring(4), stride=0)


# --- what users write --------------------------------------------------------------------------


@dataclass
class Made:
    """A user's schedule, of one function."""

    part: Callable[[int, int], object]
    size: int = 4
    period: int = 3
    calls: int = 0
    last_step: int = 0

    def round(self, rank: int, step: int) -> Round:
        self.calls += 1
        self.last_step = max(self.last_step, step)
        return self.part(rank, step)  # type: ignore[return-value]

    def describe(self) -> str:
        return "Made()"


def test_attributes_that_only_look_like_ours_are_left_alone() -> None:
    made = Made(lambda rank, step: Round(rank ^ 1, rank ^ 1))
    made.rounds = made.resized = [1, 2, 3]  # type: ignore[attr-defined]
    to, sender, weights = many(made, np.arange(4), np.zeros(4, np.int64))
    assert to.tolist() == sender.tolist() == [1, 0, 3, 2] and weights.tolist() == [0.5] * 4
    assert resized(made, 2).size == 2
    check_rounds(made)


@pytest.mark.parametrize(
    ("rounds", "word"),
    [
        (lambda ranks, steps: len(ranks), "method rounds fails .*TypeError"),
        (lambda: 4, "method rounds fails .*TypeError"),
        (lambda ranks, steps: (ranks[:1], ranks[:1], ranks[:1] + 0.5), "1 rounds for 4 ranks"),
        (
            lambda ranks, steps: (ranks ^ 1, ranks ^ 1, np.full(len(ranks), 0.25)),
            r"rank 0 in step 0 to, sender, weight \(1, 1, 0.25\), its method round \(1, 1, 0.5\)",
        ),
    ],
)
def test_a_vectorised_form_must_say_the_same(rounds: Callable[..., object], word: str) -> None:
    made = Made(lambda rank, step: Round(rank ^ 1, rank ^ 1))
    made.rounds = rounds  # type: ignore[attr-defined]
    with pytest.raises(ScheduleError, match=word):
        check_rounds(made)


def test_what_a_user_made_promises_nothing() -> None:
    made = Made(lambda rank, step: ALONE)
    assert isinstance(made, Schedule)
    assert repeats(made) is False
    assert endless(made) is True
    assert repeats(Hierarchical(2, made)) is False
    assert endless(Strided(made)) is True


@pytest.mark.parametrize("size", [1, 2, 3, 6, 16, 33])
def test_check_rounds_takes_what_is_right(size: int) -> None:
    for schedule in every_kind(size):
        check_rounds(schedule)
    if size > 1:
        check_rounds(Made(lambda rank, step: Round((rank + 1) % size, (rank - 1) % size, 1), size))


def from_step_2(bad: Callable[[int], object]) -> Callable[[int, int], object]:
    """A ring of four whose rounds go bad in step 2."""
    return lambda rank, step: Round((rank + 1) % 4, (rank - 1) % 4) if step < 2 else bad(rank)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (lambda rank: Round(rank + 1, None), "rank 0 in step 2 puts to rank 1, which has nobody"),
        (lambda rank: Round(4 if rank == 3 else None, None), "rank 3 in step 2 puts to rank 4; r"),
        (lambda rank: Round(None, -1), "rank 0 in step 2 receives from rank -1; ranks are 0 to 3"),
        (lambda rank: Round(True, None), "puts to rank True"),
        (lambda rank: Round(1.0, None), "puts to rank 1.0"),
        (lambda rank: Round(rank, rank), "rank 0 in step 2 puts to itself"),
        (lambda rank: Round(None, rank), "rank 0 in step 2 receives from itself"),
        (lambda rank: Round(rank ^ 1, rank ^ 1, 1.25), "rank 0 in step 2 has weight 1.25"),
        (lambda rank: Round(rank ^ 1, rank ^ 1, -0.5), "weight -0.5"),
        (lambda rank: Round(rank ^ 1, rank ^ 1, float("nan")), "weight nan"),
        (lambda rank: Round(rank ^ 1, rank ^ 1, None), "weight None"),
        (lambda rank: Round(3, 3) if rank < 3 else Round(0, 0), "rank 1 in step 2 puts to rank 3,"),
        (lambda rank: Round(None, 3) if rank < 2 else ALONE, "rank 0 in step 2 waits for rank 3,"),
        (lambda rank: Round(rank ^ 1, rank ^ 2), "puts to rank 1, which has rank 3 as its sender"),
        (lambda rank: (1, 1, 0.5), r"rank 0 in step 2 has \(1, 1, 0.5\), which is not a Round"),
        (lambda rank: None if rank else Round(1, 1), "puts to rank 1, which has nobody"),
    ],
)
def test_check_rounds_says_rank_step_and_what(bad: Callable[[int], object], said: str) -> None:
    check_rounds(Made(from_step_2(bad), period=2))
    with pytest.raises(ScheduleError, match=f"Made\\(\\): .*{said}"):
        check_rounds(Made(from_step_2(bad)))


def test_check_rounds_finds_one_bad_rank_of_a_thousand() -> None:
    def part(rank: int, step: int) -> Round:
        return ALONE if (rank, step) == (777, 40) else Round((rank + 1) % 1000, (rank - 1) % 1000)

    with pytest.raises(ScheduleError, match="rank 776 in step 40 puts to rank 777"):
        check_rounds(Made(part, size=1000, period=41))


def test_check_rounds_ends_soon() -> None:
    size = 100_000
    made = Made(lambda rank, step: Round((rank + 1) % size, (rank - 1) % size), size, 10**9)
    check_rounds(made)
    assert made.last_step == STEPS - 1
    assert made.calls <= 3 * STEPS * RANKS


@pytest.mark.parametrize("what", [{"size": 0}, {"size": 2.5}, {"period": 0}, {"period": "3"}])
def test_check_rounds_of_no_size_or_no_period(what: dict[str, object]) -> None:
    (name, value), *_ = what.items()
    with pytest.raises(ScheduleError, match=f"Made\\(\\): {name} is {value!r}"):
        check_rounds(Made(lambda rank, step: ALONE, **what))  # type: ignore[arg-type]
    with pytest.raises(ScheduleError, match="not a schedule"):
        check_rounds(Made)  # type: ignore[arg-type]


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


@pytest.mark.parametrize(
    "schedule",
    [
        Broadcast(5),
        Broadcast(8, 3),
        GlobalAverage(5),
        Rotated(GlobalAverage(5)),
        Hierarchical(4, GlobalAverage(5)),
        Strided(GlobalAverage(5), 2),
    ],
)
@pytest.mark.parametrize("after", [0, 1, 1000, 1 << 80])
def test_finite_schedules_end(schedule: Schedule, after: int) -> None:
    assert rounds(schedule, schedule.period + after) == [ALONE] * schedule.size
