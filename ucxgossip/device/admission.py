"""What must be there before a CUDA device is used, and which device memory can be registered.

Each thing that is missing or does not fit is an error of its own name, before anything is made.

Memory. UCX hands device memory to other processes by the driver's IPC handles. Memory from
``cudaMallocAsync`` and from torch's expandable segments has none, and may be put only in part
without an error (openucx/ucx#11283). So what the driver does not call capable of legacy IPC is
refused when it is registered, and the message names the allocator that made it.

Untested on hardware: proved with a stand-in for the driver (tests/test_device_cuda.py).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import metadata, util

from ucxgossip.device import driver as cuda
from ucxgossip.device.driver import Driver
from ucxgossip.errors import ArrayError, CudaVersionError, MissingExtraError

_ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
_WHEELS = {"libucx-cu12": 12, "libucx-cu13": 13}


def check_wheel(driver: Driver, ucx_origin: str) -> None:
    """`CudaVersionError` for a UCX wheel of a newer CUDA than the driver serves.

    ucx_origin: as `ucp.lib.Library.origin` has it. The wheel's CUDA runtime is its own, and works
    with any driver that is not older.
    """
    major, minor = driver.version
    for wheel, wanted in _WHEELS.items():
        if ucx_origin == "wheel" and _installed(wheel) and wanted > major:
            raise CudaVersionError(
                f"the UCX wheel {wheel} is for CUDA {wanted}, but this machine's driver serves "
                f"CUDA {major}.{minor}: pip uninstall {wheel}; pip install "
                f"'ucxgossip[{_extra(driver)}]'"
            )


def check_installed(driver: Driver, ucx_origin: str) -> None:
    """`MissingExtraError` without CuPy; `CudaVersionError` as `check_wheel`."""
    check_wheel(driver, ucx_origin)
    if util.find_spec("cupy") is None:
        raise MissingExtraError(
            "models on CUDA need CuPy, which compiles the mixing kernels, and it is not installed: "
            f"pip install 'ucxgossip[{_extra(driver)}]'"
        )


def _extra(driver: Driver) -> str:
    """The extra for the driver's CUDA."""
    return f"cu{min(max(driver.version[0], 12), 13)}"


def _installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def check_memory(
    driver: Driver, address: int, environment: Mapping[str, str] | None = None
) -> None:
    """`ArrayError` for memory at a device address that cannot be registered for puts.

    environment: where torch's allocator settings stand, ``os.environ`` by default.
    """
    if driver.pointer(cuda.POINTER_MEMORY_TYPE, address) != cuda.MEMORY_TYPE_DEVICE:
        raise ArrayError(
            f"the memory at {address:#x} is no device memory that the CUDA driver knows; pass an "
            "array on a CUDA device"
        )
    if driver.pointer(cuda.POINTER_IS_MANAGED, address):
        raise ArrayError(
            "the array lies in managed memory (cudaMallocManaged), which no other process can "
            "map; CuPy: drop cupy.cuda.set_allocator(cupy.cuda.malloc_managed)"
        )
    if not driver.pointer(cuda.POINTER_LEGACY_IPC, address):
        raise ArrayError(
            "the array's memory cannot be handed to another process (no legacy CUDA IPC): "
            + _cause(os.environ if environment is None else environment)
        )


def _cause(environment: Mapping[str, str]) -> str:
    for variable in _ALLOCATOR_VARIABLES:
        setting = environment.get(variable, "").replace(" ", "")
        if "expandable_segments:True" in setting:
            return f"{variable} has expandable_segments:True; set it to expandable_segments:False"
        if "backend:cudaMallocAsync" in setting:
            return f"{variable} has backend:cudaMallocAsync; set it to backend:native"
    return (
        "it comes from cudaMallocAsync or from expandable segments. torch: set "
        f"{_ALLOCATOR_VARIABLES[0]} (formerly {_ALLOCATOR_VARIABLES[1]}) to "
        "backend:native,expandable_segments:False; CuPy: cupy.cuda.set_allocator("
        "cupy.cuda.MemoryPool().malloc)"
    )
