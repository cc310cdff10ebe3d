"""The CPU mix that the engine runs: average in place, and measure the disagreement in that pass.

``dst += alpha * (src - dst)`` for 1-D contiguous float32 or float64 arrays that do not overlap,
in the arrays' own precision; the squared distance of the two inputs falls out of the difference
that is computed anyway. One pass: 12 bytes moved per float32 element, where ``add_`` then
``mul_`` moves 20.

The sum of squares is the only place where the order of additions is left to the compiler (one
``reassoc`` flag on that addition), which is what lets LLVM vectorise the reduction; the mix itself
stays exact. ``fastmath`` for the whole function was rejected: it would let the mix be rewritten.

`mix_whole` and `delta_whole` do the same whole or not at all: a NaN or an infinity anywhere in what
comes in must change nothing. The sum of squares tells for nothing whether there was one, but only
at the end; so the values from before are kept in `undo`, which stays in the cache where arrays are
a chunk at a time. Measured against it (docs/performance.md): a pass that looks first, and one that
sums first.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ucxgossip import jit

BLOCK = 8192
"""Elements whose squares are summed in the arrays' precision before going to float64."""


@jit.intrinsic
def _loose_add(typingctx: Any, left: Any, right: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fadd(args[0], args[1], flags=("reassoc",))

    return left(left, left), codegen


def loose_add(left: Any, right: Any) -> Any:
    """``left + right``, which the compiler may reorder with others like it."""
    return left + right


jit.compiled_as(loose_add, lambda left, right: _loose_add(left, right))


@jit.njit
def copy_block(dst: Any, src: Any) -> None:
    """``dst[:] = src`` of one length, without what numba compiles to say that it is not one."""
    for i in range(len(dst)):
        dst[i] = src[i]


@jit.njit
def mix_block(dst: Any, src: Any, alpha: Any) -> float:
    """Mix one block; the sum of its squared differences, added up in the arrays' precision."""
    total = alpha - alpha  # zero of the arrays' dtype
    for i in range(len(dst)):
        difference = src[i] - dst[i]
        dst[i] += alpha * difference
        total = loose_add(total, difference * difference)
    return float(total)


@jit.njit
def mix(dst: Any, src: Any, alpha: Any) -> float:
    """``dst += alpha * (src - dst)``; the squared distance of the inputs. No checks.

    alpha: a scalar of the arrays' dtype. ``alpha == 1`` copies, exactly.
    """
    distance = 0.0
    for start in range(0, len(dst), BLOCK):
        # Slices, not offsets: an index that numba cannot prove non-negative stops vectorisation.
        block_dst, block_src = dst[start : start + BLOCK], src[start : start + BLOCK]
        distance += mix_block(block_dst, block_src, alpha)
        if alpha == 1:
            copy_block(block_dst, block_src)
    return distance


@jit.njit
def delta_block(dst: Any, src: Any, alpha: Any) -> float:
    """One block of `delta`; the sum of its squared differences."""
    total = alpha - alpha
    for i in range(len(dst)):
        difference = src[i] - dst[i]
        dst[i] = alpha * difference
        total = loose_add(total, difference * difference)
    return float(total)


@jit.njit
def delta(dst: Any, src: Any, alpha: Any) -> float:
    """``dst = alpha * (src - dst)``, what `mix` would add; the squared distance. No checks.

    For a snapshot that travels: what comes in turns it into the correction to apply later.
    """
    distance = 0.0
    for start in range(0, len(dst), BLOCK):
        block_dst, block_src = dst[start : start + BLOCK], src[start : start + BLOCK]
        distance += delta_block(block_dst, block_src, alpha)
    return distance


# --- whole or not at all -----------------------------------------------------------------------

CAME_IN, OWN = 1, 2
"""Bits of what was not finite: the values that came in, and those that they were to meet."""


@jit.njit
def spoiled(dst: Any, src: Any) -> int:
    """Which of the two holds a NaN or an infinity, as bits: `CAME_IN` for `src`, `OWN` for `dst`.

    Finite values so far apart that their difference is infinite count as `CAME_IN`.
    """
    found = 0
    for i in range(len(dst)):
        if not np.isfinite(src[i] - dst[i]):
            own, came_in = not np.isfinite(dst[i]), not np.isfinite(src[i])
            if own:
                found |= OWN
            if came_in or not own:
                found |= CAME_IN
    return found


@jit.njit
def distance_of(dst: Any, src: Any, zero: Any) -> float:
    """Squared distance of two arrays; not finite where one of them is not. zero: of their dtype."""
    distance = 0.0
    for start in range(0, len(dst), BLOCK):
        block_dst, block_src = dst[start : start + BLOCK], src[start : start + BLOCK]
        total = zero
        for i in range(len(block_dst)):
            difference = block_src[i] - block_dst[i]
            total = loose_add(total, difference * difference)
        distance += float(total)
    return distance


@jit.njit
def kept_mix_block(dst: Any, src: Any, alpha: Any, undo: Any) -> float:
    """`mix_block` that keeps what `dst` held in `undo`."""
    total = alpha - alpha
    for i in range(len(dst)):
        before = dst[i]
        difference = src[i] - before
        undo[i] = before
        dst[i] = before + alpha * difference
        total = loose_add(total, difference * difference)
    return float(total)


@jit.njit
def mix_whole(dst: Any, src: Any, alpha: Any, undo: Any) -> float:
    """`mix` where all values are finite; else `dst` stays, and `spoiled` comes back, negative.

    undo: room for as many elements as `dst` has.
    """
    distance = 0.0
    for start in range(0, len(dst), BLOCK):
        block_dst, block_src = dst[start : start + BLOCK], src[start : start + BLOCK]
        distance += kept_mix_block(block_dst, block_src, alpha, undo[start : start + BLOCK])
        if alpha == 1:
            copy_block(block_dst, block_src)
    if not np.isfinite(distance):
        before = undo[: len(dst)]
        found = spoiled(before, src)
        if found:
            copy_block(dst, before)
            return -float(found)
    return distance


@jit.njit
def kept_delta_block(dst: Any, src: Any, alpha: Any, undo: Any) -> float:
    """`delta_block` that keeps what `dst` held in `undo`."""
    total = alpha - alpha
    for i in range(len(dst)):
        before = dst[i]
        difference = src[i] - before
        undo[i] = before
        dst[i] = alpha * difference
        total = loose_add(total, difference * difference)
    return float(total)


@jit.njit
def delta_whole(dst: Any, src: Any, alpha: Any, undo: Any) -> float:
    """`delta` where all values are finite; else no correction, zeros, and `spoiled`, negative."""
    distance = 0.0
    for start in range(0, len(dst), BLOCK):
        block_dst, block_src = dst[start : start + BLOCK], src[start : start + BLOCK]
        distance += kept_delta_block(block_dst, block_src, alpha, undo[start : start + BLOCK])
    if not np.isfinite(distance):
        found = spoiled(undo[: len(dst)], src)
        if found:
            dst[:] = alpha - alpha
            return -float(found)
    return distance
