"""device.cuda, driver and admission with a stand-in for libcuda: the calls, their order, errors.

What a driver does is for the tests marked `gpu` (test_gpu.py).
"""

import ctypes
import gc
import os
import sys
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest

import engine_pair as engines
import fake_driver as fake
from ucxgossip.device import admission, cuda
from ucxgossip.device import driver as driver_module
from ucxgossip.device import table as t
from ucxgossip.device.driver import Driver
from ucxgossip.errors import (
    ArrayError,
    CudaVersionError,
    DeviceError,
    MissingExtraError,
    NoDeviceError,
)
from ucxgossip.kernels.cuda_whole import KINDS, names

STREAM = 0x55
NUMBERS = {name: 900 + i for i, name in enumerate(n for kind in KINDS for n in names(kind))}


@pytest.fixture
def library() -> Any:
    return fake.FakeLibrary()


@pytest.fixture
def device(library: Any) -> Any:
    made = cuda.CudaDevice(1, lambda: STREAM, Driver(library), lambda ordinal: NUMBERS)
    yield made
    assert library.contexts == [], "contexts pushed and not popped"
    assert library.mode == fake.GLOBAL, "the thread's capture mode was not given back"


# --- the device --------------------------------------------------------------------------------


def test_the_table(device: Any, library: Any) -> None:
    table = device.table
    assert device.name == "cuda:1"
    assert table[t.CONTEXT] == fake.CONTEXT + 1
    assert table[t.OUT] != table[t.IN] and {table[t.OUT], table[t.IN]} <= library.live
    assert (table[t.THREADS], table[t.BLOCKS]) == (256, 24)
    assert list(table[t.KERNELS : t.KERNELS + 6]) == sorted(NUMBERS.values())


def test_compiled_code_calls_the_driver(device: Any, library: Any) -> None:
    table, event = device.table, device.event()
    source, to = np.arange(8.0), np.zeros(8)
    arguments, mode = np.zeros(1, np.int64), np.zeros(1, np.int64)
    library.calls.clear()
    assert t.push(table, mode.ctypes.data) == 0
    assert t.copy(table, to.ctypes.data, source.ctypes.data, 64, int(table[t.IN])) == 0
    assert t.record(table, event, int(table[t.IN])) == 0
    assert t.wait(table, STREAM, event) == 0
    assert t.query(table, event) == t.NOT_READY
    assert t.query(table, event) == 0
    assert t.launch(table, 901, 7, 3, int(table[t.IN]), arguments.ctypes.data) == 0
    assert t.pop(table, mode.ctypes.data) == 0
    library.fails["cuThreadExchangeStreamCaptureMode"] = 1
    assert t.push(table, mode.ctypes.data) == 1 and library.contexts == []
    library.fails.clear()
    assert np.array_equal(source, to)
    found = dict(library.calls)
    assert found["cuStreamWaitEvent"] == (STREAM, event, 0)
    shape = (901, 7, 3, 1, 256, 1, 1, 0)
    assert found["cuLaunchKernel"] == (*shape, table[t.IN], arguments.ctypes.data, 0)
    device.drop_event(event)


def test_no_call_breaks_a_capture(device: Any, library: Any) -> None:
    """Of a graph, in any thread: calls that could are refused unless this thread's mode is relaxed.

    The mode is the caller's own again afterwards, also where it was not the usual one.
    """
    library.mode = 1
    memory, values = device.allocate(64), np.zeros(64, np.uint8)
    device.read(memory.address, values)
    assert device.settle(1.0) and device.pin(4096, 4096)
    device.unpin(4096)
    library.fails["cuThreadExchangeStreamCaptureMode"] = 1
    with pytest.raises(DeviceError, match="cuThreadExchangeStreamCaptureMode"):
        device.read(memory.address, values)
    library.fails.clear()
    del memory
    gc.collect()
    assert library.mode == 1 and library.memory == {}
    library.mode = fake.GLOBAL


def test_memory_is_zeroed_viewed_and_freed(device: Any, library: Any) -> None:
    memory = device.allocate(64)
    view = memory.view(np.dtype(np.float32), 16)
    interface = view.__cuda_array_interface__
    assert interface["data"] == (memory.address, False)
    assert (interface["shape"], interface["typestr"]) == ((16,), "<f4")
    assert bytes((ctypes.c_uint8 * 64).from_address(memory.address)) == bytes(64)
    address = memory.address
    del memory
    gc.collect()
    assert address in library.memory  # the view keeps it
    del view
    gc.collect()
    assert address not in library.memory


def test_memory_that_cannot_be_mapped_is_an_arena_all_the_same(device: Any, library: Any) -> None:
    """Drivers are known to say so of plain memory; then chunks are staged."""
    library.attributes[driver_module.POINTER_LEGACY_IPC] = 0
    library.fails["cuIpcGetMemHandle"] = 1
    memory = device.allocate(64)
    assert device.export(memory) == b""


def test_too_little_memory(device: Any, library: Any) -> None:
    library.fails["cuMemAlloc_v2"] = 2
    with pytest.raises(DeviceError, match=r"cuMemAlloc_v2: CUDA_ERROR_OUT_OF_MEMORY \(2\): 64"):
        device.allocate(64)


def test_memory_that_an_allocator_keeps_is_asked_for(library: Any) -> None:
    """Once, and outside of our context and mode: torch.cuda.empty_cache is torch's."""
    asked = []

    def reclaim() -> None:
        asked.append((list(library.contexts), library.mode))
        library.fails.clear()

    made = cuda.CudaDevice(0, lambda: STREAM, Driver(library), lambda _: NUMBERS, reclaim)
    library.fails["cuMemAlloc_v2"] = 1
    with pytest.raises(DeviceError, match=r"\(1\)"):
        made.allocate(64)
    assert asked == []
    library.fails["cuMemAlloc_v2"] = 2
    assert made.allocate(64).nbytes == 64
    assert asked == [([], fake.GLOBAL)]


def test_kernels_stay_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """As CuPy has it: a module is held by its functions and by a memo that anybody may clear."""
    memo: list[Any] = []
    unloaded: list[int] = []

    class Module:
        def __del__(self) -> None:
            unloaded.append(1)

    class RawModule:
        def __init__(self, code: str, options: tuple[str, ...]) -> None:
            memo.append(Module())

        def get_function(self, name: str) -> Any:
            function = SimpleNamespace(ptr=NUMBERS[name], module=memo[-1])
            return SimpleNamespace(kernel=function)

    within = SimpleNamespace(Device=lambda _: nullcontext())
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(RawModule=RawModule, cuda=within))
    monkeypatch.setattr(cuda, "_functions", [])
    assert cuda.compile_kernels(0) == NUMBERS
    memo.clear()
    gc.collect()
    assert unloaded == []


@pytest.mark.parametrize(
    ("raised", "named"),
    [
        (ImportError("libnvrtc.so.12"), MissingExtraError),
        (RuntimeError("Failed to find CUDA headers"), MissingExtraError),
        (RuntimeError("cudaErrorInsufficientDriver"), CudaVersionError),
    ],
)
def test_a_cupy_that_does_not_fit(
    raised: Exception, named: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> None:
        raise raised

    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=SimpleNamespace(Device=fail)))
    with pytest.raises(named, match=str(raised)) as found:
        cuda.compile_kernels(0)
    assert found.value.__cause__ is raised


def test_what_is_none_of_cupys_errors_goes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise MemoryError("too little")

    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=SimpleNamespace(Device=fail)))
    with pytest.raises(MemoryError, match="too little"):
        cuda.compile_kernels(0)


def test_reads_and_writes_go_by_the_current_stream(device: Any, library: Any) -> None:
    memory, values = device.allocate(64), np.arange(16, dtype=np.float32)
    library.calls.clear()
    device.write(memory.address, values)
    found = np.zeros_like(values)
    device.read(memory.address, found)
    assert np.array_equal(found, values)
    copies = [arguments for name, arguments in library.calls if name == "cuMemcpyAsync"]
    assert {arguments[3] for arguments in copies} == {STREAM}
    assert library.names().count("cuEventQuery") == 4  # until they have ended


def test_nothing_is_asked_of_a_stream_that_is_captured(device: Any, library: Any) -> None:
    """An event that a capture records is none that can be asked for; the engine would, later."""
    memory, values, event = device.allocate(64), np.zeros(64, np.uint8), device.event()
    library.captured.add(STREAM)
    library.calls.clear()
    for ask in (
        lambda: device.record(event, STREAM),
        lambda: device.read(memory.address, values),
        lambda: device.write(memory.address, values),
    ):
        with pytest.raises(DeviceError, match=r"\(900\): .* cuda:1 is captured in a CUDA graph"):
            ask()
    assert not {"cuEventRecord", "cuMemcpyAsync"} & set(library.names())
    device.record(event, STREAM + 1)
    library.captured.clear()
    device.record(event, STREAM)
    device.drop_event(event)


def test_memory_of_another_process(
    device: Any, library: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A handle names the allocation; what is mapped is the place in it."""
    memory = device.allocate(64)
    handle = device.export(memory)
    assert device.map(handle) == 0  # this process's own: the driver refuses that
    assert device.map(b"") == device.map(handle[:-1]) == 0
    own = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: own + 1)
    assert device.map(handle) == memory.address
    assert library.mapped == [memory.address - 256]
    device.unmap(memory.address)
    assert library.mapped == []
    assert device.map(b"another host".ljust(64, b"\0") + handle[64:]) == 0
    library.fails["cuIpcOpenMemHandle_v2"] = 201
    with pytest.raises(DeviceError, match=r"cuIpcOpenMemHandle_v2: .*\(201\)"):
        device.map(handle)
    library.fails = {"cuIpcGetMemHandle": 1}
    assert device.export(memory) == b""


def test_pinning(device: Any, library: Any) -> None:
    assert device.pin(4096, 8192)
    device.unpin(4096)
    library.fails["cuMemHostRegister_v2"] = 2
    assert not device.pin(4096, 8192)
    found = [each for each in library.calls if "Host" in each[0]]
    assert found[:2] == [
        ("cuMemHostRegister_v2", (4096, 8192, 1)),
        ("cuMemHostUnregister", (4096,)),
    ]


def test_memory_that_another_has_pinned(device: Any, library: Any) -> None:
    """It is pinned, and stays so; where only a page of it is, it is not."""
    library.fails["cuMemHostRegister_v2"] = 712
    library.attributes[driver_module.POINTER_MEMORY_TYPE] = 1
    assert device.pin(4096, 8192)
    asked = [arguments for name, arguments in library.calls if name == "cuPointerGetAttribute"]
    assert [arguments[2] for arguments in asked] == [4096, 4096 + 8191]
    device.unpin(4096)
    assert "cuMemHostUnregister" not in library.names()
    library.attributes[driver_module.POINTER_MEMORY_TYPE] = 0
    assert not device.pin(4096, 8192)


def test_settling(device: Any, library: Any) -> None:
    before = set(library.live)
    assert device.settle(5.0)
    assert library.live == before
    library.fails["cuEventQuery"] = 600
    assert not device.settle(0.01)
    library.fails["cuEventQuery"] = 719
    assert device.settle(5.0)
    assert library.live == before


@pytest.mark.parametrize("function", ["cuEventCreate", "cuCtxPushCurrent_v2"])
def test_settling_a_device_that_has_failed(device: Any, library: Any, function: str) -> None:
    """It does nothing any more; one that has too little memory for an event may go on."""
    library.fails[function] = 719
    assert device.settle(5.0)
    library.fails[function] = 2
    assert not device.settle(5.0)


def test_a_device_that_has_failed_is_left_all_the_same(
    device: Any, library: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, event = device.allocate(64), device.event()
    handle = device.export(memory)
    monkeypatch.setattr(cuda.os, "getpid", lambda: 0)
    mapped = device.map(handle)
    assert mapped and device.pin(4096, 4096)
    library.fails["cuCtxPushCurrent_v2"] = 719
    device.drop_event(event)
    device.unpin(4096)
    device.unmap(mapped)
    assert not device.pin(8192, 4096)


@pytest.mark.parametrize("function", [None, "cuEventCreate", "cuCtxPushCurrent_v2"])
def test_an_engine_is_closed_on_a_device_that_has_failed(
    device: Any, library: Any, function: str | None
) -> None:
    pair = engines.make_pair("shm", 4096, 2)
    pair.engines[0].equip(pair.boxes[0], device)
    if function is not None:
        library.fails[function] = 719
        pair.engines[0].renew(1, elsewhere=True)
    for engine, box in zip(pair.engines, pair.boxes, strict=True):
        engine.close()
        assert engine.worker.closed and box.region.closed
        engine.context.close()


def test_a_device_that_is_not_there(library: Any) -> None:
    with pytest.raises(NoDeviceError, match="there is no cuda:2: 2 CUDA devices"):
        cuda.CudaDevice(2, lambda: 0, Driver(library), lambda ordinal: NUMBERS)


# --- the driver --------------------------------------------------------------------------------


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    driver_module.load.cache_clear()
    monkeypatch.setattr(driver_module, "LIBRARY", "libcuda.so.not-here")
    with pytest.raises(NoDeviceError, match="libcuda.so.not-here cannot be loaded"):
        driver_module.load()


def test_a_driver_without_a_device(library: Any) -> None:
    library.fails["cuInit"] = 100
    with pytest.raises(NoDeviceError, match="CUDA_ERROR_NO_DEVICE"):
        Driver(library)


def test_a_driver_that_is_too_old(library: Any) -> None:
    del library.cuStreamCreateWithPriority
    with pytest.raises(NoDeviceError, match="no function cuStreamCreateWithPriority"):
        Driver(library)


def test_what_the_driver_says(library: Any) -> None:
    found = Driver(library)
    assert found.version == (12, 8) and found.count() == 2
    assert found.name(0) == "Stand-in"
    assert found.error_name(600) == "CUDA_ERROR_NOT_READY"
    assert found.error_name(12345) == "unknown error"


# --- admission ---------------------------------------------------------------------------------


def installed(*packages: str) -> Any:
    """Only these of the wheels and CuPy are installed."""
    return mock.patch.multiple(
        admission,
        _installed=lambda name: name in packages,
        util=mock.Mock(find_spec=lambda name: object() if name in packages else None),
    )


def test_all_is_there(library: Any) -> None:
    with installed("libucx-cu12", "cupy"):
        admission.check_installed(Driver(library), "wheel")


def test_no_cupy(library: Any) -> None:
    with (
        installed("libucx-cu12"),
        pytest.raises(MissingExtraError, match=r"pip install 'ucxgossip\[cu12\]'"),
    ):
        admission.check_installed(Driver(library), "wheel")


def test_a_wheel_for_a_newer_cuda(library: Any) -> None:
    with (
        installed("libucx-cu13", "cupy"),
        pytest.raises(CudaVersionError, match=r"CUDA 13, but .* serves CUDA 12\.8.*\[cu12\]"),
    ):
        admission.check_installed(Driver(library), "wheel")


@pytest.mark.parametrize(
    ("version", "origin", "wheel"),
    [(13000, "wheel", "libucx-cu13"), (13000, "wheel", "libucx-cu12"), (12080, "system", "cu13")],
)
def test_wheels_that_fit(version: int, origin: str, wheel: str) -> None:
    with installed(wheel, "cupy"):
        admission.check_installed(Driver(fake.FakeLibrary(version)), origin)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"PYTORCH_ALLOC_CONF": "expandable_segments: True"}, "expandable_segments:False"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"}, "backend:native"),
        ({}, "backend:native,expandable_segments:False"),
    ],
)
def test_memory_without_ipc(library: Any, environment: dict[str, str], said: str) -> None:
    library.attributes[driver_module.POINTER_LEGACY_IPC] = 0
    with pytest.raises(ArrayError, match=said) as raised:
        admission.check_memory(Driver(library), 64, environment)
    for variable in environment:
        assert variable in str(raised.value)


def test_managed_and_host_memory(library: Any) -> None:
    library.attributes[driver_module.POINTER_IS_MANAGED] = 1
    with pytest.raises(ArrayError, match="managed memory"):
        admission.check_memory(Driver(library), 64)
    library.attributes[driver_module.POINTER_MEMORY_TYPE] = 1
    with pytest.raises(ArrayError, match="no device memory"):
        admission.check_memory(Driver(library), 64)


def test_memory_is_asked_about_in_a_context_that_is_there(library: Any) -> None:
    """The caller's thread may have none; none is made for it."""
    library.calls.clear()
    admission.check_memory(Driver(library), 64)
    found = dict(library.calls)
    assert found["cuCtxPushCurrent_v2"] == (fake.CONTEXT + 1,)
    assert library.retained == {0: 0, 1: 1} and library.contexts == []
    library.retained[1] = 0
    with pytest.raises(ArrayError, match="no device memory"):
        admission.check_memory(Driver(library), 64)
    assert library.retained == {0: 0, 1: 0}


def test_one_device_for_all_who_open_it(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_devices", {})
    monkeypatch.setattr(
        cuda.CudaDevice.__init__, "__defaults__", (None, lambda _: NUMBERS, lambda: None)
    )
    with installed("cupy"):
        first = cuda.open_device(0, lambda: STREAM, "wheel", Driver(library))
        assert cuda.open_device(0, lambda: STREAM, "wheel") is first
