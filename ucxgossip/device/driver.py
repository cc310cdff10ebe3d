"""NVIDIA's driver API out of ``libcuda.so.1``, bound by ctypes: only what a device here calls.

Handles, device addresses and sizes are 64 bits wide. A call that fails is a `DeviceError` with the
driver's own name for it. Source: the CUDA Driver API reference, 12 and 13.

Rejected: the runtime API (its library must match a toolkit; the driver's is there wherever a GPU
can be used, and torch's contexts are the same primary contexts); cuda-python (one package more).

Untested on hardware.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from ucxgossip.errors import DeviceError, NoDeviceError

LIBRARY = "libcuda.so.1"

EVENT_DISABLE_TIMING = 2
STREAM_NON_BLOCKING = 1
CAPTURE_RELAXED = 2
HOST_REGISTER_PORTABLE = 1
IPC_LAZY_ENABLE_PEER_ACCESS = 1
MULTIPROCESSOR_COUNT = 16
OUT_OF_MEMORY, NO_DEVICE, INVALID_CONTEXT, ALREADY_REGISTERED = 2, 100, 201, 712
CAPTURE_UNSUPPORTED = 900
POINTER_MEMORY_TYPE, POINTER_IS_MANAGED, POINTER_LEGACY_IPC = 2, 8, 10
MEMORY_TYPE_HOST, MEMORY_TYPE_DEVICE = 1, 2


class IpcHandle(ctypes.Structure):
    """``CUipcMemHandle``, which goes by value."""

    _fields_ = (("reserved", ctypes.c_char * 64),)


_word, _int, _out = ctypes.c_uint64, ctypes.c_int, ctypes.c_void_p
_PROTOTYPES: dict[str, tuple[Any, ...]] = {
    "cuInit": (ctypes.c_uint,),
    "cuDriverGetVersion": (_out,),
    "cuGetErrorName": (_int, _out),
    "cuDeviceGetCount": (_out,),
    "cuDeviceGet": (_out, _int),
    "cuDeviceGetName": (_out, _int, _int),
    "cuDeviceGetAttribute": (_out, _int, _int),
    "cuDevicePrimaryCtxGetState": (_int, _out, _out),
    "cuDevicePrimaryCtxRetain": (_out, _int),
    "cuDevicePrimaryCtxRelease_v2": (_int,),
    "cuCtxPushCurrent_v2": (_word,),
    "cuCtxPopCurrent_v2": (_out,),
    "cuCtxGetStreamPriorityRange": (_out, _out),
    "cuMemAlloc_v2": (_out, ctypes.c_size_t),
    "cuMemFree_v2": (_word,),
    "cuMemsetD8_v2": (_word, ctypes.c_ubyte, ctypes.c_size_t),
    "cuMemHostRegister_v2": (_word, ctypes.c_size_t, ctypes.c_uint),
    "cuMemHostUnregister": (_word,),
    "cuMemGetAddressRange_v2": (_out, _out, _word),
    "cuIpcGetMemHandle": (_out, _word),
    "cuIpcOpenMemHandle_v2": (_out, IpcHandle, ctypes.c_uint),
    "cuIpcCloseMemHandle": (_word,),
    "cuPointerGetAttribute": (_out, _int, _word),
    "cuEventCreate": (_out, ctypes.c_uint),
    "cuEventDestroy_v2": (_word,),
    "cuEventRecord": (_word, _word),
    "cuEventQuery": (_word,),
    "cuStreamCreateWithPriority": (_out, ctypes.c_uint, _int),
    "cuThreadExchangeStreamCaptureMode": (_out,),
    "cuStreamIsCapturing": (_word, _out),
    "cuStreamWaitEvent": (_word, _word, ctypes.c_uint),
    "cuMemcpyAsync": (_word, _word, ctypes.c_size_t, _word),
    "cuLaunchKernel": (
        *(_word, *(ctypes.c_uint,) * 7),
        *(_word, ctypes.c_void_p, ctypes.c_void_p),
    ),
}


class Driver:
    """The driver's functions. `library`: what has them as attributes, libcuda by ctypes."""

    def __init__(self, library: Any) -> None:
        self.functions: dict[str, Any] = {}
        for name, argtypes in _PROTOTYPES.items():
            try:
                function = getattr(library, name)
            except AttributeError:
                raise NoDeviceError(
                    f"{LIBRARY} has no function {name}: the driver is too old. CUDA 12 or newer is "
                    "needed"
                ) from None
            function.argtypes, function.restype = argtypes, ctypes.c_int
            self.functions[name] = function
        status = self.functions["cuInit"](0)
        if status != 0:
            raise NoDeviceError(
                f"no CUDA device can be used: cuInit returned {self.error_name(status)} ({status}) "
                "(nvidia-smi? CUDA_VISIBLE_DEVICES?)"
            )

    def address(self, name: str) -> int:
        """Where the C function is, for compiled code."""
        return int(ctypes.cast(self.functions[name], ctypes.c_void_p).value or 0)

    def error_name(self, status: int) -> str:
        """``"CUDA_ERROR_NOT_READY"`` for 600."""
        text = ctypes.c_char_p()
        known = self.functions["cuGetErrorName"](status, ctypes.addressof(text)) == 0
        return text.value.decode() if known and text.value else "unknown error"

    def call(self, name: str, *arguments: Any, detail: str = "") -> None:
        """Call a function; `DeviceError` where it fails."""
        status = self.functions[name](*arguments)
        if status != 0:
            raise DeviceError(name, status, self.error_name(status), detail)

    def word(self, name: str, *arguments: Any, detail: str = "") -> int:
        """As `call`, for a function whose first parameter is where its 64-bit result goes."""
        found = ctypes.c_uint64()
        self.call(name, ctypes.addressof(found), *arguments, detail=detail)
        return found.value

    def number(self, name: str, *arguments: Any) -> int:
        """As `word`, for a result of 32 bits."""
        found = ctypes.c_int()
        self.call(name, ctypes.addressof(found), *arguments)
        return found.value

    @property
    def version(self) -> tuple[int, int]:
        """The newest CUDA that this driver serves, such as ``(12, 8)``."""
        found = self.number("cuDriverGetVersion")
        return found // 1000, found % 1000 // 10

    def count(self) -> int:
        """Devices that this process sees."""
        return self.number("cuDeviceGetCount")

    def name(self, ordinal: int) -> str:
        """The device's name, such as ``"NVIDIA H100 80GB HBM3"``."""
        text = ctypes.create_string_buffer(128)
        self.call("cuDeviceGetName", ctypes.addressof(text), len(text), ordinal)
        return text.value.decode(errors="replace")

    @contextmanager
    def current(self, context: int) -> Iterator[None]:
        """Make `context` this thread's current one, in relaxed capture mode (`table.RELAXED`)."""
        self.call("cuCtxPushCurrent_v2", context)
        mode, before = ctypes.c_int(CAPTURE_RELAXED), ctypes.c_uint64()
        try:
            self.call("cuThreadExchangeStreamCaptureMode", ctypes.addressof(mode))
            try:
                yield
            finally:
                self.functions["cuThreadExchangeStreamCaptureMode"](ctypes.addressof(mode))
        finally:
            self.functions["cuCtxPopCurrent_v2"](ctypes.addressof(before))

    def pointer(self, attribute: int, address: int) -> int:
        """An integer attribute of the memory at `address`; 0 where the driver knows none.

        Addresses are those of all devices, so any context will do in a thread that has none.
        """
        found = ctypes.c_uint64()
        asked = ctypes.addressof(found), attribute, address
        status = self.functions["cuPointerGetAttribute"](*asked)
        if status == INVALID_CONTEXT:
            with self._any_context():
                status = self.functions["cuPointerGetAttribute"](*asked)
        return found.value & 0xFFFFFFFF if status == 0 else 0

    @contextmanager
    def _any_context(self) -> Iterator[None]:
        """Make a context current that is there already; none where none is."""
        for ordinal in range(self.count()):
            device = self.number("cuDeviceGet", ordinal)
            flags, active = ctypes.c_uint(), ctypes.c_int()
            self.call(
                "cuDevicePrimaryCtxGetState",
                *(device, ctypes.addressof(flags), ctypes.addressof(active)),
            )
            if active.value:
                context = self.word("cuDevicePrimaryCtxRetain", device)
                try:
                    with self.current(context):
                        yield
                finally:
                    self.functions["cuDevicePrimaryCtxRelease_v2"](device)
                return
        yield


@lru_cache(maxsize=1)
def load() -> Driver:
    """The driver of this machine; `NoDeviceError` where there is none, or no device."""
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError as error:
        raise NoDeviceError(
            f"no CUDA device can be used: {LIBRARY} cannot be loaded ({error}). Install NVIDIA's "
            "driver, or run where it is (nvidia-smi shows it)"
        ) from error
    return Driver(library)
