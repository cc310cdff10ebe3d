"""Chunks that go straight into the partner's slots on its device: engine.device_rounds, staging.

As test_device_rounds; processes, and what a driver maps between them, are for the tests marked
`gpu`.
"""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import engine_pair as engines
import fake_device as fake
from device_pair import CHUNK, DevicePair, calls, mean, values_of
from ucxgossip.engine import device_rounds as d
from ucxgossip.engine import staging as staging_module
from ucxgossip.engine import words as w
from ucxgossip.engine.staging import PLACES
from ucxgossip.errors import DeviceError

OUT, HOST = fake.OUT, fake.HOST


def test_chunks_go_straight_to_the_partners_device(make: Callable[..., DevicePair]) -> None:
    """No host slot is written; a chunk is signalled once its copy has completed, and not before."""
    values = values_of(3 * CHUNK // 4, 21)
    both = make(values[0].nbytes, pace=0, direct=True)
    memories = [both.memory(each) for each in values]
    for rank in (0, 1):
        both.post(rank, memories[rank])
    both.tick_out(HOST)
    both.pair.settle(0)
    assert both.word(0, d.COPIED) == 3 and both.pair.word(0, w.PUT) == 0
    both.device.tick(OUT)
    both.pair.settle(0)
    assert both.pair.word(0, w.PUT) == both.pair.word(1, w.PUT) == 0
    both.device.pace = 1
    both.pair.until(both.pair.ended)
    for rank in (0, 1):
        expected = mean(values[rank], values[1 - rank])
        assert np.array_equal(memories[rank].view(np.float32, len(values[0])), expected)
        assert not both.pair.boxes[rank].slot(0, np.uint8, values[0].nbytes).any()
        assert both.stagings[rank].ways == [1 - rank]


def test_what_is_copied_at_a_time_and_before_any_has_come_is_limited(
    make: Callable[..., DevicePair], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each run has an event of its own, of which there are as many as staging places."""
    monkeypatch.setattr(staging_module, "LONGEST_RUN_BY_WAY", 2 * CHUNK + 8)
    chunks = 4 * PLACES
    values = values_of(chunks * CHUNK // 4, 32)
    both = make(values[0].nbytes, pace=0, direct=True)
    memories = [both.memory(each) for each in values]
    for rank in (0, 1):
        both.post(rank, memories[rank])
    both.tick_out(HOST)
    both.pair.settle(0)
    for rank in (0, 1):
        assert both.word(rank, d.OUT_RUNS) == PLACES and both.word(rank, d.COPIED) == 2 * PLACES
        assert both.pair.word(rank, w.PUT) == 0
    both.tick_out(OUT)
    both.step(0, 2)  # one sees that it has left, one signals
    assert both.pair.word(0, w.PUT) == 2 * PLACES  # all that has left is signalled at once
    both.device.pace = 1
    both.pair.until(both.pair.ended)
    assert calls(both.device)["copy"] == 2 * (chunks // 2 + 2)  # and of each zeros and results
    for rank in (0, 1):
        expected = mean(values[rank], values[1 - rank])
        assert np.array_equal(memories[rank].view(np.float32, len(expected)), expected)


def test_direct_waits_for_the_credit_of_its_place(make: Callable[..., DevicePair]) -> None:
    values = values_of(500, 23)
    both = make(values[0].nbytes, depth=1, pace=1, direct=True)
    memories = [both.memory(each) for each in values]
    both.post(0, memories[0])  # rank 1 has not posted, and has given no credit
    both.pair.settle(0)
    assert both.word(0, d.PHASE) == d.MOVING and both.word(0, d.COPIED) == 0
    both.post(1, memories[1])
    both.pair.until(both.pair.ended)
    assert np.array_equal(memories[0].view(np.float32, 500), mean(values[0], values[1]))


def test_ways_end_with_a_change_of_members(make: Callable[..., DevicePair]) -> None:
    values = values_of(500, 24)
    both = make(values[0].nbytes, pace=1, direct=True)
    memories = [both.memory(each) for each in values]
    for rank in (0, 1):
        both.post(rank, memories[rank])
    both.pair.until(both.pair.ended)
    assert both.device.mapped
    for engine in both.pair.engines:
        engine.renew(1, elsewhere=True)
    for rank in (0, 1):
        assert both.stagings[rank].ways == []
        assert both.word(rank, d.SLOTS_HERE) == both.word(rank, d.WAYS) == 0
    assert both.device.mapped == []
    exported = both.device.exported
    assert both.stagings[0].expose() == b"" and both.device.exported == exported
    assert both.word(0, d.SLOTS_HERE) == 0


def test_ways_are_left_once_all_has_gone_by_them(make: Callable[..., DevicePair]) -> None:
    """Also of a round that is held for ever; what it sent can still be mixed."""
    values = values_of(8 * CHUNK // 4, 27)
    both = make(values[0].nbytes, direct=True)
    memories = [both.memory(each) for each in values]
    for rank in (0, 1):
        both.post(rank, memories[rank], held=1)
    engine = both.pair.engines[0]
    assert not engine.leave_ways(0.0) and both.stagings[0].ways == [1]
    both.pair.settle(0, 3)
    assert both.pair.word(0, w.SENT) < 8
    left = threading.Event()

    def serve() -> None:  # a connection over TCP that is not through yet takes both
        while not left.is_set():
            both.pair.step(1)

    partner = threading.Thread(target=serve)
    partner.start()
    try:
        assert engine.leave_ways(engines.DEADLINE_S)
    finally:
        left.set()
        partner.join(engines.DEADLINE_S)
    assert both.pair.word(0, w.SENT) == 8 and both.stagings[0].ways == []
    both.stagings[1].unheld()
    both.pair.engines[1].unhold(both.pair.boxes[1])
    both.pair.until(lambda: both.pair.ended(1))
    assert np.array_equal(memories[1].view(np.float32, len(values[1])), mean(values[1], values[0]))


def test_ways_are_tried_before_they_are_taken(make: Callable[..., DevicePair]) -> None:
    both = make(4096, pace=1)
    here, there = both.stagings[0], both.stagings[1]
    token = bytes(range(16))
    assert not there.seen(0, token)
    handle = there.expose()
    assert handle == there.expose() and both.device.exported == 1
    address = here.try_way(1, 0, handle, token)
    assert there.seen(0, token) and not there.seen(1, token) and not there.seen(5, token)
    here.take_way(1, address)
    assert here.ways == [1]
    assert here.try_way(1, 0, b"1 5", token) == 0  # of another process


def test_a_way_on_which_the_driver_fails_is_none(
    make: Callable[..., DevicePair], monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """Peers that it maps and cannot connect, or does not map: the log has its error."""
    caplog.set_level("INFO", "ucxgossip")
    both = make(4096)
    handle = both.stagings[1].expose()

    def fail(*_: object) -> None:
        raise DeviceError("cuMemcpyAsync", 217, "CUDA_ERROR_PEER_ACCESS_UNSUPPORTED")

    monkeypatch.setattr(both.device, "write", fail)
    assert both.stagings[0].try_way(1, 0, handle, bytes(16)) == 0
    assert both.device.mapped == []
    said = "rank 0: no way to rank 1's device: {}: CUDA_ERROR_PEER_ACCESS_UNSUPPORTED (217)"
    assert said.format("cuMemcpyAsync") in caplog.text
    monkeypatch.setattr(both.device, "map", lambda _: fail(0))
    assert both.stagings[0].try_way(1, 0, handle, bytes(16)) == 0
    assert len(caplog.messages) == 2 and caplog.messages[0] == caplog.messages[1]


def test_no_ways_where_checksums_travel_or_nothing_is_exported(
    make: Callable[..., DevicePair],
) -> None:
    assert make(4096, verify=True).stagings[0].expose() == b""
    both = make(4096)
    both.device.exports = False
    assert both.stagings[0].expose() == b""
    assert both.word(0, d.SLOTS_HERE) == 0
