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
from ucxgossip.quarantine import Quarantine
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


# --- values that are not finite ----------------------------------------------------------------


def with_damage(size: int, rank: int, value: float = np.nan) -> np.ndarray:
    values = dyadic(size)
    values[rank, COUNT // 2] = value
    return values


@pytest.mark.parametrize("transport", ["tcp", "shm"])
@pytest.mark.parametrize("kind", ["in place", "held", "stale", "stale gradients"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_damage_stays_where_it_is(job: Job, kind: str, bad: float, transport: str) -> None:
    """Rank 2's values reach nobody in three periods, and the others still come together."""
    size, values = 4, with_damage(4, 2, bad)

    def body(group: ug.Group) -> tuple[np.ndarray, dict[int, int]]:
        meter, schedule = Meter(), Dissemination(size)
        common = (group, start(group, values), schedule, meter)
        make: dict[str, Callable[[], Any]] = {
            "in place": lambda: InPlace(*common),
            "held": lambda: Held(*common),
            "stale": lambda: Stale(*common, 1),
            "stale gradients": lambda: Stale(*common, 1, before=False),
        }
        stream = make[kind]()
        for _ in range(6):
            stream.post()
            stream.settle()
            assert np.isfinite(stream.distance)
        stream.finish()
        return stream.array.copy(), meter.quarantine.counts

    ends = job(size, body, transport)
    for rank in (0, 1, 3):
        found, counts = ends[rank]
        sent = [Dissemination(size).round(rank, step).sender for step in range(6)]
        assert np.isfinite(found).all()
        assert counts == ({2: sent.count(2)} if 2 in sent else {})
    found, counts = ends[2]
    assert counts == {2: 6}
    np.testing.assert_array_equal(found, values[2])


@pytest.mark.parametrize("kind", [InPlace, Held])
def test_raised_where_it_came_in_and_where_it_was_made(job: Job, kind: Any) -> None:
    values = with_damage(2, 1)

    def body(group: ug.Group) -> None:
        meter = Meter(quarantine=Quarantine("raise"))
        meter.quarantine.step = 5
        stream = kind(group, start(group, values), Dissemination(2), meter, what="weights")
        stream.post()
        with pytest.raises(errors.NonFiniteError, match="weights") as caught:
            stream.settle()
        assert (caught.value.rank, caught.value.what, caught.value.step) == (1, "weights", 5)
        np.testing.assert_array_equal(stream.array, values[group.rank])
        group.agree("caught", {})
        stream.array[:] = group.rank  # the round is over: the stream may go on
        stream.post()
        stream.settle()
        assert (stream.array == 0.5).all()

    job(2, body)


@pytest.mark.parametrize("kind", [InPlace, Held])
def test_allowed_it_spreads(job: Job, kind: Any) -> None:
    def body(group: ug.Group) -> bool:
        meter = Meter(quarantine=Quarantine("allow"))
        stream = kind(group, start(group, with_damage(2, 1)), Dissemination(2), meter)
        stream.post()
        stream.settle()
        assert meter.quarantine.counts == {}
        return bool(np.isnan(stream.array).any())

    assert job(2, body) == [True, True]


def test_outer_leaves_out_and_goes_on_alone(job: Job) -> None:
    def body(group: ug.Group) -> np.ndarray:
        buffer, meter = registered(group, COUNT, FLOAT), Meter()
        stream = Outer(group, buffer, Dissemination(2), meter, Nesterov(1.0, 0.0))
        stream.begin()
        array_of(buffer)[:] = 4.0
        if group.rank:
            array_of(buffer)[3] = np.nan
        stream.post()
        stream.wait()
        assert meter.quarantine.counts == {1: 1}  # the change; the slow weights are whole still
        if group.rank == 0:
            assert (stream.array == 4.0).all()
        stream.average(Collective(group, meter.quarantine))
        stream.post()
        stream.wait()
        return stream.array.copy()

    for found in job(2, body):
        assert (found == 4.0).all()


@pytest.mark.parametrize("transport", ["tcp", "shm"])
def test_push_sum_drops_a_message_with_its_mass(job: Job, transport: str) -> None:
    size, values = 4, with_damage(4, 2)

    def body(group: ug.Group) -> tuple[np.ndarray, float, dict[int, int], np.ndarray, float]:
        meter = Meter()
        collective = Collective(group, meter.quarantine)
        stream = PushSum(group, start(group, values), Dissemination(size), meter, collective)
        for _ in range(5 + 3 * group.rank):
            stream.post()
        stream.finish()
        weighted, mass = stream.mass * stream.array, stream.mass
        counts = dict(meter.quarantine.counts)
        stream.average(collective)
        assert stream.mass == 1.0
        return weighted, mass, counts, stream.array.copy(), stream.distance

    ends = job(size, body, transport)
    healthy = (0, 1, 3)
    masses = [ends[rank][1] for rank in healthy]
    assert 1.0 < sum(masses) < size - 0.1  # rank 2's own, and at most what lay in its slots
    expected = sum(ends[rank][0] for rank in healthy) / sum(ends[rank][1] for rank in healthy)
    for rank, (weighted, _, counts, found, distance) in enumerate(ends):
        assert np.isfinite(weighted).all() == (rank != 2)
        assert set(counts) <= {2}
        assert np.isfinite(distance)
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
    assert ends[2][2] and any(ends[rank][2] for rank in healthy)


def test_a_damaged_rank_does_not_drain_push_sum(job: Job) -> None:
    """Its partners find its slots full and keep their mass, for as many steps as there are."""
    values = with_damage(2, 1)

    def body(group: ug.Group) -> tuple[float, int]:
        meter = Meter()
        stream = PushSum(group, start(group, values), Dissemination(2), meter, Collective(group))
        for step in range(200):
            stream.post()
            stream.wait()
            if step % 10 == 0:
                group.agree(f"step {step}", {})
        mass = stream.mass
        group.agree("over", {})
        return mass, meter.skipped

    (mass, skipped), _ = job(2, body)
    assert mass == 0.25  # two messages lie in the two slots
    assert skipped == 198


@pytest.mark.parametrize("size", [2, 3, 4])
def test_exact_mean_is_of_those_that_are_finite(job: Job, size: int) -> None:
    """And the damaged rank gets it too; with everyone damaged, nothing changes."""
    values = with_damage(size, 1)

    def body(group: ug.Group) -> tuple[np.ndarray, np.ndarray, float, dict[int, int]]:
        collective = Collective(group, Quarantine())
        array = values[group.rank].copy()
        assert np.isnan(collective.consensus_distance([array]))
        collective.average(array)
        every = np.full(8, group.rank, np.float32)
        every[group.rank] = np.inf
        collective.average(every)
        weighed = np.full(8, 1.0 + group.rank)
        collective.average(weighed, mass=1.0 + group.rank)
        return array, every, float(weighed[0]), collective.quarantine.counts

    healthy = [rank for rank in range(size) if rank != 1]
    masses = 1.0 + np.arange(size)
    for rank, (found, every, weighed, counts) in enumerate(job(size, body)):
        np.testing.assert_allclose(found, values[healthy].mean(axis=0), atol=1e-10)
        assert every.tolist() == [np.inf if i == rank else rank for i in range(8)]
        assert weighed == pytest.approx((masses**2).sum() / masses.sum())
        assert counts == {rank: 1 + (rank == 1)}


def test_exact_mean_that_raises_or_allows(job: Job) -> None:
    values = with_damage(2, 1)

    def body(group: ug.Group) -> None:
        plain = values[group.rank].copy()
        Collective(group).average(plain)
        assert np.isnan(plain).sum() == 1
        array = values[group.rank].copy()
        collective = Collective(group, Quarantine("raise"))
        if group.rank == 1:
            with pytest.raises(errors.NonFiniteError, match="its own part of a mean"):
                collective.average(array)
        else:
            collective.average(array)
        np.testing.assert_array_equal(array, values[0])
        group.agree("over", {})

    job(2, body)


@pytest.mark.parametrize(("mass", "grown"), [(1.0, 1.0), (4.0, 0.25), (0.5, 2.0), (0.01, 4.0)])
def test_push_sum_divides_updates_by_mass(store: Any, mass: float, grown: float) -> None:
    """As the paper's step on x = m z, by no more than four times; several steps count as one."""
    with ug.join(0, 1, store) as group:
        buffer = registered(group, 3, np.dtype(np.float64))
        stream = PushSum(group, buffer, Dissemination(1), Meter(), Collective(group))
        array = array_of(buffer)
        array[:] = 8.0
        stream.mass = mass
        for _ in range(2):
            stream.settle()
            array += 0.5
        stream.post()
        assert (array == 8.0 + grown).all()
        stream.post()  # nothing was changed since
        assert (array == 8.0 + grown).all()
