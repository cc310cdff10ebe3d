"""Rounds that are known ahead: posted, or posted and driven to their end, in one compiled call.

A blocking round of 8 bytes over shared memory takes about a microsecond; choosing its partners,
checking and posting it from Python took fifteen. So the partners of the next rounds of a mailbox
are laid out once, as an *itinerary*, and `post` and `exchange` take one round after the other from
it. They leave to the caller whatever is not the plain case: the end of the itinerary, a change of
members (another epoch), a round that did not end in time, or not well.

Rejected: keeping the whole posting path and making each of its parts quicker (two locks, a
dataclass and fifteen arguments stay).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types

from ucxgossip import jit
from ucxgossip.engine import drive, rounds
from ucxgossip.engine import words as w
from ucxgossip.engine.handlers import mailbox_words
from ucxgossip.engine.post import Post
from ucxgossip.schedule import Rounds

FIRST, COUNT, EPOCH, SOURCE, TARGET, NBYTES, OPERATION, PARAM, HELD, WHOLE, SCATTERED = range(11)
PARTNERS, WEIGHTS, ENGINE, INDEX = 11, 12, 13, 14
_WORDS = 15

SLICE_NS = 250_000_000
"""For how long `exchange` drives before Python may handle signals."""

ENDED, LEFT_OUT, LEAVE, POSTED, BROKEN = range(5)
"""What became of the next round: ended; ended, and chunks were left out; it was not posted; posted
and under way; ended badly."""


@jit.njit
def _post_next(engine: Any, plan: Any, kick: int) -> bool:
    """Post the mailbox's next round if the itinerary has it and the epoch is its own."""
    index = plan[INDEX]
    next_number = jit.view_words(mailbox_words(engine, index)[w.NUMBER], 1)
    number = next_number[0]
    place = number - plan[FIRST]
    if place < 0 or place >= plan[COUNT] or engine[w.EPOCH] != plan[EPOCH]:
        return False
    partners = jit.view_words(plan[PARTNERS], 3 * plan[COUNT])
    weights = jit.view_float64(plan[WEIGHTS], plan[COUNT])
    posted = rounds.post(
        engine,
        index,
        number,
        plan[SOURCE],
        plan[TARGET],
        plan[NBYTES],
        partners[3 * place],
        partners[3 * place + 1],
        plan[OPERATION],
        weights[place],
        plan[PARAM],
        plan[HELD],
        partners[3 * place + 2],
        plan[WHOLE],
        plan[SCATTERED],
        kick,
    )
    if posted:
        next_number[0] = number + 1
    return posted


@jit.njit
def post(itinerary: int) -> int:
    """Start the next round of an itinerary and return; see `ENDED`.

    For a caller who keeps the members from changing meanwhile.
    """
    plan = jit.view_words(itinerary, _WORDS)
    engine = jit.view_words(plan[ENGINE], w.ENGINE_WORDS)
    return POSTED if _post_next(engine, plan, 1) else LEAVE


@jit.njit
def exchange(itinerary: int) -> int:
    """Start the next round of an itinerary and drive it for at most `SLICE_NS`; see `ENDED`."""
    plan = jit.view_words(itinerary, _WORDS)
    engine, index = jit.view_words(plan[ENGINE], w.ENGINE_WORDS), plan[INDEX]
    deadline_ns = jit.now_ns() + SLICE_NS
    if not drive.acquire(engine, deadline_ns):
        return LEAVE
    # Members change under the lock only, so that the epoch stays while it is held.
    if jit.load_acquire(engine, w.STOP) != 0 or not _post_next(engine, plan, 0):
        drive.release(engine)
        return LEAVE
    ended = drive.drive_locked(engine, index, deadline_ns)
    drive.release(engine)
    if not ended:
        return POSTED
    mailbox = mailbox_words(engine, index)
    if jit.load_acquire(mailbox, w.STATE) != w.DONE:
        return BROKEN
    return LEFT_OUT if mailbox[w.SPOILED] + mailbox[w.OWN_SPOILED] else ENDED


class Itinerary:
    """The rounds of a mailbox from number `first` on, all alike but for partners and weights.

    engine, index: the address of the engine's words, and the mailbox's number. asked: what for, for
    the caller to compare. rounds: this rank's, `ahead` more than the itinerary will have. what: a
    round of them. kept: what must live as long, source and target among it.
    """

    def __init__(
        self,
        engine: int,
        index: int,
        asked: tuple[object, ...],
        first: int,
        epoch: int,
        rounds: Rounds,
        ahead: int,
        what: Post,
        kept: tuple[object, ...],
    ) -> None:
        self.engine, self.asked, self.epoch, self.kept = engine, asked, epoch, kept
        to, sender, weights = rounds
        count = len(to) - ahead
        self._partners = np.stack([to[:count], sender[:count], sender[ahead:]], axis=1)
        self._weights = np.ascontiguousarray(weights[:count])
        self._words = np.zeros(_WORDS, np.int64)
        self._words[:] = (
            *(first, count, epoch, what.source, what.target, what.nbytes, what.operation),
            *(what.source_param, what.held, what.whole, what.scattered),
            *(self._partners.ctypes.data, self._weights.ctypes.data, engine, index),
        )
        self.address = int(self._words.ctypes.data)


_word = types.int64
SIGNATURE = _word(_word)
"""The signature under which `post` and `exchange` are compiled ahead of their first calls."""
