"""How a chunk leaves: as a message, as a store into memory of this machine, or as puts.

Order of data and signal (docs/protocol.md): over a network put, fence, put; where UCX maps the
partner's memory into this process (``ucp_rkey_ptr``, shared memory), a copy and a store-release.
Puts into shared memory were rejected: after the first ``ucp_worker_fence`` UCX 1.22 serves them by
active messages.

A payload that stands in several arrays (`scattered`) is stored, or put, piece by piece, and brought
together in staging memory only where that would be too many puts, or where one checksum is wanted.
"""

from __future__ import annotations

from typing import Any

from ucxgossip import jit
from ucxgossip.engine import ways
from ucxgossip.engine import words as w
from ucxgossip.engine.checks import checksum
from ucxgossip.engine.handlers import place_of, place_offset, word_of
from ucxgossip.mailbox import SIGNAL_RING
from ucxgossip.scattered import array_at, gather, piece_at, pieces_in
from ucxgossip.ucp import ops


@jit.njit
def endpoint_of(engine: Any, rank: int) -> int:
    """The endpoint to `rank`, 0 where there is none."""
    return jit.view_words(engine[w.ENDPOINTS], engine[w.RANKS])[rank]  # type: ignore[no-any-return]


@jit.njit
def twin(engine: Any, mailbox: Any, rank: int) -> Any:
    """(address, rkey, local pointer or 0) of the mailbox's twin on `rank`."""
    return jit.view_words(mailbox[w.PEERS] + 24 * rank, 3)


@jit.njit
def requests_of(mailbox: Any, part: int) -> Any:
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
def send(
    engine: Any,
    mailbox: Any,
    rank: int,
    ident: int,
    number: int,
    chunk: int,
    credit: int,
    nbytes: int,
) -> int:
    """Send an active message about (round, chunk); `nbytes` of that chunk go with it."""
    # UCX 1.13 does not know COPY_HEADER: the ring keeps a header while its message may wait.
    turn = credit if ident == w.AM_CREDIT else number * mailbox[w.CHUNKS] + chunk
    if ident == w.AM_TAKEN:
        turn = number  # always of a last chunk
    kept = w.HEADER_RING * ident + turn % w.HEADER_RING
    header = mailbox[w.HEADERS] + w.CHECKED_HEADER_BYTES * kept
    header_bytes = w.HEADER_BYTES
    fields = jit.view_words(header, w.HEADER_WORDS + 1)
    fields[0], fields[1], fields[2] = mailbox[w.INDEX], number, chunk
    fields[3], fields[4], fields[5] = engine[w.EPOCH], engine[w.RANK], credit
    if ident == w.AM_DATA and engine[w.ANSWERS] and chunk > 0 and chunk + 1 == mailbox[w.PARTS]:
        fields[4] |= w.ASKS
        mailbox[w.UNANSWERED] = 1
    data = _together(mailbox, chunk, chunk * mailbox[w.CHUNK], nbytes) if nbytes else 0
    if ident == w.AM_DATA and mailbox[w.CHECKS] != 0:
        fields[w.HEADER_WORDS] = checksum(engine, mailbox, number, chunk, data, nbytes)
        header_bytes = w.CHECKED_HEADER_BYTES
    return ops.send(
        endpoint_of(engine, rank),
        ident,
        header,
        header_bytes,
        data,
        nbytes,
        engine[w.SHORT_PARAM] if nbytes <= w.SHORT else engine[w.EAGER_PARAM],
    )


@jit.njit
def forget(request: int) -> int:
    """Give back a request whose completion nobody awaits; its error status, or 0."""
    if request > 0:
        ops.free(request)
        return 0
    return request


@jit.njit
def dozes(mailbox: Any, direct: int) -> bool:
    """Whether the owner of the mailbox at `direct` may sleep without having seen our last store.

    It raises its word before it looks for the last time, we store before we read that word: one of
    the two sees the other's.
    """
    jit.full_fence()
    return jit.load_acquire(jit.view_words(direct + mailbox[w.DOZE_OFFSET], 1), 0) != 0


@jit.njit
def ring(engine: Any, mailbox: Any, part: int) -> int:
    """Wake the target, who may sleep: a store or an RDMA write alone wakes nobody."""
    engine[w.BELLS] += 1
    return forget(send(engine, mailbox, mailbox[w.TO], w.AM_BELL, mailbox[w.ROUND], part, 0, 0))


@jit.njit
def store_signalled(engine: Any, mailbox: Any, part: int, offset: int, nbytes: int) -> int:
    """Copy one chunk into a place of this machine, then its signal, with release order."""
    number = mailbox[w.ROUND]
    direct = twin(engine, mailbox, mailbox[w.TO])[2]
    place = place_of(mailbox, number, part)
    to = direct + mailbox[w.SLOTS_OFFSET] + place_offset(mailbox, place)
    ways.store(mailbox, to, offset, nbytes)
    if mailbox[w.CHECKS] != 0:
        source = _together(mailbox, part, offset, nbytes)
        check = checksum(engine, mailbox, number, part, source, nbytes)
        jit.view_words(direct + mailbox[w.CHECKS_OFFSET] + 8 * place, 1)[0] = check
    signal = jit.view_words(direct + mailbox[w.SIGNALS_OFFSET] + 8 * place, 1)
    jit.store_release(signal, 0, word_of(engine, mailbox, number, part))
    return ring(engine, mailbox, part) if dozes(mailbox, direct) else 0


@jit.njit
def outgoing(mailbox: Any, part: int) -> int:
    """Which of the words that are put from is that of chunk `part`."""
    return (mailbox[w.ROUND] % SIGNAL_RING) * mailbox[w.CHUNKS] + part  # type: ignore[no-any-return]


@jit.njit
def _put_check(engine: Any, mailbox: Any, part: int, source: int, nbytes: int) -> int:
    """Put the checksum of one chunk, which stands at `source`; an error status, or 0."""
    number = mailbox[w.ROUND]
    peer = twin(engine, mailbox, mailbox[w.TO])
    word = mailbox[w.OUT_CHECKS] + 8 * outgoing(mailbox, part)
    jit.view_words(word, 1)[0] = checksum(engine, mailbox, number, part, source, nbytes)
    remote = peer[0] + mailbox[w.CHECKS_OFFSET] + 8 * place_of(mailbox, number, part)
    endpoint = endpoint_of(engine, mailbox[w.TO])
    return forget(ops.put(endpoint, word, 8, remote, peer[1], mailbox[w.OUT_PARAM]))


@jit.njit
def _put_pieces(engine: Any, mailbox: Any, part: int, offset: int, nbytes: int, to: int) -> int:
    """Put one chunk to the address `to` from where its pieces are; an error status, or 0."""
    endpoint = endpoint_of(engine, mailbox[w.TO])
    key = twin(engine, mailbox, mailbox[w.TO])[1]
    requests = requests_of(mailbox, part)
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
    key = twin(engine, mailbox, mailbox[w.TO])[1]
    request = ops.put(endpoint_of(engine, mailbox[w.TO]), source, nbytes, to, key, param)
    if request < 0:
        return request
    requests_of(mailbox, part)[0] = request
    if mailbox[w.CHECKS] == 0:
        return 0
    return _put_check(engine, mailbox, part, source, nbytes)


@jit.njit
def put_signalled(engine: Any, mailbox: Any, part: int, offset: int, nbytes: int) -> int:
    """Put one chunk and, behind a fence, its signal; an error status, or 0."""
    number = mailbox[w.ROUND]
    endpoint = endpoint_of(engine, mailbox[w.TO])
    peer = twin(engine, mailbox, mailbox[w.TO])
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
    word = mailbox[w.OUTGOING] + 8 * outgoing(mailbox, part)
    jit.view_words(word, 1)[0] = word_of(engine, mailbox, number, part)
    remote = base + mailbox[w.SIGNALS_OFFSET] + 8 * place
    status = forget(ops.put(endpoint, word, 8, remote, key, mailbox[w.OUT_PARAM]))
    if status == 0 and not jit.view_words(engine[w.WAKES], engine[w.RANKS])[mailbox[w.TO]]:
        status = ring(engine, mailbox, part)
    return status
