"""What one round does, in numbers that compiled code takes."""

from __future__ import annotations

from typing import NamedTuple


class Post(NamedTuple):
    """What one round does: addresses in bytes, partners by rank (-1: none).

    source, target: the same address mixes in place. scattered: 1 where both are the addresses of
    scatter-gather lists (`scattered`). operation: COPY, MIX_FLOAT32, MIX_FLOAT64,
    DELTA_FLOAT32 or DELTA_FLOAT64 of `words`. source_param: address of
    the request parameters with the source's memory handle, 0 for unregistered memory. held: mix
    only after `Engine.unhold`. next_writer: who puts the round `Layout.ahead` later, to get its
    credit at this one's end. whole: 1 leaves out chunks that hold a NaN or an infinity.
    """

    source: int
    target: int
    nbytes: int
    to: int
    sender: int
    operation: int
    alpha: float = 0.5
    source_param: int = 0
    held: int = 0
    next_writer: int = -1
    whole: int = 0
    scattered: int = 0
