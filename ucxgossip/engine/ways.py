"""How a chunk is stored into the ring of a rank on this host: through the caches, or past them.

A ring is written and read again while it is in the cache; that is fast where the two cores share
a cache, and slow where they do not (two sockets, two core complexes): then each line comes out of
the other one's cache, and a store past the caches (non-temporal), for the partner to read from
memory, takes an eighth of the time (docs/performance.md, "Two modes of shared memory"). Which it is
nobody tells (a hypervisor moves virtual cores), and it may change. So of `PERIOD` chunks to a rank
the first are stored in one way, then in the other, and the rest in the way that took less.

Rejected: a measurement at join (ranks move later); a topology read from /sys (virtual machines
do not have it); a setting (nobody would know its value, and no value is right for long).
"""

from __future__ import annotations

from typing import Any

from ucxgossip import jit
from ucxgossip.engine import words as w
from ucxgossip.mailbox import WAYS
from ucxgossip.scattered import gather

PERIOD = 2048
TRIAL = 32
"""Chunks that are tried each way, two rounds of a ring of 16; the first half of them find the lines
as the other way left them, and do not count."""

COUNT, KEPT_NS, STREAMED_NS, STREAMS = range(WAYS)
"""By rank: chunks stored so far, the least time of the last trial of each way, and the choice."""

_WORTH = 1.5
"""Storing past the caches costs the reader, too: it must be so many times faster to be chosen."""


@jit.njit
def streams_next(ways: Any) -> bool:
    """Whether the next chunk goes past the caches. ways: the fields of one rank."""
    step = ways[COUNT] % PERIOD
    if step < 2 * TRIAL:
        return step >= TRIAL  # type: ignore[no-any-return]
    return ways[STREAMS] != 0  # type: ignore[no-any-return]


@jit.njit
def note(ways: Any, took: int) -> None:
    """Count a chunk whose store took so many nanoseconds; choose at the end of a trial."""
    step = ways[COUNT] % PERIOD
    ways[COUNT] += 1
    if step >= 2 * TRIAL:
        return
    way = KEPT_NS if step < TRIAL else STREAMED_NS
    part = step % TRIAL
    if part == TRIAL // 2:
        ways[way] = took
    elif part > TRIAL // 2:
        ways[way] = min(ways[way], took)
    if step == 2 * TRIAL - 1:
        ways[STREAMS] = ways[KEPT_NS] > _WORTH * ways[STREAMED_NS]


@jit.njit
def _copy(mailbox: Any, to: int, offset: int, nbytes: int, stream: bool) -> None:
    source = mailbox[w.SOURCE]
    if mailbox[w.SCATTERED]:
        gather(source, offset, nbytes, to, stream)
    elif stream:
        jit.stream_memory(to, source + offset, nbytes)
    else:
        jit.copy_memory(to, source + offset, nbytes)


@jit.njit
def store(mailbox: Any, to: int, offset: int, nbytes: int) -> None:
    """Copy `nbytes` of the source from `offset` on to `to`, a place in the target's mailbox.

    They are there before whatever is stored next.
    """
    whole_slots = mailbox[w.PER_SLOT] == mailbox[w.CHUNKS]
    if whole_slots or nbytes < mailbox[w.CHUNK]:
        _copy(mailbox, to, offset, nbytes, False)
        return
    ways = jit.view_words(mailbox[w.WAYS] + 8 * WAYS * mailbox[w.TO], WAYS)
    begun = jit.now_ns()
    _copy(mailbox, to, offset, nbytes, streams_next(ways))
    note(ways, jit.now_ns() - begun)
