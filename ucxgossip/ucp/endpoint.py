"""The UCP endpoint: the way from this worker to another one."""

from __future__ import annotations

import ctypes
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from ucxgossip.errors import ArgumentError, ClosedError, UCXError
from ucxgossip.ucp import abi, lib, ops
from ucxgossip.ucp.resource import Resource
from ucxgossip.ucp.worker import Worker

if TYPE_CHECKING:
    from ucxgossip.ucp.memory import MemoryRegion, RemoteKey

_PLAIN = abi.RequestParam()

MAX_BLOB = 1 << 16
"""Bytes of the longest worker address or packed key that is handed to libucp."""


def check_blob(what: str, blob: bytes) -> None:
    """`ArgumentError` for a worker address or key whose length cannot be one.

    All that can be checked here: libucp gets no length, and follows the lengths inside.
    """
    if not isinstance(blob, bytes) or not 0 < len(blob) <= MAX_BLOB:
        length = f"{len(blob)} bytes" if isinstance(blob, bytes) else type(blob).__name__
        raise ArgumentError(f"a {what} of {length}; must be 1 to {MAX_BLOB} bytes")


class Endpoint(Resource):
    """``ucp_ep_h`` from `worker` to the worker whose `address` is given.

    close_timeout: seconds that `close()` may wait for outstanding puts. Over TCP, make the
    endpoints of both directions before the first put (docs/protocol.md says why).
    """

    def __init__(self, worker: Worker, address: bytes, close_timeout: float = 2.0) -> None:
        check_blob("worker address", address)
        self.library = worker.library
        self.worker = worker
        self.close_timeout = close_timeout
        self._abandoned = False
        buffer = ctypes.create_string_buffer(address, len(address))
        params = abi.EpParams(
            field_mask=abi.EpParamField.REMOTE_ADDRESS | abi.EpParamField.ERR_HANDLING_MODE,
            address=ctypes.addressof(buffer),
            err_mode=abi.ERR_HANDLING_NONE,
        )
        handle = ctypes.c_void_p()
        self.library("ucp_ep_create", worker.handle, ctypes.byref(params), ctypes.byref(handle))
        super().__init__(handle.value or 0, worker)

    def put(
        self,
        source: MemoryRegion,
        remote_address: int,
        remote_key: RemoteKey,
        nbytes: int | None = None,
        timeout: float = 30.0,
    ) -> None:
        """``ucp_put_nbx`` and ``ucp_ep_flush_nbx``: blocks until the bytes are in place.

        Puts the first `nbytes` of `source` at `remote_address`. Over TCP the target must call
        progress meanwhile. For streams of puts use `ops` from compiled code.
        """
        count = source.nbytes if nbytes is None else nbytes
        if source.closed:
            raise ClosedError("the source region of a put is closed")
        if not 0 <= count <= source.nbytes:
            raise ArgumentError(f"a put of {count} bytes out of a region of {source.nbytes}")
        put = ops.put(
            self.handle,
            source.address,
            count,
            remote_address,
            remote_key.handle,
            ctypes.addressof(_PLAIN),
        )
        self.wait(put, "ucp_put_nbx", timeout)
        self.flush(timeout)

    def flush(self, timeout: float = 30.0) -> None:
        """``ucp_ep_flush_nbx``: blocks until every put on this endpoint is visible remotely."""
        request = ops.flush(self.handle, ctypes.addressof(_PLAIN))
        self.wait(request, "ucp_ep_flush_nbx", timeout)

    def wait(self, request: int, call: str, timeout: float) -> None:
        """Progress until `request` (as `ops` returns it) is done, then free it."""
        if request <= 0:
            lib.check(request, call)
            return
        deadline = time.monotonic() + timeout
        status = ops.check(request)
        while status == abi.Status.INPROGRESS and time.monotonic() < deadline:
            self.worker.progress()
            status = ops.check(request)
        ops.free(request)
        if status == abi.Status.INPROGRESS:
            status = abi.Status.ERR_TIMED_OUT
        lib.check(status, call, f"after {timeout} s" if status < 0 else "")

    def transports(self) -> list[str]:
        """Transport and device of each lane, such as ``"tcp/lo"``; empty before UCX 1.14."""
        attr = abi.EpAttr(field_mask=abi.EpAttrField.TRANSPORTS)
        entries = (abi.TransportEntry * 16)()
        attr.transports_entries = ctypes.cast(entries, ctypes.POINTER(abi.TransportEntry))
        attr.transports_num_entries = len(entries)
        attr.transports_entry_size = ctypes.sizeof(abi.TransportEntry)
        handle = self.handle
        if self.library.version < (1, 14, 0):
            return []
        self.library("ucp_ep_query", handle, ctypes.byref(attr))
        return [
            f"{entry.transport_name.decode()}/{entry.device_name.decode()}"
            for entry in entries[: attr.transports_num_entries]
        ]

    def abandon(self) -> None:
        """Leave the closing to the worker's destruction, without a flush: the partner is gone."""
        self._abandoned = True

    def _release(self, handle: int) -> None:
        if self._abandoned:
            return
        params = abi.RequestParam()
        request = self.library.functions["ucp_ep_close_nbx"](handle, ctypes.byref(params))
        with suppress(UCXError):  # a partner that went first; the endpoint is gone either way
            self.wait(ops.signed(request), "ucp_ep_close_nbx", self.close_timeout)
