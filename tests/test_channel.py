"""Channels: one-way messages that either side may pass over, whole or not at all."""

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import ucxgossip as ug
from ucxgossip import jit
from ucxgossip.channel import Channel
from ucxgossip.engine import channel as engine_channel
from ucxgossip.errors import (
    ArgumentError,
    ExchangeError,
    ExchangeTimeoutError,
    IntegrityError,
    PeerError,
    UCXError,
)
from ucxgossip.mixing.stream import array_of, registered

Job = Callable[..., list[Any]]
DEADLINE_S = 20.0
FLOAT = np.dtype(np.float64)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        jit.yield_cpu()
        assert time.monotonic() < deadline, "deadline"


def to_right(group: ug.Group, nbytes: int, depth: int = 2) -> Channel:
    """Rank 0 sends, rank 1 receives."""
    return Channel(
        group, nbytes, to=1 if group.rank == 0 else None, sender=0 if group.rank else None,
        depth=depth,
    )  # fmt: skip


@pytest.mark.parametrize("transport", ["tcp", "shm"])
@pytest.mark.parametrize("count", [1, 100, 5000, 700_001])
def test_messages_come_whole_and_in_order(job: Job, transport: str, count: int) -> None:
    rounds = 12

    def body(group: ug.Group) -> None:
        channel = to_right(group, 8 * count)
        if group.rank == 0:
            source = registered(group, count, np.dtype(np.float64))
            for number in range(rounds):
                until(lambda: channel.free)
                array_of(source)[:] = np.arange(count) + 1000.0 * number
                channel.put(source)
                channel.wait_sent()
            assert channel.sent == rounds
        else:
            for number in range(rounds):
                channel.wait_arrived(DEADLINE_S)
                expected = np.arange(count) + 1000.0 * number
                assert np.array_equal(channel.view(np.float64, count), expected)
                channel.release()
            assert not channel.arrived
        group.agree("over", {})
        assert channel.mailbox.intact()

    job(2, body, transport)


@pytest.mark.parametrize("transport", ["tcp", "shm"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_sender_passes_over_while_all_slots_are_full(job: Job, transport: str, depth: int) -> None:
    filled, drained = threading.Event(), threading.Event()

    def body(group: ug.Group) -> None:
        channel = to_right(group, 80, depth)
        if group.rank == 0:
            source = registered(group, 10, np.dtype(np.float64))
            for number in range(depth):
                assert channel.free
                array_of(source)[:] = number
                channel.put(source)
                channel.wait_sent()
            assert not channel.free  # all are full, and nobody has read
            filled.set()
            assert drained.wait(DEADLINE_S)
            until(lambda: channel.free)
        else:
            assert filled.wait(DEADLINE_S)
            channel.wait_arrived(DEADLINE_S)
            assert (channel.view(np.float64, 10) == 0).all()
            assert not channel.free  # this rank sends to nobody
            channel.release()
            drained.set()
        group.agree("over", {})

    job(2, body, transport)


def test_what_has_not_come_is_not_there(job: Job) -> None:
    def body(group: ug.Group) -> None:
        channel = to_right(group, 64)
        assert not channel.arrived
        group.agree("looked", {})
        with pytest.raises(ArgumentError, match="puts nothing" if group.rank else "nobody puts"):
            channel.put(registered(group, 8, FLOAT)) if group.rank else channel.release()
        if group.rank:
            with pytest.raises(ExchangeTimeoutError, match="for rank 0 to put message 0"):
                channel.wait_arrived(0.05)
        group.agree("over", {})

    job(2, body)


def test_half_a_message_is_no_message(as_ranks: Any, store: Any) -> None:
    """Chunks are put one by one; the last one's signal alone does not make a message."""

    def rank(number: int) -> None:
        tuning = ug.Tuning(chunk=64, window=1, eager=0)
        with ug.join(number, 2, store, "shm", 30.0, tuning=tuning) as group:
            channel = to_right(group, 256)
            if number == 1:
                from ucxgossip.engine import words as w
                from ucxgossip.mailbox import signal_word

                row = group.engine.table[channel.mailbox.index]
                signals = jit.view_words(int(row[w.SIGNALS]), 4)
                signals[3] = signal_word(0, 3)
                assert not channel.arrived
                signals[:] = [signal_word(0, position) for position in range(4)]
                assert channel.arrived
                signals[:] = 0
            group.agree("over", {})

    for end in as_ranks(2, rank):
        assert end is None, end


@pytest.mark.parametrize("transport", ["tcp", "shm"])
@pytest.mark.parametrize("count", [8, 100, 5000])
def test_verified_messages(as_ranks: Any, store: Any, transport: str, count: int) -> None:
    """Whole ones pass; one flipped byte, in any chunk, ends the group with a named error."""
    tuning = ug.Tuning(chunk=4096, window=2, eager=1024)

    def rank(number: int) -> None:
        with ug.join(number, 2, store, transport, 30.0, tuning=tuning, verify=True) as group:
            channel = to_right(group, 8 * count)
            source = registered(group, count, FLOAT)
            for message in range(5):
                if number == 0:
                    until(lambda: channel.free)
                    array_of(source)[:] = np.arange(count) + message
                    channel.put(source)
                    channel.wait_sent()
                    continue
                channel.wait_arrived(DEADLINE_S)
                assert channel.arrived  # asked again, it is not read again
                found = channel.view(np.float64, count)
                np.testing.assert_array_equal(found, np.arange(count) + message)
                channel.release()
            if number == 0:
                until(lambda: channel.free)
                channel.put(source)
                channel.wait_sent()
            group.agree("put", {})
            if number == 1:
                what = (group.engine.words, channel.mailbox.index, channel.taken, 8 * count)
                until(lambda: engine_channel.complete(*what))
                channel.view(np.uint8, 8 * count)[8 * count - 3] ^= 4
                with pytest.raises(IntegrityError, match="put by rank 0") as caught:
                    channel.arrived  # noqa: B018
                error = caught.value
                assert (error.rank, error.mailbox) == (0, channel.mailbox.index)
                assert (error.round, error.chunk) == (5, (8 * count - 1) // 4096)
                assert group.failed

    ends = as_ranks(2, rank)
    assert ends[1] is None, ends[1]
    assert ends[0] is None or isinstance(ends[0], PeerError), ends[0]


def test_failed_put_is_told_and_not_forgotten(as_ranks: Any, store: Any) -> None:
    def rank(number: int) -> None:
        from ucxgossip.engine import words as w

        with ug.join(number, 2, store, "shm", 30.0) as group:
            channel = to_right(group, 80)
            if number == 0:
                source = registered(group, 10, np.dtype(np.float64))
                channel.put(source)
                channel.wait_sent()
                row = group.engine.table[channel.mailbox.index]
                row[w.FAILURE], row[w.STATE] = -3, w.FAILED
                for look in (lambda: channel.free, channel.wait_sent):
                    with pytest.raises((UCXError, ExchangeError)):
                        look()

    sender, receiver = as_ranks(2, rank)
    assert sender is None, sender
    assert receiver is None or isinstance(receiver, PeerError), receiver  # if it heard in time


def test_waiting_for_a_rank_that_left_ends_with_its_reason(as_ranks: Any, store: Any) -> None:
    def rank(number: int) -> None:
        group = ug.join(number, 2, store, "shm", 30.0)
        channel = to_right(group, 80)
        if number == 0:
            group.abort("on purpose")
        else:
            with pytest.raises(PeerError, match="on purpose"):
                channel.wait_arrived(DEADLINE_S)
        group.close()

    for end in as_ranks(2, rank):
        assert end is None, end
