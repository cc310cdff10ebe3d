"""The streams of `mixing`, without torch: exact means, the mean kept, and each other's equals."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import ucxgossip as ug
from ucxgossip import errors, jit
from ucxgossip.mixing import Collective, Held, InPlace, Meter, Nesterov, Outer, PushSum, Stale
from ucxgossip.mixing.stream import array_of, registered
from ucxgossip.schedule import BaseTwo, Dissemination, Hypercube, Rotated, Schedule

Job = Callable[..., list[Any]]
COUNT = 1000
FLOAT = np.dtype(np.float64)


def start(group: ug.Group, values: np.ndarray) -> Any:
    buffer = registered(group, values.shape[1], values.dtype)
    array_of(buffer)[:] = values[group.rank]
    return buffer


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20.0
    while not condition():
        jit.yield_cpu()
        assert time.monotonic() < deadline, "deadline"


def dyadic(size: int, dtype: Any = np.float64) -> np.ndarray:
    """Whole numbers, whose halves are exact for as many rounds as are made here."""
    return np.random.default_rng(3).integers(-1000, 1000, (size, COUNT)).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("size", "make"),
    [
        (2, Dissemination),
        (4, Dissemination),
        (4, lambda p: Rotated(Dissemination(p), seed=4)),
        (8, Hypercube),
        (8, lambda p: Rotated(Hypercube(p), seed=1)),
    ],
)
def test_mean_is_exact_after_one_period(
    job: Job, size: int, make: Callable[[int], Schedule], dtype: Any
) -> None:
    values, schedule = dyadic(size, dtype), make(size)

    def body(group: ug.Group) -> np.ndarray:
        stream = InPlace(group, start(group, values), schedule, Meter())
        for _ in range(schedule.period):
            stream.post()
            stream.wait()
        return stream.array.copy()

    for found in job(size, body):
        assert np.array_equal(found, values.mean(axis=0, dtype=dtype))


@pytest.mark.parametrize("size", [3, 5, 6])
def test_base_two_is_exact_to_rounding_for_other_numbers(job: Job, size: int) -> None:
    values, schedule = dyadic(size), BaseTwo(size)

    def body(group: ug.Group) -> np.ndarray:
        stream = InPlace(group, start(group, values), schedule, Meter())
        for _ in range(schedule.period):
            stream.post()
            stream.wait()
        return stream.array.copy()

    for found in job(size, body):
        np.testing.assert_allclose(found, values.mean(axis=0), atol=1e-10)


@pytest.mark.parametrize("transport", ["tcp", "shm"])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_push_sum_that_skips_nothing_equals_weights(job: Job, size: int, transport: str) -> None:
    """Bit for bit, on values that are no whole numbers, with steps in between."""
    values = np.random.default_rng(0).standard_normal((size, COUNT))
    steps = [np.random.default_rng((1, s)).standard_normal((size, COUNT)) for s in range(7)]
    schedule = Dissemination(size)

    def body(group: ug.Group) -> tuple[np.ndarray, np.ndarray, float, int]:
        meter = Meter()
        weights = InPlace(group, start(group, values), schedule, Meter())
        push_sum = PushSum(group, start(group, values), schedule, meter, Collective(group))
        for step in steps:
            edge = push_sum.edges[push_sum.position % len(push_sum.edges)]
            until(lambda: not any(each.busy for each in push_sum.edges) and edge.free)  # noqa: B023
            for stream in (weights, push_sum):
                stream.array -= step[group.rank]
                stream.post()
            weights.wait()
            # Wait-free it is; here the test waits for what this step's partner put.
            if edge.taken < edge.sent:
                edge.wait_arrived(20.0)
            push_sum.wait()
            group.agree("step", {})
        return weights.array.copy(), push_sum.array.copy(), push_sum.mass, meter.skipped

    for weights, pushed, mass, skipped in job(size, body, transport):
        assert skipped == 0 and mass == 1.0
        assert np.array_equal(weights, pushed)


@pytest.mark.parametrize("transport", ["tcp", "shm"])
def test_push_sum_keeps_mass_and_mean_whoever_skips(job: Job, transport: str) -> None:
    """Ranks post at their own pace, 30 to 120 times, and nobody waits."""
    size = 4
    values = np.random.default_rng(2).standard_normal((size, 30_000))

    def body(group: ug.Group) -> tuple[np.ndarray, float]:
        stream = PushSum(
            group, start(group, values), Dissemination(size), Meter(), Collective(group)
        )
        for _ in range(30 * (1 + group.rank)):
            stream.post()
        stream.finish()
        assert all(edge.mailbox.intact() for edge in stream.edges)
        return stream.mass * stream.array, stream.mass

    ends = job(size, body, transport)
    assert sum(mass for _, mass in ends) == pytest.approx(size, rel=1e-12)
    found = np.sum([weighted for weighted, _ in ends], axis=0)
    np.testing.assert_allclose(found, values.sum(axis=0), atol=1e-10)


def test_push_sum_averages_by_mass(job: Job) -> None:
    size = 4
    values = np.random.default_rng(2).standard_normal((size, COUNT))

    def body(group: ug.Group) -> tuple[np.ndarray, float]:
        collective = Collective(group)
        stream = PushSum(group, start(group, values), Dissemination(size), Meter(), collective)
        for _ in range(5 + 3 * group.rank):
            stream.post()
        stream.average(collective)
        return stream.array.copy(), stream.mass

    for found, mass in job(size, body):
        assert mass == 1.0
        np.testing.assert_allclose(found, values.mean(axis=0), atol=1e-12)


@pytest.mark.parametrize("lateness", [1, 2, 3])
@pytest.mark.parametrize("before", [True, False])
def test_stale_rounds_keep_the_mean_and_come_together(
    job: Job, lateness: int, before: bool
) -> None:
    size, values = 4, np.random.default_rng(5).standard_normal((4, COUNT))

    def body(group: ug.Group) -> np.ndarray:
        schedule = Dissemination(size)  # no rotation: the full weight would diverge from 2 on
        stream = Stale(group, start(group, values), schedule, Meter(), lateness, before=before)
        for _ in range(120):
            stream.post()
            stream.settle()
        stream.finish()
        return stream.array.copy()

    ends = np.array(job(size, body))
    np.testing.assert_allclose(ends.mean(axis=0), values.mean(axis=0), atol=1e-12)
    if before:  # corrections that do not travel on shift each round's values once
        assert np.abs(ends - ends.mean(axis=0)).max() < 1e-3


def test_stale_counts_how_late(job: Job) -> None:
    def body(group: ug.Group) -> dict[int, float]:
        meter = Meter()
        stream = Stale(group, start(group, dyadic(2)), Dissemination(2), meter, 1)
        for _ in range(5):
            stream.post()
        stream.finish()
        return meter.staleness()

    assert job(2, body) == [{1: 1.0}, {0: 1.0}]


def test_held_rounds_change_nothing_until_settled(job: Job) -> None:
    values = dyadic(2)

    def body(group: ug.Group) -> None:
        stream = Held(group, start(group, values), Dissemination(2), Meter())
        stream.begin()
        group.agree("under way", {})
        stream.wait()
        assert np.array_equal(stream.array, values[group.rank])
        stream.settle()
        assert np.array_equal(stream.array, values.mean(axis=0))

    job(2, body)


def test_outer_of_rate_one_without_momentum_is_the_mean(job: Job) -> None:
    values = dyadic(4)

    def body(group: ug.Group) -> np.ndarray:
        buffer = registered(group, COUNT, FLOAT)
        stream = Outer(group, buffer, Dissemination(4), Meter(), Nesterov(1.0, 0.0))
        stream.begin()
        for _ in range(2):
            array_of(buffer)[:] += values[group.rank]
            stream.post()
            stream.wait()
        return stream.array.copy()

    # One full period: each of the two equal additions is averaged once or twice.
    ends = job(4, body)
    pairs = [(values[rank] + values[(rank - 1) % 4]) / 2 for rank in range(4)]
    for rank, found in enumerate(ends):
        first, other = pairs[rank] + values[rank], pairs[(rank - 2) % 4] + values[(rank - 2) % 4]
        np.testing.assert_allclose(found, (first + other) / 2, atol=1e-12)


@pytest.mark.parametrize("make", [InPlace, Held])
def test_restarted_stream_goes_on_at_any_step(job: Job, make: Any) -> None:
    size, schedule = 4, Rotated(Dissemination(4), seed=9)
    values = dyadic(size)

    def body(group: ug.Group) -> tuple[np.ndarray, int]:
        stream = make(group, start(group, values), schedule, Meter())
        stream.begin()
        for _ in range(3):
            stream.settle()
            stream.post()
        stream.settle()
        group.agree("restart", {})
        stream.array[:] = values[group.rank]
        stream.load({"position": 17})
        if make is InPlace:
            stream.post()
        stream.settle()
        return stream.array.copy(), stream.position

    for rank, (found, position) in enumerate(job(size, body)):
        sender = schedule.round(rank, 17).sender
        assert position == 18
        assert np.array_equal(found, (values[rank] + values[sender]) / 2)


def test_push_sum_wants_partners_that_stay(store: Any) -> None:
    with ug.join(0, 1, store) as group:
        buffer = registered(group, 8, FLOAT)
        with pytest.raises(errors.ScheduleError, match=r"pass schedule=ug.Dissemination\(1\)"):
            PushSum(group, buffer, Rotated(Dissemination(1)), Meter(), Collective(group))


def test_table_of_all_ranks(job: Job) -> None:
    def body(group: ug.Group) -> np.ndarray:
        return Collective(group).table(np.array([group.rank, 10 * group.rank, (1 << 40) - 1]))

    for found in job(3, body):
        assert found.tolist() == [[r, 10 * r, (1 << 40) - 1] for r in range(3)]
