"""The checksum of a chunk, where ``join(verify=True)`` asked for one.

It stands beside the chunk's signal word, and is put before the signal as the data is. Its seed
names epoch, round, mailbox and chunk, so that a place that still holds another round's chunk, whole
as that may be, does not pass. Rejected: a checksum at the end of the data (a slot would no longer
be the payload, which is mixed and viewed where it stands).
"""

from __future__ import annotations

from typing import Any

from ucxgossip import jit
from ucxgossip.engine import words as w
from ucxgossip.engine.handlers import place_of
from ucxgossip.kernels.checksum import xxh64
from ucxgossip.mailbox import signal_word

_SPREAD = 0x1E3779B97F4A7C15
_POSITIVE = (1 << 63) - 1


@jit.njit
def checksum(engine: Any, mailbox: Any, number: int, part: int, address: int, nbytes: int) -> int:
    """What belongs to the `nbytes` bytes of chunk `part` of round `number`, found at `address`."""
    place = ((int(mailbox[w.INDEX]) << 32) + int(part) + 1) * _SPREAD & _POSITIVE
    return xxh64(address, nbytes, signal_word(int(engine[w.EPOCH]), int(number)) ^ place)


@jit.njit
def intact(engine: Any, mailbox: Any, number: int, part: int, address: int, nbytes: int) -> bool:
    """Whether an arrived chunk in its slot at `address` is what its checksum says."""
    if mailbox[w.CHECKS] == 0:
        return True
    told = jit.view_words(mailbox[w.CHECKS] + 8 * place_of(mailbox, number, part), 1)[0]
    return told == checksum(engine, mailbox, number, part, address, nbytes)  # type: ignore[no-any-return]
