"""Inputs and expectations for every kernel that keeps the contract, for several test files."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ucxgossip.kernels.contract import ITEMSIZE

GUARD = 64
CANARY = 0xA5
SIZES = [0, 1, 7, 33, 8191, 8193, 100_003]
MORE_THAN_A_GRID = 5_000_011
"""Elements of which each thread of a GPU takes several."""
ALPHAS = [0.0, 0.25, 0.5, 1.0, 0.3]
"""0.3 beside powers of two: with those a fused multiply-add rounds like two operations."""
OFFSETS = [(0, 0), (1, 1), (1, 3), (5, 0)]
"""Elements from a boundary of 64 bytes to the start of dst and of src."""
DTYPES = {
    "float32": np.float32,
    "float64": np.float64,
    "bfloat16": np.uint16,
    "float16": np.float16,
}
EPSILON = {"float32": 2.0**-24, "float64": 2.0**-53, "bfloat16": 2.0**-8, "float16": 2.0**-11}
"""Half a unit in the last place of 1: what rounding once may do, relatively."""


def encode(kind: str, values: NDArray[Any]) -> NDArray[Any]:
    """`values`, float32 or float64, as an array of `kind`: rounded to nearest even."""
    if kind != "bfloat16":
        return values.astype(DTYPES[kind])
    # By division in double, not by bits: shares nothing with the kernels.
    wide = values.astype(np.float64)
    with np.errstate(invalid="ignore"):
        _, exponent = np.frexp(wide)
        unit = np.exp2(np.maximum(exponent - 8.0, -133.0))
        kept = (np.rint(wide / unit) * unit).astype(np.float32)
    kept = np.where(np.isfinite(wide) & (wide != 0), kept, wide.astype(np.float32))
    return (kept.view(np.uint32) >> 16).astype(np.uint16)


def decode(kind: str, array: NDArray[Any]) -> NDArray[Any]:
    """The numbers in an array of `kind`, float32 (float64: float64), exactly."""
    if kind == "bfloat16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float64 if kind == "float64" else np.float32)


def expected(kinds: tuple[str, str], dst: Any, src: Any, alpha: float) -> NDArray[Any]:
    """What the contract says, by NumPy, operation by operation."""
    own, theirs = decode(kinds[0], dst), decode(kinds[1], src)
    if alpha == 1:
        return encode(kinds[0], theirs)
    return encode(kinds[0], own + own.dtype.type(alpha) * (theirs - own))


def pairs(kinds: tuple[str, str], dst: Any, src: Any) -> list[tuple[str, Any]]:
    return [(kinds[0], dst), (kinds[1], src)]


def mean(kinds: tuple[str, str], dst: Any, src: Any, alpha: float) -> NDArray[Any]:
    """The weighted mean in double, which shares no rounding with any kernel."""
    own, theirs = (
        decode(kind, each).astype(np.float64) for kind, each in zip(kinds, (dst, src), strict=True)
    )
    return (1 - alpha) * own + alpha * theirs


def squared_distance(kinds: tuple[str, str], dst: Any, src: Any) -> float:
    own, theirs = (
        decode(kind, each).astype(np.float64) for kind, each in zip(kinds, (dst, src), strict=True)
    )
    return float(((theirs - own) ** 2).sum())


def tolerance(kind: str) -> dict[str, float]:
    """How far the contract's arithmetic may be from `mean`, for numbers of a few units."""
    steps = EPSILON["float64" if kind == "float64" else "float32"]
    return {"rtol": 1.01 * EPSILON[kind], "atol": 32 * steps}


class Guarded:
    """An array of `kind`, `offset` elements off a boundary of 64 bytes, canaries on both sides."""

    def __init__(self, kind: str, count: int, offset: int, rng: np.random.Generator) -> None:
        size = ITEMSIZE[kind]
        memory = np.full(2 * GUARD + 64 + (offset + count) * size, CANARY, np.uint8)
        start = GUARD + -(memory.ctypes.data + GUARD) % 64 + offset * size
        self.memory, self.start, self.end = memory, start, start + count * size
        self.array = memory[start : self.end].view(DTYPES[kind])
        self.array[:] = encode(kind, rng.standard_normal(count))

    def intact(self) -> bool:
        sides = self.memory[: self.start], self.memory[self.end :]
        return all(bool((side == CANARY).all()) for side in sides)


def same_bits(found: NDArray[Any], wanted: NDArray[Any]) -> bool:
    """Equal to the bit; in arrays of floats any NaN equals any other."""
    unsigned = np.dtype(f"u{found.itemsize}")
    equal = found.view(unsigned) == wanted.view(unsigned)
    if found.dtype.kind == "f":
        equal |= np.isnan(found) & np.isnan(wanted)
    return bool(equal.all())


SPECIAL = [np.nan, np.inf, -np.inf, -0.0, 0.0, 1.0, -3.0]


def special_pairs(kinds: tuple[str, str]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Every pair of special values, in a crowd of ordinary ones."""
    pairs = np.array([(d, s) for d in SPECIAL for s in SPECIAL])
    dst, src = np.ones(100 + len(pairs)), np.full(100 + len(pairs), 3.0)
    dst[51 : 51 + len(pairs)], src[51 : 51 + len(pairs)] = pairs.T
    return encode(kinds[0], dst), encode(kinds[1], src)


def same_numbers(kind: str, found: NDArray[Any], wanted: NDArray[Any]) -> bool:
    """`same_bits` of what arrays of `kind` stand for."""
    return same_bits(decode(kind, found), decode(kind, wanted))
