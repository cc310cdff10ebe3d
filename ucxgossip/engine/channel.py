"""What a receiver asks about a message that no round of its own expects."""

from __future__ import annotations

from typing import Any

from numba import types

from ucxgossip import jit
from ucxgossip.engine import credits
from ucxgossip.engine import words as w
from ucxgossip.engine.checks import intact
from ucxgossip.engine.handlers import arrived, mailbox_words, place_of, place_offset


@jit.njit
def complete(engine: Any, index: int, number: int, nbytes: int) -> bool:
    """Whether every chunk of message `number` is in its slot of mailbox `index`."""
    mailbox = mailbox_words(engine, index)
    parts = (nbytes + mailbox[w.CHUNK] - 1) // mailbox[w.CHUNK]
    # The last chunk first: chunks are put in order, and mostly nothing has come.
    part = parts - 1
    while part >= 0 and arrived(engine, mailbox, number, part):
        part -= 1
    return part < 0  # type: ignore[no-any-return]


@jit.njit
def first_corrupt(engine: Any, index: int, number: int, nbytes: int) -> int:
    """The first chunk of message `number` that is not what its checksum says, or -1."""
    mailbox = mailbox_words(engine, index)
    slot = mailbox[w.SLOTS] + place_offset(mailbox, place_of(mailbox, number, 0))
    parts = (nbytes + mailbox[w.CHUNK] - 1) // mailbox[w.CHUNK]
    for part in range(parts):
        offset = part * mailbox[w.CHUNK]
        length = min(mailbox[w.CHUNK], nbytes - offset)
        if not intact(engine, mailbox, number, part, slot + offset, length):
            return part
    return -1


_word, _words = types.int64, types.int64[::1]


def prepare() -> None:
    """Compile what channels call, ahead of a step and outside of the worker's lock."""
    jit.compile_ahead(complete, types.boolean(_words, _word, _word, _word))
    jit.compile_ahead(first_corrupt, _word(_words, _word, _word, _word))
    jit.compile_ahead(credits.grant, types.int64(_words, _words, _word, _word))
