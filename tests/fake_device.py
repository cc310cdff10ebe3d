"""A device over plain host memory whose streams and events complete late, for the engine's tests.

It has the table that a CUDA device has (`ucxgossip.device.table`), filled with C callbacks. What is
enqueued on a stream happens later: each `query` of an event moves the device's clock by `pace`
operations, each the next one of a stream that the test's random numbers choose; with `pace` 0
nothing happens until the test calls `tick`. Every event, copy and kernel is written to `log`.

The stream of whoever computes (`current_stream`) is the host: it does its work at once, but events
recorded there complete late too. Where it waits for an event, the clock is moved until that has
completed, as a stream would wait.
"""

from __future__ import annotations

import ctypes
import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ucxgossip.device import table as t
from ucxgossip.kernels.cpu import CAME_IN, OWN, mix, spoiled

OUT, IN, HOST = 101, 102, 103
STREAMS = (OUT, IN, HOST)
KERNELS = {
    1000 + t.PER_KIND * kind + each: (dtype, each)
    for kind, dtype in enumerate((np.float32, np.float64))
    for each in range(t.PER_KIND)
}
INVALID, CAPTURING = 400, 900
DEADLINE_S = 30.0


def array_at(address: int, dtype: Any, count: int) -> NDArray[Any]:
    raw = (ctypes.c_uint8 * (count * np.dtype(dtype).itemsize)).from_address(address)
    return np.frombuffer(raw, dtype)


class FakeMemory:
    """Host memory with canaries around it."""

    GUARD = 64

    def __init__(self, nbytes: int) -> None:
        self.raw = np.zeros(nbytes + 2 * self.GUARD + 64, np.uint8)
        start = -self.raw.ctypes.data % 64 + self.GUARD
        self.bytes = self.raw[start : start + nbytes]
        self.raw[:start] = self.raw[start + nbytes :] = 0x5C
        self.address, self.nbytes = int(self.bytes.ctypes.data), nbytes
        self._start = start

    def view(self, dtype: Any, count: int) -> NDArray[Any]:
        return self.bytes[: count * np.dtype(dtype).itemsize].view(dtype)

    def intact(self) -> bool:
        ends = self.raw[: self._start], self.raw[self._start + self.nbytes :]
        return all(bool((end == 0x5C).all()) for end in ends)


class FakeDevice:
    """`ucxgossip.device.Device` for tests. pace: operations that a query lets happen."""

    name = "fake:0"

    def __init__(self, seed: int = 0, pace: int = 1, pins: bool = True) -> None:
        self.random, self.pace, self.pins = random.Random(seed), pace, pins
        self.lock = threading.RLock()
        self.left = threading.Condition(self.lock)  # a thread popped a context
        self.exports, self.exported = True, 0
        self.mapped: list[int] = []
        self.queues: dict[int, deque[tuple[str, Callable[[], bool]]]] = {
            stream: deque() for stream in STREAMS
        }
        self.fired: dict[int, bool] = {}  # by event: what was recorded last has completed
        self.recorded: dict[int, int] = {}  # how often
        self.reached: dict[int, int] = {}  # up to which of those
        self.fails: dict[str, int] = {}  # an error to return, by function
        self.log: list[str] = []
        self.memories: list[FakeMemory] = []
        self.pinned: dict[int, int] = {}
        self.stalled: set[int] = set()  # streams on which a query lets nothing happen
        self.depths: dict[int, int] = {}  # pushes without a pop, by thread
        self.modes: dict[int, int] = {}  # of capturing, by thread
        self.live: set[int] = set()  # events
        self._last_event = 5000
        self._errors: list[BaseException] = []
        self.table = np.zeros(t.WORDS, np.int64)
        self._scratch = np.zeros(1, np.int64)
        self._callbacks: list[Any] = []
        self._fill()

    def _fill(self) -> None:
        for word, function, count in (
            (t.PUSH, self._push, 1),
            (t.POP, self._pop, 1),
            (t.QUERY, self._query, 1),
            (t.RECORD, self._record, 2),
            (t.WAIT, self._wait, 3),
            (t.COPY, self._copy, 4),
            (t.LAUNCH, self._launch, 11),
            (t.EXCHANGE, self._exchange, 1),
        ):
            kind = ctypes.CFUNCTYPE(ctypes.c_int, *(ctypes.c_int64,) * count)
            callback = kind(self._guarded(function))
            self._callbacks.append(callback)
            self.table[word] = ctypes.cast(callback, ctypes.c_void_p).value
        self.table[t.CONTEXT], self.table[t.OUT], self.table[t.IN] = 7, OUT, IN
        self.table[t.SCRATCH] = self._scratch.ctypes.data
        self.table[t.THREADS], self.table[t.BLOCKS] = 256, 4
        self.table[t.KERNELS : t.KERNELS + len(KERNELS)] = list(KERNELS)

    def _guarded(self, function: Callable[..., int]) -> Callable[..., int]:
        name = function.__name__.strip("_")

        def run(*arguments: int) -> int:
            with self.lock:
                if name in self.fails:
                    return self.fails[name]
                try:
                    return function(*arguments)
                except BaseException as error:  # it would be lost in C
                    self._errors.append(error)
                    return INVALID

        return run

    def check(self) -> None:
        """What went wrong inside callbacks, and what should hold at the end of a test.

        The engine's thread may be among its calls meanwhile; it leaves soon.
        """
        with self.left:
            left = self.left.wait_for(lambda: not any(self.depths.values()), DEADLINE_S)
            if self._errors:
                raise self._errors[0]
            assert left, "contexts pushed and not popped"
            assert not any(self.modes.values()), "a thread's capture mode was not given back"
        assert all(memory.intact() for memory in self.memories), "a canary was overwritten"

    # --- what the engine calls -----------------------------------------------------------------

    def _push(self, context: int) -> int:
        assert context == 7
        thread = threading.get_ident()
        self.depths[thread] = self.depths.get(thread, 0) + 1
        return 0

    def _pop(self, scratch: int) -> int:
        assert scratch == self._scratch.ctypes.data
        self.depths[threading.get_ident()] -= 1
        self.left.notify_all()
        return 0

    def _exchange(self, word: int) -> int:
        thread, mode = threading.get_ident(), array_at(word, np.int32, 1)
        before = self.modes.get(thread, 0)
        self.modes[thread], mode[0] = int(mode[0]), before
        return 0

    def _query(self, event: int) -> int:
        assert event in self.recorded
        if self.modes.get(threading.get_ident()) != t.RELAXED:
            return CAPTURING  # as the driver says while any thread captures a graph
        for _ in range(self.pace):
            self._tick(tuple(each for each in STREAMS if each not in self.stalled))
        return 0 if self.completed(event) else t.NOT_READY

    def _record(self, event: int, stream: int) -> int:
        number = self.recorded[event] = self.recorded.get(event, 0) + 1

        def fire() -> bool:
            self.reached[event] = max(self.reached.get(event, 0), number)
            return True

        self._enqueue(stream, f"event {event}", fire)
        return 0

    def _wait(self, stream: int, event: int, flags: int) -> int:
        assert flags == 0 and event in self.recorded
        number = self.recorded[event]
        self._enqueue(stream, f"wait {event}", lambda: self.reached.get(event, 0) >= number)
        return 0

    def _copy(self, to: int, source: int, nbytes: int, stream: int) -> int:
        def run() -> bool:
            ctypes.memmove(to, source, nbytes)
            return True

        self._enqueue(stream, f"copy {nbytes} {source:#x} -> {to:#x}", run)
        return 0

    def _launch(self, kernel: int, *rest: int) -> int:
        gx, gy, gz, bx, by, bz, shared, stream, arguments, extra = rest
        assert (gz, bx, by, bz, shared, extra) == (1, 256, 1, 1, 0, 0)
        dtype, which = KERNELS[kernel]
        # By value, as a launch takes them: the engine writes the next ones at once.
        dst, src, _, count, result, chunk = (
            int(array_at(int(each), np.int64, 1)[0]) for each in array_at(arguments, np.int64, 6)
        )
        alpha = dtype(array_at(int(array_at(arguments, np.int64, 6)[2]), dtype, 1)[0])
        if which == t.MIX:
            chunk = count
        assert gy == -(-count // chunk) <= 65535 and 1 <= gx * gy <= max(4, gy)
        pieces = [(at, min(chunk, count - at)) for at in range(0, count, chunk)]

        def run() -> bool:
            found = array_at(result, np.float64, 2 * len(pieces))
            for row, (at, length) in enumerate(pieces):
                skip = at * np.dtype(dtype).itemsize
                to, source = (array_at(each + skip, dtype, length) for each in (dst, src))
                bits = found.view(np.int64)[2 * row + 1 :]
                with np.errstate(all="ignore"):
                    if which == t.MIX:
                        found[0] += mix(to, source, alpha)
                    elif which == t.GAUGE:
                        difference = (source - to).astype(np.float64)
                        found[2 * row] += float(difference @ difference)
                        bits[0] |= spoiled(to, source) & (CAME_IN | OWN)
                    elif bits[0] == 0:
                        mix(to, source, alpha)
            return True

        self._enqueue(stream, f"kernel {which} x {len(pieces)} -> {dst:#x}", run)
        return 0

    # --- its clock -----------------------------------------------------------------------------

    def _enqueue(self, stream: int, what: str, run: Callable[[], bool]) -> None:
        self.queues[stream].append((what, run))

    def completed(self, event: int) -> bool:
        return self.reached.get(event, 0) == self.recorded[event]

    def _tick(self, streams: tuple[int, ...] = STREAMS) -> bool:
        """Let the next operation of one stream happen; False where none can."""
        for stream in self.random.sample(streams, len(streams)):
            if self.queues[stream]:
                what, run = self.queues[stream][0]
                if run():
                    self.queues[stream].popleft()
                    self.log.append(what)
                    return True
        return False

    def tick(self, *streams: int) -> bool:
        """Let one operation happen, of these streams if any are given; False where none can."""
        with self.lock:
            return self._tick(streams or STREAMS)

    def compute(self, run: Callable[[], None]) -> None:
        """Something that the training stream has to do before events recorded after it."""

        def done() -> bool:
            run()
            return True

        with self.lock:
            self._enqueue(HOST, "compute", done)

    def idle(self) -> bool:
        """Whether nothing is enqueued."""
        with self.lock:
            return not any(self.queues.values())

    # --- the Python face -----------------------------------------------------------------------

    def current_stream(self) -> int:
        return HOST

    def error_name(self, status: int) -> str:
        return f"FAKE_ERROR_{status}"

    def allocate(self, nbytes: int) -> FakeMemory:
        memory = FakeMemory(nbytes)
        self.memories.append(memory)
        return memory

    def pin(self, address: int, nbytes: int) -> bool:
        if self.pins:
            assert address % 4096 == 0 and nbytes % 4096 == 0
            assert address not in self.pinned
            self.pinned[address] = nbytes
        return self.pins

    def unpin(self, address: int) -> None:
        del self.pinned[address]

    def event(self) -> int:
        with self.lock:
            self._last_event += 1
            self.live.add(self._last_event)
            return self._last_event

    def drop_event(self, event: int) -> None:
        self.live.remove(event)

    def record(self, event: int, stream: int) -> None:
        with self.lock:
            assert self._record(event, stream) == 0

    def wait(self, stream: int, event: int) -> None:
        """The host is the stream: move the clock until the event has completed."""
        assert stream == HOST
        deadline = time.monotonic() + DEADLINE_S
        while True:
            with self.lock:
                assert event in self.recorded
                if self.completed(event):
                    return
                self._tick()
            assert time.monotonic() < deadline, "an event that nobody completes"

    def read(self, address: int, into: NDArray[Any]) -> None:
        ctypes.memmove(into.ctypes.data, address, into.nbytes)

    def write(self, address: int, values: NDArray[Any]) -> None:
        ctypes.memmove(address, values.ctypes.data, values.nbytes)

    def export(self, memory: FakeMemory) -> bytes:
        self.exported += 1
        return f"{os.getpid()} {memory.address}".encode() if self.exports else b""

    def map(self, handle: bytes) -> int:
        process, address = handle.split()
        if int(process) != os.getpid():
            return 0
        self.mapped.append(int(address))
        return int(address)

    def unmap(self, address: int) -> None:
        self.mapped.remove(address)

    def settle(self, timeout: float) -> bool:
        deadline = time.monotonic() + timeout
        while not self.idle():
            self.tick()
            if time.monotonic() > deadline:
                return False
        return True
