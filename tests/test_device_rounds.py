"""engine.device_rounds on a device whose streams and events complete late (fake_device).

Two engines in one process, driven in turns by the test. What a GPU alone can show (that its copies
and kernels are ordered by streams as the fake's are) is left to the tests marked `gpu`.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import engine_pair as engines
import fake_device as fake
from device_pair import CHUNK, DevicePair, calls, mean, values_of
from ucxgossip.device import table as t
from ucxgossip.engine import device_rounds as d
from ucxgossip.engine import staging as staging_module
from ucxgossip.engine import words as w
from ucxgossip.engine.staging import PLACES
from ucxgossip.errors import DeviceError

OUT, IN, HOST = fake.OUT, fake.IN, fake.HOST


# --- values ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("on", "direct"),
    [((0, 1), False), ((0,), False), ((0, 1), True)],
    ids=["both", "one with a host", "both, direct"],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("count", [3, 700, 2500])
def test_rounds_mix_as_on_the_host(
    make: Callable[..., DevicePair], on: tuple[int, ...], direct: bool, dtype: Any, count: int
) -> None:
    """Both ranks' values after several rounds, whatever the order of the device's work."""
    for seed, pace in ((1, 1), (2, 1), (3, 2), (4, 7)):
        values = values_of(count, seed, dtype)
        both = make(values[0].nbytes, on=on, pace=pace, seed=seed, direct=direct)
        memories = [both.memory(each) for each in values]
        for _ in range(5):
            for rank in (0, 1):
                both.post(rank, memories[rank], dtype)
            both.pair.until(both.pair.ended)
            distance = float(((values[1] - values[0]).astype(np.float64) ** 2).sum())
            for rank in on:
                engine, box = both.pair.engines[rank], both.pair.boxes[rank]
                found = float(engine.floats[box.index, w.DISTANCE])
                assert found == pytest.approx(distance, rel=1e-4, abs=1e-30)
            values = [mean(values[0], values[1], 0.5), mean(values[1], values[0], 0.5)]
            for rank in (0, 1):
                assert np.array_equal(memories[rank].view(dtype, count), values[rank])


def test_copies_and_one_sided_rounds(make: Callable[..., DevicePair]) -> None:
    values = values_of(1000, 5)
    both = make(values[0].nbytes)
    memories = [both.memory(each) for each in values]
    both.post(0, memories[0], sender=-1, next_writer=-1)
    both.post(1, memories[1], to=-1, operation=w.COPY, next_writer=-1)
    both.pair.until(both.pair.ended)
    assert np.array_equal(memories[1].view(np.float32, 1000), values[0])
    assert np.array_equal(memories[0].view(np.float32, 1000), values[0])


def test_source_and_target_apart(make: Callable[..., DevicePair]) -> None:
    values = values_of(1000, 6)
    both = make(values[0].nbytes)
    sources, targets = ([both.memory(each) for each in values] for _ in range(2))
    for rank in (0, 1):
        both.post(rank, sources[rank], target=targets[rank].address)
    both.pair.until(both.pair.ended)
    for rank in (0, 1):
        assert np.array_equal(sources[rank].view(np.float32, 1000), values[rank])
        expected = mean(values[rank], values[1 - rank])
        assert np.array_equal(targets[rank].view(np.float32, 1000), expected)


def test_a_chunk_that_is_not_finite_is_left_out(make: Callable[..., DevicePair]) -> None:
    values = values_of(4 * CHUNK // 4, 7)
    values[0][3] = np.nan  # chunk 0
    values[1][CHUNK // 4] = np.inf  # chunk 1
    both = make(values[0].nbytes)
    memories = [both.memory(each) for each in values]
    for rank in (0, 1):
        both.post(rank, memories[rank])
    both.pair.until(both.pair.ended)
    apart = 2 * CHUNK // 4
    for rank in (0, 1):
        found = memories[rank].view(np.float32, len(values[0]))
        assert found[:apart].tobytes() == values[rank][:apart].tobytes()
        expected = mean(values[rank][apart:], values[1 - rank][apart:])
        assert np.array_equal(found[apart:], expected)
        assert both.pair.word(rank, w.SPOILED) == 1
        assert both.pair.word(rank, w.OWN_SPOILED) == 1
        engine, box = both.pair.engines[rank], both.pair.boxes[rank]
        assert np.isfinite(engine.floats[box.index, w.DISTANCE])


def test_of_a_run_one_chunk_is_left_out(make: Callable[..., DevicePair]) -> None:
    """All four are mixed by one launch, and have results of their own."""
    values = values_of(PLACES * CHUNK // 4, 31)
    bad = slice(2 * CHUNK // 4, 3 * CHUNK // 4)
    values[1][bad.start + 7] = np.nan
    both = make(values[0].nbytes)
    memories = [both.memory(each) for each in values]
    for rank in (0, 1):
        both.post(rank, memories[rank], held=1)
    both.pair.until(lambda: both.came(0, 1))
    for rank in (0, 1):
        both.stagings[rank].unheld()
        both.pair.engines[rank].unhold(both.pair.boxes[rank])
    both.pair.until(both.pair.ended)
    assert calls(both.device)["kernel 2"] == 2
    for rank in (0, 1):
        expected = mean(values[rank], values[1 - rank])
        expected[bad] = values[rank][bad]
        found = memories[rank].view(np.float32, len(expected))
        assert found.tobytes() == expected.tobytes()
        spoiled = both.pair.word(rank, w.SPOILED), both.pair.word(rank, w.OWN_SPOILED)
        assert spoiled == ((1, 0) if rank == 0 else (0, 1))
        rest = np.delete((values[1] - values[0]).astype(np.float64), np.arange(bad.start, bad.stop))
        distance = both.pair.engines[rank].floats[both.pair.boxes[rank].index, w.DISTANCE]
        assert distance == pytest.approx(float(rest @ rest), rel=1e-4)


def test_allowed_values_are_mixed(make: Callable[..., DevicePair]) -> None:
    values = values_of(100, 8)
    values[0][3] = np.nan
    both = make(values[0].nbytes)
    memories = [both.memory(each) for each in values]
    for rank in (0, 1):
        both.post(rank, memories[rank], whole=0)
    both.pair.until(both.pair.ended)
    for rank in (0, 1):
        assert np.isnan(memories[rank].view(np.float32, 100)[3])
        assert both.pair.word(rank, w.SPOILED) == 0


# --- order -------------------------------------------------------------------------------------


def test_nothing_leaves_before_the_sources_event(make: Callable[..., DevicePair]) -> None:
    values = values_of(700, 9)
    both = make(values[0].nbytes, pace=0)
    memories = [both.memory(np.full(700, np.nan, np.float32)) for _ in values]
    for rank in (0, 1):

        def write(rank: int = rank) -> None:
            memories[rank].view(np.float32, 700)[:] = values[rank]

        both.device.compute(write)
        both.post(rank, memories[rank])
    both.pair.settle(0)
    assert both.device.log == [] and both.word(0, d.COPIED) == 0
    assert both.pair.word(0, w.PUT) == both.pair.word(1, w.PUT) == 0
    assert "compute" in both.pair.engines[0].describe_wait(both.pair.boxes[0], 1.0).what
    both.device.pace = 1
    both.pair.until(both.pair.ended)
    for rank in (0, 1):
        expected = mean(values[rank], values[1 - rank])
        assert np.array_equal(memories[rank].view(np.float32, 700), expected)


def test_a_chunk_is_put_once_its_copy_has_completed(make: Callable[..., DevicePair]) -> None:
    values = values_of(3 * CHUNK // 4, 10)
    both = make(values[0].nbytes, pace=0)
    memories = [both.memory(each) for each in values]
    for rank in (0, 1):
        both.post(rank, memories[rank])
    both.tick_out(HOST)
    both.pair.settle(0)
    assert both.word(0, d.COPIED) == 3 and both.word(0, d.LEFT) == 0
    assert both.pair.word(0, w.PUT) == 0
    both.device.tick(OUT)  # the copy of a rank's first chunk, whose event has not completed
    both.pair.settle(0)
    assert both.pair.word(0, w.PUT) == both.pair.word(1, w.PUT) == 0
    both.device.pace = 1
    both.pair.until(both.pair.ended)


def test_in_place_a_chunk_is_mixed_after_its_own_copy_left(
    make: Callable[..., DevicePair],
) -> None:
    values = values_of(700, 11)
    both = make(values[0].nbytes, on=(0,), pace=0)
    memories = [both.memory(each) for each in values]
    for rank in (0, 1):
        both.post(rank, memories[rank])
    both.tick_out(HOST)
    both.pair.settle(0)
    assert both.pair.word(1, w.SENT) == both.pair.word(1, w.PARTS)  # all has arrived
    assert both.word(0, d.ENQUEUED) == 0
    assert np.array_equal(memories[0].view(np.float32, 700), values[0])
    both.tick_out(OUT)
    both.step(0)
    assert both.word(0, d.ENQUEUED) > 0
    both.device.pace = 1
    both.pair.until(both.pair.ended)


def test_no_credit_before_the_mix_has_completed(make: Callable[..., DevicePair]) -> None:
    """The slot stays its sender's until the device has read it, however far that is ahead."""
    values = values_of(100, 12)
    both = make(values[0].nbytes, depth=1, on=(0,), pace=0)
    memories = [both.memory(each) for each in values]
    for rank in (0, 1):
        both.post(rank, memories[rank])
    both.tick_out(HOST)
    both.pair.settle(0)
    both.tick_out(OUT)
    both.pair.until(lambda: both.pair.ended(1))
    both.step(0)
    assert both.launched(0) and both.pair.word(0, w.MIXED) == 0
    again = both.memory(values[0] + 1)
    both.post(1, again)  # the next round, into the only slot
    both.pair.settle(0)
    assert both.pair.word(1, w.PUT) == 0
    slot = both.pair.boxes[0].slot(0, np.float32, 100)
    assert np.array_equal(slot, values[1])
    both.tick_out(IN)
    both.pair.until(lambda: both.pair.ended(0))
    assert np.array_equal(memories[0].view(np.float32, 100), mean(values[0], values[1]))
    both.post(0, memories[0])
    both.device.pace = 1
    both.pair.until(both.pair.ended)


def test_done_is_recorded_after_the_last_mix(make: Callable[..., DevicePair]) -> None:
    values = values_of(6 * CHUNK // 4, 13)
    both = make(values[0].nbytes, on=(0,), pace=1)
    memories = [both.memory(each) for each in values]
    for rank in (0, 1):
        both.post(rank, memories[rank])
    both.pair.until(both.pair.ended)
    log = both.device.log
    done = log.index(f"event {both.stagings[0].done_event}")
    kernels = {i: what.split() for i, what in enumerate(log) if what.startswith("kernel")}
    assert sum(int(words[3]) for words in kernels.values()) == 12  # two a chunk
    assert max(kernels) < done


def test_a_stream_joins_while_mixes_are_under_way(make: Callable[..., DevicePair]) -> None:
    """`join_stream` after the launch gives whole values, before the round has ended."""
    values = values_of(2000, 14)
    both = make(values[0].nbytes, pace=0)
    memories = [both.memory(each) for each in values]
    for rank in (0, 1):
        both.post(rank, memories[rank])
    both.tick_out(HOST)

    def launched() -> bool:
        both.tick_out(OUT)
        return both.launched(0) and both.launched(1)

    both.pair.until(launched)
    assert not both.pair.ended(0)
    for rank in (0, 1):
        assert both.stagings[rank].join_stream() == HOST
        expected = mean(values[rank], values[1 - rank])
        assert np.array_equal(memories[rank].view(np.float32, 2000), expected)
    both.device.pace = 1
    both.pair.until(both.pair.ended)


def test_a_held_round_mixes_after_the_streams_work(make: Callable[..., DevicePair]) -> None:
    values = values_of(700, 15)
    both = make(values[0].nbytes, pace=1)
    memories = [both.memory(each) for each in values]
    for rank in (0, 1):
        both.post(rank, memories[rank], held=1)
    both.pair.settle(0, 300)
    assert both.word(0, d.ENQUEUED) == 0
    assert both.pair.word(0, w.SENT) == both.pair.word(0, w.PARTS)
    both.device.pace = 0
    read = []
    both.device.compute(lambda: read.append(memories[0].view(np.float32, 700).copy()))
    for rank in (0, 1):
        both.stagings[rank].unheld()
        both.pair.engines[rank].unhold(both.pair.boxes[rank])
    both.pair.settle(0)
    assert both.launched(0)  # the host need not wait for the stream
    both.tick_out(IN)
    assert np.array_equal(memories[0].view(np.float32, 700), values[0])
    both.device.pace = 1
    both.pair.until(both.pair.ended)
    assert np.array_equal(read[0], values[0])
    assert np.array_equal(memories[0].view(np.float32, 700), mean(values[0], values[1]))


@pytest.mark.parametrize("bytes_staged", [0, 6 * CHUNK, 1 << 20])
def test_more_small_chunks_are_staged(
    make: Callable[..., DevicePair], monkeypatch: pytest.MonkeyPatch, bytes_staged: int
) -> None:
    monkeypatch.setattr(staging_module, "STAGED", bytes_staged)
    values = values_of(8 * CHUNK // 4, 26)
    both = make(values[0].nbytes)
    places = min(8, max(PLACES, bytes_staged // CHUNK))
    assert both.stagings[0].words[d.OUT_PLACES] == both.stagings[0].words[d.IN_PLACES] == places
    memories = [both.memory(each) for each in values]
    for rank in (0, 1):
        both.post(rank, memories[rank])
    both.pair.until(both.pair.ended)
    for memory in memories:
        found = memory.view(np.float32, 8 * CHUNK // 4)
        np.testing.assert_allclose(found, (values[0] + values[1]) / 2, atol=1e-6)


@pytest.mark.parametrize("direct", [False, True], ids=["staged", "direct"])
def test_a_held_round_is_launched_before_the_stream_has_ended(
    make: Callable[..., DevicePair], direct: bool
) -> None:
    """However many chunks it has: what the stream computes may end as late as it likes."""
    count = 4 * PLACES * CHUNK // 4
    values = values_of(count, 25)
    both = make(values[0].nbytes, direct=direct)
    memories = [both.memory(each) for each in values]
    for rank in (0, 1):
        both.post(rank, memories[rank], held=1)
    both.pair.until(lambda: all(both.pair.word(r, w.SENT) == 4 * PLACES for r in (0, 1)))
    read = []
    both.device.stalled = {HOST}
    both.device.compute(lambda: read.append(memories[0].view(np.float32, count).copy()))
    for rank in (0, 1):
        both.stagings[rank].unheld()
        both.pair.engines[rank].unhold(both.pair.boxes[rank])
    both.pair.until(lambda: both.launched(0) and both.launched(1))
    both.pair.settle(0)
    assert not read and both.pair.word(0, w.MIXED) == 0
    both.device.stalled = set()
    both.pair.until(both.pair.ended)
    assert np.array_equal(read[0], values[0])
    for rank in (0, 1):
        expected = mean(values[rank], values[1 - rank])
        assert np.array_equal(memories[rank].view(np.float32, count), expected)


def test_what_waits_on_the_device_is_limited(make: Callable[..., DevicePair]) -> None:
    """Over all mailboxes: a driver's call blocks when its queue is full."""
    most = PLACES * (d.MOST_IN_FLIGHT - 1)  # and what the round needs besides
    chunks = most + 8
    values = values_of(chunks * CHUNK // 4, 26)
    both = make(values[0].nbytes, pace=40)
    more = both.another(2 * CHUNK)
    memories = [both.memory(each) for each in values]
    small = [both.memory(each[: 2 * CHUNK // 4]) for each in values]
    for rank in (0, 1):
        both.post(rank, memories[rank], held=1)
    both.pair.until(lambda: all(both.pair.word(r, w.SENT) == chunks for r in (0, 1)))
    both.device.stalled = {HOST}
    for rank in (0, 1):
        both.device.compute(lambda: None)
        both.stagings[rank].unheld()
        both.pair.engines[rank].unhold(both.pair.boxes[rank])
    both.pair.until(lambda: both.word(0, d.ENQUEUED) == both.word(1, d.ENQUEUED) == most)
    both.device.stalled = {IN}
    for rank in (0, 1):
        more.post(rank, small[rank])
    both.pair.settle(0, 100)
    assert both.word(0, d.ENQUEUED) == most and more.word(0, d.ENQUEUED) == 0
    both.device.stalled = set()
    both.pair.until(lambda: both.pair.ended() and more.pair.ended())
    for rank in (0, 1):
        expected = mean(values[rank], values[1 - rank])
        assert np.array_equal(memories[rank].view(np.float32, len(expected)), expected)
        head = small[rank].view(np.float32, 2 * CHUNK // 4)
        assert np.array_equal(head, expected[: len(head)])


@pytest.mark.parametrize("tuning", [engines.TUNING, engines.MESSAGES], ids=["puts", "messages"])
def test_rounds_that_wait_for_chunks_keep_no_other_from_ending(
    make: Callable[..., DevicePair], tuning: Any
) -> None:
    """More rounds than may wait on the device, whose first chunks all come before any last one."""
    most, chunks = 8, 2 * PLACES
    values = values_of(chunks * CHUNK // 4, 27)
    boxes = [make(values[0].nbytes, pace=0, tuning=tuning)]
    boxes += [boxes[0].another(values[0].nbytes) for _ in range(most + 3)]
    device = boxes[0].device
    memories = [[each.memory(mine) for mine in values] for each in boxes]
    for both, memory in zip(boxes, memories, strict=True):
        for rank in (0, 1):
            both.stagings[rank].words[d.MOST] = most
            both.post(rank, memory[rank])

    def ended() -> bool:
        for stream in (OUT, IN, HOST):  # so that the copies of each round wait for all others'
            device.tick(stream)
        return all(both.pair.ended() for both in boxes)

    boxes[0].pair.until(ended)
    for memory in memories:
        for rank in (0, 1):
            expected = mean(values[rank], values[1 - rank])
            assert np.array_equal(memory[rank].view(np.float32, len(expected)), expected)


@pytest.mark.parametrize("direct", [False, True], ids=["staged", "direct"])
@pytest.mark.parametrize("whole", [0, 1])
def test_what_has_come_is_mixed_in_few_calls(
    make: Callable[..., DevicePair], direct: bool, whole: int
) -> None:
    """A held round has all its chunks there: staged, as many as there are places; direct, all."""
    chunks = 4 * PLACES
    count = chunks * CHUNK // 4 - 5
    values = values_of(count, 28)
    both = make(values[0].nbytes, on=(0, 1) if direct else (0,), direct=direct)
    memories = [both.memory(each) for each in values]
    for rank in (0, 1):
        both.post(rank, memories[rank], held=1, whole=whole)
    both.pair.until(lambda: both.came(0, 1))
    out = calls(both.device)
    ranks = len(both.on)
    assert out["copy"] == ranks * (1 + (1 if direct else chunks // (PLACES // 2)))  # one: zeros
    both.device.log.clear()
    for rank in both.on:
        both.stagings[rank].unheld()
    for rank in (0, 1):
        both.pair.engines[rank].unhold(both.pair.boxes[rank])
    both.pair.until(both.pair.ended)
    runs = ranks * (1 if direct else chunks // PLACES)
    found = calls(both.device)
    kernels = [found[f"kernel {each}"] for each in range(3)]
    assert kernels == ([0, runs, runs] if whole else [runs, 0, 0])
    assert found["copy"] == ranks + (0 if direct else runs)  # one for the results
    assert found["event"] == runs + 3 * ranks  # that of the target, that it is done, and the end
    for rank in (0, 1):
        expected = mean(values[rank], values[1 - rank])
        assert np.array_equal(memories[rank].view(np.float32, count), expected)


def test_what_comes_while_others_are_mixed_waits_for_nothing(
    make: Callable[..., DevicePair],
) -> None:
    """A run is what has come: the first chunk is not kept until the second is there."""
    values = values_of(3 * CHUNK // 4, 29)
    both = make(values[0].nbytes, on=(0,), pace=0)
    memories = [both.memory(each) for each in values]
    both.post(0, memories[0])
    both.tick_out(HOST)
    both.pair.settle(0)
    both.tick_out(OUT)
    both.pair.settle(0)
    both.post(1, memories[1])
    both.pair.until(lambda: both.pair.word(1, w.PUT) == 1, 1)
    both.pair.until(lambda: both.word(0, d.ENQUEUED) == 1, 0)
    both.device.pace = 1
    both.pair.until(both.pair.ended)
    assert np.array_equal(memories[0].view(np.float32, len(values[0])), mean(*values))


def test_launched_is_waited_for(make: Callable[..., DevicePair]) -> None:
    """`Engine.wait(launched=True)` returns while the device still mixes."""
    values = values_of(100, 16)
    both = make(values[0].nbytes, on=(0,), pace=0)
    memories = [both.memory(each) for each in values]
    for rank in (0, 1):
        both.post(rank, memories[rank])
    both.tick_out(HOST)
    engine, box = both.pair.engines[0], both.pair.boxes[0]
    assert not engine.wait(box, 0.01, launched=True)
    both.tick_out(OUT)
    both.pair.settle(0)
    assert engine.wait(box, engines.DEADLINE_S, launched=True)
    assert engine.active(box) and not engine.wait(box, 0.01)
    assert engine.launched(box)
    error = engine.describe_wait(box, 1.0)
    assert (error.rank, error.what) == (0, "to mix on fake:0 what has come")
    both.device.pace = 1
    assert engine.wait(box, engines.DEADLINE_S)


# --- what goes wrong ---------------------------------------------------------------------------


@pytest.mark.parametrize("function", ["query", "record", "copy", "launch", "push"])
def test_an_error_of_the_device_ends_the_round(
    make: Callable[..., DevicePair], function: str
) -> None:
    values = values_of(100, 17)
    both = make(values[0].nbytes, on=(0,), pace=1)
    memories = [both.memory(each) for each in values]
    for rank in (0, 1):
        both.post(rank, memories[rank])
    both.device.fails[function] = 719
    both.pair.until(lambda: both.pair.word(0, w.STATE) == w.FAILED)
    assert both.pair.word(0, w.FAILURE) == w.DEVICE_FAILED - 719
    both.device.fails.clear()


def test_a_corrupt_chunk_is_not_mixed(make: Callable[..., DevicePair]) -> None:
    values = values_of(100, 18)
    both = make(values[0].nbytes, on=(0,), pace=1, verify=True)
    memories = [both.memory(each) for each in values]
    for rank in (0, 1):
        both.post(rank, memories[rank])
    both.pair.until(both.pair.ended)
    both.post(1, memories[1])
    both.pair.until(lambda: both.pair.word(1, w.SENT) == 1, 1, 0)
    both.pair.settle(0)
    both.pair.boxes[0].slot(1, np.float32, 100)[0] += 1
    before = memories[0].view(np.float32, 100).copy()
    both.post(0, memories[0])
    both.pair.until(lambda: both.pair.word(0, w.STATE) != w.ACTIVE)
    assert both.pair.word(0, w.FAILURE) == w.CORRUPT
    assert np.array_equal(memories[0].view(np.float32, 100), before)


def test_chunks_before_a_corrupt_one_are_mixed(make: Callable[..., DevicePair]) -> None:
    """Of chunks that have all come; the error names the one."""
    values = values_of(3 * CHUNK // 4, 30)
    both = make(values[0].nbytes, on=(0,), verify=True)
    memories = [both.memory(each) for each in values]
    for rank in (0, 1):
        both.post(rank, memories[rank], held=1 - rank)
    both.pair.until(lambda: both.pair.word(0, w.SENT) == both.pair.word(1, w.SENT) == 3)
    both.pair.boxes[0].slot(0, np.float32, len(values[0]))[CHUNK // 4 + 3] += 1
    both.stagings[0].unheld()
    both.pair.engines[0].unhold(both.pair.boxes[0])
    both.pair.until(lambda: both.pair.word(0, w.STATE) == w.FAILED)
    assert both.pair.word(0, w.FAILURE) == w.CORRUPT and both.pair.word(0, w.MIXED) == 1
    both.tick_out(IN)
    found = memories[0].view(np.float32, len(values[0]))
    assert np.array_equal(found[CHUNK // 4 :], values[0][CHUNK // 4 :])
    first = slice(0, CHUNK // 4)
    assert np.array_equal(found[first], mean(values[0][first], values[1][first]))


def test_a_round_that_is_broken_off_leaves_nothing_running(
    make: Callable[..., DevicePair],
) -> None:
    values = values_of(3 * CHUNK // 4, 19)
    both = make(values[0].nbytes, on=(0,), pace=0)
    memories = [both.memory(each) for each in values]
    for rank in (0, 1):
        both.post(rank, memories[rank])
    both.tick_out(HOST)
    both.pair.settle(0)
    both.tick_out(OUT)
    both.pair.settle(0)
    assert both.word(0, d.ENQUEUED) > 0 and not both.device.idle()
    engine, box = both.pair.engines[0], both.pair.boxes[0]
    pinned = set(both.device.pinned)
    engine.renew(1, elsewhere=True)
    assert both.pair.word(0, w.STATE) == w.BROKEN
    assert both.device.idle()
    found = memories[0].view(np.float32, len(values[0])).reshape(3, -1)
    wanted = mean(values[0], values[1]).reshape(3, -1)
    for chunk, (old, new) in enumerate(zip(values[0].reshape(3, -1), wanted, strict=True)):
        assert np.array_equal(found[chunk], old) or np.array_equal(found[chunk], new)
    start = box.region.address // 4096 * 4096
    assert start in both.device.pinned and set(both.device.pinned) != pinned


def test_what_a_device_still_uses_is_kept_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it does not end its work in time: events, pinned memory, slots that are mapped."""
    kept: list[object] = []
    monkeypatch.setattr(staging_module, "_kept_for_good", kept)
    both = DevicePair(engines.make_pair("shm", 4096, 2), (0, 1), 0, direct=True)
    device, engine, box = both.device, both.pair.engines[0], both.pair.boxes[0]
    monkeypatch.setattr(device, "settle", lambda _: False)
    before = set(device.live), set(device.pinned), list(device.mapped)
    assert all(before)
    assert not engine.leave_ways(engines.DEADLINE_S) and both.stagings[0].ways == [1]
    engine.renew(1, elsewhere=True)
    assert both.stagings[0].ways == [] and not box.retired
    for each in both.pair.engines:
        each.close()
    live, pinned, mapped = before
    assert live == device.live and pinned < set(device.pinned) and mapped == device.mapped
    assert all(staging in kept for staging in both.stagings.values())
    for each in both.pair.engines:
        each.context.close()


def test_memory_that_cannot_be_pinned_is_said(
    make: Callable[..., DevicePair], monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr(fake.FakeDevice, "pin", lambda *_: False)
    values = values_of(100, 20)
    both = make(values[0].nbytes)
    assert "cannot be pinned" in caplog.text
    memories = [both.memory(each) for each in values]
    for rank in (0, 1):
        both.post(rank, memories[rank])
    both.pair.until(both.pair.ended)
    assert np.array_equal(memories[0].view(np.float32, 100), mean(values[0], values[1]))


def test_too_little_memory_leaves_nothing_behind() -> None:
    pair, device = engines.make_pair("shm", 4096, 2), fake.FakeDevice()
    allocate = device.allocate

    def second(nbytes: int) -> Any:
        if device.memories:
            raise DeviceError("cuMemAlloc_v2", 2, "CUDA_ERROR_OUT_OF_MEMORY")
        return allocate(nbytes)

    device.allocate = second
    with pytest.raises(DeviceError):
        pair.engines[0].equip(pair.boxes[0], device)
    assert not device.live and not device.pinned
    for engine in pair.engines:
        engine.close()
        engine.context.close()


def test_the_table_has_room() -> None:
    assert t.KERNELS + 2 * t.PER_KIND <= t.WORDS
    assert d.ARGUMENTS + 2 * d.VALUES <= d.WORDS
