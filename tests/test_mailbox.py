"""ucxgossip.mailbox: the parts of a mailbox do not overlap, and guards notice what strays."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ucxgossip.errors import ArgumentError
from ucxgossip.mailbox import (
    ALIGNMENT,
    GUARD,
    GUARD_BYTE,
    MAX_DEPTH,
    MAX_POSITION,
    SIGNAL_RING,
    Layout,
    Mailbox,
    parse_description,
    signal_word,
)
from ucxgossip.ucp import Context, Endpoint, RemoteKey, Worker
from ucxgossip.ucp.endpoint import MAX_BLOB

layouts = st.builds(
    Layout,
    nbytes=st.integers(1, 1 << 40) | st.integers(1, 300),
    depth=st.integers(1, 64),
    chunk=st.integers(1, 1 << 22).map(lambda words: 8 * words) | st.just(8),
    verify=st.booleans(),
    ranks=st.integers(1, 2000),
) | st.builds(
    lambda depth, more, chunk, last: Layout(
        (depth + more) * chunk + min(last, chunk), depth, chunk, ring=True
    ),
    depth=st.integers(1, 64),
    more=st.integers(0, 1000),
    chunk=st.integers(1, 1 << 17).map(lambda words: 8 * words) | st.just(8),
    last=st.integers(1, 1 << 20),
)
some = settings(max_examples=100, deadline=None)


def parts(layout: Layout) -> list[tuple[int, int]]:
    """Start and end of everything that is written, in the order of their places."""
    words = 8 * layout.places
    starts = [layout.slots + i * layout.stride for i in range(layout.depth)]
    outgoing = 8 * SIGNAL_RING * layout.chunks
    checks = [
        (layout.checks, layout.checks + words),
        (layout.out_checks, layout.out_checks + outgoing),
    ]
    return [
        *((start, start + layout.slot_bytes) for start in starts),
        (layout.signals, layout.signals + words),
        (layout.outgoing, layout.outgoing + outgoing),
        (layout.credits, layout.credits + 8 * layout.ranks),
        (layout.doze, layout.doze + 8),
        *(checks if layout.verify else []),
    ]


@some
@given(layouts)
def test_parts_stand_apart(layout: Layout) -> None:
    """A guard before, between and after all parts, so nothing overlaps or leaves the region."""
    ends = [(0, 0), *parts(layout), (layout.total, layout.total)]
    assert all(start - end >= GUARD for (_, end), (start, _) in pairwise(ends))


@some
@given(layouts)
def test_parts_are_aligned(layout: Layout) -> None:
    assert all(start % ALIGNMENT == 0 for start, _ in parts(layout))


@some
@given(layouts)
def test_chunks_cover_the_payload(layout: Layout) -> None:
    assert (layout.chunks - 1) * layout.chunk < layout.nbytes <= layout.chunks * layout.chunk


@some
@given(layouts)
def test_memory_is_depth_times_the_payload(layout: Layout) -> None:
    """Beyond that: a word a place, SIGNAL_RING words a chunk, a word a rank, and a guard and
    rounding a part. With checksums the words of places and chunks twice.
    """
    words = 8 * (layout.places + SIGNAL_RING * layout.chunks)
    extra = layout.total - layout.depth * layout.slot_bytes - words - 8 * layout.ranks - 8
    if layout.verify:
        extra -= words
    assert 0 < extra <= (layout.depth + 7) * (GUARD + ALIGNMENT)


def test_layout_by_hand() -> None:
    layout = Layout(nbytes=100, depth=2, chunk=32)
    assert layout.chunks == 4
    assert parts(layout) == [
        (64, 164),
        (256, 356),
        (448, 512),
        (576, 2624),
        (2688, 2704),
        (2816, 2824),
    ]
    assert layout.total == 2944


@pytest.mark.parametrize("name", ["nbytes", "depth", "chunk", "ranks"])
@pytest.mark.parametrize("value", [0, -8, 8.5, "8", None])
def test_bad_layout(name: str, value: Any) -> None:
    with pytest.raises(ArgumentError, match=f"mailbox: {name} is {value!r}"):
        Layout(**({"nbytes": 64, "depth": 2, "chunk": 8} | {name: value}))


@pytest.mark.parametrize("chunk", [1, 7, 12, 65])
def test_chunk_of_broken_words(chunk: int) -> None:
    with pytest.raises(ArgumentError, match=f"chunk is {chunk}; must be a multiple of 8"):
        Layout(64, 2, chunk)


def test_a_ring_is_smaller_than_a_payload() -> None:
    layout = Layout(100, 3, 32, ring=True)
    assert (layout.chunks, layout.places, layout.slot_bytes, layout.ahead) == (4, 3, 32, 1)
    with pytest.raises(ArgumentError, match="a ring of 4 chunks; must be fewer than .* 4"):
        Layout(100, 4, 32, ring=True)


@some
@given(layouts)
def test_credits_that_were_given_open_no_round_beyond_the_reach(layout: Layout) -> None:
    """`Group.restart` goes on so many rounds later."""
    assert layout.places <= layout.reach * layout.chunks < layout.places + layout.chunks
    assert layout.reach == (1 if layout.ring else layout.depth)


def test_depth_beyond_the_limit() -> None:
    limit = MAX_DEPTH
    assert Layout(8, limit, 8).depth == limit
    with pytest.raises(ArgumentError, match=f"depth is {limit + 1}; at most {limit}"):
        Layout(8, limit + 1, 8)


# --- signal words ------------------------------------------------------------------------------

epochs = st.integers(0, (1 << 15) - 1)
numbers = st.integers(0, MAX_POSITION - 1)


@some
@given(epochs, numbers, epochs, numbers)
def test_signal_words_are_distinct(epoch: int, number: int, other: int, later: int) -> None:
    same = (epoch, number) == (other, later)
    assert (signal_word(epoch, number) == signal_word(other, later)) == same


@some
@given(epochs, numbers)
def test_signal_word_is_a_positive_int64_and_grows(epoch: int, number: int) -> None:
    assert 0 < signal_word(epoch, number) < 1 << 63
    assert signal_word(epoch, number) < signal_word(epoch, number + 1)
    assert epoch == 0 or signal_word(epoch - 1, MAX_POSITION) < signal_word(epoch, 0)


# --- a mailbox in memory -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def context() -> Iterator[Context]:
    with Context("shm") as context:
        yield context


SHAPES = [
    Layout(100, 2, 32, ranks=4),
    Layout(1, 1, 8, ranks=4),
    Layout(64, 3, 64, ranks=9),
    Layout(4097, 4, 1024, ranks=4),
    Layout(100, 2, 32, verify=True, ranks=4),
    Layout(4097, 4, 1024, verify=True, ranks=4),
]
RINGS = [
    Layout(4097, 4, 1024, ring=True, ranks=4),
    Layout(100, 1, 8, verify=True, ring=True, ranks=4),
]
shapes = pytest.mark.parametrize("layout", SHAPES, ids=str)


@pytest.fixture
def mailbox(context: Context, layout: Layout) -> Iterator[Mailbox]:
    made = Mailbox(context, layout)
    yield made
    made.close()


@pytest.mark.parametrize("layout", [*SHAPES, *RINGS], ids=str)
def test_guards_stand_when_all_else_is_written(mailbox: Mailbox, layout: Layout) -> None:
    assert mailbox.intact()
    for start, end in parts(layout):
        mailbox.region.bytes[start:end] = 0xFF
    assert mailbox.intact()
    written = sum(end - start for start, end in parts(layout))
    assert np.count_nonzero(mailbox.region.bytes == 0xFF) == written


@pytest.mark.parametrize("layout", [*SHAPES, *RINGS], ids=str)
def test_guards_notice_every_byte_outside(mailbox: Mailbox, layout: Layout) -> None:
    inside = {place for start, end in parts(layout) for place in range(start, end)}
    for place in sorted(set(range(layout.total)) - inside):
        mailbox.region.bytes[place] ^= 1
        assert not mailbox.intact(), place
        mailbox.region.bytes[place] = GUARD_BYTE
    assert mailbox.intact()


@shapes
def test_slots_take_turns(mailbox: Mailbox, layout: Layout) -> None:
    for number in range(layout.depth):
        mailbox.slot(number, np.uint8, layout.nbytes)[:] = number + 1
    for number in (*range(3 * layout.depth), layout.rounds - 1):
        slot = mailbox.slot(number, np.uint8, layout.nbytes)
        assert set(slot.tolist()) == {number % layout.depth + 1}


@pytest.mark.parametrize("layout", SHAPES[:1], ids=str)
def test_slot_is_of_the_type_asked_for(mailbox: Mailbox) -> None:
    mailbox.slot(1, np.float32, 25)[:] = 2.5
    assert mailbox.slot(3, np.float32, 25).tolist() == [2.5] * 25
    assert not mailbox.slot(0, np.uint8, 100).any()


@pytest.mark.parametrize("layout", SHAPES[:1], ids=str)
def test_description_makes_a_twin_reachable(
    context: Context, mailbox: Mailbox, layout: Layout
) -> None:
    address, packed = parse_description(mailbox.describe(), layout, rank=3)
    assert (address, packed) == (mailbox.region.address, mailbox.region.pack())
    with Worker(context) as worker:
        endpoint = Endpoint(worker, worker.address)
        key = RemoteKey(endpoint, packed)
        mailbox.set_peer(3, key, address)
        assert not mailbox.peers[:3].any()
        assert mailbox.peers[3].tolist() == [address, key.handle, key.pointer(address)]
        mailbox.close()
        assert key.closed and mailbox.region.closed
        assert not mailbox.peers.any() and not mailbox.keys
        mailbox.close()


@pytest.mark.parametrize("length", [0, 1, 8, 15, 16, 17 + MAX_BLOB])
def test_description_of_a_length_that_cannot_be(length: int) -> None:
    with pytest.raises(ArgumentError, match=f"rank 5 published a mailbox of {length} bytes"):
        parse_description(bytes(length), Layout(100, 2, 32), rank=5)


def test_description_of_another_layout() -> None:
    blob = (4096).to_bytes(8, "little") + (2945).to_bytes(8, "little") + b"key"
    with pytest.raises(ArgumentError, match="rank 5 has a mailbox of 2945 bytes .* has 2944"):
        parse_description(blob, Layout(100, 2, 32), rank=5)
    blob = (4096).to_bytes(8, "little") + (2944).to_bytes(8, "little") + b"key"
    assert parse_description(blob, Layout(100, 2, 32), rank=5) == (4096, b"key")


@pytest.mark.parametrize("address", [0, (1 << 63) - 2944, 1 << 63, (1 << 64) - 1])
def test_description_of_an_address_that_cannot_be(address: int) -> None:
    blob = address.to_bytes(8, "little") + (2944).to_bytes(8, "little") + b"key"
    with pytest.raises(ArgumentError, match=f"rank 5 published a mailbox at address {address:#x}"):
        parse_description(blob, Layout(100, 2, 32), rank=5)
