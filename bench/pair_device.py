"""Memory on a CUDA device for a pair's puts, and the UCX settings that let UCX serve it.

Needs the driver only: no torch, no CuPy. Untested on hardware.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ucxgossip.device import driver as cuda
from ucxgossip.device.admission import check_wheel
from ucxgossip.device.cuda import CudaDevice
from ucxgossip.kernels.cuda_whole import KINDS, names
from ucxgossip.ucp import lib

DEVICES = ("cpu", "cuda")

SETTINGS: dict[str, dict[str, str]] = {
    "auto": {},
    "tcp": {"TLS": "tcp,cuda_copy"},
    "shm": {"TLS": "posix,cuda_copy,cuda_ipc"},
    "verbs": {"TLS": "ib,cuda_copy"},
}
"""Added to a transport's own settings: without cuda_copy UCX knows no device memory."""


class PairMemory:
    """`nbytes` to put from, and as many to put to, on the device of one side of a pair.

    side: 0 or 1; two devices where there are two, else both on one. The device's context stays
    current in this thread, as UCX wants it before ``ucp_init``.
    """

    def __init__(self, nbytes: int, side: int) -> None:
        driver = cuda.load()
        check_wheel(driver, lib.load().origin)
        count = driver.count()
        kernels = dict.fromkeys((name for kind in KINDS for name in names(kind)), 0)
        self.device = CudaDevice(side % max(count, 1), lambda: 0, driver, lambda _: kernels)
        self.device.make_current()
        self.describes = f"{driver.name(self.device.ordinal)}, CUDA {driver.version}, {count} seen"
        self._source, self._inbox = (self.device.allocate(nbytes) for _ in range(2))
        self.source = self._source.view(np.dtype(np.uint8), nbytes)
        self.inbox = self._inbox.view(np.dtype(np.uint8), nbytes)

    def fill(self, values: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        """Write what is put."""
        self.device.write(self._source.address, values)

    def came(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """What has been put here."""
        found = np.empty(self._inbox.nbytes, np.uint8)
        self.device.read(self._inbox.address, found)
        return found
