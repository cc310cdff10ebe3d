"""What the layers above ask of a device, whoever made it."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class DeviceMemory(Protocol):
    """Memory on a device, freed with its last reference. `view` keeps one."""

    @property
    def address(self) -> int:
        """Address of its first byte."""

    @property
    def nbytes(self) -> int:
        """Bytes."""

    def view(self, dtype: np.dtype[Any], count: int) -> object:
        """`count` elements from the start on: what ``torch.as_tensor`` takes without a copy."""


class Device(Protocol):
    """One device: memory, events, and the table by which the engine drives it.

    Streams and events are integers, as C has them. `read`, `write`, `allocate` and `settle` wait
    for the device; what else waits is the driver's affair. Errors of the device are `DeviceError`.
    """

    @property
    def name(self) -> str:
        """As torch writes it: ``"cuda:0"``."""

    @property
    def table(self) -> NDArray[np.int64]:
        """The words of `device.table`; they stay where they are."""

    def current_stream(self) -> int:
        """The stream on which the caller's thread computes."""

    def error_name(self, status: int) -> str:
        """What the device's driver calls an error that a function of the table returned."""

    def allocate(self, nbytes: int) -> DeviceMemory:
        """Zeroed plain memory that lives as long as somebody holds it."""

    def pin(self, address: int, nbytes: int) -> bool:
        """Let the device copy from and to host memory by itself; False where it cannot."""

    def unpin(self, address: int) -> None:
        """Undo a `pin` that returned True, as far as it did anything."""

    def event(self) -> int:
        """A new event."""

    def drop_event(self, event: int) -> None:
        """Give an event back."""

    def record(self, event: int, stream: int) -> None:
        """`event` completes once all that `stream` holds now has."""

    def wait(self, stream: int, event: int) -> None:
        """What `stream` gets from now on begins after `event`; the caller does not wait."""

    def read(self, address: int, into: NDArray[Any]) -> None:
        """Fill a contiguous host array from device memory, after the current stream's work."""

    def write(self, address: int, values: NDArray[Any]) -> None:
        """Fill device memory from a contiguous host array, after the current stream's work."""

    def export(self, memory: DeviceMemory) -> bytes:
        """By which another process of this host can `map` the memory; empty where none can."""

    def map(self, handle: bytes) -> int:
        """Where this process sees memory that another one of its host exported; 0: none such."""

    def unmap(self, address: int) -> None:
        """Give back what `map` returned."""

    def settle(self, timeout: float) -> bool:
        """Wait until the engine's two streams hold nothing; False after `timeout` seconds."""
