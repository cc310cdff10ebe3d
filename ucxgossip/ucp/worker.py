"""The UCP worker: the queue of a process, its address and its event descriptor."""

from __future__ import annotations

import ctypes

from ucxgossip.ucp import abi
from ucxgossip.ucp.context import Context
from ucxgossip.ucp.resource import Resource


class Worker(Resource):
    """``ucp_worker_h``, to be used by one thread at a time (``UCS_THREAD_MODE_SERIALIZED``).

    Attributes: `address`, bytes by which another worker connects to this one; `event_fd`, readable
    when ``ucp_worker_arm`` succeeded and something has come since.
    """

    def __init__(self, context: Context) -> None:
        self.library = context.library
        params = abi.WorkerParams(
            field_mask=abi.WorkerParamField.THREAD_MODE, thread_mode=abi.THREAD_MODE_SERIALIZED
        )
        handle = ctypes.c_void_p()
        self.library(
            "ucp_worker_create", context.handle, ctypes.byref(params), ctypes.byref(handle)
        )
        super().__init__(handle.value or 0, context)
        self.context = context
        self.address = self._query_address()
        descriptor = ctypes.c_int(-1)
        self.library("ucp_worker_get_efd", handle, ctypes.byref(descriptor))
        self.event_fd = descriptor.value

    def _query_address(self) -> bytes:
        attr = abi.WorkerAttr(field_mask=abi.WorkerAttrField.ADDRESS)
        self.library("ucp_worker_query", self.handle, ctypes.byref(attr))
        try:
            return ctypes.string_at(attr.address, attr.address_length)
        finally:
            self.library.functions["ucp_worker_release_address"](self.handle, attr.address)

    def progress(self) -> int:
        """``ucp_worker_progress``: non-zero if something moved."""
        return int(self.library.functions["ucp_worker_progress"](self.handle))

    def set_handler(self, ident: int, callback: int, argument: int) -> None:
        """Call the C function at `callback` with `argument` for each active message `ident`."""
        params = abi.AmHandlerParam(
            field_mask=abi.AmHandlerField.ID
            | abi.AmHandlerField.FLAGS
            | abi.AmHandlerField.CB
            | abi.AmHandlerField.ARG,
            id=ident,
            flags=abi.AM_FLAG_WHOLE_MSG,
            cb=callback,
            arg=argument,
        )
        self.library("ucp_worker_set_am_recv_handler", self.handle, ctypes.byref(params))

    def _release(self, handle: int) -> None:
        self.library.functions["ucp_worker_destroy"](handle)
