"""One put of any size, outside of all mailboxes: how a guest gets the state of a member.

The guest opens memory for it, on a UCX context of its own, and tells the member where; the member
puts from a thread of its own, on a context of its own too, so that neither the rounds nor the
epochs of the group have part in it. Rejected: the wardens' connections (they carry what must not
wait behind a model of gigabytes); the store (one process for all, which may be far).
"""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Mapping
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from ucxgossip.errors import RendezvousError
from ucxgossip.ucp.context import Context
from ucxgossip.ucp.endpoint import Endpoint
from ucxgossip.ucp.memory import MemoryRegion, RemoteKey
from ucxgossip.ucp.worker import Worker

_IDLE_S = 0.0005
PIECE = 1 << 24
"""Bytes of one put."""


class Landing:
    """`nbytes` of memory that another process may put to once it knows `where`; close it."""

    def __init__(self, transport: str, settings: Mapping[str, str], nbytes: int) -> None:
        self._context = Context(transport, settings)
        try:
            self._worker = Worker(self._context)
            self._region = MemoryRegion(self._context, nbytes=nbytes)
        except BaseException:
            self._context.close()
            raise
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._drive, name="ucxgossip-landing", daemon=True)
        self._thread.start()

    @property
    def where(self) -> str:
        """Worker address, memory address and key, as text without white space."""
        parts = (self._worker.address, self._region.pack())
        text = [base64.b64encode(part).decode() for part in parts]
        return json.dumps([*text, self._region.address], separators=(",", ":"))

    def _drive(self) -> None:
        """Puts over TCP need the target's progress."""
        while not self._stop.is_set():
            if not self._worker.progress():
                self._stop.wait(_IDLE_S)

    def take(self) -> NDArray[np.uint8]:
        """What was put, in memory of its own."""
        return self._region.bytes.copy()

    def close(self) -> None:
        """Take the memory away. Further calls do nothing."""
        self._stop.set()
        self._thread.join()
        self._region.close()
        self._worker.close()
        self._context.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def put(
    where: str, data: bytes, transport: str, settings: Mapping[str, str], timeout: float
) -> None:
    """Put `data` to a `Landing`; returns when it is in place.

    Raises `UCXError`, `ArgumentError` or `RendezvousError`.
    """
    try:
        address, key, target = json.loads(where)
        worker_address, packed = base64.b64decode(address), base64.b64decode(key)
        target = int(target)
    except (ValueError, TypeError) as error:
        raise RendezvousError(f"this is no place to put to: {error}") from None
    context = Context(transport, settings)
    try:
        worker = Worker(context)
        endpoint = Endpoint(worker, worker_address, close_timeout=timeout)
        remote = RemoteKey(endpoint, packed)
        source = MemoryRegion(context, array=np.frombuffer(data, np.uint8).copy())
        for start in range(0, len(data), PIECE):
            piece = MemoryRegion(context, array=source.bytes[start : start + PIECE])
            endpoint.put(piece, target + start, remote, timeout=timeout)
            piece.close()
    finally:
        context.close()
