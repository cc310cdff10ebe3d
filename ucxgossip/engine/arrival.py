"""A chunk that arrives as an active message: mixed at once if it may be, else laid into its place.

UCX calls `on_data` with the payload still in the buffer to which the kernel has just copied it.
Mixed from there it is read out of the cache, and no place is written or read at all. So over TCP
chunks go as messages, of one segment each, and not as puts: UCX completes a put over TCP when the
target's acknowledgement comes back, and in place a chunk is mixed after that, when it has left the
cache (docs/performance.md, "Messages in place of puts"). The payload may stand at any address;
numba's loads of it are unaligned ones.

One call of UCX's progress brings up to sixteen messages, and a pass sends one chunk. So a chunk
whose own has not left yet lets the rounds move first: where it is its round's turn and the
connection takes it, its own leaves then and there. Only where no chunk is put: a fence may be a
flush that makes progress (UCX before 1.19), and UCX forbids that within a handler.

Rejected: mixing only in `advance` (each chunk is copied into its place first); mixing what comes
before its turn, or before its own chunk has left (a round mixes in order, and in place).
"""

from __future__ import annotations

from typing import Any

from numba import types

from ucxgossip import jit
from ucxgossip.engine import words as w
from ucxgossip.engine.apply import apply
from ucxgossip.engine.drive import move
from ucxgossip.engine.handlers import (
    mailbox_words,
    on_bell,
    on_credit,
    on_taken,
    place_of,
    place_offset,
    read_header,
    signal_words,
    take_credit,
    word_of,
)
from ucxgossip.engine.rounds import apply_pieces
from ucxgossip.engine.sending import endpoint_of, forget, send


@jit.njit
def _before_its_own(engine: Any, mailbox: Any, number: int, chunk: int) -> bool:
    """Whether the chunk is of the round under way, in place, and its own has not left.

    And whether rounds may move within a handler: not where any of them puts, since a put's fence
    is a progress call in some releases of UCX.
    """
    return (
        engine[w.LARGEST] <= engine[w.EAGER]
        and jit.load_acquire(mailbox, w.STATE) == w.ACTIVE
        and mailbox[w.ROUND] == number
        and mailbox[w.DEVICE] == 0
        and mailbox[w.TO] >= 0
        and mailbox[w.SENT] <= chunk < mailbox[w.PARTS]
        and mailbox[w.SOURCE] == mailbox[w.TARGET]
    )


@jit.njit
def _wanted_now(engine: Any, mailbox: Any, number: int, chunk: int, nbytes: int) -> bool:
    """Whether the chunk is the next one that the round under way mixes, and may mix now."""
    return (
        jit.load_acquire(mailbox, w.STATE) == w.ACTIVE
        and mailbox[w.ROUND] == number
        and mailbox[w.MIXED] == chunk
        and mailbox[w.FROM] == engine[w.HEADER_COPY + 4]
        and nbytes == min(mailbox[w.CHUNK], mailbox[w.NBYTES] - chunk * mailbox[w.CHUNK])
        and (mailbox[w.TO] < 0 or mailbox[w.SENT] > chunk or mailbox[w.SOURCE] != mailbox[w.TARGET])
        and mailbox[w.HELD] == 0
        and mailbox[w.DEVICE] == 0
        and mailbox[w.CHECKS] == 0
    )


@jit.njit
def _answer(engine: Any, mailbox: Any, number: int, chunk: int) -> None:
    """Tell the sender that this rank has all of its round.

    What comes of it is not looked at: a connection that fails is noticed by who waits on it.
    """
    rank = engine[w.HEADER_COPY + 4]
    if endpoint_of(engine, rank) != 0:
        forget(send(engine, mailbox, rank, w.AM_TAKEN, number, chunk, 0, 0))


@jit.njit
def on_data(
    address: int, header: int, header_bytes: int, data: int, nbytes: int, param: int
) -> int:
    """Mix a chunk, or copy it into its place and raise its signal."""
    engine, fits = read_header(address, header, header_bytes)
    if not fits:
        return 0
    number, chunk = engine[w.HEADER_COPY + 1], engine[w.HEADER_COPY + 2]
    mailbox = mailbox_words(engine, engine[w.HEADER_COPY])
    checked = header_bytes == w.CHECKED_HEADER_BYTES
    offset = chunk * mailbox[w.CHUNK]
    if nbytes > min(mailbox[w.CAPACITY] - offset, mailbox[w.CHUNK]) or checked != (
        mailbox[w.CHECKS] != 0
    ):
        engine[w.MALFORMED] += 1
        return 0
    take_credit(engine, mailbox)
    if engine[w.ASKED]:
        _answer(engine, mailbox, number, chunk)
    if _before_its_own(engine, mailbox, number, chunk):
        move(engine, 1)  # something came, so that nobody has waited in vain
    if _wanted_now(engine, mailbox, number, chunk, nbytes):
        if mailbox[w.SCATTERED]:
            apply_pieces(engine, mailbox, offset, nbytes, data)
        else:
            apply(engine, mailbox, mailbox[w.TARGET] + offset, data, nbytes)
        mailbox[w.MIXED] = chunk + 1
        return 0
    place = place_of(mailbox, number, chunk)
    jit.copy_memory(mailbox[w.SLOTS] + place_offset(mailbox, place), data, nbytes)
    if checked:
        told = engine[w.HEADER_COPY + w.HEADER_WORDS]
        jit.view_words(mailbox[w.CHECKS] + 8 * place, 1)[0] = told
    jit.store_release(signal_words(mailbox), place, word_of(engine, mailbox, number, chunk))
    return 0


_word = types.int64
_SIGNATURE = types.int8(_word, _word, _word, _word, _word, _word)


def callbacks() -> dict[int, Any]:
    """C functions of the handlers by message id."""
    table = {w.AM_DATA: on_data, w.AM_CREDIT: on_credit, w.AM_BELL: on_bell, w.AM_TAKEN: on_taken}
    return {ident: jit.c_callback(handler, _SIGNATURE) for ident, handler in table.items()}
