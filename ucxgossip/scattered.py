"""Payloads that stand in several arrays: the scatter-gather list of a round.

A model is some hundred tensors, most of them small. A round of all of them goes through one
mailbox as if they stood one behind the other: chunks, places, signals and credits are those of one
array of that size, and only who puts a chunk and who mixes it looks where its *pieces* are.

A list is a row of words: how many arrays, where each one starts in the payload (and where the last
one ends), where each one is in memory.

Rejected: a mailbox for each array (1.45 times one array for ResNet-50 over shared memory: places
that are cold again at each tensor); packing the payload first (each byte once more through memory);
``UCP_DATATYPE_IOV`` (its entries must be kept for each put under way; not tried).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ucxgossip import jit

COUNT, STARTS = 0, 1


def lay_out(addresses: Sequence[int], sizes: Sequence[int]) -> NDArray[np.int64]:
    """The list of arrays at `addresses`, of `sizes` bytes, none of them 0."""
    starts = np.concatenate([[0], np.cumsum(sizes)])
    return np.concatenate([[len(sizes)], starts, addresses]).astype(np.int64)


@jit.njit
def _words(scattered: int) -> Any:
    count = jit.view_words(scattered, 1)[COUNT]
    return jit.view_words(scattered, 2 + 2 * count)


@jit.njit
def array_at(scattered: int, offset: int) -> int:
    """Which array of the list at address `scattered` holds byte `offset` of the payload."""
    words = _words(scattered)
    first, last = 0, words[COUNT] - 1
    while first < last:
        middle = (first + last + 1) // 2
        if words[STARTS + middle] <= offset:
            first = middle
        else:
            last = middle - 1
    return first


@jit.njit
def piece_at(scattered: int, array: int, offset: int, nbytes: int) -> Any:
    """Address and length of what stands in `array` from byte `offset` of the payload on.

    nbytes: of the payload that are wanted; the length is at most that.
    """
    words = _words(scattered)
    start, end = words[STARTS + array], words[STARTS + array + 1]
    address = words[STARTS + words[COUNT] + 1 + array]
    return address + offset - start, min(nbytes, end - offset)


@jit.njit
def pieces_in(scattered: int, offset: int, nbytes: int) -> int:
    """In how many pieces `nbytes` of the payload from `offset` on stand."""
    return array_at(scattered, offset + nbytes - 1) - array_at(scattered, offset) + 1


@jit.njit
def gather(scattered: int, offset: int, nbytes: int, to: int, stream: bool) -> None:
    """Copy `nbytes` of the payload from `offset` on to the address `to`.

    stream: past the caches.
    """
    array, done = array_at(scattered, offset), 0
    while done < nbytes:
        address, length = piece_at(scattered, array, offset + done, nbytes - done)
        if stream:
            jit.stream_memory(to + done, address, length)
        else:
            jit.copy_memory(to + done, address, length)
        array, done = array + 1, done + length
