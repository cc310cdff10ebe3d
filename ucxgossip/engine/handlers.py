"""What arrives as active messages: credits, answers and bells here, chunks in `arrival`.

UCX calls these from ``ucp_worker_progress``, so they run compiled, without the GIL, in whatever
thread drives. Each gets the address of the engine's words. Nothing in a message is trusted: a
header that does not fit is counted and dropped before any memory is touched.
"""

from __future__ import annotations

from typing import Any

from ucxgossip import jit
from ucxgossip.engine import words as w
from ucxgossip.mailbox import MAX_POSITION, signal_word


@jit.njit
def mailbox_words(engine: Any, index: int) -> Any:
    """Row `index` of the mailbox table."""
    return jit.view_words(engine[w.TABLE] + 8 * w.MAILBOX_WORDS * index, w.MAILBOX_WORDS)


@jit.njit
def mailbox_floats(engine: Any, index: int) -> Any:
    """Row `index` of the floats beside the mailbox table."""
    return jit.view_float64(engine[w.FLOAT_TABLE] + 8 * w.FLOATS * index, w.FLOATS)


@jit.njit
def read_header(address: int, header: int, header_bytes: int) -> Any:
    """The engine's words, and whether the header (copied into them) names a mailbox and chunk."""
    engine = jit.view_words(address, w.ENGINE_WORDS)
    if header_bytes != w.HEADER_BYTES and header_bytes != w.CHECKED_HEADER_BYTES:
        engine[w.MALFORMED] += 1
        return engine, False
    copy = address + 8 * w.HEADER_COPY
    jit.copy_memory(copy, header, header_bytes)
    fields = jit.view_words(copy, w.HEADER_WORDS)
    engine[w.ASKED] = (fields[4] & w.ASKS) // w.ASKS
    fields[4] &= ~w.ASKS
    fits = (
        0 <= fields[0] < engine[w.MAILBOXES]
        and fields[1] >= 0
        and fields[2] >= 0
        and fields[3] == engine[w.EPOCH]
        and 0 <= fields[4] < engine[w.RANKS]
        and 0 <= fields[5] <= MAX_POSITION
    )
    if fits:
        mailbox = mailbox_words(engine, fields[0])
        checked = header_bytes == w.CHECKED_HEADER_BYTES
        fits = (
            fields[1] < MAX_POSITION // mailbox[w.CHUNKS]
            and fields[2] < mailbox[w.CHUNKS]
            and (not checked or mailbox[w.CHECKS] != 0)
        )
    if not fits:
        engine[w.MALFORMED] += 1
    return engine, fits


@jit.njit
def take_credit(engine: Any, mailbox: Any) -> None:
    """Note the credit that the message being handled gives, if any; the largest counts."""
    credits = jit.view_words(mailbox[w.CREDITS], engine[w.RANKS])
    rank, credit = engine[w.HEADER_COPY + 4], engine[w.HEADER_COPY + 5]
    if credit > jit.load_acquire(credits, rank):
        jit.store_release(credits, rank, credit)


@jit.njit
def position(mailbox: Any, number: int, chunk: int) -> int:
    """The number of (round, chunk) among all chunks that ever go through the mailbox."""
    return number * mailbox[w.CHUNKS] + chunk  # type: ignore[no-any-return]


@jit.njit
def place_of(mailbox: Any, number: int, chunk: int) -> int:
    """The place of (round, chunk) in a mailbox, and of its signal word among the signal words."""
    return position(mailbox, number, chunk) % mailbox[w.PLACES]  # type: ignore[no-any-return]


@jit.njit
def place_offset(mailbox: Any, place: int) -> int:
    """Bytes from slot 0 to a place."""
    slot, part = place // mailbox[w.PER_SLOT], place % mailbox[w.PER_SLOT]
    return slot * mailbox[w.STRIDE] + part * mailbox[w.CHUNK]  # type: ignore[no-any-return]


@jit.njit
def signal_words(mailbox: Any) -> Any:
    """The signal words that others put."""
    return jit.view_words(mailbox[w.SIGNALS], mailbox[w.PLACES])


@jit.njit
def word_of(engine: Any, mailbox: Any, number: int, chunk: int) -> int:
    """The signal word that says "(round, chunk) is there"."""
    return signal_word(engine[w.EPOCH], position(mailbox, number, chunk))


@jit.njit
def arrived(engine: Any, mailbox: Any, number: int, chunk: int) -> bool:
    """Whether chunk `chunk` of round `number` is in its place."""
    expected = word_of(engine, mailbox, number, chunk)
    return jit.load_acquire(signal_words(mailbox), place_of(mailbox, number, chunk)) == expected


@jit.njit
def seen(engine: Any, mailbox: Any, number: int, chunk: int) -> bool:
    """Whether the signal of a bell has become visible, be it overwritten by a later round's."""
    expected = word_of(engine, mailbox, number, chunk)
    found = jit.load_acquire(signal_words(mailbox), place_of(mailbox, number, chunk))
    return (found & ~w.ON_DEVICE) >= expected


@jit.njit
def on_credit(
    address: int, header: int, header_bytes: int, data: int, nbytes: int, param: int
) -> int:
    """Places of the sender are free for this rank to write."""
    engine, fits = read_header(address, header, header_bytes)
    if fits:
        take_credit(engine, mailbox_words(engine, engine[w.HEADER_COPY]))
    return 0


@jit.njit
def on_taken(
    address: int, header: int, header_bytes: int, data: int, nbytes: int, param: int
) -> int:
    """The target of a round has all of its messages."""
    engine, fits = read_header(address, header, header_bytes)
    if fits:
        mailbox = mailbox_words(engine, engine[w.HEADER_COPY])
        number, rank = engine[w.HEADER_COPY + 1], engine[w.HEADER_COPY + 4]
        if mailbox[w.ROUND] == number and mailbox[w.TO] == rank:
            mailbox[w.UNANSWERED] = 0
    return 0


@jit.njit
def on_bell(
    address: int, header: int, header_bytes: int, data: int, nbytes: int, param: int
) -> int:
    """A put was signalled. UCX orders no message after a put, so the signal may come later than
    its bell: it is noted, and nobody sleeps before it is seen. (Beyond UNSEEN_MAX at a time they
    are not noted; a sleep ends by itself after a second.)
    """
    engine, fits = read_header(address, header, header_bytes)
    if fits:
        index, number = engine[w.HEADER_COPY], engine[w.HEADER_COPY + 1]
        chunk = engine[w.HEADER_COPY + 2]
        count = engine[w.UNSEEN]
        mailbox = mailbox_words(engine, index)
        if not seen(engine, mailbox, number, chunk) and count < w.UNSEEN_MAX:
            entry = w.UNSEEN + 1 + 3 * count
            engine[entry], engine[entry + 1], engine[entry + 2] = index, number, chunk
            engine[w.UNSEEN] = count + 1
    return 0


@jit.njit
def all_seen(engine: Any) -> bool:
    """Whether every bell's signal is visible; forgets those that are."""
    count = engine[w.UNSEEN]
    kept = 0
    for i in range(count):
        entry = w.UNSEEN + 1 + 3 * i
        mailbox = mailbox_words(engine, engine[entry])
        if not seen(engine, mailbox, engine[entry + 1], engine[entry + 2]):
            target = w.UNSEEN + 1 + 3 * kept
            for k in range(3):
                engine[target + k] = engine[entry + k]
            kept += 1
    engine[w.UNSEEN] = kept
    return kept == 0
