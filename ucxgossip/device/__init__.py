"""Devices: memory that the CPU does not compute on, and what the engine asks of whoever owns it.

`table` is how compiled code calls a device: an int64 array of C functions and handles. `protocol`
is a device's Python face, `cuda` the one of NVIDIA's driver, `driver` that driver's C functions,
`admission` what is refused before anything is made. Tests bring a device of their own, over plain
host memory, whose streams and events complete late (tests/fake_device.py).

Rejected: CuPy or torch in the engine's path (they need the GIL); a class for each vendor with
virtual calls (compiled code cannot call methods; a table of addresses serves CUDA, the fake, and
others later).
"""

from ucxgossip.device.protocol import Device, DeviceMemory

__all__ = ["Device", "DeviceMemory"]
