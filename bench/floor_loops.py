"""The compiled loops of the floors: what a round costs when nothing but it is done.

Each takes one array of words that never change (see `Word`): a call from Python costs least with
one argument, and nothing has to be written before it.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import numpy as np
from numba import types

from ucxgossip import jit
from ucxgossip.kernels.cpu import mix

CHUNK = 1 << 16
"""Bytes that are moved at a time, and averaged while they are in the cache."""

RING = 1 << 20
"""Bytes that may be there before they are averaged; CHUNK divides it."""

DONE, TIMED_OUT, GONE = 0, -1, -2

SIGNATURE = (types.int64[::1],)

_DEADLINE_NS = 60_000_000_000
_SPINS, _YIELDS = 200, 40
_POLL_MS = 100
_ARRIVED, _TAKEN = 0, 8
"""Places of an edge's two counters of chunks, in int64; a cache line lies between."""

FLAGS = 128
"""Bytes of an edge's counters, in front of its ring."""

_HALF = np.float32(0.5)


class Word(IntEnum):
    """What stands where in the words of a loop.

    SOURCE, NBYTES: the array. OUT, IN: descriptors of the sockets, or addresses of the edges. BOX:
    address of the ring that is received into (sockets), or of two int64: the chunks that went out
    by the edge and those that came in by the other, in all rounds before.
    """

    SOURCE = 0
    NBYTES = 1
    OUT = 2
    IN = 3
    BOX = 4


_SOURCE, _NBYTES, _OUT, _IN = int(Word.SOURCE), int(Word.NBYTES), int(Word.OUT), int(Word.IN)
_BOX = int(Word.BOX)


@jit.njit
def _average(target: int, source: int, nbytes: int) -> None:
    mix(jit.view_float32(target, nbytes // 4), jit.view_float32(source, nbytes // 4), _HALF)


@jit.njit
def swap(words: Any) -> int:
    """Send the array over one socket while another's comes in over the other; average in place.

    A chunk is averaged once it has left and its counterpart is here. No deadlock: ranks could all
    wait for room in their rings only if each had received a ring more than it has sent.
    """
    source, nbytes, box = words[_SOURCE], words[_NBYTES], words[_BOX]
    sent, got, mixed, idle, deadline = 0, 0, 0, 0, 0
    while mixed < nbytes:
        moved = 0
        if sent < nbytes:
            moved = jit.write_some(words[_OUT], source + sent, nbytes - sent)
            sent += max(moved, 0)
        room = min(nbytes - got, RING - (got - mixed), RING - got % RING)
        if room > 0:
            count = jit.read_some(words[_IN], box + got % RING, room)
            if count == 0:
                return GONE
            got += max(count, 0)
            moved = max(moved, count)
        step = min(CHUNK, nbytes - mixed)
        while step > 0 and min(sent, got) - mixed >= step:
            _average(source + mixed, box + mixed % RING, step)
            mixed += step
            step = min(CHUNK, nbytes - mixed)
            moved = 1
        if moved > 0:
            idle = 0
            continue
        idle += 1
        if idle <= _YIELDS:
            jit.yield_cpu()
            continue
        now = jit.now_ns()
        if idle == _YIELDS + 1:
            deadline = now + _DEADLINE_NS
        elif now > deadline:
            return TIMED_OUT
        readable = words[_IN] if room > 0 else -1
        if not jit.wait_stream(readable, words[_OUT] if sent < nbytes else -1, _POLL_MS):
            return GONE
    return DONE


@jit.njit
def copy(words: Any) -> int:
    """Copy the array into the partner's ring while another's comes into ours; average in place."""
    source, nbytes = words[_SOURCE], words[_NBYTES]
    outward, inward = jit.view_words(words[_OUT], 16), jit.view_words(words[_IN], 16)
    slots = RING // CHUNK
    chunks = (nbytes + CHUNK - 1) // CHUNK
    counts = jit.view_words(words[_BOX], 2)
    put, got = counts[0], counts[1]
    sent, mixed, idle, deadline = 0, 0, 0, 0
    while mixed < chunks:
        moved = False
        if sent < chunks and put + sent - jit.load_acquire(outward, _TAKEN) < slots:
            start = sent * CHUNK
            place = words[_OUT] + FLAGS + (put + sent) % slots * CHUNK
            jit.copy_memory(place, source + start, min(CHUNK, nbytes - start))
            sent += 1
            jit.store_release(outward, _ARRIVED, put + sent)
            moved = True
        if mixed < sent and jit.load_acquire(inward, _ARRIVED) > got + mixed:
            start = mixed * CHUNK
            place = words[_IN] + FLAGS + (got + mixed) % slots * CHUNK
            _average(source + start, place, min(CHUNK, nbytes - start))
            mixed += 1
            jit.store_release(inward, _TAKEN, got + mixed)
            moved = True
        if moved:
            idle = 0
            continue
        idle += 1
        if idle <= _SPINS:
            continue
        jit.yield_cpu()
        if idle % 1024 == 0:
            now = jit.now_ns()
            if deadline == 0:
                deadline = now + _DEADLINE_NS
            elif now > deadline:
                return TIMED_OUT
    counts[0], counts[1] = put + chunks, got + chunks
    return DONE
