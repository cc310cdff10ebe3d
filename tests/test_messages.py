"""What engines tell each other: credits, bells, chunks in messages and answers; what is malformed.

Two engines in one process, driven in turns by the test, also with NUMBA_DISABLE_JIT=1
(test_interpreted.py).
"""

import time

import numpy as np
import pytest

from engine_pair import ANSWERED, DEADLINE_S, MESSAGES, TUNING, Pair, make_pair
from ucxgossip import jit
from ucxgossip.engine import Engine, credits, drive
from ucxgossip.engine import words as w
from ucxgossip.engine.handlers import on_taken
from ucxgossip.mailbox import Layout, Mailbox
from ucxgossip.scattered import lay_out
from ucxgossip.ucp import Endpoint, ops


@pytest.mark.parametrize("pair", [(64, 2, True), (64, 2)], indirect=True)
def test_message_without_its_checksum_is_dropped(pair: Pair) -> None:
    """And one with a checksum that nobody asked for."""
    engine, target = pair.engines
    header, payload = np.zeros(7, np.int64), np.ones(8)
    wrong = w.HEADER_BYTES if pair.boxes[0].layout.verify else w.CHECKED_HEADER_BYTES
    ops.send(
        engine.endpoints[1].handle,
        w.AM_DATA,
        header.ctypes.data,
        wrong,
        payload.ctypes.data,
        payload.nbytes,
        int(engine.words[w.EAGER_PARAM]),
    )
    pair.until(lambda: target.words[w.MALFORMED] == 1)
    assert not pair.boxes[1].slot(0, np.uint8, 64).any()
    target.words[w.MALFORMED] = 0


@pytest.mark.parametrize("pair", [(64, 4)], indirect=True)
def test_credits_ride_on_small_rounds(pair: Pair, transport: str) -> None:
    """Over a network: after the first one each way no credit is sent by itself."""
    for number in range(12):
        arrays = [np.zeros(8), np.ones(8)]
        for rank, array in enumerate(arrays):
            pair.post(rank, array)
        pair.until(pair.ended)
        assert all((array == 0.5).all() for array in arrays)
        for rank in (0, 1):
            # Over a network what round n said as it was posted; else what was stored at its end,
            # to let the other put round n + 2.
            told = int(pair.boxes[rank].told[1 - rank])
            assert told == number + 4 if transport == "tcp" else number + 2 < told <= number + 5
            assert pair.boxes[1 - rank].credits[rank] == told


@pytest.mark.parametrize("pair", [(64, 4)], indirect=True)
def test_no_credit_rides_where_they_are_exact(pair: Pair) -> None:
    for engine in pair.engines:
        engine.words[w.EXACT] = 1
    for number in range(4):
        arrays = [np.zeros(8), np.ones(8)]
        for rank, array in enumerate(arrays):
            pair.post(rank, array)
        pair.until(pair.ended)
        pair.settle(0)
        # That of round n + 2, which was wanted next, and none beyond.
        assert pair.boxes[0].credits[1] == pair.boxes[1].told[0] == number + 3


def test_a_bell_follows_a_put_only_where_puts_wake_nobody(pair: Pair, transport: str) -> None:
    """Also in a group whose transport is "auto", whose partners on other hosts go over TCP."""
    if transport != "tcp":
        pytest.skip("stores ring only those who doze")
    made = {}
    for ring, lanes in ((True, ["tcp/lo"]), (True, ["rc_mlx5/mlx5_0:1", "tcp/lo"]), (False, [])):
        engine = Engine(pair.engines[0].context, 0, 2, TUNING, ring=ring)
        made[ring, len(lanes)] = engine
        engine_lanes, Endpoint.transports = Endpoint.transports, lambda _, lanes=lanes: lanes
        try:
            engine.connect(1, pair.engines[1].worker.address)
        finally:
            Endpoint.transports = engine_lanes
    assert {key: int(engine._wakes[1]) for key, engine in made.items()} == {
        (True, 1): 1,
        (True, 2): 0,
        (False, 0): 1,
    }
    for engine in made.values():
        engine.close()
    sender = pair.engines[0]
    for wakes in (1, 0):
        sender._wakes[1] = wakes
        before = int(sender.words[w.BELLS])
        arrays = [np.zeros(512), np.ones(512)]
        for rank, array in enumerate(arrays):
            pair.post(rank, array)
        pair.until(pair.ended)
        assert sender.words[w.BELLS] - before == (0 if wakes else pair.word(0, w.PARTS))


def test_the_target_of_a_store_is_woken_if_it_dozes(pair: Pair, transport: str) -> None:
    """A bell after the signal, a message after the credit; none if it is awake."""
    if transport == "tcp":
        pytest.skip("a put over TCP wakes its target")
    box = pair.boxes[1]
    word = box.region.view(np.int64, 1, box.layout.doze)
    worker = int(pair.engines[1].words[w.WORKER])
    for number, dozes in enumerate([0, 1, 0, 1]):
        while ops.progress(worker):
            pass
        pair.open(1, number)
        word[0] = dozes
        array = np.ones(8)
        pair.post(0, array, sender=-1, next_writer=-1)
        pair.until(lambda: pair.ended(0), 0)
        assert bool(ops.progress(worker)) == bool(dozes)
        while ops.progress(worker):
            pass
        credit = (number + 1) * box.layout.chunks
        credits.grant(pair.engines[0].words, pair.engines[0].table[0], 1, credit)
        assert box.credits[0] == credit
        assert bool(ops.progress(worker)) == bool(dozes)
        word[0] = 0


def test_whoever_moves_dozes_no_more(pair: Pair, transport: str) -> None:
    engine, box = pair.engines[1], pair.boxes[1]
    word = box.region.view(np.int64, 1, box.layout.doze)
    array = np.zeros(512)
    pair.post(1, array)
    pair.settle(1)
    deadline = time.monotonic() + DEADLINE_S  # on a busy machine a yield may take a time slice
    while True:
        assert not drive.drive(engine.words, 0, jit.now_ns() + 20_000_000)
        if engine.words[w.SLEEPS] or time.monotonic() > deadline:
            break
    assert word[0] == engine.words[w.DOZING] == (transport == "shm")
    other = np.ones(512)
    pair.post(0, other)
    pair.until(pair.ended)
    assert word[0] == engine.words[w.DOZING] == 0


BAD_HEADERS = [
    [-1, 0, 0, 0, 0, 1],
    [1, 0, 0, 0, 0, 1],
    [1 << 40, 0, 0, 0, 0, 1],
    [0, -1, 0, 0, 0, 1],
    [0, 1 << 47, 0, 0, 0, 1],
    [0, (1 << 48) | 5, 0, 0, 0, 1],
    [0, (1 << 63) - 1, 0, 0, 0, 1],
    [0, 0, 4, 0, 0, 1],
    [0, 0, -1, 0, 0, 1],
    [0, 0, 0, 1, 0, 1],
    [0, 0, 0, 0, -1, 1],
    [0, 0, 0, 0, 2, 1],
    [0, 0, 0, 0, 1 << 40, 1],
    [0, 0, 0, 0, 0, -1],
    [0, 0, 0, 0, 0, (1 << 47) + 1],
    [0, 0, 0, 0, 0],
    [],
]


@pytest.mark.parametrize("ident", [w.AM_DATA, w.AM_CREDIT, w.AM_BELL, w.AM_TAKEN])
@pytest.mark.parametrize("header", BAD_HEADERS, ids=str)
def test_malformed_message_is_counted_and_dropped(
    transport: str, ident: int, header: list[int]
) -> None:
    pair = make_pair(transport, 4096, 2)
    words = np.array([*header, 0], np.int64)
    payload = np.ones(8)
    engine = pair.engines[0]
    before = pair.boxes[1].region.bytes.copy()
    request = ops.send(
        engine.endpoints[1].handle,
        ident,
        words.ctypes.data,
        8 * len(header),
        payload.ctypes.data,
        payload.nbytes,
        int(engine.words[w.EAGER_PARAM]),
    )
    assert request >= 0
    pair.until(lambda: pair.engines[1].words[w.MALFORMED] == 1)
    np.testing.assert_array_equal(pair.boxes[1].region.bytes, before)
    assert not pair.boxes[1].credits.any()
    for each in pair.engines:
        each.close()
        each.context.close()


@pytest.mark.parametrize(
    ("nbytes", "chunk", "count"), [(16, 0, 3), (4096, 0, 129), (4096, 3, 129), (4000, 3, 117)]
)
def test_oversized_payload_is_dropped(transport: str, nbytes: int, chunk: int, count: int) -> None:
    pair = make_pair(transport, nbytes, 2)
    header, payload = np.zeros(6, np.int64), np.ones(count)
    header[2] = chunk
    engine = pair.engines[0]
    ops.send(
        engine.endpoints[1].handle,
        w.AM_DATA,
        header.ctypes.data,
        w.HEADER_BYTES,
        payload.ctypes.data,
        payload.nbytes,
        int(engine.words[w.EAGER_PARAM]),
    )
    pair.until(lambda: pair.engines[1].words[w.MALFORMED] == 1)
    assert pair.boxes[1].intact()
    for each in pair.engines:
        each.close()
        each.context.close()


@pytest.mark.parametrize("pair", [(4096, 2, False, False, MESSAGES)], indirect=True)
def test_a_chunk_that_comes_in_its_turn_is_mixed_out_of_its_message(
    pair: Pair, transport: str
) -> None:
    """And no place is written; over shared memory chunks are stored into the places."""
    left, right = np.arange(512.0), np.arange(512.0) * 3
    pair.post(1, right, to=-1, next_writer=-1)
    pair.post(0, left, sender=-1, next_writer=-1)
    pair.until(pair.ended)
    np.testing.assert_array_equal(right, np.arange(512.0) * 2)
    assert pair.boxes[1].slot(0, np.uint8, 4096).any() == (transport != "tcp")


@pytest.mark.parametrize("pair", [(4096, 2, False, False, MESSAGES)], indirect=True)
def test_so_is_one_that_belongs_to_several_arrays(pair: Pair, transport: str) -> None:
    left = np.arange(512.0)
    arrays = [np.full(size, 100.0) for size in (1, 126, 3, 382)]
    table = lay_out([each.ctypes.data for each in arrays], [each.nbytes for each in arrays])
    pair.post(
        1,
        left,
        source=table.ctypes.data,
        target=table.ctypes.data,
        scattered=1,
        to=-1,
        next_writer=-1,
    )
    pair.post(0, left, sender=-1, next_writer=-1)
    pair.until(pair.ended)
    np.testing.assert_array_equal(np.concatenate(arrays), 50 + np.arange(512.0) / 2)
    assert pair.boxes[1].slot(0, np.uint8, 4096).any() == (transport != "tcp")


@pytest.mark.parametrize("pair", [(4096, 2, False, False, MESSAGES)], indirect=True)
@pytest.mark.parametrize(
    ("in_place", "window", "puts"),
    [(True, 0, 0), (True, 2, 0), (True, 2, 1), (False, 0, 0), (False, 2, 0), (False, 2, 1)],
)
def test_a_chunk_that_comes_before_its_own_has_left_waits_in_its_place(
    pair: Pair, transport: str, in_place: bool, window: int, puts: int
) -> None:
    """In place it would be sent mixed, unless its own can leave just then; else it is mixed.

    Where any mailbox puts its chunks nothing leaves within a handler, which a put may not.
    """
    if transport != "tcp":
        pytest.skip("a store goes into its place")
    if puts:
        engine, larger = pair.engines[1], 2 * MESSAGES.eager
        engine.open(Mailbox(engine.context, Layout(4096, 2, larger)))
    left, right, target = np.arange(512.0), np.arange(512.0) * 3, np.arange(512.0) * 5
    mixed = right if in_place else target
    pair.post(1, right, target=mixed.ctypes.data)
    pair.until(lambda: bool(pair.boxes[0].credits[1]))  # it may not put yet, but be put to
    pair.post(0, left)
    while pair.word(0, w.PUT) == 0:
        drive.drive_once(pair.engines[0].words)
    row = pair.engines[1].table[0]
    row[w.WINDOW] = window
    while pair.word(1, w.MIXED) == 0 and not pair.boxes[1].slot(0, np.uint8, 1024).any():
        ops.progress(pair.engines[1].worker.handle)
    waits = in_place and (window == 0 or puts == 1)
    assert (pair.word(1, w.MIXED) == 0) == waits
    assert pair.boxes[1].slot(0, np.uint8, 1024).any() == waits
    assert pair.word(1, w.SENT) == int(in_place and not waits)
    row[w.WINDOW] = 2
    pair.until(pair.ended)
    np.testing.assert_array_equal(left, np.arange(512.0) * 2)
    np.testing.assert_array_equal(mixed, np.arange(512.0) * (2 if in_place else 3))


@pytest.mark.parametrize(
    "pair",
    [(4096, 2, False, False, MESSAGES), (4096, 2, False, False, ANSWERED)],
    indirect=True,
)
def test_a_round_with_answers_ends_once_its_target_has_all(pair: Pair, transport: str) -> None:
    """Without them once the connection has taken it; over shared memory once it is stored."""
    asks = transport == "tcp" and bool(pair.engines[0].words[w.ANSWERS])
    left, right = np.arange(512.0), np.arange(512.0) * 3
    pair.post(1, right, to=-1, next_writer=-1)
    pair.until(lambda: bool(pair.boxes[0].credits[1]))
    pair.post(0, left, sender=-1, next_writer=-1)
    while pair.word(0, w.SENT) < pair.word(0, w.PARTS):
        drive.drive_once(pair.engines[0].words)
    for _ in range(100):
        drive.drive_once(pair.engines[0].words)
    assert pair.engines[0].active(pair.boxes[0]) == asks
    if asks:
        assert "has all of it" in pair.engines[0].describe_wait(pair.boxes[0], 1.0).what
        for number, rank in ((1, 1), (0, 0)):  # of another round, of another rank
            _say_taken(pair, number, rank)
        assert pair.engines[0].active(pair.boxes[0])
    pair.until(pair.ended)
    np.testing.assert_array_equal(right, np.arange(512.0) * 2)


def _say_taken(pair: Pair, number: int, rank: int) -> None:
    header = np.array([0, number, 3, 0, rank, 0], np.int64)
    address = pair.engines[0].address
    on_taken(address, header.ctypes.data, w.HEADER_BYTES, 0, 0, 0)
    drive.drive_once(pair.engines[0].words)


def test_bell_ahead_of_its_signal_keeps_the_target_awake(pair: Pair) -> None:
    engine, target = pair.engines
    header = np.array([0, 5, 0, 0, 0, 0], np.int64)
    ops.send(
        engine.endpoints[1].handle,
        w.AM_BELL,
        header.ctypes.data,
        w.HEADER_BYTES,
        0,
        0,
        int(engine.words[w.EAGER_PARAM]),
    )
    pair.until(lambda: target.words[w.UNSEEN] == 1)
    from ucxgossip.engine.handlers import all_seen

    assert not all_seen(target.words)
    row = target.table[0]
    signals = jit.view_words(int(row[w.SIGNALS]), 8)
    chunks = int(row[w.CHUNKS])
    signals[5 % 2 * chunks] = 7 * chunks + 1  # a later round's word says that this one was seen
    assert all_seen(target.words)
    assert target.words[w.UNSEEN] == 0
    signals[:] = 0
