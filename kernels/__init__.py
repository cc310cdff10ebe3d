"""Mixing kernels, one contract for every backend: ``dst += alpha * (src - dst)`` in place.

`contract` says what is promised; `mix_` keeps it for NumPy arrays, `select` gives the kernel for a
device. `cpu` is what the engine runs.
"""

from ucxgossip.kernels.contract import Mix
from ucxgossip.kernels.host import mix_
from ucxgossip.kernels.selection import select

__all__ = ["Mix", "mix_", "select"]
