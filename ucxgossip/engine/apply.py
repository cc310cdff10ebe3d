"""What a chunk that has arrived does to the target: copied, mixed, or left out and counted.

A table of kernels by operation was rejected: compiled code cannot hold functions of several
signatures in one.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ucxgossip import jit
from ucxgossip.engine import words as w
from ucxgossip.engine.handlers import mailbox_floats, mailbox_words
from ucxgossip.kernels.cpu import CAME_IN, OWN, delta, delta_whole, mix, mix_whole


@jit.njit
def _apply_whole(mailbox: Any, floats: Any, target: int, source: int, nbytes: int) -> None:
    """Mix one arrived chunk into the target unless either holds a NaN or an infinity: count it."""
    operation, undo = mailbox[w.OPERATION], mailbox[w.UNDO]
    if operation == w.MIX_FLOAT32:
        count = nbytes // 4
        found = mix_whole(
            jit.view_float32(target, count),
            jit.view_float32(source, count),
            np.float32(floats[w.ALPHA]),
            jit.view_float32(undo, count),
        )
    elif operation == w.MIX_FLOAT64:
        count = nbytes // 8
        found = mix_whole(
            jit.view_float64(target, count),
            jit.view_float64(source, count),
            floats[w.ALPHA],
            jit.view_float64(undo, count),
        )
    elif operation == w.DELTA_FLOAT32:
        count = nbytes // 4
        found = delta_whole(
            jit.view_float32(target, count),
            jit.view_float32(source, count),
            np.float32(floats[w.ALPHA]),
            jit.view_float32(undo, count),
        )
    else:
        count = nbytes // 8
        found = delta_whole(
            jit.view_float64(target, count),
            jit.view_float64(source, count),
            floats[w.ALPHA],
            jit.view_float64(undo, count),
        )
    if found < 0:
        bits = int(-found)
        mailbox[w.SPOILED] += bits & CAME_IN
        mailbox[w.OWN_SPOILED] += (bits & OWN) // OWN
    else:
        floats[w.DISTANCE] += found


def apply(engine: Any, mailbox: Any, target: int, source: int, nbytes: int) -> None:
    """Mix or copy one arrived chunk into the target."""
    apply_at(engine[w.ADDRESS], mailbox[w.INDEX], target, source, nbytes)


jit.compiled_as(
    apply,
    lambda engine, mailbox, target, source, nbytes: jit.call(
        engine[w.APPLY], (engine[w.ADDRESS], mailbox[w.INDEX], target, source, nbytes)
    ),
)


@jit.njit
def apply_at(address: int, index: int, target: int, source: int, nbytes: int) -> int:
    """As `apply`, to mailbox `index` of the engine whose words are at `address`: 0."""
    engine = jit.view_words(address, w.ENGINE_WORDS)
    mailbox, floats = mailbox_words(engine, index), mailbox_floats(engine, index)
    operation = mailbox[w.OPERATION]
    if mailbox[w.WHOLE] != 0 and operation != w.COPY:
        _apply_whole(mailbox, floats, target, source, nbytes)
    elif operation == w.MIX_FLOAT32:
        count = nbytes // 4
        floats[w.DISTANCE] += mix(
            jit.view_float32(target, count),
            jit.view_float32(source, count),
            np.float32(floats[w.ALPHA]),
        )
    elif operation == w.MIX_FLOAT64:
        count = nbytes // 8
        floats[w.DISTANCE] += mix(
            jit.view_float64(target, count), jit.view_float64(source, count), floats[w.ALPHA]
        )
    elif operation == w.DELTA_FLOAT32:
        count = nbytes // 4
        floats[w.DISTANCE] += delta(
            jit.view_float32(target, count),
            jit.view_float32(source, count),
            np.float32(floats[w.ALPHA]),
        )
    elif operation == w.DELTA_FLOAT64:
        count = nbytes // 8
        floats[w.DISTANCE] += delta(
            jit.view_float64(target, count), jit.view_float64(source, count), floats[w.ALPHA]
        )
    else:
        jit.copy_memory(target, source, nbytes)
    return 0
