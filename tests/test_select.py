"""kernels.select: by device and by what is installed; what is missing is named."""

from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ucxgossip.errors import (
    ArgumentError,
    ArrayError,
    BackendError,
    CudaVersionError,
    MissingExtraError,
    NoDeviceError,
)
from ucxgossip.kernels import mix_, select, selection
from ucxgossip.kernels.device_arrays import (
    Operand,
    as_bits,
    distance_address,
    operands,
    stream_handle,
)
from ucxgossip.kernels.torch_mix import mix_ as lerp


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), "cpu:0"], ids=repr)
def test_the_cpu_has_numba(device: Any) -> None:
    assert select(device) is mix_
    assert select(device, "numba") is mix_
    assert select(device, "torch") is lerp


def test_cpu_is_the_default() -> None:
    assert select() is mix_


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tpu",), "device is 'tpu'; choose one of cpu, cuda"),
        ((None,), "device is None"),
        (("cpu", "cupy"), "backend is 'cupy'; for cpu choose one of numba, torch"),
        (("cuda", "numba"), "backend is 'numba'; for cuda choose one of cupy, numba_cuda, torch"),
    ],
)
def test_what_there_is_not(arguments: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        select(*arguments)


def installed(monkeypatch: pytest.MonkeyPatch, *modules: str, wheels: str = "") -> None:
    """Of the packages that are looked for, only `modules` and `wheels` are there."""
    looked = selection.util.find_spec

    def find(name: str) -> Any:
        return (name in modules or None) if name in ("cupy", "numba_cuda") else looked(name)

    monkeypatch.setattr(selection, "util", SimpleNamespace(find_spec=find))
    monkeypatch.setattr(selection, "_has", lambda name: name == wheels)


@pytest.mark.parametrize("backend", [None, "cupy", "numba_cuda"])
@pytest.mark.parametrize(
    ("wheel", "extras"), [("libucx-cu13", ("cu13", "cu12")), ("libucx-cu12", ("cu12", "cu13"))]
)
def test_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, backend: Any, wheel: str, extras: tuple[str, str]
) -> None:
    """The one of the UCX wheel's major first."""
    installed(monkeypatch, wheels=wheel)
    package = "numba-cuda" if backend == "numba_cuda" else "CuPy"
    with pytest.raises(MissingExtraError) as raised:
        select("cuda", backend)
    assert isinstance(raised.value, ImportError)
    first, second = extras
    assert f"needs {package}, which is not installed" in str(raised.value)
    assert f"pip install 'ucxgossip[{first}]' (or [{second}]," in str(raised.value)


class RuntimeFailure(Exception):
    pass


def fake_cupy(count: Any) -> ModuleType:
    def ask() -> int:
        if isinstance(count, Exception):
            raise count
        return int(count)

    module = ModuleType("cupy")
    runtime = SimpleNamespace(getDeviceCount=ask, CUDARuntimeError=RuntimeFailure)
    module.cuda = SimpleNamespace(runtime=runtime)  # type: ignore[attr-defined]
    return module


@pytest.mark.parametrize(
    ("count", "message"),
    [(0, "no CUDA device is visible"), (RuntimeFailure("insufficient driver"), "insufficient")],
)
def test_cupy_without_a_device(monkeypatch: pytest.MonkeyPatch, count: Any, message: str) -> None:
    installed(monkeypatch, "cupy")
    monkeypatch.setitem(__import__("sys").modules, "cupy", fake_cupy(count))
    with pytest.raises(NoDeviceError, match=message):
        select("cuda:1")


CUPYS_OWN = type("NVRTCError", (RuntimeError,), {"__module__": "cupy_backends.cuda.libs.nvrtc"})


@pytest.mark.parametrize(
    ("raised", "named"),
    [
        (ImportError("libnvrtc.so.12: cannot open shared object file"), MissingExtraError),
        (RuntimeError("CuPy failed to load libnvrtc.so.12: OSError: ..."), MissingExtraError),
        (RuntimeError("Failed to find CUDA headers. Please install CUDA"), MissingExtraError),
        (RuntimeFailure("cudaErrorUnsupportedPtxVersion: compiled with ..."), CudaVersionError),
        (CUPYS_OWN("nvrtc: error: invalid value for --gpu-architecture (-arch)"), CudaVersionError),
        (CUPYS_OWN("NVRTC_ERROR_OUT_OF_MEMORY (1)"), BackendError),
    ],
)
def test_a_cupy_that_is_broken(
    monkeypatch: pytest.MonkeyPatch, raised: Exception, named: type[Exception]
) -> None:
    """As its kernels are made; what is not CuPy's is not taken for it."""
    for error, expected in ((raised, named), (KeyError("ours"), KeyError)):
        module = fake_cupy(1)

        def fail(error: Exception = error, **_: Any) -> None:
            raise error

        module.RawModule = fail  # type: ignore[attr-defined]
        installed(monkeypatch, "cupy")
        monkeypatch.setitem(__import__("sys").modules, "cupy", module)
        with pytest.raises(expected) as found:
            select("cuda")
        assert type(found.value) is expected and str(error) in str(found.value)
        if expected is named:
            assert found.value.__cause__ is error
        if expected in (MissingExtraError, CudaVersionError):
            assert "ucxgossip[cu12]" in str(found.value)


def test_a_cupy_without_its_own_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "cupy")
    monkeypatch.setitem(__import__("sys").modules, "cupy", None)
    with pytest.raises(MissingExtraError, match=r"cannot be loaded.*ucxgossip\[cu12\]"):
        select("cuda")


def test_numba_cuda_stands_in_for_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "numba_cuda")
    monkeypatch.setattr(selection, "_numba_cuda", lambda: lerp)
    assert select("cuda") is lerp


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_numba_cuda_without_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "numba_cuda")
    with pytest.raises(NoDeviceError, match="numba finds no CUDA device"):
        select("cuda", "numba_cuda")


# --- what a GPU kernel is told of its arrays ---------------------------------------------------


def array(
    typestr: str = "<f4", shape: Any = (8,), address: int = 4096, **more: Any
) -> SimpleNamespace:
    """What an array on a device says of itself."""
    interface = {"typestr": typestr, "shape": shape, "data": (address, False), "version": 3}
    return SimpleNamespace(__cuda_array_interface__=interface | more)


@pytest.mark.parametrize(
    ("typestr", "kind", "size"),
    [
        *(("<f4", "float32", 4), ("<f8", "float64", 8), ("<f2", "float16", 2)),
        *(("<u2", "bfloat16", 2), ("<V2", "bfloat16", 2)),
    ],
)
def test_operands(typestr: str, kind: str, size: int) -> None:
    dst, src = operands(array(typestr), array(typestr, address=8192 + size, strides=(size,)))
    assert (dst, src) == (Operand(4096, 8, kind), Operand(8192 + size, 8, kind))
    assert dst.end == 4096 + 8 * size


def test_torch_says_v2_of_bfloat16() -> None:
    assert torch._tensor._dtype_to_typestr(torch.bfloat16) == "<V2"


def test_numba_is_given_bits() -> None:
    tensor, other = array("<V2", address=8192), array("<u2")
    found = as_bits(tensor).__cuda_array_interface__
    assert found == tensor.__cuda_array_interface__ | {"typestr": "<u2"}
    assert as_bits(other) is other


def test_neighbours_do_not_overlap() -> None:
    operands(array(), array(address=4096 + 32))
    operands(array(address=4096 + 32), array())
    operands(array(shape=(0,)), array(shape=(0,)))


def test_a_read_only_source_is_read() -> None:
    operands(array(), array(address=8192, data=(8192, True)))


@pytest.mark.parametrize(
    ("dst", "src", "message"),
    [
        (np.zeros(8, np.float32), array(), "dst must be an array on a CUDA device"),
        (array(), torch.zeros(8), "src must be an array on a CUDA device"),
        (array("<i4"), array(), "dst is <i4"),
        (array(">f4"), array(), "dst is >f4"),
        (array("<f8"), array(address=8192), "dst is float64 but src is float32"),
        (array(shape=(2, 4)), array(), "dst must be 1-D and contiguous"),
        (array(), array(strides=(8,), address=8192), "src must be 1-D and contiguous"),
        (array(data=(4096, True)), array(address=8192), "dst is read-only"),
        (array(), array(shape=(7,), address=8192), "dst has 8 elements but src has 7"),
        (array(), array(address=4096 + 28), "overlap"),
        (array("<f4"), array("<u2", address=4090), "overlap"),
        (array(address=4098), array(address=8192), "dst starts at 0x1002"),
    ],
)
def test_operands_refused(dst: Any, src: Any, message: str) -> None:
    with pytest.raises(ArrayError, match=message):
        operands(dst, src)


class NeedsGradient:
    @property
    def __cuda_array_interface__(self) -> Any:
        raise RuntimeError("Variable requires grad")


def test_what_does_not_give_its_address() -> None:
    with pytest.raises(ArrayError, match=r"src does not give .* requires grad.*detach"):
        operands(array(), NeedsGradient())


def test_distance_address() -> None:
    assert distance_address(None) == 0
    assert distance_address(array("<f8", (1,))) == 4096
    for bad in (array("<f8", (2,)), array("<f4", (1,)), np.zeros(1)):
        with pytest.raises(ArrayError, match="distance"):
            distance_address(bad)


def test_stream_handle() -> None:
    assert [stream_handle(each) for each in (None, 0, 94_000, np.int64(5))] == [0, 0, 94_000, 5]
    for bad in ("0", -1, 1.0, True):
        with pytest.raises(ArgumentError, match="stream"):
            stream_handle(bad)
