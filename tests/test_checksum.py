"""The checksum is XXH64, to the bit: compiled and interpreted, beside the ``xxhash`` package."""

from collections.abc import Callable

import numba
import numpy as np
import pytest
import xxhash

from ucxgossip.kernels.checksum import xxh64

MASK = (1 << 64) - 1
SEEDS = [0, 1, -1, 0x9E3779B185EBCA87, -(1 << 63), (5 << 48) | 77]


@numba.njit
def compiled(address: int, nbytes: int, seed: int) -> int:
    return xxh64(address, nbytes, seed)


def signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def data(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, count, dtype=np.uint8)


def check(run: Callable[[int, int, int], int], array: np.ndarray, seed: int) -> None:
    expected = xxhash.xxh64_intdigest(array.tobytes(), seed=seed & MASK)
    found = run(array.ctypes.data, array.nbytes, signed(seed & MASK))
    assert int(found) == signed(expected), (array.nbytes, seed)


@pytest.mark.parametrize("run", [compiled, xxh64], ids=["compiled", "interpreted"])
@pytest.mark.parametrize("seed", SEEDS)
def test_every_length_up_to_300(run: Callable[[int, int, int], int], seed: int) -> None:
    array = data(300)
    for length in range(301):
        check(run, array[:length], seed)


@pytest.mark.parametrize("run", [compiled, xxh64], ids=["compiled", "interpreted"])
def test_at_every_alignment(run: Callable[[int, int, int], int]) -> None:
    array = data(500)
    for start in range(64):
        check(run, array[start : start + 333], 3)


def test_random_sizes() -> None:
    rng = np.random.default_rng(0)
    array = data(1 << 21)
    for length in rng.integers(301, len(array), 60).tolist():
        check(compiled, array[:length], int(rng.integers(-(1 << 63), 1 << 63)))


def test_one_flipped_bit_changes_it() -> None:
    array = data(4096)
    before = compiled(array.ctypes.data, array.nbytes, 7)
    for position in range(0, 4096, 37):
        for bit in range(8):
            array[position] ^= 1 << bit
            assert compiled(array.ctypes.data, array.nbytes, 7) != before
            array[position] ^= 1 << bit
    assert compiled(array.ctypes.data, array.nbytes, 7) == before
