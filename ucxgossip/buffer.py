"""Buffers: the memory of a payload, as the engine wants it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ucxgossip.errors import ArrayError
from ucxgossip.ucp.memory import MemoryRegion


@dataclass(frozen=True)
class Buffer:
    """Memory of a payload: an address, its size, and the request parameters to put it with.

    `owner` keeps the memory alive. `param` 0: not registered.
    """

    address: int
    nbytes: int
    dtype: np.dtype[Any]
    owner: object
    param: int = 0

    @classmethod
    def of(cls, array: NDArray[Any], region: MemoryRegion | None = None) -> Buffer:
        """The memory of a 1-D contiguous writeable array; `ArrayError` for others."""
        if not isinstance(array, np.ndarray):
            raise ArrayError(
                f"exchange takes a NumPy array, not {type(array).__name__}; for a CPU tensor "
                "pass tensor.numpy()"
            )
        if array.ndim != 1 or not array.flags.c_contiguous:
            raise ArrayError(
                f"the array must be 1-D and contiguous, not shape {array.shape} with strides "
                f"{array.strides}; pass np.ascontiguousarray(array).ravel()"
            )
        if array.dtype.hasobject:
            raise ArrayError(f"the array is {array.dtype}; Python objects cannot travel")
        if not array.flags.writeable:
            raise ArrayError("the array is read-only; it is averaged in place")
        param = 0 if region is None else region.param_address
        return cls(array.ctypes.data, array.nbytes, array.dtype, array, param)
