"""mixing.device on a fake device, and the mailboxes that streams take in turn (mixing.lanes)."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fake_device as fake
import ucxgossip as ug
from ucxgossip import errors
from ucxgossip.buffer import Buffer
from ucxgossip.mixing import (
    Collective,
    DeviceArray,
    DeviceHeld,
    DeviceInPlace,
    Held,
    InPlace,
    Meter,
    serve,
)
from ucxgossip.mixing.lanes import Lanes
from ucxgossip.quarantine import Quarantine
from ucxgossip.schedule import Dissemination, Rotated

Job = Callable[..., list[Any]]
COUNT = 3000


def array_on(device: fake.FakeDevice, values: np.ndarray) -> DeviceArray:
    array = DeviceArray(device, device.allocate(values.nbytes), values.dtype, len(values))
    array.write(values)
    return array


@pytest.mark.parametrize("lanes", [1, 2, 3])
@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize(("transport", "size"), [("tcp", 4), ("shm", 4), ("tcp", 7)])
def test_any_number_of_lanes_gives_the_same(
    job: Job, held: bool, lanes: int, transport: str, size: int
) -> None:
    """As the schedule says, on devices and beside ranks without one; books once a round.

    Several chunks each. Of seven ranks each keeps connections to four.
    """
    rounds = 7
    values = np.random.default_rng(lanes).standard_normal((size, COUNT))
    schedule = Rotated(Dissemination(size), seed=3)

    tuning = ug.Tuning(endpoints=4, chunk=4096)

    def body(group: ug.Group) -> tuple[np.ndarray, int, bool]:
        meter, more = Meter(), {"position": 5, "lanes": lanes}
        if group.rank == 3:
            region = group.allocate(8 * COUNT)
            plain = region.view(np.float64, COUNT)
            plain[:] = values[3]
            serve(group)
            here = Held if held else InPlace
            on_cpu = here(group, Buffer.of(plain, region), schedule, meter, **more)
            stream: Any = on_cpu
        else:
            array = array_on(fake.FakeDevice(group.rank, 1 + group.rank), values[group.rank])
            there = DeviceHeld if held else DeviceInPlace
            stream = there(group, array, schedule, meter, **more)
        stream.begin()
        for _ in range(rounds - held):
            stream.settle()
            stream.post()
        stream.finish()
        assert stream.position == 5 + rounds
        found = plain.copy() if group.rank == 3 else array.read()
        counted = sum(count for count, _ in meter.lateness.values())
        return found, counted, all(box.intact() for box in stream.lanes.mailboxes)

    expected = values
    for step in range(5, 5 + rounds):
        partners = [schedule.round(rank, step).sender for rank in range(size)]
        expected = expected + 0.5 * (expected[partners] - expected)
    for rank, (found, counted, intact) in enumerate(job(size, body, transport, tuning=tuning)):
        np.testing.assert_allclose(found, expected[rank], rtol=1e-13, atol=1e-14)
        assert counted == rounds and intact


@pytest.mark.parametrize(("kind", "lanes"), [(DeviceInPlace, 1), (DeviceHeld, 1), (DeviceHeld, 2)])
def test_what_is_not_finite_is_raised_at_a_wait_and_nowhere_else(
    job: Job, kind: Any, lanes: int
) -> None:
    """On both ranks at the same one, so many rounds later; it names the step of the round."""

    def body(group: ug.Group) -> list[int]:
        device, raised = fake.FakeDevice(group.rank), []
        array = array_on(device, np.full(COUNT, np.nan if group.rank else 0.0))
        meter = Meter(quarantine=Quarantine("raise"))
        stream = kind(group, array, Dissemination(2), meter, what="weights", lanes=lanes)
        for step in range(5):
            meter.quarantine.step = 10 + step
            stream.post()
            try:
                stream.settle()
            except errors.NonFiniteError as error:
                assert (error.rank, error.what, error.step) == (1, "weights", 10)
                raised.append(step)
            if step == 0:
                device.settle(30.0)
                array.write(np.full(COUNT, float(group.rank)))
        stream.finish()
        assert (array.read() == 0.5).all()
        return raised

    assert job(2, body) == [[lanes], [lanes]]


def test_what_is_not_finite_is_raised_at_the_end(job: Job) -> None:
    def body(group: ug.Group) -> None:
        array = array_on(fake.FakeDevice(), np.full(COUNT, np.nan if group.rank else 0.0))
        meter = Meter(quarantine=Quarantine("raise"))
        stream = DeviceInPlace(group, array, Dissemination(2), meter)
        stream.post()
        stream.settle()
        with pytest.raises(errors.NonFiniteError):
            stream.finish()
        stream.finish()

    job(2, body)


@pytest.mark.parametrize("kind", [DeviceInPlace, DeviceHeld])
def test_what_is_not_finite_does_not_keep_a_rank_from_a_collective(job: Job, kind: Any) -> None:
    """The others are in it already; it is raised at the wait after it."""

    def body(group: ug.Group) -> float:
        device = fake.FakeDevice(group.rank)
        array = array_on(device, np.full(COUNT, np.nan if group.rank == 3 else 0.0))
        meter = Meter(quarantine=Quarantine("raise"))
        stream = kind(group, array, Dissemination(4), meter)
        stream.post()
        stream.settle()
        device.settle(30.0)
        array.write(np.full(COUNT, float(group.rank)))
        stream.average(Collective(group))
        found = float(array.read()[0])
        if group.rank in (0, 3):  # who took from the other
            with pytest.raises(errors.NonFiniteError):
                stream.settle()
        stream.settle()
        return found

    assert job(4, body) == [1.5] * 4


def test_finish_ends_the_rounds_of_all_lanes(job: Job) -> None:
    def body(group: ug.Group) -> tuple[bool, bool, bool]:
        device = fake.FakeDevice(group.rank)
        array = array_on(device, np.full(COUNT, float(group.rank)))
        stream = DeviceHeld(group, array, Dissemination(2), Meter(), lanes=2)
        stream.begin()
        wait, device.wait = device.wait, lambda *_: None
        device.stalled = {fake.IN}
        stream.settle()
        stream.post()
        before = all(group.engine.active(box) for box in stream.lanes.mailboxes)
        device.stalled, device.wait = set(), wait
        stream.finish()
        after = any(group.engine.active(box) for box in stream.lanes.mailboxes)
        return before, after, device.idle()

    assert job(2, body) == [(True, False, True)] * 2


def test_lanes_share_the_slots_of_one_mailbox(job: Job) -> None:
    def body(group: ug.Group) -> list[list[int]]:
        return [
            [box.layout.depth for box in Lanes.sharing(group, nbytes, count).mailboxes]
            for nbytes, count in ((1 << 20, 1), (1 << 20, 2), (1 << 20, 3), (1024, 1), (1024, 2))
        ]

    assert job(2, body) == [[[2], [1, 1], [1, 1, 1], [32], [16, 16]]] * 2
    capped = ug.Tuning(endpoints=4)
    assert job(6, body, tuning=capped)[0] == [[2], [1, 1], [1, 1, 1], [2], [1, 1]]


def test_lanes_tell_where_they_are(job: Job) -> None:
    """`enter` takes over the rounds of others, be it so many steps later."""

    def body(group: ug.Group) -> list[list[int]]:
        ours, theirs = Lanes.sharing(group, 64, 2), Lanes.sharing(group, 64, 2)
        theirs.mailboxes[0].round, theirs.mailboxes[1].round = 11, 10
        assert ours.at(7) is ours.mailboxes[1] is ours.oldest_first(7)[0]
        found = []
        for later in range(4):
            ours.enter(theirs.place(21), 21 + later)
            found.append([box.round for box in ours.mailboxes])
        return found

    # Step 21 is round 10 of mailbox 1, step 22 round 11 of mailbox 0, step 23 round 11 of 1.
    assert job(2, body)[0] == [[11, 10], [11, 11], [12, 11], [12, 12]]
