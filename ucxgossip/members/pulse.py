"""The pulse: a word a tenth of a second to those who watch this process, come what may.

Compiled and without the GIL, so that a long compilation, a checkpoint being written or any other
call that keeps Python's lock is not taken for death; a process that is stopped or cut off falls
silent. A thread of its own: the engine's sleeps, and steps back while callers drive.
"""

from __future__ import annotations

import os
import threading
from typing import Any

import numpy as np

from ucxgossip import jit

INTERVAL_MS = 100
ALIVE = 1
GOODBYE = 2
WORD_BYTES = 8
PLACES = 16

_STOP, _LOCK, _WAKE, _FIRST = 0, 8, 16, 24


@jit.njit
def _lock(words: Any) -> None:
    while not jit.compare_swap(words, _LOCK, 0, 1):
        jit.yield_cpu()


@jit.njit
def _assign(words: Any, place: int, descriptor: int) -> None:
    """Write to `descriptor` from now on (-1: to none); the one before is not written to again."""
    _lock(words)
    words[_FIRST + place] = descriptor
    jit.store_release(words, _LOCK, 0)


@jit.njit
def _beat(words: Any, value: int) -> None:
    _lock(words)
    for place in range(PLACES):
        if words[_FIRST + place] >= 0:
            jit.write_word(words[_FIRST + place], value)
    jit.store_release(words, _LOCK, 0)


@jit.njit
def _run(words: Any) -> None:
    while jit.load_acquire(words, _STOP) == 0:
        _beat(words, ALIVE)
        jit.wait_readable(-1, words[_WAKE], INTERVAL_MS)


class Pulse:
    """Writes ALIVE to each non-blocking descriptor it is given, every INTERVAL_MS."""

    def __init__(self) -> None:
        self._words = np.zeros(_FIRST + PLACES, np.int64)
        self._words[_FIRST:] = -1
        self._words[_WAKE] = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._places: dict[int, int] = {}
        with jit.warm_up(_run):
            self._words[_STOP] = 1
            _run(self._words)
            _assign(self._words, 0, -1)
            _beat(self._words, ALIVE)
            self._words[_STOP] = 0
        self._thread = threading.Thread(target=self._body, name="ucxgossip-pulse", daemon=True)

    def _body(self) -> None:
        _run(self._words)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def add(self, descriptor: int) -> None:
        """Write to `descriptor` until it is removed; at most PLACES at a time."""
        place = next(place for place in range(PLACES) if place not in self._places.values())
        self._places[descriptor] = place
        _assign(self._words, place, descriptor)

    def remove(self, descriptor: int) -> None:
        """Write to `descriptor` no more; it may be closed then."""
        place = self._places.pop(descriptor, None)
        if place is not None:
            _assign(self._words, place, -1)

    def close(self) -> None:
        """Say goodbye, and end the thread. Further calls do nothing."""
        if self._words[_STOP]:
            return
        self._words[_STOP] = 1
        jit.kick(int(self._words[_WAKE]))
        if self._thread.ident is not None:
            self._thread.join()
        _beat(self._words, GOODBYE)
        os.close(int(self._words[_WAKE]))
