"""`mix_` for NumPy arrays: the contract's checks, its dtypes, and all cores for what is large.

The engine does not come here: it calls `cpu` on its own thread, a chunk at a time. Large arrays
are cut into one part a thread, whole blocks each, and mixed by threads of our own, which compiled
code lets run side by side as it holds no GIL.

Rejected: numba's ``prange``. It starts in 4 us where a thread of ours takes 20, but its layers end
the process when used from two threads (workqueue) or after a fork (OpenMP), and spin: where one of
two cores was taken it took 4 to 7 ms for what one thread did in 0.13.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from ucxgossip.errors import ArgumentError, ArrayError
from ucxgossip.kernels import bits16, cpu
from ucxgossip.kernels.contract import check_alpha, check_pair

PARALLEL = 1 << 23
"""Bytes of `dst` from which more than one thread takes part (docs/kernels.md: how measured)."""

_config: Any = numba.config
_KINDS = {
    np.dtype(np.float32): "float32",
    np.dtype(np.float64): "float64",
    np.dtype(np.uint16): "bfloat16",
    np.dtype(np.float16): "float16",
}


def mix_(
    dst: NDArray[Any],
    src: NDArray[Any],
    alpha: float,
    *,
    distance: NDArray[np.float64] | None = None,
    stream: None = None,
    threads: int | None = None,
) -> float:
    """Average `src` into `dst` in place: ``dst += alpha * (src - dst)`` (`contract.Mix`).

    dst, src: 1-D contiguous arrays of one length without overlap; float32, float64, float16, or
    bfloat16 as uint16; of one dtype, or `dst` float32 and `src` of 16 bits (`ArrayError` else).
    alpha: weight of `src`, 0 to 1 (`ArgumentError` else). distance: one float64, to which the
    squared distance is added. threads: how many to use; by default one below `PARALLEL` bytes, and
    above one a core, up to NUMBA_NUM_THREADS.
    Returns the squared Euclidean distance of the two inputs.
    """
    _check(dst, src)
    weight = check_alpha(alpha)
    if stream is not None:
        raise ArgumentError(f"mix_: stream is {stream!r}; NumPy arrays have none")
    if threads is not None and (not isinstance(threads, int) or threads < 1):
        raise ArgumentError(f"mix_: threads is {threads!r}; must be a whole number from 1")
    if distance is not None:
        _check_distance(distance)
    if threads is None:
        threads = thread_count() if dst.nbytes >= PARALLEL else 1
    found = _mix(dst, src, weight, threads)
    if distance is not None:
        distance[0] += found
    return found


def thread_count() -> int:
    """Cores that this process may run on, at most NUMBA_NUM_THREADS."""
    return min(len(os.sched_getaffinity(0)), int(_config.NUMBA_NUM_THREADS))


def _check(dst: NDArray[Any], src: NDArray[Any]) -> None:
    check_pair(_kind("dst", dst), _kind("src", src))
    if dst.shape != src.shape:
        raise ArrayError(f"mix_: dst is {dst.dtype}{dst.shape} but src is {src.dtype}{src.shape}")
    if not dst.flags.writeable:
        raise ArrayError("mix_: dst is read-only")
    if np.may_share_memory(dst, src):
        raise ArrayError("mix_: dst and src overlap")


def _kind(name: str, array: NDArray[Any]) -> str:
    if not isinstance(array, np.ndarray):
        raise ArrayError(f"mix_: {name} must be a NumPy array, not {type(array).__name__}")
    if array.ndim != 1 or not array.flags.c_contiguous:
        raise ArrayError(f"mix_: {name} must be 1-D and contiguous, not shape {array.shape}")
    if array.dtype not in _KINDS:
        raise ArrayError(
            f"mix_: {name} is {array.dtype}; served are float32, float64, float16 and, as uint16, "
            "bfloat16"
        )
    return _KINDS[array.dtype]


def _check_distance(distance: object) -> None:
    if (
        not isinstance(distance, np.ndarray)
        or (distance.dtype, distance.shape) != (np.float64, (1,))
        or not distance.flags.writeable
    ):
        raise ArrayError("mix_: distance must be a NumPy array of one float64 that can be written")


# --- the kernel of a dtype, by one thread or several -------------------------------------------


def _mix(dst: NDArray[Any], src: NDArray[Any], alpha: float, threads: int) -> float:
    kernel, weight = cpu.mix, dst.dtype.type(alpha)
    if src.dtype.itemsize == 2:
        kernel, weight = bits16.mix, np.float32(alpha)
        dst, src = (_as_bits(array) for array in (dst, src))
    found = in_parts(lambda part: kernel(dst[part], src[part], weight), len(dst), threads)
    return float(sum(found))


def in_parts(run: Callable[[slice], Any], count: int, threads: int) -> list[Any]:
    """What `run` returned for each part of `count` elements: one part a thread, in whole blocks.

    The first part is run by the caller, the others by threads of ours, at the same time if `run`
    lets go of the GIL.
    """
    blocks = -(-count // cpu.BLOCK)
    step = max(1, -(-blocks // threads)) * cpu.BLOCK
    parts = [slice(start, min(start + step, count)) for start in range(0, count, step)]
    others = [_pool(threads).submit(run, part) for part in parts[1:]]
    first = [run(part) for part in parts[:1]]
    return first + [other.result() for other in others]


def _as_bits(array: NDArray[Any]) -> NDArray[Any]:
    """float16 as int16, which is what `bits16` takes for it."""
    return array.view(np.int16) if array.dtype == np.float16 else array


_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}


def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads beside the caller's. A forked child makes its own: its parent's are not there."""
    key = os.getpid(), threads
    if key not in _pools:
        _pools[key] = ThreadPoolExecutor(max(1, threads - 1), "ucxgossip-mix")
    return _pools[key]
