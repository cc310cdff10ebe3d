"""Who may put what, and when that is told.

A credit tells another rank that it may put all chunks below a number here, counted over all rounds.
It rides on a small round's message; whoever puts a round soon and has not heard of its slot by then
gets one of its own: `AHEAD` rounds before, at the latest when that round is posted here. Where a
round goes through fewer places than it has chunks (a ring), more follow as chunks are mixed. Into
memory of this machine a credit is stored, and its owner woken only if it dozes.

Rejected: a message a round and slot, as protocol 2 had it (half of a small round's messages).
"""

from __future__ import annotations

from typing import Any

from ucxgossip import jit
from ucxgossip.engine import words as w
from ucxgossip.engine.handlers import position
from ucxgossip.engine.sending import dozes, forget, send, twin


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
    direct = twin(engine, mailbox, rank)[2]
    if direct != 0:
        word = jit.view_words(direct + mailbox[w.CREDITS_OFFSET] + 8 * engine[w.RANK], 1)
        jit.store_release(word, 0, credit)
        if not dozes(mailbox, direct):
            return 0
    return forget(send(engine, mailbox, rank, w.AM_CREDIT, 0, 0, credit, 0))


@jit.njit
def grant_for(engine: Any, mailbox: Any, rank: int, number: int, mixed: int) -> int:
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
def riding(engine: Any, mailbox: Any) -> int:
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
def credited(engine: Any, mailbox: Any) -> bool:
    """Whether the place of the next chunk is free on the partner."""
    credits = jit.view_words(mailbox[w.CREDITS], engine[w.RANKS])
    chunk = position(mailbox, mailbox[w.ROUND], mailbox[w.PUT])
    return jit.load_acquire(credits, mailbox[w.TO]) > chunk
