"""What CuPy raises where it cannot load or compile, by the names of `ucxgossip.errors`.

CuPy finds CUDA's libraries and headers when they are first needed, and says so by an error of
whatever kind: the text is all that tells a package that is missing from one of another CUDA.
Sources: ``_softlink.pyx``, ``core.pyx`` and ``compiler.py`` of CuPy 15.0.0a1. Untested on hardware.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ucxgossip.errors import BackendError, CudaVersionError, GossipError, MissingExtraError

_MISSING = (
    "CuPy failed to load",  # libnvrtc and others, by dlopen
    "Failed to find CUDA headers",
    "cannot open source file",  # a header, by NVRTC
    "CUDA is not found",
)
_OTHER_VERSION = (
    "cudaErrorInsufficientDriver",
    "cudaErrorSystemDriverMismatch",
    "cudaErrorCompatNotSupportedOnDevice",
    "cudaErrorNoKernelImageForDevice",
    "cudaErrorUnsupportedPtxVersion",
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH",
    "CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE",
    "CUDA_ERROR_NO_BINARY_FOR_GPU",
    "CUDA_ERROR_UNSUPPORTED_PTX_VERSION",
    "invalid value for --gpu-architecture",  # NVRTC is older than the GPU
)
_EXTRA = "pip install 'ucxgossip[cu12]' or 'ucxgossip[cu13]'"


@contextmanager
def named() -> Iterator[None]:
    """Give what CuPy raises within its name here; what is none of CuPy's goes through.

    `MissingExtraError`: a part of it, or of CUDA, that it needs is missing; `CudaVersionError`: one
    is for another CUDA than the driver serves; `BackendError`: anything else that it says.
    """
    try:
        yield
    except GossipError:
        raise
    except Exception as error:
        found = _name(error)
        if found is None:
            raise
        raise found from error


def _name(error: Exception) -> BackendError | None:
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, ImportError) or any(part in text for part in _MISSING):
        return MissingExtraError(
            f"CuPy is installed but cannot be loaded, or misses a part of CUDA: {text}; {_EXTRA}, "
            "by the driver's CUDA major, brings what it needs"
        )
    if any(part in text for part in _OTHER_VERSION):
        return CudaVersionError(
            f"CuPy cannot make the mixing kernels: {text}; it must be for the driver's CUDA: "
            f"{_EXTRA}, and no other build of CuPy beside it"
        )
    if type(error).__module__.partition(".")[0] in ("cupy", "cupy_backends"):
        return BackendError(f"CuPy cannot make the mixing kernels: {text}")
    return None
