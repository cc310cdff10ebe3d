"""Which mixing kernel serves a device: by what is asked for, or by what is installed.

A backend's module is imported when it is chosen, so that CuPy, numba-cuda and a GPU are needed by
those who use them alone.
"""

from __future__ import annotations

from importlib import metadata, util
from typing import Any

from ucxgossip.errors import ArgumentError, MissingExtraError, NoDeviceError
from ucxgossip.kernels.contract import Mix
from ucxgossip.kernels.cupy_errors import named

BACKENDS = {"cpu": ("numba", "torch"), "cuda": ("cupy", "numba_cuda", "torch")}
"""The backends of each device, best first."""


def select(device: object = "cpu", backend: str | None = None) -> Mix:
    """The kernel ``mix_(dst, src, alpha, *, distance=None, stream=None)`` for a device.

    device: "cpu", "cuda" or "cuda:1" (or a `torch.device`). A kernel for CUDA launches on the
    current device, which must be the one the arrays are on.
    backend: "numba" (NumPy arrays), "cupy" or "numba_cuda" (whatever has
    ``__cuda_array_interface__``), "torch" (tensors of any device; a baseline, see `torch_mix`); by
    default the best installed: numba on the CPU, CuPy on CUDA, or numba-cuda where CuPy is missing.

    `ArgumentError`: no such device or backend; `MissingExtraError`: a package or a part of one is
    missing, with the extra that brings it; `NoDeviceError`: no CUDA device can be used;
    `CudaVersionError`, `BackendError`: CuPy cannot compile.
    """
    name = str(device).partition(":")[0]
    if name not in BACKENDS:
        raise ArgumentError(f"select: device is {device!r}; choose one of {', '.join(BACKENDS)}")
    if backend is not None and backend not in BACKENDS[name]:
        raise ArgumentError(
            f"select: backend is {backend!r}; for {name} choose one of {', '.join(BACKENDS[name])}"
        )
    if backend is None:
        backend = "numba" if name == "cpu" else _best_for_cuda()
    return _made(name, backend)


def _best_for_cuda() -> str:
    installed = [each for each in ("cupy", "numba_cuda") if _is_installed(each)]
    return installed[0] if installed else "cupy"


def _made(device: str, backend: str) -> Mix:
    if backend == "torch":
        from ucxgossip.kernels.torch_mix import mix_ as lerp

        return lerp
    if backend == "numba":
        from ucxgossip.kernels.host import mix_

        return mix_
    if not _is_installed(backend):
        raise _missing(backend)
    if backend == "cupy":
        return _cupy()
    return _numba_cuda()


def _is_installed(backend: str) -> bool:
    return util.find_spec("cupy" if backend == "cupy" else "numba_cuda") is not None


def _missing(backend: str) -> MissingExtraError:
    major, other = ("cu13", "cu12") if _has("libucx-cu13") else ("cu12", "cu13")
    package = {"cupy": "CuPy", "numba_cuda": "numba-cuda"}[backend]
    return MissingExtraError(
        f"select: mixing on CUDA needs {package}, which is not installed: "
        f"pip install 'ucxgossip[{major}]' (or [{other}], by the driver's CUDA major)"
    )


def _has(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def _cupy() -> Mix:
    with named():
        import cupy

        count: Any
        try:
            count = cupy.cuda.runtime.getDeviceCount()
        except cupy.cuda.runtime.CUDARuntimeError as error:
            raise NoDeviceError(f"select: no CUDA device can be used: {error}") from error
        if count == 0:
            raise NoDeviceError("select: no CUDA device is visible (CUDA_VISIBLE_DEVICES?)")
        from ucxgossip.kernels.cupy_mix import CupyMix

        return CupyMix()


def _numba_cuda() -> Mix:
    from numba import cuda as numba_cuda

    cuda: Any = numba_cuda
    if not cuda.is_available():
        raise NoDeviceError("select: numba finds no CUDA device or no driver (nvidia-smi?)")
    from ucxgossip.kernels.numba_cuda_mix import NumbaCudaMix

    return NumbaCudaMix()
