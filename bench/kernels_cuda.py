"""The part of `ucxgossip bench kernels` that needs a GPU. **Untested on hardware.**

Arrays are CuPy's. Where torch has CUDA, its `add_`, `mul_` and `lerp_` run beside ours on the same
memory; all on the default stream. Times are those of CUDA events around a run of launches.
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.utils.dlpack

from ucxgossip.bench.kernels import Call, Entrant, Pair, check
from ucxgossip.errors import MissingExtraError
from ucxgossip.kernels import Mix, select
from ucxgossip.kernels.contract import ITEMSIZE

CALLS = 20
"""Launches in one figure."""

_ALPHA = 0.5


def backends() -> dict[str, Mix]:
    """The kernels that can run here. CuPy's must: `MissingExtraError`, `NoDeviceError` else."""
    found = {"cupy": select("cuda", "cupy")}
    with suppress(MissingExtraError):
        found["numba_cuda"] = select("cuda", "numba_cuda")
    return found


def describe() -> str:
    """The device's name."""
    import cupy

    name: bytes = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["name"]
    return name.decode()


def timed(call: Call, count: int) -> float:
    """Seconds that `count` calls take on the device."""
    import cupy

    begun, ended = cupy.cuda.Event(), cupy.cuda.Event()
    begun.record()
    for _ in range(count):
        call()
    ended.record()
    ended.synchronize()
    return 1e-3 * float(cupy.cuda.get_elapsed_time(begun, ended))


def entrants(kernels: dict[str, Mix], pair: Pair, size: int) -> list[Entrant]:
    """A copy of `dst`, each kernel with its squared distance, and torch's ways.

    Without CUDA in torch its ways are left out, with a line that says so.
    """
    import cupy

    count = size // ITEMSIZE[pair[0]]
    dst, src = (_array(cupy, kind, count, seed) for seed, kind in enumerate(pair))
    total, other = cupy.zeros(1, np.float64), cupy.empty_like(dst)
    found = [Entrant("bound", lambda: cupy.copyto(other, dst), mixes=False)]
    for name, kernel in kernels.items():
        found.append(Entrant(name, partial(kernel, dst, src, _ALPHA, distance=total)))
    if not torch.cuda.is_available():
        print("# torch has no CUDA: add_mul and lerp are left out", flush=True)
        return found
    own, theirs = (_tensor(array, kind) for array, kind in zip((dst, src), pair, strict=True))
    found += [
        Entrant("add_mul", lambda: own.add_(theirs).mul_(_ALPHA)),
        Entrant("lerp", lambda: own.lerp_(theirs.to(own.dtype), _ALPHA)),
    ]
    for entrant in found:
        if entrant.mixes:
            check(entrant, own, theirs)
    return found


def _array(cupy: Any, kind: str, count: int, seed: int) -> Any:
    """Normal numbers on the device, as what the kernels take: bfloat16 as uint16."""
    numbers = cupy.random.default_rng(seed).standard_normal(count, dtype=np.float32)
    if kind == "bfloat16":
        return (numbers.view(np.uint32) >> 16).astype(np.uint16)
    return numbers.astype(kind)


def _tensor(array: Any, kind: str) -> torch.Tensor:
    tensor: torch.Tensor = torch.utils.dlpack.from_dlpack(array)
    return tensor.view(torch.bfloat16) if kind == "bfloat16" else tensor
