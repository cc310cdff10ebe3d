"""Registered memory, and the keys by which others put into it."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ucxgossip.device import driver
from ucxgossip.device.admission import check_memory
from ucxgossip.errors import ArgumentError, ArrayError
from ucxgossip.ucp import abi
from ucxgossip.ucp.context import Context
from ucxgossip.ucp.endpoint import Endpoint, check_blob
from ucxgossip.ucp.resource import Resource


class MemoryRegion(Resource):
    """``ucp_mem_h``: `nbytes` allocated by UCX, or an existing array registered.

    Memory that others reach over shared memory must be allocated by UCX. Allocated memory is
    zeroed, and views of its `bytes` must not outlive the region. `param` is the
    ``ucp_request_param_t`` of puts out of this region.

    array: a NumPy array, or what has ``__cuda_array_interface__``: memory on a CUDA device, plain
    (``cudaMalloc``), without `bytes`; `ArrayError` for memory that no other process can map (the
    message names the allocator setting), `NoDeviceError` without a driver. Untested on hardware.
    """

    def __init__(self, context: Context, nbytes: int | None = None, array: Any = None) -> None:
        if (nbytes is None) == (array is None):
            raise ArgumentError("MemoryRegion takes either nbytes or array")
        params = abi.MemMapParams(field_mask=abi.MemMapField.ADDRESS | abi.MemMapField.LENGTH)
        self.on_device = hasattr(array, "__cuda_array_interface__")
        if self.on_device:
            params.address, params.length = _device_span(array)
            params.field_mask |= abi.MemMapField.MEMORY_TYPE
            params.memory_type = abi.MEMORY_TYPE_CUDA
            self._array = array
        elif array is not None:
            if not array.flags.c_contiguous or array.nbytes == 0:
                raise ArrayError("a registered array must be contiguous and not empty")
            params.address, params.length = array.ctypes.data, array.nbytes
        else:
            if nbytes is None or nbytes <= 0:
                raise ArgumentError(f"MemoryRegion of {nbytes} bytes; must be positive")
            params.length = nbytes
            params.field_mask |= abi.MemMapField.FLAGS
            params.flags = abi.MEM_MAP_ALLOCATE
        self.library = context.library
        handle = ctypes.c_void_p()
        self.library("ucp_mem_map", context.handle, ctypes.byref(params), ctypes.byref(handle))
        super().__init__(handle.value or 0, context)
        self.context = context
        attr = abi.MemAttr(field_mask=abi.MemAttrField.ADDRESS | abi.MemAttrField.LENGTH)
        self.library("ucp_mem_query", handle, ctypes.byref(attr))
        self.address: int = int(params.address or attr.address)
        self.nbytes: int = int(params.length)
        self.bytes: NDArray[np.uint8] = np.empty(0, np.uint8)
        if array is None:
            self.bytes = np.ctypeslib.as_array(
                (ctypes.c_uint8 * self.nbytes).from_address(self.address)
            )
        elif not self.on_device:
            self.bytes = array.reshape(-1).view(np.uint8)
        self.param = abi.RequestParam(op_attr_mask=abi.OpAttr.MEMH, memh=handle.value)
        if self.on_device:  # or UCX asks the driver at each put
            self.param.op_attr_mask |= abi.OpAttr.MEMORY_TYPE
            self.param.memory_type = abi.MEMORY_TYPE_CUDA
        if array is None:
            self.bytes[:] = 0

    @property
    def param_address(self) -> int:
        """Address of `param`."""
        return ctypes.addressof(self.param)

    def view(self, dtype: Any, count: int, offset: int = 0) -> NDArray[Any]:
        """`count` elements of `dtype` from byte `offset` on."""
        size = np.dtype(dtype).itemsize * count
        if self.on_device:
            raise ArrayError("a view of a region on a device; the CPU cannot read it")
        if offset < 0 or count < 0 or offset + size > self.nbytes:
            raise ArgumentError(
                f"a view of bytes {offset} to {offset + size} of a region of {self.nbytes}"
            )
        return self.bytes[offset : offset + size].view(dtype)

    def pack(self) -> bytes:
        """``ucp_rkey_pack``: the key by which another process puts here."""
        buffer, size = ctypes.c_void_p(), ctypes.c_size_t()
        self.library(
            "ucp_rkey_pack",
            self.context.handle,
            self.handle,
            ctypes.byref(buffer),
            ctypes.byref(size),
        )
        try:
            return ctypes.string_at(buffer.value or 0, size.value)
        finally:
            self.library.functions["ucp_rkey_buffer_release"](buffer)

    def _release(self, handle: int) -> None:
        self.library("ucp_mem_unmap", self.context.handle, handle)


def _device_span(array: Any) -> tuple[int, int]:
    """Address and bytes of an array on a device that can be registered; `ArrayError` else."""
    interface = array.__cuda_array_interface__
    address, read_only = interface["data"]
    nbytes = math.prod(interface["shape"]) * np.dtype(interface["typestr"]).itemsize
    if nbytes == 0 or read_only or interface.get("strides") is not None:
        raise ArrayError("a registered array must be contiguous, writeable and not empty")
    check_memory(driver.load(), int(address))
    return int(address), nbytes


class RemoteKey(Resource):
    """``ucp_rkey_h``: the right to put, over `endpoint`, into the region that packed `blob`."""

    def __init__(self, endpoint: Endpoint, blob: bytes) -> None:
        check_blob("packed key", blob)
        self.library = endpoint.library
        buffer = ctypes.create_string_buffer(blob, len(blob))
        handle = ctypes.c_void_p()
        self.library(
            "ucp_ep_rkey_unpack", endpoint.handle, ctypes.addressof(buffer), ctypes.byref(handle)
        )
        super().__init__(handle.value or 0, endpoint)

    def pointer(self, remote_address: int) -> int:
        """``ucp_rkey_ptr``: where this process may store to that memory directly; 0 if nowhere."""
        local = ctypes.c_void_p()
        status = self.library.functions["ucp_rkey_ptr"](
            self.handle, remote_address, ctypes.byref(local)
        )
        return int(local.value or 0) if status == abi.Status.OK else 0

    def _release(self, handle: int) -> None:
        self.library.functions["ucp_rkey_destroy"](handle)
