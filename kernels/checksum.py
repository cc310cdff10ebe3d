"""XXH64: does a chunk hold what was put?

The 64-bit hash of xxHash (its specification: doc/xxhash_spec.md of github.com/Cyan4973/xxHash),
over raw memory: some 12 GB/s a core here. It finds accidents, not
attacks: whoever can write a slot can write its checksum. Rejected: CRC32C (no instruction for it
in portable compiled code), XXH3 (faster with vectors, at ten times the code), a call
into the ``xxhash`` package (Python, once a chunk, under the engine's lock).

`xxh64` is a pair (see `jit`): plain Python integers where interpreted, uint64 where compiled.
"""

from __future__ import annotations

import ctypes

import numpy as np

from ucxgossip import jit

_MASK = (1 << 64) - 1
_PRIME_1 = 0x9E3779B185EBCA87
_PRIME_2 = 0xC2B2AE3D27D4EB4F
_PRIME_3 = 0x165667B19E3779F9
_PRIME_4 = 0x85EBCA77C2B2AE63
_PRIME_5 = 0x27D4EB2F165667C5

# numba makes float64 of a uint64 and a plain integer: every operand is uint64.
_P1, _P2, _P3, _P4, _P5 = (
    np.uint64(prime) for prime in (_PRIME_1, _PRIME_2, _PRIME_3, _PRIME_4, _PRIME_5)
)


# --- interpreted -------------------------------------------------------------------------------


def _rotated(value: int, bits: int) -> int:
    value &= _MASK
    return (value << bits | value >> 64 - bits) & _MASK


def _mixed(lane: int, word: int) -> int:
    return _rotated(lane + word * _PRIME_2, 31) * _PRIME_1 & _MASK


def xxh64(address: int, nbytes: int, seed: int) -> int:
    """XXH64 of `nbytes` bytes from `address` on, as a signed 64-bit integer.

    seed: any 64-bit integer, signed or not.
    """
    data = ctypes.string_at(int(address), int(nbytes))
    seed, position, length = int(seed) & _MASK, 0, int(nbytes)
    if length >= 32:
        lanes = [seed + _PRIME_1 + _PRIME_2, seed + _PRIME_2, seed, seed - _PRIME_1]
        while position + 32 <= length:
            for lane in range(4):
                word = int.from_bytes(data[position : position + 8], "little")
                lanes[lane] = _mixed(lanes[lane], word)
                position += 8
        turns = zip(lanes, (1, 7, 12, 18), strict=True)
        total = sum(_rotated(lane, bits) for lane, bits in turns) & _MASK
        for lane in lanes:
            total = ((total ^ _mixed(0, lane)) * _PRIME_1 + _PRIME_4) & _MASK
    else:
        total = seed + _PRIME_5
    total = (total + length) & _MASK
    while position + 8 <= length:
        word = int.from_bytes(data[position : position + 8], "little")
        total = (_rotated(total ^ _mixed(0, word), 27) * _PRIME_1 + _PRIME_4) & _MASK
        position += 8
    if position + 4 <= length:
        word = int.from_bytes(data[position : position + 4], "little")
        total = (_rotated(total ^ word * _PRIME_1, 23) * _PRIME_2 + _PRIME_3) & _MASK
        position += 4
    for byte in data[position:]:
        total = _rotated(total ^ byte * _PRIME_5, 11) * _PRIME_1 & _MASK
    total = (total ^ total >> 33) * _PRIME_2 & _MASK
    total = (total ^ total >> 29) * _PRIME_3 & _MASK
    total ^= total >> 32
    return total - (1 << 64) if total >> 63 else total


# --- compiled ----------------------------------------------------------------------------------


@jit.njit
def _rotate(value: np.uint64, bits: int) -> np.uint64:
    return (value << np.uint64(bits)) | (value >> np.uint64(64 - bits))


@jit.njit
def _mix(lane: np.uint64, word: np.uint64) -> np.uint64:
    return _rotate(lane + word * _P2, 31) * _P1


@jit.njit
def _merge(total: np.uint64, lane: np.uint64) -> np.uint64:
    return (total ^ _mix(np.uint64(0), lane)) * _P1 + _P4


@jit.njit
def _stripes(address: int, count: int, seed: np.uint64) -> np.uint64:
    """The four lanes over `count` stripes of 32 bytes, made one."""
    words = jit.view_unsigned(address, 4 * count)
    a, b, c, d = seed + _P1 + _P2, seed + _P2, seed, seed - _P1
    for stripe in range(count):
        at = 4 * stripe
        a = _mix(a, words[at])
        b = _mix(b, words[at + 1])
        c = _mix(c, words[at + 2])
        d = _mix(d, words[at + 3])
    total = _rotate(a, 1) + _rotate(b, 7) + _rotate(c, 12) + _rotate(d, 18)
    return _merge(_merge(_merge(_merge(total, a), b), c), d)


@jit.njit
def _tail(total: np.uint64, address: int, nbytes: int) -> np.uint64:
    """Up to 31 bytes after the last stripe."""
    position = 0
    while position + 8 <= nbytes:
        word = jit.view_unsigned(address + position, 1)[0]
        total = _rotate(total ^ _mix(np.uint64(0), word), 27) * _P1 + _P4
        position += 8
    rest = jit.view_bytes(address + position, nbytes - position)
    start = 0
    if nbytes - position >= 4:
        word = np.uint64(0)
        for i in range(4):
            word |= np.uint64(rest[i]) << np.uint64(8 * i)
        total = _rotate(total ^ (word * _P1), 23) * _P2 + _P3
        start = 4
    for i in range(start, nbytes - position):
        total = _rotate(total ^ (np.uint64(rest[i]) * _P5), 11) * _P1
    return total


def _xxh64(address: int, nbytes: int, seed: int) -> int:
    stripes = nbytes // 32
    start = np.uint64(seed)
    total = _stripes(address, stripes, start) if stripes > 0 else start + _P5
    total = total + np.uint64(nbytes)
    total = _tail(total, address + 32 * stripes, nbytes - 32 * stripes)
    total = (total ^ (total >> np.uint64(33))) * _P2
    total = (total ^ (total >> np.uint64(29))) * _P3
    return np.int64(total ^ (total >> np.uint64(32)))  # type: ignore[return-value]


jit.compiled_as(xxh64, _xxh64)
