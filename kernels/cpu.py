"""The CPU mix: average in place, and measure the disagreement in the same pass.

``dst += alpha * (src - dst)`` for 1-D contiguous float32 or float64 arrays that do not overlap,
in the arrays' own precision; the squared distance of the two inputs falls out of the difference
that is computed anyway. One pass: 12 bytes moved per float32 element, where ``add_`` then
``mul_`` moves 20.

The sum of squares is the only place where the order of additions is left to the compiler (one
``reassoc`` flag on that addition), which is what lets LLVM vectorise the reduction; the mix itself
stays exact. ``fastmath`` for the whole function was rejected: it would let the mix be rewritten.
"""

from __future__ import annotations

from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ucxgossip import jit
from ucxgossip.errors import ArgumentError, ArrayError

BLOCK = 8192
"""Elements whose squares are summed in the arrays' precision before going to float64."""


@jit.intrinsic
def _loose_add(typingctx: Any, left: Any, right: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fadd(args[0], args[1], flags=("reassoc",))

    return left(left, left), codegen


def _add(left: Any, right: Any) -> Any:
    return left + right


jit.compiled_as(_add, lambda left, right: _loose_add(left, right))


@jit.njit
def mix_block(dst: Any, src: Any, alpha: Any) -> float:
    """Mix one block; the sum of its squared differences, added up in the arrays' precision."""
    total = alpha - alpha  # zero of the arrays' dtype
    for i in range(len(dst)):
        difference = src[i] - dst[i]
        dst[i] += alpha * difference
        total = _add(total, difference * difference)
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
            block_dst[:] = block_src
    return distance


@jit.njit
def delta_block(dst: Any, src: Any, alpha: Any) -> float:
    """One block of `delta`; the sum of its squared differences."""
    total = alpha - alpha
    for i in range(len(dst)):
        difference = src[i] - dst[i]
        dst[i] = alpha * difference
        total = _add(total, difference * difference)
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


def mix_(dst: NDArray[Any], src: NDArray[Any], alpha: float) -> float:
    """Average `src` into `dst` in place: ``dst += alpha * (src - dst)``.

    dst, src: 1-D contiguous arrays of one length and one dtype, float32 or float64, without
    overlap (`ArrayError` else). alpha: weight of `src`, 0 to 1 (`ArgumentError` else).
    Returns the squared Euclidean distance of the two inputs.
    """
    for name, array in (("dst", dst), ("src", src)):
        if not isinstance(array, np.ndarray):
            raise ArrayError(f"mix_: {name} must be a NumPy array, not {type(array).__name__}")
        if array.ndim != 1 or not array.flags.c_contiguous:
            raise ArrayError(f"mix_: {name} must be 1-D and contiguous, not shape {array.shape}")
        if array.dtype not in (np.float32, np.float64):
            raise ArrayError(f"mix_: {name} is {array.dtype}; float32 and float64 are served")
    if dst.shape != src.shape or dst.dtype != src.dtype:
        raise ArrayError(f"mix_: dst is {dst.dtype}{dst.shape} but src is {src.dtype}{src.shape}")
    if not isinstance(alpha, Real) or not 0 <= alpha <= 1:
        raise ArgumentError(f"mix_: alpha is {alpha!r}; must be a number from 0 to 1")
    if not dst.flags.writeable:
        raise ArrayError("mix_: dst is read-only")
    if np.may_share_memory(dst, src):
        raise ArrayError("mix_: dst and src overlap")
    return float(mix(dst, src, dst.dtype.type(alpha)))
