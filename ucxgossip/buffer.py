"""Buffers: the memory of a payload, in one array or in several, as the engine wants it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ucxgossip.errors import ArrayError
from ucxgossip.scattered import lay_out
from ucxgossip.ucp.memory import MemoryRegion


@dataclass(frozen=True)
class Buffer:
    """Memory of a payload: an address, its size, and the request parameters to put it with.

    `owner` keeps the memory alive. `param` 0: not registered; region: as which it is. scattered:
    the payload stands in several arrays, and `address` is that of their list (`scattered`).
    """

    address: int
    nbytes: int
    dtype: np.dtype[Any]
    owner: object
    param: int = 0
    scattered: bool = False
    region: MemoryRegion | None = None

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
        return cls(array.ctypes.data, array.nbytes, array.dtype, array, param, region=region)

    @classmethod
    def of_all(cls, arrays: Sequence[NDArray[Any]]) -> Buffer:
        """The memory of several arrays of one dtype, as if they stood one behind the other.

        `ArrayError` where `of` refuses one of them, where dtypes differ, or where two overlap.
        """
        if not isinstance(arrays, list | tuple) or not arrays:
            raise ArrayError(f"exchange takes an array, or a list of them, not {arrays!r}")
        found = []
        for index, array in enumerate(arrays):
            try:
                found.append(cls.of(array))
            except ArrayError as error:
                raise ArrayError(f"array {index} of {len(arrays)}: {error}") from None
            if array.dtype != arrays[0].dtype:
                raise ArrayError(
                    f"array {index} of {len(arrays)} is {array.dtype}, the first is "
                    f"{arrays[0].dtype}; those of one round must be of one dtype"
                )
        parts = [each for each in found if each.nbytes]
        places = sorted((each.address, each.nbytes) for each in parts)
        for (start, nbytes), (following, _) in pairwise(places):
            if start + nbytes > following:
                raise ArrayError("two of the arrays overlap; each is averaged in place")
        table = lay_out([each.address for each in parts], [each.nbytes for each in parts])
        return cls(
            int(table.ctypes.data),
            sum(each.nbytes for each in parts),
            arrays[0].dtype,
            (tuple(arrays), table),
            scattered=True,
        )

    @property
    def contents(self) -> Any:
        """The array, or a list of the arrays."""
        return list(self.owner[0]) if self.scattered else self.owner  # type: ignore[index]

    def copy(self) -> Buffer:
        """A payload of the same values, in memory of its own."""
        if self.scattered:
            return Buffer.of_all([array.copy() for array in self.contents])
        return Buffer.of(self.contents.copy())
