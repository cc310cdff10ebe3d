"""What every mixing kernel promises, whatever it runs on.

``dst += alpha * (src - dst)``, in place, for 1-D contiguous arrays of one length that do not
overlap. Both operands are widened to float32 (float64: to float64), the three operations are
rounded one by one to nearest even, and so is the store: a kernel that keeps the contract gives the
same bits as NumPy, NaNs aside, which stay NaN with any payload. ``alpha == 1`` copies, exactly.
The squared distance of the two inputs falls out of the difference that is computed anyway, so it
costs no second pass.

Rejected: a fused multiply-add (free, but CPU and GPU replicas of one model would drift apart by
rounding); a bfloat16 type of our own on the CPU (NumPy has none: uint16 stands for it).
"""

from __future__ import annotations

from numbers import Real
from typing import Any, Protocol

from ucxgossip.errors import ArgumentError, ArrayError

SERVED: dict[str, tuple[str, ...]] = {
    "float32": ("float32", "bfloat16", "float16"),
    "float64": ("float64",),
    "bfloat16": ("bfloat16",),
    "float16": ("float16",),
}
"""Which payloads (``src``) each kind of ``dst`` takes."""

PAIRS = tuple((dst, src) for dst, payloads in SERVED.items() for src in payloads)
"""`SERVED`, pair by pair."""

ITEMSIZE = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}
"""Bytes an element."""


class Mix(Protocol):
    """A kernel that keeps the contract: what `select` returns."""

    def __call__(
        self, dst: Any, src: Any, alpha: float, *, distance: Any = None, stream: Any = None
    ) -> float | None:
        """``dst += alpha * (src - dst)`` for arrays of `count` elements each.

        alpha: weight of `src`, 0 to 1. distance: one float64 in the memory of `dst`, to which the
        squared Euclidean distance of the two inputs is added. stream: for GPUs, the handle of the
        stream (an integer; None: the default stream); the call only enqueues. Returns the squared
        distance on the CPU, None on a GPU, where it is not known yet.

        `ArrayError`: arrays that are not served; `ArgumentError`: alpha.
        """


def check_alpha(alpha: float) -> float:
    """`alpha` as a float; `ArgumentError` unless it is a number from 0 to 1."""
    if not isinstance(alpha, Real) or not 0 <= alpha <= 1:
        raise ArgumentError(f"mix_: alpha is {alpha!r}; must be a number from 0 to 1")
    return float(alpha)


def check_pair(dst: str, src: str) -> None:
    """`ArrayError` unless a payload of kind `src` can be mixed into `dst`."""
    if dst not in SERVED:
        raise ArrayError(f"mix_: dst is {dst}; served are {', '.join(SERVED)}")
    if src not in SERVED[dst]:
        raise ArrayError(f"mix_: dst is {dst} but src is {src}; it takes {', '.join(SERVED[dst])}")
