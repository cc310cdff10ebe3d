"""One round of one mailbox, as a state machine that never waits.

`advance` moves a round as far as it goes now and returns; whoever drives calls it again. A round
puts its source chunk by chunk into the partner's slot, each chunk followed by its signal
(`sending`), where that one's `credits` allow it, and mixes the chunks that arrive into its target.
In place, chunk c is mixed once its own copy has left (`SENT`) and the partner's has come.

A chunk is also the unit of integrity: where its values are not finite it is left out and counted
(`apply`); where its checksum does not fit the round fails (`checks`).

Nothing here blocks, raises or allocates; a UCX error ends the round with its status.
"""

from __future__ import annotations

from typing import Any

from numba import types

from ucxgossip import jit
from ucxgossip.engine import words as w
from ucxgossip.engine.apply import apply
from ucxgossip.engine.checks import intact
from ucxgossip.engine.credits import credited, grant_for, riding
from ucxgossip.engine.handlers import (
    arrived,
    mailbox_floats,
    mailbox_words,
    place_of,
    place_offset,
    position,
)
from ucxgossip.engine.sending import put_signalled, requests_of, send, store_signalled, twin
from ucxgossip.scattered import array_at, piece_at
from ucxgossip.ucp import ops

_IN_PROGRESS = 1


@jit.njit
def fail(mailbox: Any, status: int) -> int:
    """End the round with a negative `status`; 1."""
    mailbox[w.FAILURE] = status
    mailbox[w.DONE_NS] = jit.now_ns()
    jit.store_release(mailbox, w.STATE, w.FAILED)
    return 1


@jit.njit
def may_put(engine: Any, mailbox: Any) -> bool:
    """Whether the round has a chunk to put, and credit and window allow it."""
    part = mailbox[w.PUT]
    return (
        mailbox[w.TO] >= 0
        and part < mailbox[w.PARTS]
        and part - mailbox[w.SENT] < mailbox[w.WINDOW]
        and credited(engine, mailbox)
    )


@jit.njit
def put_next(engine: Any, mailbox: Any) -> int:
    """Put the next chunk; 1 unless that failed."""
    part = mailbox[w.PUT]
    offset = part * mailbox[w.CHUNK]
    nbytes = min(mailbox[w.CHUNK], mailbox[w.NBYTES] - offset)
    if twin(engine, mailbox, mailbox[w.TO])[2] != 0:
        status = store_signalled(engine, mailbox, part, offset, nbytes)
    elif min(mailbox[w.NBYTES], mailbox[w.CHUNK]) <= engine[w.EAGER]:
        to, credit = mailbox[w.TO], riding(engine, mailbox) if part == 0 else 0
        status = send(engine, mailbox, to, w.AM_DATA, mailbox[w.ROUND], part, credit, nbytes)
        requests_of(mailbox, part)[0] = max(status, 0)
    else:
        status = put_signalled(engine, mailbox, part, offset, nbytes)
    if status < 0:
        return fail(mailbox, status)
    mailbox[w.PUT] = part + 1
    return 1


@jit.njit
def reap(mailbox: Any) -> int:
    """Count the chunks whose source is free again; how many became so."""
    moved = 0
    while mailbox[w.SENT] < mailbox[w.PUT]:
        requests = requests_of(mailbox, mailbox[w.SENT])
        for index in range(w.PIECES):
            request = requests[index]
            if request != 0:
                status = ops.check(request)
                if status == _IN_PROGRESS:
                    return moved
                ops.free(request)
                requests[index] = 0
                if status < 0:
                    return fail(mailbox, status)
        mailbox[w.SENT] += 1
        moved += 1
    return moved


@jit.njit
def apply_pieces(engine: Any, mailbox: Any, offset: int, nbytes: int, came: int) -> None:
    """Mix the chunk at `came` into the arrays of the target that it belongs to."""
    target = mailbox[w.TARGET]
    array, done = array_at(target, offset), 0
    while done < nbytes:
        address, length = piece_at(target, array, offset + done, nbytes - done)
        apply(engine, mailbox, address, came + done, length)
        array, done = array + 1, done + length


@jit.njit
def _mix_next(engine: Any, mailbox: Any) -> int:
    """Mix the next chunk if it has arrived and its own copy has left; 1 if it did."""
    part = mailbox[w.MIXED]
    if mailbox[w.FROM] < 0 or part == mailbox[w.PARTS] or mailbox[w.HELD]:
        return 0
    if mailbox[w.TO] >= 0 and mailbox[w.SENT] <= part and mailbox[w.SOURCE] == mailbox[w.TARGET]:
        return 0
    if not arrived(engine, mailbox, mailbox[w.ROUND], part):
        return 0
    offset = part * mailbox[w.CHUNK]
    nbytes = min(mailbox[w.CHUNK], mailbox[w.NBYTES] - offset)
    came = mailbox[w.SLOTS] + place_offset(mailbox, place_of(mailbox, mailbox[w.ROUND], part))
    if not intact(engine, mailbox, mailbox[w.ROUND], part, came, nbytes):
        return fail(mailbox, w.CORRUPT)
    if mailbox[w.SCATTERED]:
        apply_pieces(engine, mailbox, offset, nbytes, came)
    else:
        apply(engine, mailbox, mailbox[w.TARGET] + offset, came, nbytes)
    mailbox[w.MIXED] = part + 1
    return 1


@jit.njit
def finish(engine: Any, mailbox: Any) -> int:
    """End the round when nothing is left to do; 1 if it did."""
    if mailbox[w.TO] >= 0 and (mailbox[w.SENT] < mailbox[w.PARTS] or mailbox[w.UNANSWERED]):
        return 0
    if mailbox[w.FROM] >= 0 and mailbox[w.MIXED] < mailbox[w.PARTS]:
        return 0
    if mailbox[w.NEXT_WRITER] >= 0:
        number = mailbox[w.ROUND]
        following = number + mailbox[w.AHEAD]
        mixed = position(mailbox, number + 1, 0)
        status = grant_for(engine, mailbox, mailbox[w.NEXT_WRITER], following, mixed)
        if status < 0:
            return fail(mailbox, status)
    mailbox[w.DONE_NS] = jit.now_ns()
    jit.store_release(mailbox, w.STATE, w.DONE)
    return 1


@jit.njit
def advance(engine: Any, mailbox: Any, turn: bool) -> int:
    """Move the active round of `mailbox` as far as it goes now; non-zero if anything moved.

    turn: whether it may put a chunk now, where `may_put` said so.
    """
    if mailbox[w.FROM] >= 0:
        number = mailbox[w.ROUND]
        mixed = position(mailbox, number, mailbox[w.MIXED])
        status = grant_for(engine, mailbox, mailbox[w.FROM], number, mixed)
        if status < 0:
            return fail(mailbox, status)
    moved = put_next(engine, mailbox) if turn else 0
    if mailbox[w.STATE] == w.FAILED:
        return moved
    moved += reap(mailbox)
    if mailbox[w.STATE] == w.FAILED:
        return moved
    moved += _mix_next(engine, mailbox)
    return moved + finish(engine, mailbox)


@jit.njit
def post(
    engine: Any,
    index: int,
    number: int,
    source: int,
    target: int,
    nbytes: int,
    to: int,
    sender: int,
    operation: int,
    alpha: float,
    source_param: int,
    held: int,
    next_writer: int,
    whole: int,
    scattered: int,
    kick: int,
) -> bool:
    """Start round `number` of mailbox `index`; whoever drives takes it from here.

    kick: 1 wakes the engine thread, if it sleeps. The other arguments are the mailbox words of the
    same names (`words`). False if the last round has not ended.
    """
    mailbox, floats = mailbox_words(engine, index), mailbox_floats(engine, index)
    if jit.load_acquire(mailbox, w.STATE) == w.ACTIVE:
        return False
    mailbox[w.ROUND] = number
    mailbox[w.SOURCE] = source
    mailbox[w.SOURCE_PARAM] = source_param if source_param else engine[w.PLAIN]
    mailbox[w.TARGET] = target
    mailbox[w.NBYTES] = nbytes
    mailbox[w.PARTS] = (nbytes + mailbox[w.CHUNK] - 1) // mailbox[w.CHUNK]
    mailbox[w.TO] = to
    mailbox[w.FROM] = sender
    mailbox[w.OPERATION] = operation
    mailbox[w.HELD] = held
    mailbox[w.NEXT_WRITER] = next_writer
    mailbox[w.WHOLE] = whole
    mailbox[w.SCATTERED] = scattered
    mailbox[w.SPOILED] = 0
    mailbox[w.OWN_SPOILED] = 0
    mailbox[w.PUT] = 0
    mailbox[w.SENT] = 0
    mailbox[w.UNANSWERED] = 0
    mailbox[w.MIXED] = 0
    mailbox[w.FAILURE] = 0
    mailbox[w.POSTED_NS] = jit.now_ns()
    mailbox[w.TURN] = engine[w.POSTS]
    floats[w.ALPHA] = alpha
    floats[w.DISTANCE] = 0.0
    jit.store_release(mailbox, w.STATE, w.ACTIVE)
    jit.fetch_add(engine, w.POSTS, 1)
    if kick:
        jit.full_fence()  # it says that it sleeps, then looks whether POSTS has changed
        if jit.load_acquire(engine, w.ASLEEP) != 0 or jit.load_acquire(engine, w.PARKED) != 0:
            jit.kick(engine[w.ENGINE_FD])
    return True


_word = types.int64
POST_SIGNATURE = types.boolean(types.int64[::1], *(_word,) * 8, types.float64, *(_word,) * 6)
"""The signature under which `post` is compiled ahead of its first call."""
