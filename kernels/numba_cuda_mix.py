"""The mix on a GPU, by numba: a reference that is short, portable and runs without a GPU.

One thread an element, in strides of the grid; no vector loads. Under numba's simulator
(NUMBA_ENABLE_CUDASIM=1, set before numba is imported) the same functions run as Python, which is
how they are tested against NumPy without a device. bfloat16 is uint16, by its bits.

The product of the mix is libdevice's ``mul_rn``, which the compiler does not fuse with the sum
(numba has no way to say so for one kernel); the simulator has no libdevice and fuses nothing.

**Untested on hardware.** Where numba-cuda is installed, which the test extra does not bring, it is
compiled for sm_90 (tests/test_numba_cuda_mix.py).

Rejected: as the kernel of choice, since it reads 4 bytes at a time where `cupy_mix` reads 16.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import cuda as _cuda

from ucxgossip.kernels.contract import PAIRS, check_alpha
from ucxgossip.kernels.device_arrays import as_bits, distance_address, operands, stream_handle

cuda: Any = _cuda
_config: Any = numba.config

THREADS = 256
"""Threads a block."""

_BLOCKS = 1056  # 8 on each of 132 multiprocessors; more than enough anywhere


def _widen(value: Any) -> Any:
    return np.float32(value)


def _same(value: Any) -> Any:
    return value


def _widen_bfloat16(value: Any) -> Any:
    # Of two uint32 numba makes uint64, which is no float32's size.
    return np.uint32(np.uint32(value) << np.uint32(16)).view(np.float32)


def _narrow_bfloat16(value: Any) -> Any:
    bits = np.float32(value).view(np.uint32)
    upper = bits >> np.uint32(16)
    if value != value:
        return np.uint16(upper | np.uint32(0x40))
    # 64 bits: the sum of what is no NaN stays below 2**32, but NumPy would warn of those that are.
    rounded = np.int64(bits) + np.int64(0x7FFF) + np.int64(upper & np.uint32(1))
    return np.uint16(rounded >> np.int64(16))


def _narrow_float16(value: Any) -> Any:
    return np.float16(value)


_WIDEN = {"float32": _same, "float64": _same, "bfloat16": _widen_bfloat16, "float16": _widen}
_NARROW = {
    "float32": _same,
    "float64": _same,
    "bfloat16": _narrow_bfloat16,
    "float16": _narrow_float16,
}


def _product(alpha: Any, difference: Any) -> Any:
    return alpha * difference


def _products() -> dict[str, Any]:
    """A product that stays one, for each kind of `dst`."""
    if _config.ENABLE_CUDASIM:
        return dict.fromkeys(_NARROW, cuda.jit(device=True)(_product))
    from numba.cuda import libdevice

    return dict.fromkeys(_NARROW, libdevice.fmul_rn) | {"float64": libdevice.dmul_rn}


_PRODUCT = _products()


def _make(dst_kind: str, src_kind: str) -> Any:
    product = _PRODUCT[dst_kind]
    own_widen, their_widen = (cuda.jit(device=True)(_WIDEN[kind]) for kind in (dst_kind, src_kind))
    narrow = cuda.jit(device=True)(_NARROW[dst_kind])

    def kernel(dst: Any, src: Any, alpha: Any, distance: Any, wanted: Any) -> None:
        total = 0.0
        for i in range(cuda.grid(1), dst.size, cuda.gridsize(1)):
            own, theirs = own_widen(dst[i]), their_widen(src[i])
            difference = theirs - own
            dst[i] = narrow(theirs if alpha == 1 else own + product(alpha, difference))
            total += difference * difference
        if wanted:
            cuda.atomic.add(distance, 0, total)

    return cuda.jit(kernel)


KERNELS = {pair: _make(*pair) for pair in PAIRS}
"""A kernel a pair of types: (dst, src, alpha, distance, wanted), with `distance` an array of one
float64, to which the squared distance is added if `wanted`."""


class NumbaCudaMix:
    """`contract.Mix` for arrays on the current CUDA device."""

    def __init__(self) -> None:
        """Set aside the one float64 on the device that stands for a distance nobody asked for."""
        self._unwanted = cuda.device_array(1, np.float64)

    def __call__(
        self, dst: Any, src: Any, alpha: float, *, distance: Any = None, stream: int | None = None
    ) -> None:
        """Enqueue ``dst += alpha * (src - dst)`` on `stream` (`contract.Mix`); compiles at first.

        dst, src, distance: anything with ``__cuda_array_interface__``. stream: its handle, None
        for the default stream.
        """
        to, payload = operands(dst, src)
        weight = check_alpha(alpha)
        wanted, handle = distance_address(distance) != 0, stream_handle(stream)
        if to.count == 0:
            return
        number = np.float64(weight) if to.kind == "float64" else np.float32(weight)
        total = cuda.as_cuda_array(distance, sync=False) if wanted else self._unwanted
        blocks = min(_BLOCKS, -(-to.count // THREADS))
        arrays = (cuda.as_cuda_array(as_bits(array), sync=False) for array in (dst, src))
        kernel = KERNELS[to.kind, payload.kind]
        kernel[blocks, THREADS, cuda.external_stream(handle)](*arrays, number, total, wanted)
