"""Rounds of two engines that the test drives in turns: every step of a round is under control.

The whole file also runs with NUMBA_DISABLE_JIT=1 (test_interpreted.py), where the state machine,
the handlers and the UCX calls are plain Python.
"""

import numpy as np
import pytest

from engine_pair import ANSWERED, MESSAGES, TUNING, Pair, canaries_alive, guarded
from ucxgossip import jit
from ucxgossip.engine import drive, ways
from ucxgossip.engine import words as w
from ucxgossip.engine.checks import checksum
from ucxgossip.mailbox import Layout, Mailbox, parse_description
from ucxgossip.ucp import RemoteKey


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
