"""The mix on a GPU, by CuPy: `cuda_source` compiled by NVRTC for the device at hand.

`CupyMix()` compiles and loads; a call only launches: no allocation, no synchronisation, nothing on
another stream than the one given. Its grid is as large as fills the device, whatever the count.
Launches go to the current device (``cupy.cuda.Device(n).use()``), the one it was made on.

**Untested on hardware**: proved without a GPU are the compilation for sm_90, what PTX and ptxas
show, and the index arithmetic, by running the source on a CPU (tests/test_cuda_source.py).

Rejected: `cupy.ElementwiseKernel` (no 16-byte loads, and a second kernel for the distance); CuPy's
``ExternalStream`` (deprecated since 14).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ucxgossip.kernels.contract import ITEMSIZE, PAIRS, check_alpha
from ucxgossip.kernels.cuda_source import SOURCE, THREADS, kernel_name
from ucxgossip.kernels.device_arrays import distance_address, operands, stream_handle

_BLOCKS_EACH = 8
"""Blocks a multiprocessor: 2048 threads, all that it holds at 32 registers a thread."""


class _Stream:
    """A stream's handle in the form that `cupy.cuda.Stream.from_external` takes."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._handle


class CupyMix:
    """`contract.Mix` for arrays on the CUDA device that was current when this was made."""

    def __init__(self) -> None:
        """Compile the kernels and load them; milliseconds where CuPy has them in its cache."""
        import cupy

        module = cupy.RawModule(code=SOURCE, options=("--std=c++17",))
        self._cupy: Any = cupy
        self._kernels = {pair: module.get_function(kernel_name(*pair)) for pair in PAIRS}
        for kernel in self._kernels.values():
            kernel.compile()
        self._blocks = _BLOCKS_EACH * int(cupy.cuda.Device().attributes["MultiProcessorCount"])

    def __call__(
        self, dst: Any, src: Any, alpha: float, *, distance: Any = None, stream: int | None = None
    ) -> None:
        """Enqueue ``dst += alpha * (src - dst)`` on `stream` (`contract.Mix`).

        dst, src, distance: anything with ``__cuda_array_interface__``. stream: its handle, None
        for the default stream.
        """
        to, payload = operands(dst, src)
        weight = check_alpha(alpha)
        total, handle = distance_address(distance), stream_handle(stream)
        if to.count == 0:
            return
        groups = -(-to.count * ITEMSIZE[payload.kind] // 16)
        blocks = min(self._blocks, -(-groups // THREADS))
        number = np.float64(weight) if to.kind == "float64" else np.float32(weight)
        arguments = (
            np.uint64(to.address),
            np.uint64(payload.address),
            number,
            np.int64(to.count),
            np.uint64(total),
        )
        with self._cupy.cuda.Stream.from_external(_Stream(handle)):
            self._kernels[to.kind, payload.kind]((blocks,), (THREADS,), arguments)
