"""A stand-in for libcuda over host memory: C functions by name, as ctypes would find them.

What is enqueued happens at once, but an event completes at its second query only. It keeps the
calls, the contexts that are pushed and the capture mode, as if somebody captured a graph always.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from ucxgossip.device import driver as cuda

CONTEXT = 0x7000
GLOBAL, RELAXED = 0, 2
UNSAFE = ("cuMemAlloc", "cuMemFree", "cuMemHostRegister", "cuMemHostUnregister", "cuEventQuery")
NAMES = {
    100: b"CUDA_ERROR_NO_DEVICE",
    600: b"CUDA_ERROR_NOT_READY",
    2: b"CUDA_ERROR_OUT_OF_MEMORY",
    900: b"CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED",
}


def put(address: int, value: int, kind: Any = ctypes.c_uint64) -> int:
    kind.from_address(address).value = value
    return 0


class FakeLibrary:
    """version, count: of the driver. attributes: of every pointer, by number."""

    def __init__(self, version: int = 12080, count: int = 2) -> None:
        self.version, self.count = version, count
        self.attributes = {
            cuda.POINTER_MEMORY_TYPE: cuda.MEMORY_TYPE_DEVICE,
            cuda.POINTER_IS_MANAGED: 0,
            cuda.POINTER_LEGACY_IPC: 1,
        }
        self.fails: dict[str, int] = {}
        self.calls: list[tuple[str, tuple[int, ...]]] = []
        self.contexts: list[int] = []
        self.mode = GLOBAL
        self.retained = {0: 0, 1: 1}  # by device, how often: somebody works on number 1
        self.captured: set[int] = set()  # streams
        self.pending: dict[int, int] = {}
        self.memory: dict[int, Any] = {}
        self.live: set[int] = set()
        self.mapped: list[int] = []
        self._last = 0x100
        self._kept: list[Any] = []
        for name, argtypes in cuda._PROTOTYPES.items():
            setattr(self, name, self._function(name, len(argtypes)))

    def _function(self, name: str, count: int) -> Any:
        body = getattr(self, f"do_{name.removesuffix('_v2')}", lambda *_: 0)

        def run(*arguments: int) -> int:
            self.calls.append((name, arguments))
            if name in self.fails:
                return self.fails[name]
            if name.removesuffix("_v2") in UNSAFE and self.mode != RELAXED:
                return 900
            found = body(*arguments)
            return found if isinstance(found, int) else 0

        function = ctypes.CFUNCTYPE(ctypes.c_int, *(ctypes.c_uint64,) * count)(run)
        self._kept.append(function)
        return Callable(function)

    def new(self) -> int:
        self._last += 1
        self.live.add(self._last)
        return self._last

    def names(self) -> list[str]:
        return [name for name, _ in self.calls]

    # --- functions -----------------------------------------------------------------------------

    def do_cuDriverGetVersion(self, out: int) -> int:
        return put(out, self.version, ctypes.c_int)

    def do_cuGetErrorName(self, status: int, out: int) -> int:
        if status not in NAMES:
            return 1
        text = ctypes.create_string_buffer(NAMES[status])
        self._kept.append(text)
        return put(out, ctypes.addressof(text))

    def do_cuDeviceGetCount(self, out: int) -> int:
        return put(out, self.count, ctypes.c_int)

    def do_cuDeviceGet(self, out: int, ordinal: int) -> int:
        return put(out, ordinal, ctypes.c_int)

    def do_cuDeviceGetName(self, out: int, size: int, device: int) -> int:
        ctypes.memmove(out, b"Stand-in\0", 9)
        return 0

    def do_cuDeviceGetAttribute(self, out: int, attribute: int, device: int) -> int:
        return put(out, 3, ctypes.c_int)

    def do_cuDevicePrimaryCtxRetain(self, out: int, device: int) -> int:
        self.retained[device] += 1
        return put(out, CONTEXT + device)

    def do_cuDevicePrimaryCtxRelease(self, device: int) -> int:
        self.retained[device] -= 1
        return 0

    def do_cuDevicePrimaryCtxGetState(self, device: int, flags: int, active: int) -> int:
        put(flags, 0, ctypes.c_uint)
        return put(active, int(self.retained[device] > 0), ctypes.c_int)

    def do_cuCtxPushCurrent(self, context: int) -> int:
        self.contexts.append(context)
        return 0

    def do_cuCtxPopCurrent(self, out: int) -> int:
        return put(out, self.contexts.pop())

    def do_cuThreadExchangeStreamCaptureMode(self, word: int) -> int:
        before, self.mode = self.mode, ctypes.c_int.from_address(word).value
        return put(word, before, ctypes.c_int)

    def do_cuCtxGetStreamPriorityRange(self, least: int, most: int) -> int:
        put(least, 0, ctypes.c_int)
        return put(most, -5, ctypes.c_int)

    def do_cuMemAlloc(self, out: int, nbytes: int) -> int:
        assert self.contexts
        memory = np.full(nbytes, 0xEE, np.uint8)
        self.memory[memory.ctypes.data] = memory
        return put(out, memory.ctypes.data)

    def do_cuMemFree(self, address: int) -> int:
        del self.memory[address]
        return 0

    def do_cuMemsetD8(self, address: int, value: int, nbytes: int) -> int:
        ctypes.memset(address, value, nbytes)
        return 0

    def do_cuPointerGetAttribute(self, out: int, attribute: int, address: int) -> int:
        if not self.contexts:
            return cuda.INVALID_CONTEXT
        return put(out, self.attributes[attribute], ctypes.c_int)

    def do_cuMemGetAddressRange(self, base: int, size: int, address: int) -> int:
        put(size, 1 << 21)
        return put(base, address - 256)

    def do_cuIpcGetMemHandle(self, out: int, base: int) -> int:
        ctypes.memmove(out, base.to_bytes(8, "little") + b"handle".ljust(56, b"."), 64)
        return 0

    def do_cuIpcOpenMemHandle(self, out: int, handle: int, flags: int) -> int:
        raw = bytes((ctypes.c_uint8 * 64).from_address(handle))
        assert raw[8:14] == b"handle" and flags == 1 and self.contexts
        base = int.from_bytes(raw[:8], "little")
        self.mapped.append(base)
        return put(out, base)

    def do_cuIpcCloseMemHandle(self, base: int) -> int:
        self.mapped.remove(base)
        return 0

    def do_cuEventCreate(self, out: int, flags: int) -> int:
        assert flags == cuda.EVENT_DISABLE_TIMING and self.contexts
        return put(out, self.new())

    def do_cuEventDestroy(self, event: int) -> int:
        self.live.remove(event)
        return 0

    def do_cuEventRecord(self, event: int, stream: int) -> int:
        assert self.contexts
        self.pending[event] = 1
        return 0

    def do_cuEventQuery(self, event: int) -> int:
        left = self.pending[event]
        self.pending[event] = max(0, left - 1)
        return 600 if left else 0

    def do_cuStreamCreateWithPriority(self, out: int, flags: int, priority: int) -> int:
        assert ctypes.c_int(priority).value == -5
        return put(out, self.new())

    def do_cuStreamIsCapturing(self, stream: int, out: int) -> int:
        return put(out, int(stream in self.captured), ctypes.c_int)

    def do_cuMemcpyAsync(self, to: int, source: int, nbytes: int, stream: int) -> int:
        assert self.contexts
        ctypes.memmove(to, source, nbytes)
        return 0


class Callable:
    """A C function whose prototype may be set again, as one that ctypes found."""

    def __init__(self, function: Any) -> None:
        self._function = function
        self._as_parameter_ = function
        self.argtypes: Any = None
        self.restype: Any = None

    def __call__(self, *arguments: Any) -> int:
        assert len(arguments) == len(self.argtypes)
        words = []
        for kind, value in zip(self.argtypes, arguments, strict=True):
            if isinstance(value, ctypes.Structure):  # goes by value; by its address here
                words.append(ctypes.addressof(value))
            else:
                words.append(kind(value).value or 0)
        return int(self._function(*words))
