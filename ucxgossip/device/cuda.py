"""A CUDA device: plain memory, events, two streams of our own, and the kernels of the engine.

It works in the device's primary context, which is torch's and CuPy's too, and pushes it for each
call, so that the caller's current device stays what it was. The streams do not synchronise with
the default stream, and have the highest priority: a mix is short, and somebody waits for it.

The arena of a bucket is ``cuMemAlloc`` memory: it lives as long as the bucket and can be handed to
other processes, unlike what torch's caching allocator may give.

Untested on hardware: proved are the calls it makes, with a stand-in for the driver, and the engine
over a device of the same table (tests/test_device_cuda.py, tests/test_device_rounds.py).
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ucxgossip.device import driver as cuda
from ucxgossip.device import table as t
from ucxgossip.device.admission import check_installed
from ucxgossip.device.driver import Driver
from ucxgossip.device.protocol import DeviceMemory
from ucxgossip.errors import DeviceError, NoDeviceError
from ucxgossip.kernels.cuda_source import THREADS
from ucxgossip.kernels.cuda_whole import KINDS, WHOLE_SOURCE, names
from ucxgossip.kernels.cupy_errors import named

_BLOCKS_EACH = 8
"""Blocks a multiprocessor, as `kernels.cupy_mix` has it."""

_COPY_S = 60.0
_DEFAULT_STREAM = 0

Loader = Callable[[int], dict[str, int]]


def compile_kernels(ordinal: int) -> dict[str, int]:
    """The engine's kernels on device `ordinal`, by name: ``CUfunction`` handles.

    Compiled by NVRTC through CuPy, which caches them on disk. Where it cannot, an error with the
    cause, as `kernels.cupy_errors` names it.
    """
    with named():
        import cupy

        with cupy.cuda.Device(ordinal):
            module = cupy.RawModule(code=WHOLE_SOURCE, options=("--std=c++17",))
            found = {
                name: module.get_function(name).kernel for kind in KINDS for name in names(kind)
            }
    _functions.extend(found.values())
    return {name: int(function.ptr) for name, function in found.items()}


_functions: list[Any] = []
"""Kernels stay loaded as long as the process: the engine has their handles, and a `RawModule` does
not hold them, only CuPy's memo (``cupy.clear_memo``, also at exit) and its functions do."""


_EXPORT = struct.Struct("<64sqQ64s")


@lru_cache(maxsize=1)
def _host() -> bytes:
    """This host since its last start, for containers of it too."""
    try:
        text = Path("/proc/sys/kernel/random/boot_id").read_bytes()
    except OSError:
        text = platform.node().encode()
    return text.strip()[:64].ljust(64, b"\0")


class CudaMemory:
    """Plain device memory (`ucxgossip.device.DeviceMemory`)."""

    def __init__(
        self, driver: Driver, context: int, nbytes: int, reclaim: Callable[[], None]
    ) -> None:
        try:
            self.address = _allocated(driver, context, nbytes)
        except DeviceError as error:
            if error.status != cuda.OUT_OF_MEMORY:
                raise
            reclaim()
            self.address = _allocated(driver, context, nbytes)
        # At the interpreter's exit the driver may be gone before us.
        weakref.finalize(self, _free, driver, context, self.address).atexit = False
        self.nbytes = nbytes

    def view(self, dtype: np.dtype[Any], count: int) -> object:
        """`count` elements as something with ``__cuda_array_interface__`` (version 3)."""
        return _View(self, np.dtype(dtype), count)


class _View:
    def __init__(self, memory: CudaMemory, dtype: np.dtype[Any], count: int) -> None:
        self._memory = memory
        self.__cuda_array_interface__ = {
            "shape": (count,),
            "typestr": dtype.str,
            "data": (memory.address, False),
            "version": 3,
        }


def _allocated(driver: Driver, context: int, nbytes: int) -> int:
    with driver.current(context):
        return driver.word("cuMemAlloc_v2", nbytes, detail=f"{nbytes} bytes")


def _nothing() -> None:
    pass


def _free(driver: Driver, context: int, address: int) -> None:
    with suppress(DeviceError), driver.current(context):  # of a device that has failed
        driver.functions["cuMemFree_v2"](address)


class CudaDevice:
    """`ucxgossip.device.Device` number `ordinal`, of those that the process sees.

    current_stream: gives the handle of the stream on which the calling thread computes. load:
    compiles the kernels. reclaim: gives the driver back what an allocator keeps and does not use,
    which is tried where memory is short.
    """

    def __init__(
        self,
        ordinal: int,
        current_stream: Callable[[], int],
        driver: Driver | None = None,
        load: Loader = compile_kernels,
        reclaim: Callable[[], None] = _nothing,
    ) -> None:
        self.driver, self.ordinal = driver or cuda.load(), ordinal
        self.name = f"cuda:{ordinal}"
        self.current_stream, self.reclaim = current_stream, reclaim
        count = self.driver.count()
        if not 0 <= ordinal < count:
            raise NoDeviceError(
                f"there is no {self.name}: {count} CUDA devices are visible (CUDA_VISIBLE_DEVICES?)"
            )
        self._device = self.driver.number("cuDeviceGet", ordinal)
        self.context = self.driver.word("cuDevicePrimaryCtxRetain", self._device)
        self._scratch = np.zeros(1, np.int64)
        self._mapped: dict[int, int] = {}
        self._pinned: set[int] = set()
        self.table = np.zeros(t.WORDS, np.int64)
        self._fill(load)

    def _fill(self, load: Loader) -> None:
        call, table = self.driver, self.table
        for word, name in (
            (t.PUSH, "cuCtxPushCurrent_v2"),
            (t.POP, "cuCtxPopCurrent_v2"),
            (t.QUERY, "cuEventQuery"),
            (t.RECORD, "cuEventRecord"),
            (t.WAIT, "cuStreamWaitEvent"),
            (t.COPY, "cuMemcpyAsync"),
            (t.LAUNCH, "cuLaunchKernel"),
            (t.EXCHANGE, "cuThreadExchangeStreamCaptureMode"),
        ):
            table[word] = call.address(name)
        least, most = ctypes.c_int(), ctypes.c_int()
        with call.current(self.context):
            call.call(
                "cuCtxGetStreamPriorityRange", ctypes.addressof(least), ctypes.addressof(most)
            )
            for word in (t.OUT, t.IN):
                flags = cuda.STREAM_NON_BLOCKING
                table[word] = call.word("cuStreamCreateWithPriority", flags, most.value)
            kernels = load(self.ordinal)
        for kind, each in enumerate(KINDS):
            first = t.KERNELS + t.PER_KIND * kind
            table[first : first + t.PER_KIND] = [kernels[name] for name in names(each)]
        processors = call.number("cuDeviceGetAttribute", cuda.MULTIPROCESSOR_COUNT, self._device)
        table[t.CONTEXT], table[t.SCRATCH] = self.context, self._scratch.ctypes.data
        table[t.THREADS], table[t.BLOCKS] = THREADS, _BLOCKS_EACH * processors

    def make_current(self) -> None:
        """Leave the device's context current in this thread, for libraries that look for one."""
        self.driver.call("cuCtxPushCurrent_v2", self.context)

    def error_name(self, status: int) -> str:
        """``"CUDA_ERROR_LAUNCH_FAILED"`` for 719."""
        return self.driver.error_name(status)

    # --- memory --------------------------------------------------------------------------------

    def allocate(self, nbytes: int) -> CudaMemory:
        """Zeroed plain memory; `DeviceError` where there is too little."""
        memory = CudaMemory(self.driver, self.context, nbytes, self.reclaim)
        event = self.event()
        try:
            with self.driver.current(self.context):
                self.driver.call("cuMemsetD8_v2", memory.address, 0, nbytes)
                self.driver.call("cuEventRecord", event, _DEFAULT_STREAM)
                self._await(event, f"filling {nbytes} bytes")  # streams of ours do not wait for it
        finally:
            self.drop_event(event)
        return memory

    def pin(self, address: int, nbytes: int) -> bool:
        """``cuMemHostRegister`` of whole pages; False where the driver refuses.

        True too where somebody else has done it, as UCX does with memory of its own.
        """
        with suppress(DeviceError), self.driver.current(self.context):
            register = self.driver.functions["cuMemHostRegister_v2"]
            status = register(address, nbytes, cuda.HOST_REGISTER_PORTABLE)
            if status == 0:
                self._pinned.add(address)
            return status == 0 or (
                status == cuda.ALREADY_REGISTERED
                and all(
                    self.driver.pointer(cuda.POINTER_MEMORY_TYPE, end) == cuda.MEMORY_TYPE_HOST
                    for end in (address, address + nbytes - 1)
                )
            )
        return False

    def unpin(self, address: int) -> None:
        """``cuMemHostUnregister``, of what this device registered."""
        if address in self._pinned:
            self._pinned.remove(address)
            with suppress(DeviceError), self.driver.current(self.context):
                self.driver.functions["cuMemHostUnregister"](address)

    def export(self, memory: DeviceMemory) -> bytes:
        """``cuIpcGetMemHandle``, with host, process, and the place within its allocation."""
        base, size = ctypes.c_uint64(), ctypes.c_size_t()
        handle = cuda.IpcHandle()
        functions = self.driver.functions
        with self.driver.current(self.context):
            found = functions["cuMemGetAddressRange_v2"](
                ctypes.addressof(base), ctypes.addressof(size), memory.address
            )
            if found or functions["cuIpcGetMemHandle"](ctypes.addressof(handle), base.value):
                return b""
        return _EXPORT.pack(_host(), os.getpid(), memory.address - base.value, bytes(handle))

    def map(self, handle: bytes) -> int:
        """``cuIpcOpenMemHandle``; 0 for another host's, and for this process's own."""
        if len(handle) != _EXPORT.size:
            return 0
        host, process, offset, raw = _EXPORT.unpack(handle)
        if host != _host() or process == os.getpid():
            return 0
        base = ctypes.c_uint64()
        with self.driver.current(self.context):
            self.driver.call(
                "cuIpcOpenMemHandle_v2",
                ctypes.addressof(base),
                cuda.IpcHandle.from_buffer_copy(raw),
                cuda.IPC_LAZY_ENABLE_PEER_ACCESS,
            )
        self._mapped[base.value + offset] = base.value
        return int(base.value + offset)

    def unmap(self, address: int) -> None:
        """``cuIpcCloseMemHandle``; the exporter may be gone, and the device have failed."""
        base = self._mapped.pop(address)
        with suppress(DeviceError), self.driver.current(self.context):
            self.driver.functions["cuIpcCloseMemHandle"](base)

    def read(self, address: int, into: NDArray[Any]) -> None:
        """Fill a contiguous host array from device memory, after the current stream's work."""
        self._copy(into.ctypes.data, address, into.nbytes)

    def write(self, address: int, values: NDArray[Any]) -> None:
        """Fill device memory from a contiguous host array, after the current stream's work."""
        self._copy(address, values.ctypes.data, values.nbytes)

    def _copy(self, to: int, source: int, nbytes: int) -> None:
        stream, event = self.current_stream(), self.event()
        try:
            with self.driver.current(self.context):
                self._check_runs(stream)
                self.driver.call("cuMemcpyAsync", to, source, nbytes, stream)
                self.driver.call("cuEventRecord", event, stream)
                self._await(event, f"a copy of {nbytes} bytes")
        finally:
            self.drop_event(event)

    # --- events and streams --------------------------------------------------------------------

    def event(self) -> int:
        """``cuEventCreate``, without a clock."""
        with self.driver.current(self.context):
            return self.driver.word("cuEventCreate", cuda.EVENT_DISABLE_TIMING)

    def drop_event(self, event: int) -> None:
        """``cuEventDestroy``: the driver keeps it as long as a stream needs it."""
        with suppress(DeviceError), self.driver.current(self.context):
            self.driver.functions["cuEventDestroy_v2"](event)

    def record(self, event: int, stream: int) -> None:
        """``cuEventRecord``; `DeviceError` where a graph of the stream is captured."""
        with self.driver.current(self.context):
            self._check_runs(stream)
            self.driver.call("cuEventRecord", event, stream)

    def _check_runs(self, stream: int) -> None:
        """What a capture records does not run, so that its events are an error to ask for."""
        capturing = ctypes.c_int()
        self.driver.call("cuStreamIsCapturing", stream, ctypes.addressof(capturing))
        if capturing.value:
            status = cuda.CAPTURE_UNSUPPORTED
            raise DeviceError(
                *("cuStreamIsCapturing", status, self.driver.error_name(status)),
                f"the current stream of {self.name} is captured in a CUDA graph, of which rounds "
                "can be no part; keep forward, backward and optimizer.step of an attached model "
                "out of torch.cuda.graph",
            )

    def wait(self, stream: int, event: int) -> None:
        """``cuStreamWaitEvent``."""
        with self.driver.current(self.context):
            self.driver.call("cuStreamWaitEvent", stream, event, 0)

    def settle(self, timeout: float) -> bool:
        """Wait until the engine's two streams hold nothing; False after `timeout` seconds."""
        events: list[int] = []
        try:
            with self.driver.current(self.context):
                for stream in (t.OUT, t.IN):
                    events.append(self.event())
                    self.driver.call("cuEventRecord", events[-1], int(self.table[stream]))
                deadline = time.monotonic() + timeout
                return all(self._completes(e, deadline - time.monotonic()) for e in events)
        except DeviceError as error:  # a device that has failed does nothing any more
            return error.status != cuda.OUT_OF_MEMORY  # of which it does not stop
        finally:
            for event in events:
                self.drop_event(event)

    def _await(self, event: int, what: str) -> None:
        if not self._completes(event, _COPY_S):
            raise DeviceError(
                *("cuEventQuery", t.NOT_READY, self.driver.error_name(t.NOT_READY)),
                f"{what} did not end within {_COPY_S:g} s",
            )

    def _completes(self, event: int, timeout: float) -> bool:
        deadline = time.monotonic() + timeout
        while True:
            status = self.driver.functions["cuEventQuery"](event)
            if status == 0:
                return True
            if status != t.NOT_READY:
                raise DeviceError("cuEventQuery", status, self.driver.error_name(status))
            if time.monotonic() > deadline:
                return False
            os.sched_yield()


def open_device(
    ordinal: int,
    current_stream: Callable[[], int],
    ucx_origin: str,
    driver: Driver | None = None,
    reclaim: Callable[[], None] = _nothing,
) -> CudaDevice:
    """Device `ordinal` after all that `admission` asks for; the same one for each call.

    `NoDeviceError`, `MissingExtraError`, `CudaVersionError`, `BackendError`. Untested on hardware.
    """
    if ordinal not in _devices:
        driver = driver or cuda.load()
        check_installed(driver, ucx_origin)
        _devices[ordinal] = CudaDevice(ordinal, current_stream, driver, reclaim=reclaim)
    return _devices[ordinal]


_devices: dict[int, CudaDevice] = {}
