"""ucxgossip.kernels: the mix is exact to the bit, and touches nothing else."""

import ctypes
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ucxgossip.errors import ArgumentError, ArrayError
from ucxgossip.kernels import cpu, mix_

DTYPES = [np.float32, np.float64]
SIZES = [0, 1, 7, 8191, 8192, 8193, 100_003]
ALPHAS = [0.0, 0.25, 0.5, 1.0, 0.3]
"""0.3 beside powers of two: with those a fused multiply-add rounds like two operations."""
GUARD = 64
CANARY = -12345.0
TOLERANCE = {np.float32: 1e-5, np.float64: 1e-12}


class Guarded:
    """An array of `count` elements `offset` elements into a cache line, canaries on both sides."""

    def __init__(self, count: int, dtype: Any, offset: int, seed: int) -> None:
        whole = np.full(count + 2 * GUARD, CANARY, dtype)
        self.array = whole[GUARD + offset : GUARD + offset + count]
        self.array[:] = np.random.default_rng(seed).standard_normal(count)
        self.sides = (whole[: GUARD + offset], whole[GUARD + offset + count :])

    def intact(self) -> bool:
        return all(bool((side == CANARY).all()) for side in self.sides)


def bits(array: NDArray[Any]) -> NDArray[Any]:
    return array.view(np.dtype(f"u{array.itemsize}"))


def expected(dst: NDArray[Any], src: NDArray[Any], alpha: float) -> NDArray[Any]:
    """What NumPy makes of it in the arrays' own precision, operation by operation."""
    if alpha == 1:
        return src.copy()
    return dst + dst.dtype.type(alpha) * (src - dst)


def squared_distance(dst: NDArray[Any], src: NDArray[Any]) -> float:
    return float(((src.astype(np.float64) - dst.astype(np.float64)) ** 2).sum())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("offsets", [(0, 0), (1, 3)], ids=["aligned", "unaligned"])
def test_mix(size: int, alpha: float, dtype: Any, offsets: tuple[int, int]) -> None:
    dst, src = Guarded(size, dtype, offsets[0], 1), Guarded(size, dtype, offsets[1], 2)
    source = src.array.copy()
    wanted = expected(dst.array, src.array, alpha)
    distance = squared_distance(dst.array, src.array)

    result = mix_(dst.array, src.array, alpha)

    assert (bits(dst.array) == bits(wanted)).all()
    assert (bits(src.array) == bits(source)).all()
    assert dst.intact() and src.intact()
    assert result == pytest.approx(distance, rel=TOLERANCE[dtype], abs=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_mix_against_float64(alpha: float, dtype: Any) -> None:
    """An oracle that shares no rounding with the kernel: the weighted mean, in double."""
    dst, src = Guarded(1000, dtype, 0, 1).array, Guarded(1000, dtype, 0, 2).array
    mean = (1 - alpha) * dst.astype(np.float64) + alpha * src.astype(np.float64)
    mix_(dst, src, alpha)
    np.testing.assert_allclose(dst, mean, rtol=0, atol=8 * np.finfo(dtype).eps)


@pytest.mark.parametrize(
    "run", [cpu.mix_block, cpu.mix_block.py_func], ids=["compiled", "interpreted"]
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_mix_block(run: Any, alpha: float, dtype: Any) -> None:
    dst, src = Guarded(37, dtype, 1, 1), Guarded(37, dtype, 2, 2)
    wanted = dst.array + dtype(alpha) * (src.array - dst.array)
    distance = squared_distance(dst.array, src.array)
    result = run(dst.array, src.array, dtype(alpha))
    assert (bits(dst.array) == bits(wanted)).all()
    assert dst.intact() and src.intact()
    assert result == pytest.approx(distance, rel=TOLERANCE[dtype])


@pytest.mark.parametrize("run", [cpu.mix, cpu.mix.py_func], ids=["compiled", "interpreted"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_mix_without_checks(run: Any, alpha: float, dtype: Any) -> None:
    size = 2 * cpu.BLOCK + 5
    dst, src = Guarded(size, dtype, 1, 1), Guarded(size, dtype, 2, 2)
    wanted = expected(dst.array, src.array, alpha)
    distance = squared_distance(dst.array, src.array)
    assert run(dst.array, src.array, dtype(alpha)) == pytest.approx(distance, rel=TOLERANCE[dtype])
    assert (bits(dst.array) == bits(wanted)).all()
    assert dst.intact() and src.intact()


SPECIAL = [np.nan, np.inf, -np.inf, -0.0, 0.0, 1.0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_mix_carries_nan_and_infinity(alpha: float, dtype: Any) -> None:
    """Every pair of special values, and each in a crowd of ordinary ones."""
    pairs = np.array([(d, s) for d in SPECIAL for s in SPECIAL], dtype)
    dst, src = np.ones(cpu.BLOCK + 50, dtype), np.full(cpu.BLOCK + 50, 3, dtype)
    dst[-len(pairs) :], src[-len(pairs) :] = pairs.T
    with np.errstate(invalid="ignore"):
        wanted = expected(dst, src, alpha)
    distance = mix_(dst, src, alpha)
    np.testing.assert_array_equal(dst, wanted)
    assert (np.signbit(dst) == np.signbit(wanted))[~np.isnan(wanted)].all()
    assert np.isnan(distance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_mix_of_an_infinity_is_infinitely_far(dtype: Any) -> None:
    dst, src = np.ones(100, dtype), np.ones(100, dtype)
    src[50] = np.inf
    assert mix_(dst, src, 0.5) == np.inf
    assert dst.tolist() == [1.0] * 50 + [np.inf] + [1.0] * 49


# --- whole or not at all -----------------------------------------------------------------------

BAD = [np.nan, np.inf, -np.inf]
PLACES = [0, cpu.BLOCK - 1, cpu.BLOCK, 2 * cpu.BLOCK + 4]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("size", SIZES)
def test_whole_is_the_same_where_all_is_finite(size: int, alpha: float, dtype: Any) -> None:
    for guarded, plain in ((cpu.mix_whole, cpu.mix), (cpu.delta_whole, cpu.delta)):
        dst, src, undo = (Guarded(size, dtype, offset, offset) for offset in (1, 2, 3))
        wanted, before = dst.array.copy(), dst.array.copy()
        distance = plain(wanted, src.array, dtype(alpha))
        found = guarded(dst.array, src.array, dtype(alpha), undo.array)
        assert found == pytest.approx(distance, rel=TOLERANCE[dtype], abs=0)
        assert (bits(dst.array) == bits(wanted)).all()
        assert (bits(undo.array) == bits(before)).all()
        assert dst.intact() and src.intact() and undo.intact()


@pytest.mark.parametrize(
    ("run", "place"), [*(("compiled", place) for place in PLACES), ("interpreted", PLACES[-1])]
)
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_changes_nothing(dtype: Any, bad: float, place: int, run: str) -> None:
    """Wherever it stands, and on whichever side: not one byte of the target is written for good."""
    for alpha in (0.5, 1.0):
        for spoil, code in (((1,), cpu.CAME_IN), ((0,), cpu.OWN), ((0, 1), cpu.OWN | cpu.CAME_IN)):
            dst, src = (Guarded(PLACES[-1] + 1, dtype, 1, seed) for seed in (1, 2))
            undo = np.zeros(PLACES[-1] + 1, dtype)
            for side in spoil:
                (dst, src)[side].array[place] = bad
            before, source = dst.array.copy(), src.array.copy()
            for function in (cpu.mix_whole, cpu.delta_whole):
                each = function if run == "compiled" else function.py_func  # type: ignore[attr-defined]
                dst.array[:] = before
                with np.errstate(invalid="ignore"):
                    found = each(dst.array, src.array, dtype(alpha), undo)
                assert found == -code
                kept = before if function is cpu.mix_whole else np.zeros_like(before)
                assert (bits(dst.array) == bits(kept)).all()
                assert (bits(src.array) == bits(source)).all()
                assert dst.intact() and src.intact()


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_values_are_mixed_unless_their_difference_overflows(dtype: Any) -> None:
    large = np.finfo(dtype).max / 4
    dst, src, undo = np.ones(100, dtype), np.ones(100, dtype), np.zeros(100, dtype)
    src[7] = large
    assert cpu.spoiled(dst, src) == 0
    assert cpu.mix_whole(dst, src, dtype(0.5), undo) == np.inf  # its square overflows
    assert dst[7] == large / 2 + dtype(0.5)
    dst[8], src[8] = 3 * large, -3 * large
    before = dst.copy()
    assert cpu.mix_whole(dst, src, dtype(0.5), undo) == -cpu.CAME_IN
    assert (bits(dst) == bits(before)).all()


@pytest.mark.parametrize("run", ["compiled", "interpreted"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_distance_of(dtype: Any, run: str) -> None:
    measure = cpu.distance_of if run == "compiled" else cpu.distance_of.py_func  # type: ignore[attr-defined]
    dst, src = (Guarded(cpu.BLOCK + 9, dtype, 0, seed).array for seed in (1, 2))
    found = measure(dst, src, dtype(0))
    assert found == pytest.approx(squared_distance(dst, src), rel=TOLERANCE[dtype])
    for array in (dst, src):
        kept, array[-1] = array[-1], np.nan
        assert not np.isfinite(measure(dst, src, dtype(0)))
        array[-1] = kept
    assert measure(dst[:0], src[:0], dtype(0)) == 0.0


@pytest.mark.parametrize("dtype", DTYPES)
def test_mix_of_equals_changes_nothing(dtype: Any) -> None:
    dst = Guarded(cpu.BLOCK + 3, dtype, 0, 1).array
    before = dst.copy()
    assert mix_(dst, before, 0.3) == 0.0
    assert (bits(dst) == bits(before)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_mix_reads_a_read_only_source(dtype: Any) -> None:
    dst, src = np.zeros(9, dtype), np.ones(9, dtype)
    src.flags.writeable = False
    assert mix_(dst, src, 0.5) == 9.0
    assert dst.tolist() == [0.5] * 9


@pytest.mark.parametrize("dtype", DTYPES)
def test_mix_at_odd_addresses(dtype: Any) -> None:
    size = np.dtype(dtype).itemsize
    raw = [np.zeros(10 * size, np.uint8) for _ in range(2)]
    dst, src = (memory[1 : 1 + 9 * size].view(dtype) for memory in raw)
    assert not dst.flags.aligned
    src[:] = 1
    assert mix_(dst, src, 0.5) == 9.0
    assert dst.tolist() == [0.5] * 9
    assert raw[0][0] == 0 and not raw[0][1 + 9 * size :].any()


def ones(count: int, dtype: Any = np.float32) -> NDArray[Any]:
    return np.ones(count, dtype)


SHARED = np.zeros(12, np.float32)


@pytest.mark.parametrize(
    ("dst", "src", "message"),
    [
        (np.zeros((2, 3), np.float32), ones(6), "dst must be 1-D"),
        (np.zeros(6, np.float32), ones(6).reshape(2, 3), "src must be 1-D"),
        (np.zeros((), np.float32), ones(1), "dst must be 1-D"),
        (np.zeros(12, np.float32)[::2], ones(6), "dst must be 1-D and contiguous"),
        (np.zeros(6, np.float32), ones(12)[::-2], "src must be 1-D and contiguous"),
        (np.zeros(6, np.float16), ones(6, np.float32), "dst is float16 but src is float32"),
        (np.zeros(6, np.uint16), ones(6, np.float16), "dst is bfloat16 but src is float16"),
        (np.zeros(6, np.float64), ones(6, np.uint16), "dst is float64 but src is bfloat16"),
        (np.zeros(6, np.int32), ones(6), "dst is int32"),
        (np.zeros(6, np.float32), ones(6, np.complex64), "src is complex64"),
        (np.zeros(6, ">f4"), ones(6, ">f4"), "dst is >f4"),
        (np.zeros(6, np.float32), ones(6, np.float64), "dst is float32.* but src is float64"),
        (np.zeros(6, np.float32), ones(7), "dst is float32.6,. but src is float32.7,."),
        (np.zeros(0, np.float32), ones(1), "dst is float32.0,. but src is float32.1,."),
        (SHARED[:6], SHARED[5:11], "overlap"),
        (SHARED, SHARED, "overlap"),
    ],
)
def test_bad_arrays(dst: NDArray[Any], src: NDArray[Any], message: str) -> None:
    with pytest.raises(ArrayError, match=message):
        mix_(dst, src, 0.5)
    assert not dst.any()


def test_neighbours_in_one_array_do_not_overlap() -> None:
    memory = np.zeros(12, np.float32)
    memory[6:] = 2
    assert mix_(memory[:6], memory[6:], 0.5) == 24.0
    assert memory.tolist() == [1.0] * 6 + [2.0] * 6


def test_read_only_destination() -> None:
    dst = np.zeros(6, np.float32)
    dst.flags.writeable = False
    with pytest.raises(ArrayError, match="dst is read-only"):
        mix_(dst, ones(6), 0.5)
    assert not dst.any()


@pytest.mark.parametrize("dst", [[0.0, 0.0], (ctypes.c_float * 2)(), None])
def test_what_is_no_array(dst: Any) -> None:
    with pytest.raises(ArrayError, match="dst"):
        mix_(dst, ones(2), 0.5)


@pytest.mark.parametrize("alpha", [-0.25, 1.5, float("nan"), float("inf"), "half", None])
def test_bad_alpha(alpha: Any) -> None:
    dst = np.zeros(6, np.float32)
    with pytest.raises(ArgumentError, match="alpha"):
        mix_(dst, ones(6), alpha)
    assert not dst.any()
