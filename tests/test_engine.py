"""Two engines in one process, driven in turns by the test: every step of a round is under control.

The whole file also runs with NUMBA_DISABLE_JIT=1 (test_interpreted.py), where the state machine,
the handlers and the UCX calls are plain Python.
"""

import ast
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from numba import config

from ucxgossip import jit
from ucxgossip.engine import Constants, Engine, Post, credits, drive, ways
from ucxgossip.engine import words as w
from ucxgossip.engine.checks import checksum
from ucxgossip.engine.handlers import on_taken
from ucxgossip.errors import ArgumentError, ClosedError, ExchangeError
from ucxgossip.mailbox import Layout, Mailbox, parse_description
from ucxgossip.scattered import lay_out
from ucxgossip.ucp import Context, Endpoint, RemoteKey, ops

DEADLINE_S = 30.0
CANARY = 64
TUNING = Constants(eager=64, chunk=1024, window=3)
MESSAGES = Constants(eager=1024, chunk=1024, window=3)
"""Each chunk is a message; with `TUNING` it is a put."""
ANSWERED = replace(MESSAGES, answers=True)


@dataclass
class Pair:
    """Rank 0 and rank 1, connected both ways by one mailbox each."""

    engines: list[Engine]
    boxes: list[Mailbox]

    def post(self, rank: int, array: np.ndarray, **changes: object) -> None:
        """Start a round of `array`, in place, with the other rank."""
        other = 1 - rank
        what = {
            "source": array.ctypes.data,
            "target": array.ctypes.data,
            "nbytes": array.nbytes,
            "to": other,
            "sender": other,
            "operation": w.MIX_FLOAT64 if array.dtype == np.float64 else w.MIX_FLOAT32,
            "next_writer": other,
            "whole": 1,
        }
        self.engines[rank].post(self.boxes[rank], Post(**{**what, **changes}))  # type: ignore[arg-type]

    def open(self, rank: int, *numbers: int) -> None:
        """Let the other rank write the slots of these rounds of `rank`."""
        engine, box = self.engines[rank], self.boxes[rank]
        for number in numbers:
            credit = (number + 1) * box.layout.chunks
            assert credits.grant(engine.words, engine.table[box.index], 1 - rank, credit) == 0

    def step(self, *ranks: int) -> None:
        for rank in ranks or (0, 1):
            drive.drive_once(self.engines[rank].words)

    def until(self, condition: Callable[[], bool], *ranks: int) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            self.step(*ranks)
            assert time.monotonic() < deadline, "deadline"

    def word(self, rank: int, index: int) -> int:
        return int(self.engines[rank].table[self.boxes[rank].index, index])

    def settle(self, rank: int, passes: int = 50) -> None:
        """Give `rank` and its partner every chance to move."""
        for _ in range(passes):
            self.step(rank, 1 - rank)

    def ended(self, *ranks: int) -> bool:
        return all(self.word(rank, w.STATE) == w.DONE for rank in ranks or (0, 1))


@pytest.fixture(params=["tcp", "shm"])
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def make_pair(
    transport: str,
    nbytes: int,
    depth: int,
    verify: bool = False,
    ring: bool = False,
    tuning: Constants = TUNING,
) -> Pair:
    contexts = [Context(transport, {"NET_DEVICES": "lo"}) for _ in range(2)]
    engines = [
        Engine(context, rank, 2, tuning, ring=transport != "tcp")
        for rank, context in enumerate(contexts)
    ]
    layout = Layout(nbytes, depth, tuning.chunk, verify, ring=ring)
    boxes = [Mailbox(context, layout) for context in contexts]
    for rank in range(2):
        engines[rank].open(boxes[rank])
    for rank, other in ((0, 1), (1, 0)):
        endpoint = engines[rank].connect(other, engines[other].worker.address)
        address, packed = parse_description(boxes[other].describe(), layout, other)
        boxes[rank].set_peer(other, RemoteKey(endpoint, packed), address)
    return Pair(engines, boxes)


@pytest.fixture
def pair(transport: str, request: pytest.FixtureRequest) -> Iterator[Pair]:
    made = make_pair(transport, *getattr(request, "param", (4096, 2)))
    yield made
    for box in made.boxes:
        assert box.intact(), "a guard byte of a mailbox was overwritten"
    for engine in made.engines:
        assert engine.words[w.MALFORMED] == 0
        engine.close()
        engine.context.close()


def guarded(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A copy of `values` inside a larger buffer whose ends hold canaries; (view, buffer)."""
    raw = np.full(values.nbytes + 2 * CANARY, 0x5C, np.uint8)
    view = raw[CANARY:-CANARY].view(values.dtype)
    view[:] = values
    return view, raw


def canaries_alive(raw: np.ndarray) -> bool:
    return bool((raw[:CANARY] == 0x5C).all() and (raw[-CANARY:] == 0x5C).all())


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("pair", "nbytes"),
    [
        ((8, 2), 8),
        ((64, 2), 64),
        ((72, 2), 72),
        ((1024, 1), 1024),
        ((5000, 2), 5000),
        ((8192, 3), 8),
        ((8, 2, True), 8),
        ((64, 2, True), 64),
        ((5000, 2, True), 5000),
        ((4096, 2, False, False, MESSAGES), 4096),
        ((5000, 3, False, False, MESSAGES), 5000),
        ((5000, 2, True, False, MESSAGES), 5000),
        ((5000, 2, False, False, ANSWERED), 5000),
        ((16 * 1024 - 24, 3, True, True, ANSWERED), 16 * 1024 - 24),
        ((16 * 1024 - 24, 8, False, True, MESSAGES), 16 * 1024 - 24),
        ((16 * 1024 - 24, 3, True, True, MESSAGES), 16 * 1024 - 24),
    ],
    indirect=["pair"],
)
def test_rounds_average_in_place(pair: Pair, nbytes: int, dtype: type) -> None:
    rng = np.random.default_rng(nbytes)
    for number in range(7):
        a, b = (rng.standard_normal(nbytes // np.dtype(dtype).itemsize).astype(dtype) for _ in "ab")
        (left, left_raw), (right, right_raw) = guarded(a), guarded(b)
        pair.post(0, left)
        pair.post(1, right)
        pair.until(pair.ended)
        half = dtype(0.5)
        np.testing.assert_array_equal(left, a + half * (b - a))
        np.testing.assert_array_equal(right, b + half * (a - b))
        assert canaries_alive(left_raw) and canaries_alive(right_raw)
        expected = float(((a.astype(np.float64) - b) ** 2).sum())
        distance = pair.engines[0].floats[pair.boxes[0].index, w.DISTANCE]
        assert distance == pytest.approx(expected, rel=1e-5)
        assert pair.word(0, w.ROUND) == number


# --- values that are not finite ----------------------------------------------------------------

CHUNK = TUNING.chunk // 8  # doubles


def spoiled(pair: Pair, rank: int) -> tuple[int, int]:
    return pair.word(rank, w.SPOILED), pair.word(rank, w.OWN_SPOILED)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # where interpreted
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, CHUNK, 2 * CHUNK - 1, 4 * CHUNK - 1])
@pytest.mark.parametrize("pair", [(4096, 2), (4096, 2, False, False, MESSAGES)], indirect=True)
def test_a_chunk_that_is_not_finite_is_left_out_whole(pair: Pair, bad: float, place: int) -> None:
    """On both ranks, and no other chunk; the distance is that of what was mixed."""
    rng = np.random.default_rng(place)
    a, b = rng.standard_normal(512), rng.standard_normal(512)
    wanted_left, wanted_right = a + 0.5 * (b - a), b + 0.5 * (a - b)
    square = (a - b) ** 2
    b[place] = bad
    (left, left_raw), (right, right_raw) = guarded(a), guarded(b)
    pair.post(0, left)
    pair.post(1, right)
    pair.until(pair.ended)
    out = slice(place // CHUNK * CHUNK, (place // CHUNK + 1) * CHUNK)
    wanted_left[out], wanted_right[out] = a[out], b[out]
    np.testing.assert_array_equal(left, wanted_left)
    np.testing.assert_array_equal(right, wanted_right)
    assert canaries_alive(left_raw) and canaries_alive(right_raw)
    assert (spoiled(pair, 0), spoiled(pair, 1)) == ((1, 0), (0, 1))
    square[out] = 0
    for rank in range(2):
        distance = pair.engines[rank].floats[pair.boxes[rank].index, w.DISTANCE]
        assert distance == pytest.approx(square.sum(), rel=1e-9)
    good = [np.zeros(512), np.ones(512)]  # the next round starts counting anew
    for rank in range(2):
        pair.post(rank, good[rank])
    pair.until(pair.ended)
    assert (good[0] == 0.5).all() and (good[1] == 0.5).all()
    assert (spoiled(pair, 0), spoiled(pair, 1)) == ((0, 0), (0, 0))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("operation", ["mix", "delta"])
def test_each_operation_leaves_out(pair: Pair, operation: str, dtype: type) -> None:
    double = dtype is np.float64
    names = {"mix": (w.MIX_FLOAT32, w.MIX_FLOAT64), "delta": (w.DELTA_FLOAT32, w.DELTA_FLOAT64)}
    count = 4096 // np.dtype(dtype).itemsize
    left, right = np.ones(count, dtype), np.full(count, 3, dtype)
    right[0] = np.nan
    for rank, array in enumerate((left, right)):
        pair.post(rank, array, operation=names[operation][double])
    pair.until(pair.ended)
    kept, mixed = (1, 2) if operation == "mix" else (0, 1)
    assert left.tolist() == [kept] * (count // 4) + [mixed] * (3 * count // 4)
    assert spoiled(pair, 0) == (1, 0) and spoiled(pair, 1) == (0, 1)
    assert np.isnan(right[0]) == (operation == "mix")  # no correction, rather than a NaN


def test_allowed_it_is_mixed(pair: Pair) -> None:
    left, right = np.zeros(512), np.ones(512)
    right[5] = np.nan
    for rank, array in enumerate((left, right)):
        pair.post(rank, array, whole=0)
    pair.until(pair.ended)
    assert np.isnan(left).tolist() == [i == 5 for i in range(512)]
    assert spoiled(pair, 0) == (0, 0)


def test_copies_are_not_looked_at(pair: Pair) -> None:
    left, right = np.zeros(512), np.full(512, np.nan)
    pair.post(0, left, operation=w.COPY, to=-1)
    pair.post(1, right, operation=w.COPY, sender=-1, next_writer=-1)
    pair.until(pair.ended)
    assert np.isnan(left).all()
    assert spoiled(pair, 0) == (0, 0)


# --- checksums ---------------------------------------------------------------------------------

VERIFIED = [(4096, 2, True), (64, 2, True)]
"""Four chunks, and one that over TCP travels as a message."""


@pytest.mark.parametrize("pair", VERIFIED, indirect=True)
def test_one_flipped_bit_between_signal_and_mix_is_found(pair: Pair) -> None:
    box = pair.boxes[1]
    count = box.layout.nbytes // 8
    rng = np.random.default_rng(0)
    for number in range(8):
        mine, other = np.zeros(count), rng.standard_normal(count)
        pair.post(1, mine, to=-1, held=1)
        pair.post(0, other, sender=-1, next_writer=-1)
        pair.until(lambda: pair.ended(0))
        pair.settle(1)
        flipped = number % 2 == 1
        place = int(rng.integers(box.layout.nbytes))
        if flipped:
            box.slot(number, np.uint8, box.layout.nbytes)[place] ^= 1 << (number % 8)
        pair.engines[1].unhold(box)
        pair.until(lambda: pair.word(1, w.STATE) != w.ACTIVE, 1)
        if not flipped:
            assert pair.ended(1)
            np.testing.assert_array_equal(mine, other / 2)
            continue
        chunk = place // TUNING.chunk
        assert pair.word(1, w.STATE) == w.FAILED and pair.word(1, w.FAILURE) == w.CORRUPT
        assert pair.word(1, w.MIXED) == chunk
        assert (mine[chunk * CHUNK :] == 0).all(), "mixed what is corrupt"
        pair.open(1, number + 2)  # a round that failed gives no credit


@pytest.mark.parametrize("pair", VERIFIED, indirect=True)
def test_the_chunk_of_another_round_is_found(pair: Pair) -> None:
    """Whole as it is, with its own checksum: the seed names the round."""
    box, engine = pair.boxes[1], pair.engines[1]
    row = engine.table[box.index]
    checks = jit.view_words(int(row[w.CHECKS]), int(row[w.PLACES]))
    count = box.layout.nbytes // 8
    for number in range(3):
        if number == 2:
            stale, told = box.slot(0, np.uint8, box.layout.nbytes).copy(), checks.copy()
        mine, other = np.zeros(count), np.full(count, 1.0 + number)
        pair.post(1, mine, to=-1, held=1)
        pair.post(0, other, sender=-1, next_writer=-1)
        pair.until(lambda: pair.ended(0))
        pair.settle(1)
        if number == 2:
            box.slot(2, np.uint8, box.layout.nbytes)[:] = stale
            checks[:] = told
        engine.unhold(box)
        pair.until(lambda: pair.word(1, w.STATE) != w.ACTIVE, 1)
        assert pair.ended(1) == (number < 2)
    assert pair.word(1, w.FAILURE) == w.CORRUPT and pair.word(1, w.MIXED) == 0
    assert (mine == 0).all()


def test_checksum_names_epoch_round_mailbox_and_chunk(pair: Pair) -> None:
    engine, row = pair.engines[0].words.copy(), pair.engines[0].table[0].copy()
    data = np.arange(16.0)

    def of(epoch: int, index: int, number: int, part: int, nbytes: int) -> int:
        engine[w.EPOCH], row[w.INDEX] = epoch, index
        return int(checksum(engine, row, number, part, data.ctypes.data, nbytes))

    base = (0, 0, 5, 0, 120)
    others = [
        (*base[:place], base[place] + step, *base[place + 1 :])
        for place in range(5)
        for step in (1, 2, 7)
    ]
    assert len({of(*each) for each in (base, *others)}) == 1 + len(others)


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


def test_copy_leaves_the_source(pair: Pair) -> None:
    left, right = np.arange(512.0), np.arange(512.0) * 3
    received = np.zeros(512)
    pair.post(0, left, target=received.ctypes.data, operation=w.COPY)
    pair.post(1, right, operation=w.COPY, sender=-1, next_writer=-1)
    pair.engines[0].table[0, w.TO] = -1  # rank 0 only receives
    pair.until(pair.ended)
    np.testing.assert_array_equal(received, np.arange(512.0) * 3)
    np.testing.assert_array_equal(left, np.arange(512.0))


def test_a_partner_ahead_fills_the_slots_and_then_waits_for_credit(pair: Pair) -> None:
    sent = [np.full(512, float(number)) for number in range(3)]
    pair.open(1, 0, 1)
    for number in range(2):
        pair.post(0, sent[number], sender=-1, next_writer=-1)
        pair.until(lambda: pair.ended(0))
    for number in range(2):
        assert (pair.boxes[1].slot(number, np.float64, 512) == number).all()
    pair.post(0, sent[2], sender=-1, next_writer=-1)
    pair.settle(0)
    assert not pair.ended(0)
    assert pair.word(0, w.PUT) == 0, "put without credit"
    assert (pair.boxes[1].slot(2, np.float64, 512) == 0).all()
    mine = np.full(512, 10.0)
    pair.post(1, mine, to=-1)
    pair.until(lambda: pair.ended(0, 1))
    assert (mine == 5.0).all()
    assert (pair.boxes[1].slot(2, np.float64, 512) == 2).all()


def test_nothing_is_put_before_the_target_has_said_so(pair: Pair) -> None:
    """Not even into a slot that was never used: UCX over TCP (1.22 at least) crashes where an
    endpoint is made to a rank whose put is half received, and only a credit tells that it is made.
    """
    array = np.ones(512)
    pair.post(0, array, sender=-1, next_writer=-1)
    pair.settle(0)
    assert pair.word(0, w.PUT) == 0
    pair.open(1, 0)
    pair.until(lambda: pair.ended(0))
    assert (pair.boxes[1].slot(0, np.float64, 512) == 1).all()


def test_held_round_mixes_only_when_let(pair: Pair) -> None:
    left, right = np.zeros(512), np.ones(512)
    pair.post(0, left, held=True)
    pair.post(1, right)
    pair.until(lambda: pair.ended(1))
    pair.settle(0)
    assert (left == 0).all()
    assert not pair.ended(0)
    pair.engines[0].unhold(pair.boxes[0])
    pair.until(pair.ended)
    assert (left == 0.5).all()


def test_credit_of_a_round_does_not_open_another(pair: Pair) -> None:
    box = pair.boxes[0]
    box.round = 2
    chunks = box.layout.chunks
    box.credits[:] = 4 * chunks, 2 * chunks  # rank 1 has opened rounds 0 and 1
    array = np.ones(512)
    pair.post(0, array)
    pair.settle(0)
    assert pair.word(0, w.PUT) == 0
    box.credits[1] = 3 * chunks
    pair.until(lambda: pair.word(0, w.PUT) == pair.word(0, w.PARTS))


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


def test_nothing_is_mixed_before_its_signal(pair: Pair) -> None:
    array = np.zeros(512)
    pair.post(1, array, to=-1)
    pair.boxes[1].slot(0, np.float64, 512)[:] = 7.0  # the data is there, its signal is not
    pair.settle(1)
    assert (array == 0).all()
    assert pair.word(1, w.MIXED) == 0


def test_signal_of_another_round_or_epoch_is_not_taken(pair: Pair) -> None:
    array = np.zeros(16)
    pair.post(1, array, to=-1)
    row = pair.engines[1].table[pair.boxes[1].index]
    signals = jit.view_words(int(row[w.SIGNALS]), 1)
    for word in (2, 3, (1 << 48) | 1):  # rounds 1 and 2, epoch 1 of round 0
        signals[0] = word
        pair.settle(1)
        assert pair.word(1, w.MIXED) == 0
    signals[0] = 0


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
@pytest.mark.parametrize(("in_place", "window"), [(True, 0), (True, 2), (False, 0), (False, 2)])
def test_a_chunk_that_comes_before_its_own_has_left_waits_in_its_place(
    pair: Pair, transport: str, in_place: bool, window: int
) -> None:
    """In place it would be sent mixed, unless its own can leave just then; else it is mixed."""
    if transport != "tcp":
        pytest.skip("a store goes into its place")
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
    waits = in_place and window == 0
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


def test_an_engine_may_be_stopped_while_it_starts(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the warden's thread, which hears of another rank's end."""
    engine, start = pair.engines[0], threading.Thread.start

    def stopped_first(thread: threading.Thread) -> None:
        engine.stop()
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", stopped_first)
    engine.start()
    engine.stop()
    assert engine._thread is not None and not engine._thread.is_alive()


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


RING = (16 * TUNING.chunk, 8, False, True)


@pytest.mark.parametrize("pair", [RING], indirect=True)
@pytest.mark.parametrize("exact", [False, True])
def test_credits_of_a_ring_follow_as_chunks_are_mixed(pair: Pair, exact: bool) -> None:
    """By quarters of the ring, not by each chunk; beyond the round only where credits may be."""
    sender, taker = pair.engines
    taker.words[w.EXACT] = exact
    array, target = np.arange(2048.0), np.zeros(2048)
    pair.post(0, array, sender=-1, next_writer=-1)
    pair.post(1, target, to=-1, next_writer=-1)
    told = [0]
    while not pair.ended(0, 1):
        pair.step(1)
        told = sorted({*told, int(pair.boxes[1].told[0])})
        mixed, put = pair.word(1, w.MIXED), pair.word(0, w.PUT)
        assert put <= pair.boxes[0].credits[1] <= told[-1] <= mixed + 8
        pair.step(0)
    assert told == [0, 8, 10, 12, 14, 16]
    assert (target == array / 2).all()


@pytest.mark.parametrize("pair", [RING], indirect=True)
def test_a_ring_serves_rounds_of_all_sizes(pair: Pair) -> None:
    for number, parts in enumerate([16, 1, 3, 16, 9, 8, 16]):
        arrays = [np.arange(parts * 128.0) + number, np.arange(parts * 128.0) - 3]
        mean = (arrays[0] + arrays[1]) / 2
        for rank, array in enumerate(arrays):
            pair.post(rank, array)
        pair.until(pair.ended)
        assert all((array == mean).all() for array in arrays)


@pytest.mark.parametrize("pair", [RING], indirect=True)
def test_a_ring_is_stored_to_in_either_way(pair: Pair, transport: str) -> None:
    """Past the caches and through them: the chunks of many rounds, tried and chosen."""
    counts = []
    for number in range(60):
        arrays = [np.arange(2048.0) + number, np.arange(2048.0) - 3]
        mean = (arrays[0] + arrays[1]) / 2
        for rank, array in enumerate(arrays):
            pair.boxes[rank].ways[1 - rank, ways.STREAMS] = number % 2
            pair.post(rank, array)
        pair.until(pair.ended)
        assert all((array == mean).all() for array in arrays)
        counts.append(int(pair.boxes[0].ways[1, ways.COUNT]))
    assert counts == [16 * (number + 1) if transport == "shm" else 0 for number in range(60)]


def test_rounds_put_in_the_order_in_which_they_were_posted(pair: Pair, transport: str) -> None:
    """Whatever their places in the table: who was posted first is done first."""
    layout = Layout(3072, 2, TUNING.chunk)
    boxes = [Mailbox(engine.context, layout) for engine in pair.engines]
    for rank, box in enumerate(boxes):
        pair.engines[rank].open(box)
    address, packed = parse_description(boxes[1].describe(), layout, 1)
    boxes[0].set_peer(1, RemoteKey(pair.engines[0].endpoints[1], packed), address)
    engine, later = pair.engines[0], Pair(pair.engines, boxes)
    for each in (pair, later):
        each.open(1, 0)
    pair.until(lambda: all(each.boxes[0].opened(1, 0) for each in (pair, later)))
    first, second = np.ones(384), np.ones(384)  # three chunks each, as many as may be in flight
    later.post(0, first, sender=-1, next_writer=-1)
    pair.post(0, second, sender=-1, next_writer=-1)
    puts = []
    while not (pair.ended(0) and later.ended(0)):
        drive.drive_once(engine.words)
        puts.append((later.word(0, w.PUT), pair.word(0, w.PUT)))
        pair.step(1)
        assert len(puts) < 1_000_000
    assert puts[:3] == [(1, 0), (2, 0), (3, 0)]
    assert puts[-1] == (3, 3)


def test_wait_says_whom_for_what(pair: Pair) -> None:
    array = np.ones(512)
    pair.post(0, array)
    assert not pair.engines[0].wait(pair.boxes[0], 0.05)
    error = pair.engines[0].describe_wait(pair.boxes[0], 0.05)
    assert error.rank == 1 and "free its slot" in error.what
    pair.open(1, 0)
    pair.until(lambda: pair.word(0, w.SENT) == 4)
    assert not pair.engines[0].wait(pair.boxes[0], 0.05)
    error = pair.engines[0].describe_wait(pair.boxes[0], 0.05)
    assert error.rank == 1 and "put chunk 1 of 4" in error.what
    pair.boxes[1].round = pair.boxes[0].round = 0
    with pytest.raises(ExchangeError, match="still under way"):
        pair.post(0, array)


def test_engine_threads_move_rounds_by_themselves(pair: Pair) -> None:
    for engine in pair.engines:
        engine.start()
    left, right = np.zeros(512), np.ones(512)
    pair.post(0, left)
    pair.post(1, right)
    assert pair.engines[0].wait(pair.boxes[0], DEADLINE_S)
    assert pair.engines[1].wait(pair.boxes[1], DEADLINE_S)
    assert (left == 0.5).all() and (right == 0.5).all()


@pytest.mark.skipif(config.DISABLE_JIT, reason="locks between threads are atomic when compiled")
def test_the_engine_thread_parks_while_one_caller_drives(pair: Pair) -> None:
    engine, words = pair.engines[0], pair.engines[0].words
    engine.start()
    left, right = np.zeros(512), np.ones(512)
    pair.post(0, left)
    ends: list[bool] = []
    caller = threading.Thread(target=lambda: ends.append(engine.wait(pair.boxes[0], DEADLINE_S)))
    caller.start()
    deadline = time.monotonic() + DEADLINE_S
    while words[w.PARKED] != drive.LONG:
        jit.yield_cpu()
        assert time.monotonic() < deadline
    pair.engines[1].start()
    pair.post(1, right)
    caller.join(DEADLINE_S)
    assert ends == [True] and (left == 0.5).all()
    # Before `right` is freed, which the other engine's thread would mix into all the same.
    assert pair.engines[1].wait(pair.boxes[1], DEADLINE_S) and (right == 0.5).all()


@pytest.mark.parametrize("parked", [0, drive.SHORT, drive.LONG])
def test_whoever_ends_a_drive_ends_a_long_park(pair: Pair, parked: int) -> None:
    words = pair.engines[0].words
    words[w.PARKED] = parked
    assert drive.acquire(words, jit.now_ns() + int(DEADLINE_S * 1e9))
    drive.release(words)
    woken = jit.wait_readable(-1, int(words[w.ENGINE_FD]), 0) & 2
    assert bool(woken) is (parked == drive.LONG)
    words[w.PARKED] = 0


def test_ctrl_c_as_the_worker_is_taken_gives_it_back(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = drive.hold

    def hold(*arguments: object) -> None:
        assert own(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(drive, "hold", hold)
        with pytest.raises(KeyboardInterrupt):
            pair.engines[0].exclusively(list)
    assert pair.engines[0].words[w.DRIVERS] == 0
    assert pair.engines[0].exclusively(list) == []


def test_close_is_idempotent_and_final(transport: str) -> None:
    context = Context(transport, {"NET_DEVICES": "lo"})
    engine = Engine(context, 0, 1, TUNING)
    engine.start()
    engine.close()
    engine.close()
    with pytest.raises(ClosedError):
        engine.exclusively(list)
    context.close()
    context.close()


def until(condition: Callable[[], bool]) -> None:
    """Wait for what other threads do."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "deadline"
        os.sched_yield()


def test_descriptors_stay_open_until_the_last_kick(transport: str) -> None:
    """A closed one's number may be another's by then."""
    context = Context(transport, {"NET_DEVICES": "lo"})
    engine = Engine(context, 0, 1, TUNING)
    engine.words[w.LEAVING] = 1  # as a thread that was held up in `drive.release`
    closing = threading.Thread(target=engine.close)
    closing.start()
    try:
        until(lambda: bool(engine.words[w.SHUT]))
        os.fstat(int(engine.words[w.ENGINE_FD]))
        assert closing.is_alive()
    finally:
        engine.words[w.LEAVING] = 0
        closing.join(DEADLINE_S)
    context.close()


@pytest.mark.skipif(jit.INTERPRETED, reason="the lock of the interpreted engine is no lock")
@pytest.mark.parametrize("waiters", [1, 3])
def test_who_waits_when_the_engine_is_closed_leaves(transport: str, waiters: int) -> None:
    """Promptly, and before what it drives is gone; nobody is let in any more."""
    pair = make_pair(transport, 4096, 2)
    engine, box = pair.engines[0], pair.boxes[0]
    array = np.zeros(16)
    pair.post(0, array)  # of which the other rank knows nothing
    ended: list[bool] = []

    def wait() -> None:
        ended.append(engine.wait(box, 2 * DEADLINE_S))

    threads = [threading.Thread(target=wait) for _ in range(waiters)]
    for thread in threads:
        thread.start()
    until(lambda: int(engine.words[w.DRIVERS]) == waiters)
    for each in pair.engines:
        each.close()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert ended == [False] * waiters
    assert engine.words[w.DRIVERS] == engine.words[w.LOCK] == 0
    assert not drive.acquire(engine.words, jit.now_ns() + 10**12)
    for each in pair.engines:
        each.context.close()


@pytest.mark.skipif(jit.INTERPRETED, reason="the lock of the interpreted engine is no lock")
def test_who_drives_an_engine_that_is_shut_leaves(transport: str) -> None:
    """By itself, not when `Engine.wait` looks the next time: its deadline is far."""
    pair = make_pair(transport, 4096, 2)
    engine, box = pair.engines[0], pair.boxes[0]
    array = np.zeros(16)
    pair.post(0, array)  # of which the other rank knows nothing
    far = jit.now_ns() + int(2 * DEADLINE_S * 1e9)
    driver = threading.Thread(target=drive.drive, args=(engine.words, box.index, far))
    driver.start()
    until(lambda: int(engine.words[w.DRIVERS]) == 1)
    engine.stop()
    left = drive.shut(engine.words, jit.now_ns() + int(DEADLINE_S * 1e9))
    driver.join(3 * DEADLINE_S)
    for each in pair.engines:
        each.close()
        each.context.close()
    assert left


def test_too_many_mailboxes_is_a_named_error(transport: str) -> None:
    context = Context(transport, {"NET_DEVICES": "lo"})
    engine = Engine(context, 0, 1, TUNING, max_mailboxes=1)
    layout = Layout(8, 1, 8, ranks=1)
    engine.open(Mailbox(context, layout))
    second = Mailbox(context, layout)
    with pytest.raises(ArgumentError, match="more than 1"):
        engine.open(second)
    second.close()
    engine.close()
    context.close()


def test_no_word_has_two_meanings() -> None:
    """A name that is given twice is the last one's value everywhere."""
    names = [
        target.id
        for node in ast.parse(Path(w.__file__).read_text()).body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    ]
    assert len(names) == len(set(names)) > 60
