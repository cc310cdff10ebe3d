"""One round of one mailbox, as a state machine that never waits.

`advance` moves a round as far as it goes now and returns; whoever drives calls it again. A round
puts its source chunk by chunk into the partner's slot, each chunk followed by its signal, and
mixes the chunks that arrive into its target. In place, chunk c is mixed once its own copy has left
(`SENT`) and the partner's has come.

A credit tells another rank that it may put all chunks below a number here, counted over all rounds.
It rides on a small round's message; whoever puts a round soon and has not heard of its slot by then
gets one of its own: `AHEAD` rounds before, at the latest when that round is posted here. Where a
round goes through fewer places than it has chunks (a ring), more follow as chunks are mixed. Into
memory of this machine a credit is stored, and its owner woken only if it dozes.

A chunk is also the unit of integrity: where its values are not finite it is left out and counted
(`apply`); where its checksum does not fit the round fails (`checks`).

Order of data and signal (docs/protocol.md): over a network put, fence, put; where UCX maps the
partner's memory into this process (``ucp_rkey_ptr``, shared memory), a copy and a store-release.
Puts into shared memory were rejected: after the first ``ucp_worker_fence`` UCX 1.22 serves them by
active messages. Nothing here blocks, raises or allocates; a UCX error ends the round with its
status.
"""

from __future__ import annotations

from typing import Any

from numba import types

from ucxgossip import jit
from ucxgossip.engine import ways
from ucxgossip.engine import words as w
from ucxgossip.engine.apply import apply
from ucxgossip.engine.checks import checksum, intact
from ucxgossip.engine.handlers import (
    arrived,
    mailbox_floats,
    mailbox_words,
    place_of,
    place_offset,
    position,
    word_of,
)
from ucxgossip.mailbox import SIGNAL_RING
from ucxgossip.scattered import array_at, gather, piece_at, pieces_in
from ucxgossip.ucp import ops

_IN_PROGRESS = 1


@jit.njit
def _fail(mailbox: Any, status: int) -> int:
    mailbox[w.FAILURE] = status
    mailbox[w.DONE_NS] = jit.now_ns()
    jit.store_release(mailbox, w.STATE, w.FAILED)
    return 1


@jit.njit
def _endpoint(engine: Any, rank: int) -> int:
    return jit.view_words(engine[w.ENDPOINTS], engine[w.RANKS])[rank]  # type: ignore[no-any-return]


@jit.njit
def _requests(mailbox: Any, part: int) -> Any:
    """The requests of the puts of chunk `part`; 0 where there is none, or none any more."""
    return jit.view_words(mailbox[w.REQUESTS] + 8 * w.PIECES * (part % mailbox[w.WINDOW]), w.PIECES)


@jit.njit
def _staging(mailbox: Any, part: int) -> int:
    return mailbox[w.STAGING] + mailbox[w.CHUNK] * (part % mailbox[w.WINDOW])  # type: ignore[no-any-return]


@jit.njit
def _together(mailbox: Any, part: int, offset: int, nbytes: int) -> int:
    """Where chunk `part`, `nbytes` of the source from `offset` on, stands in one piece.

    If it does not where it is, it is brought together in the staging memory.
    """
    source = mailbox[w.SOURCE]
    if not mailbox[w.SCATTERED]:
        return source + offset  # type: ignore[no-any-return]
    address, length = piece_at(source, array_at(source, offset), offset, nbytes)
    if length < nbytes:
        address = _staging(mailbox, part)
        gather(source, offset, nbytes, address, False)
    return address  # type: ignore[no-any-return]


@jit.njit
def _send(
    engine: Any,
    mailbox: Any,
    rank: int,
    ident: int,
    number: int,
    chunk: int,
    credit: int,
    nbytes: int,
) -> int:
    """Send an active message about (round, chunk); `nbytes` of the source go with it."""
    # UCX 1.13 does not know COPY_HEADER: the ring keeps a header while its message may wait.
    kept = w.HEADER_RING * ident + (number + chunk + credit) % w.HEADER_RING
    header = mailbox[w.HEADERS] + w.CHECKED_HEADER_BYTES * kept
    header_bytes = w.HEADER_BYTES
    fields = jit.view_words(header, w.HEADER_WORDS + 1)
    fields[0], fields[1], fields[2] = mailbox[w.INDEX], number, chunk
    fields[3], fields[4], fields[5] = engine[w.EPOCH], engine[w.RANK], credit
    data = _together(mailbox, chunk, 0, nbytes) if nbytes else 0
    if ident == w.AM_DATA and mailbox[w.CHECKS] != 0:
        fields[w.HEADER_WORDS] = checksum(engine, mailbox, number, chunk, data, nbytes)
        header_bytes = w.CHECKED_HEADER_BYTES
    return ops.send(
        _endpoint(engine, rank),
        ident,
        header,
        header_bytes,
        data,
        nbytes,
        engine[w.EAGER_PARAM],
    )


@jit.njit
def _forget(request: int) -> int:
    """Give back a request whose completion nobody awaits; its error status, or 0."""
    if request > 0:
        ops.free(request)
        return 0
    return request


@jit.njit
def _peer(engine: Any, mailbox: Any, rank: int) -> Any:
    """(address, rkey, local pointer or 0) of the mailbox's twin on `rank`."""
    return jit.view_words(mailbox[w.PEERS] + 24 * rank, 3)


@jit.njit
def _dozes(mailbox: Any, direct: int) -> bool:
    """Whether the owner of the mailbox at `direct` may sleep without having seen our last store.

    It raises its word before it looks for the last time, we store before we read that word: one of
    the two sees the other's.
    """
    jit.full_fence()
    return jit.load_acquire(jit.view_words(direct + mailbox[w.DOZE_OFFSET], 1), 0) != 0


@jit.njit
def _told(engine: Any, mailbox: Any) -> Any:
    """The credits given, by rank."""
    return jit.view_words(mailbox[w.TOLD], engine[w.RANKS])


@jit.njit
def grant(engine: Any, mailbox: Any, rank: int, credit: int) -> int:
    """Tell `rank` that it may put all chunks below `credit` here; an error status, or 0."""
    told = _told(engine, mailbox)
    if credit <= told[rank]:
        return 0
    told[rank] = credit
    direct = _peer(engine, mailbox, rank)[2]
    if direct != 0:
        word = jit.view_words(direct + mailbox[w.CREDITS_OFFSET] + 8 * engine[w.RANK], 1)
        jit.store_release(word, 0, credit)
        if not _dozes(mailbox, direct):
            return 0
    return _forget(_send(engine, mailbox, rank, w.AM_CREDIT, 0, 0, credit, 0))


@jit.njit
def _grant_for(engine: Any, mailbox: Any, rank: int, number: int, mixed: int) -> int:
    """Let `rank` put round `number`, all chunks below `mixed` being out of the slots.

    An error status, or 0.
    """
    told = _told(engine, mailbox)[rank]
    first = position(mailbox, number, 0)
    last = first + mailbox[w.CHUNKS]
    if told >= last:
        return 0
    credit = mixed + mailbox[w.PLACES]
    if engine[w.EXACT]:
        credit = min(credit, last)
    if credit <= first or (told > first and credit < min(last, told + _grain(mailbox))):
        return 0
    return grant(engine, mailbox, rank, credit)


@jit.njit
def _grain(mailbox: Any) -> int:
    """How many more chunks a credit opens, at least, that is not the first one of its round."""
    return (mailbox[w.PLACES] + 3) // 4  # type: ignore[no-any-return]


@jit.njit
def _riding(engine: Any, mailbox: Any) -> int:
    """The credit that goes with this round's message to its target; 0: none.

    None where this rank takes nothing in the round: the slots may not be its rounds' (`Channel`).
    """
    if engine[w.EXACT] or mailbox[w.FROM] < 0:
        return 0
    credit = position(mailbox, mailbox[w.ROUND], 0) + mailbox[w.PLACES]
    told = _told(engine, mailbox)
    if credit > told[mailbox[w.TO]]:
        told[mailbox[w.TO]] = credit
    return credit  # type: ignore[no-any-return]


@jit.njit
def _credited(engine: Any, mailbox: Any) -> bool:
    """Whether the place of the next chunk is free on the partner."""
    credits = jit.view_words(mailbox[w.CREDITS], engine[w.RANKS])
    chunk = position(mailbox, mailbox[w.ROUND], mailbox[w.PUT])
    return jit.load_acquire(credits, mailbox[w.TO]) > chunk


@jit.njit
def _ring(engine: Any, mailbox: Any, part: int) -> int:
    """Wake the target, who may sleep: a store or an RDMA write alone wakes nobody."""
    engine[w.BELLS] += 1
    return _forget(_send(engine, mailbox, mailbox[w.TO], w.AM_BELL, mailbox[w.ROUND], part, 0, 0))


@jit.njit
def _store_signalled(engine: Any, mailbox: Any, part: int, offset: int, nbytes: int) -> int:
    """Copy one chunk into a place of this machine, then its signal, with release order."""
    number = mailbox[w.ROUND]
    direct = _peer(engine, mailbox, mailbox[w.TO])[2]
    place = place_of(mailbox, number, part)
    to = direct + mailbox[w.SLOTS_OFFSET] + place_offset(mailbox, place)
    ways.store(mailbox, to, offset, nbytes)
    if mailbox[w.CHECKS] != 0:
        source = _together(mailbox, part, offset, nbytes)
        check = checksum(engine, mailbox, number, part, source, nbytes)
        jit.view_words(direct + mailbox[w.CHECKS_OFFSET] + 8 * place, 1)[0] = check
    signal = jit.view_words(direct + mailbox[w.SIGNALS_OFFSET] + 8 * place, 1)
    jit.store_release(signal, 0, word_of(engine, mailbox, number, part))
    return _ring(engine, mailbox, part) if _dozes(mailbox, direct) else 0


@jit.njit
def _outgoing(mailbox: Any, part: int) -> int:
    """Which of the words that are put from is that of chunk `part`."""
    return (mailbox[w.ROUND] % SIGNAL_RING) * mailbox[w.CHUNKS] + part  # type: ignore[no-any-return]


@jit.njit
def _put_check(engine: Any, mailbox: Any, part: int, source: int, nbytes: int) -> int:
    """Put the checksum of one chunk, which stands at `source`; an error status, or 0."""
    number = mailbox[w.ROUND]
    peer = _peer(engine, mailbox, mailbox[w.TO])
    word = mailbox[w.OUT_CHECKS] + 8 * _outgoing(mailbox, part)
    jit.view_words(word, 1)[0] = checksum(engine, mailbox, number, part, source, nbytes)
    remote = peer[0] + mailbox[w.CHECKS_OFFSET] + 8 * place_of(mailbox, number, part)
    endpoint = _endpoint(engine, mailbox[w.TO])
    return _forget(ops.put(endpoint, word, 8, remote, peer[1], mailbox[w.OUT_PARAM]))


@jit.njit
def _put_pieces(engine: Any, mailbox: Any, part: int, offset: int, nbytes: int, to: int) -> int:
    """Put one chunk to the address `to` from where its pieces are; an error status, or 0."""
    endpoint = _endpoint(engine, mailbox[w.TO])
    key = _peer(engine, mailbox, mailbox[w.TO])[1]
    requests = _requests(mailbox, part)
    source = mailbox[w.SOURCE]
    first, done, index = array_at(source, offset), 0, 0
    while done < nbytes:
        address, length = piece_at(source, first + index, offset + done, nbytes - done)
        request = ops.put(endpoint, address, length, to + done, key, mailbox[w.SOURCE_PARAM])
        if request < 0:
            return request
        requests[index] = request
        index, done = index + 1, done + length
    return 0


@jit.njit
def _put_whole(engine: Any, mailbox: Any, part: int, offset: int, nbytes: int, to: int) -> int:
    """Put one chunk to the address `to` in one piece, its checksum after it; a status as above."""
    source, param = _together(mailbox, part, offset, nbytes), mailbox[w.SOURCE_PARAM]
    if mailbox[w.SCATTERED] and source == _staging(mailbox, part):
        param = mailbox[w.STAGING_PARAM]
    key = _peer(engine, mailbox, mailbox[w.TO])[1]
    request = ops.put(_endpoint(engine, mailbox[w.TO]), source, nbytes, to, key, param)
    if request < 0:
        return request
    _requests(mailbox, part)[0] = request
    if mailbox[w.CHECKS] == 0:
        return 0
    return _put_check(engine, mailbox, part, source, nbytes)


@jit.njit
def _put_signalled(engine: Any, mailbox: Any, part: int, offset: int, nbytes: int) -> int:
    """Put one chunk and, behind a fence, its signal; an error status, or 0."""
    number = mailbox[w.ROUND]
    endpoint = _endpoint(engine, mailbox[w.TO])
    peer = _peer(engine, mailbox, mailbox[w.TO])
    base, key = peer[0], peer[1]
    place = place_of(mailbox, number, part)
    to = base + mailbox[w.SLOTS_OFFSET] + place_offset(mailbox, place)
    if (
        mailbox[w.SCATTERED]
        and mailbox[w.CHECKS] == 0
        and pieces_in(mailbox[w.SOURCE], offset, nbytes) <= w.PIECES
    ):
        status = _put_pieces(engine, mailbox, part, offset, nbytes, to)
    else:
        status = _put_whole(engine, mailbox, part, offset, nbytes, to)
    if status == 0:
        status = ops.fence(engine[w.WORKER])
    if status < 0:
        return status
    word = mailbox[w.OUTGOING] + 8 * _outgoing(mailbox, part)
    jit.view_words(word, 1)[0] = word_of(engine, mailbox, number, part)
    remote = base + mailbox[w.SIGNALS_OFFSET] + 8 * place
    status = _forget(ops.put(endpoint, word, 8, remote, key, mailbox[w.OUT_PARAM]))
    if status == 0 and not jit.view_words(engine[w.WAKES], engine[w.RANKS])[mailbox[w.TO]]:
        status = _ring(engine, mailbox, part)
    return status


@jit.njit
def may_put(engine: Any, mailbox: Any) -> bool:
    """Whether the round has a chunk to put, and credit and window allow it."""
    part = mailbox[w.PUT]
    return (
        mailbox[w.TO] >= 0
        and part < mailbox[w.PARTS]
        and part - mailbox[w.SENT] < mailbox[w.WINDOW]
        and _credited(engine, mailbox)
    )


@jit.njit
def _put_next(engine: Any, mailbox: Any) -> int:
    """Put the next chunk; 1 unless that failed."""
    part = mailbox[w.PUT]
    offset = part * mailbox[w.CHUNK]
    nbytes = min(mailbox[w.CHUNK], mailbox[w.NBYTES] - offset)
    if _peer(engine, mailbox, mailbox[w.TO])[2] != 0:
        status = _store_signalled(engine, mailbox, part, offset, nbytes)
    elif mailbox[w.NBYTES] <= engine[w.EAGER]:
        to, credit = mailbox[w.TO], _riding(engine, mailbox)
        status = _send(engine, mailbox, to, w.AM_DATA, mailbox[w.ROUND], 0, credit, nbytes)
        _requests(mailbox, part)[0] = max(status, 0)
    else:
        status = _put_signalled(engine, mailbox, part, offset, nbytes)
    if status < 0:
        return _fail(mailbox, status)
    mailbox[w.PUT] = part + 1
    return 1


@jit.njit
def _reap(mailbox: Any) -> int:
    """Count the chunks whose source is free again; how many became so."""
    moved = 0
    while mailbox[w.SENT] < mailbox[w.PUT]:
        requests = _requests(mailbox, mailbox[w.SENT])
        for index in range(w.PIECES):
            request = requests[index]
            if request != 0:
                status = ops.check(request)
                if status == _IN_PROGRESS:
                    return moved
                ops.free(request)
                requests[index] = 0
                if status < 0:
                    return _fail(mailbox, status)
        mailbox[w.SENT] += 1
        moved += 1
    return moved


@jit.njit
def _apply_pieces(mailbox: Any, floats: Any, offset: int, nbytes: int, came: int) -> None:
    """Mix the chunk at `came` into the arrays of the target that it belongs to."""
    target = mailbox[w.TARGET]
    array, done = array_at(target, offset), 0
    while done < nbytes:
        address, length = piece_at(target, array, offset + done, nbytes - done)
        apply(mailbox, floats, address, came + done, length)
        array, done = array + 1, done + length


@jit.njit
def _mix_next(engine: Any, mailbox: Any, floats: Any) -> int:
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
        return _fail(mailbox, w.CORRUPT)
    if mailbox[w.SCATTERED]:
        _apply_pieces(mailbox, floats, offset, nbytes, came)
    else:
        apply(mailbox, floats, mailbox[w.TARGET] + offset, came, nbytes)
    mailbox[w.MIXED] = part + 1
    return 1


@jit.njit
def _finish(engine: Any, mailbox: Any) -> int:
    """End the round when nothing is left to do; 1 if it did."""
    if mailbox[w.TO] >= 0 and mailbox[w.SENT] < mailbox[w.PARTS]:
        return 0
    if mailbox[w.FROM] >= 0 and mailbox[w.MIXED] < mailbox[w.PARTS]:
        return 0
    if mailbox[w.NEXT_WRITER] >= 0:
        number = mailbox[w.ROUND]
        following = number + mailbox[w.AHEAD]
        mixed = position(mailbox, number + 1, 0)
        status = _grant_for(engine, mailbox, mailbox[w.NEXT_WRITER], following, mixed)
        if status < 0:
            return _fail(mailbox, status)
    mailbox[w.DONE_NS] = jit.now_ns()
    jit.store_release(mailbox, w.STATE, w.DONE)
    return 1


@jit.njit
def advance(engine: Any, mailbox: Any, floats: Any, turn: bool) -> int:
    """Move the active round of `mailbox` as far as it goes now; non-zero if anything moved.

    turn: whether it may put a chunk now, where `may_put` said so.
    """
    if mailbox[w.FROM] >= 0:
        number = mailbox[w.ROUND]
        mixed = position(mailbox, number, mailbox[w.MIXED])
        status = _grant_for(engine, mailbox, mailbox[w.FROM], number, mixed)
        if status < 0:
            return _fail(mailbox, status)
    moved = _put_next(engine, mailbox) if turn else 0
    if mailbox[w.STATE] == w.FAILED:
        return moved
    moved += _reap(mailbox)
    if mailbox[w.STATE] == w.FAILED:
        return moved
    moved += _mix_next(engine, mailbox, floats)
    return moved + _finish(engine, mailbox)


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
