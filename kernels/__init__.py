"""Mixing kernels, one contract for every backend: ``dst += alpha * (src - dst)`` in place.

`cpu` is compiled by numba and is what the engine runs.
"""

from ucxgossip.kernels.cpu import mix_

__all__ = ["mix_"]
