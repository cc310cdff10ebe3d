"""Rounds that are known ahead: posted and driven to their end in one compiled call.

A blocking round of 8 bytes over shared memory takes about a microsecond; choosing its partners,
checking and posting it from Python took fifteen. So the partners of the next rounds of a mailbox
are laid out once, as an *itinerary*, and `exchange` takes one round after the other from it. It
leaves to the caller whatever is not the plain case: the end of the itinerary, a change of members
(another epoch), a round that did not end in time, or not well.

Rejected: keeping the whole posting path and making each of its parts quicker (two locks, a
dataclass and fifteen arguments stay).
"""

from __future__ import annotations

import numpy as np
from numba import types

from ucxgossip import jit
from ucxgossip.engine import drive, rounds
from ucxgossip.engine import words as w
from ucxgossip.engine.handlers import mailbox_words
from ucxgossip.engine.post import Post
from ucxgossip.schedule import Rounds

FIRST, COUNT, EPOCH, SOURCE, TARGET, NBYTES, OPERATION, PARAM, WHOLE, PARTNERS, WEIGHTS = range(11)
_WORDS = 11

ENDED, LEFT_OUT, LEAVE, UNDER_WAY, BROKEN = range(5)
"""What `exchange` says of a round: ended; ended, and chunks were left out; none was posted; still
under way; ended badly."""


@jit.njit
def exchange(engine_address: int, index: int, itinerary: int, slice_ns: int) -> int:
    """Post the next round of mailbox `index` and drive it for at most `slice_ns`; see `ENDED`."""
    engine = jit.view_words(engine_address, w.ENGINE_WORDS)
    plan = jit.view_words(itinerary, _WORDS)
    mailbox = mailbox_words(engine, index)
    deadline_ns = jit.now_ns() + slice_ns
    if not drive.acquire(engine, deadline_ns):
        return LEAVE
    # Members change under the lock only, so that the epoch stays while it is held.
    next_number = jit.view_words(mailbox[w.NUMBER], 1)
    number = next_number[0]
    place = number - plan[FIRST]
    if (
        place < 0
        or place >= plan[COUNT]
        or engine[w.EPOCH] != plan[EPOCH]
        or jit.load_acquire(engine, w.STOP) != 0
    ):
        drive.release(engine)
        return LEAVE
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
        0,
        partners[3 * place + 2],
        plan[WHOLE],
    )
    if not posted:
        drive.release(engine)
        return LEAVE
    next_number[0] = number + 1
    ended = drive.drive_locked(engine, index, deadline_ns)
    drive.release(engine)
    if not ended:
        return UNDER_WAY
    if jit.load_acquire(mailbox, w.STATE) != w.DONE:
        return BROKEN
    return LEFT_OUT if mailbox[w.SPOILED] + mailbox[w.OWN_SPOILED] else ENDED


class Itinerary:
    """The rounds of a mailbox from number `first` on, all alike but for partners and weights.

    rounds: this rank's, `ahead` more than the itinerary will have. what: a round of them, whose
    source and target must outlive it. asked: what for, for the caller to compare.
    """

    def __init__(
        self,
        asked: tuple[object, ...],
        first: int,
        epoch: int,
        rounds: Rounds,
        ahead: int,
        what: Post,
    ) -> None:
        self.asked = asked
        to, sender, weights = rounds
        count = len(to) - ahead
        self._partners = np.stack([to[:count], sender[:count], sender[ahead:]], axis=1)
        self._weights = np.ascontiguousarray(weights[:count])
        self._words = np.zeros(_WORDS, np.int64)
        self._words[:] = (
            *(first, count, epoch, what.source, what.target, what.nbytes, what.operation),
            *(what.source_param, what.whole),
            *(self._partners.ctypes.data, self._weights.ctypes.data),
        )
        self.address = int(self._words.ctypes.data)


_word = types.int64
SIGNATURE = _word(_word, _word, _word, _word)
"""The signature under which `exchange` is compiled ahead of its first call."""
