"""What quarantine and checksums cost, each beside the same without it, interleaved in one run.

    torchrun --standalone --nproc-per-node 2 -m ucxgossip.bench.integrity [TRANSPORT]

Rank 0 prints three tables: the mixing kernel that leaves out what is not finite, a chunk at a time,
beside the plain one; the checksum alone; a blocking round of ``group.exchange`` with
``nonfinite="allow"``, with ``"skip"``, and with ``"skip"`` in a group of ``join(verify=True)``.
Medians over repeats.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ucxgossip import jit
from ucxgossip.group import Group, join
from ucxgossip.kernels.checksum import xxh64
from ucxgossip.kernels.cpu import mix, mix_whole
from ucxgossip.schedule import Dissemination

KERNEL_BYTES = (1 << 16, 1 << 20, 100_000_000)
CHUNKS = (1 << 16, 1 << 18)
ROUND_BYTES = (8, 1 << 16, 1 << 22)
REPEATS = 41
PASS_BYTES = 1 << 25
"""A timed pass goes over at least so many bytes."""


@jit.njit
def mixed(dst: Any, src: Any, alpha: Any, chunk: int, passes: int) -> float:
    """`passes` times the plain mix, `chunk` elements at a time."""
    total = 0.0
    for _ in range(passes):
        for start in range(0, len(dst), chunk):
            total += mix(dst[start : start + chunk], src[start : start + chunk], alpha)
    return total


@jit.njit
def mixed_whole(dst: Any, src: Any, alpha: Any, undo: Any, passes: int) -> float:
    """`passes` times the mix that leaves out, ``len(undo)`` elements at a time."""
    total, chunk = 0.0, len(undo)
    for _ in range(passes):
        for start in range(0, len(dst), chunk):
            part = dst[start : start + chunk]
            total += mix_whole(part, src[start : start + chunk], alpha, undo)
    return total


@jit.njit
def hashed(address: int, nbytes: int, passes: int) -> int:
    """`passes` times the checksum of one array."""
    total = 0
    for number in range(passes):
        total ^= xxh64(address, nbytes, number)
    return total


def in_turns(what: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Median seconds of each, all in turn; the first turn is not counted."""
    times: list[list[float]] = [[] for _ in what]
    for _ in range(repeats + 1):
        for each, taken in zip(what, times, strict=True):
            start = time.perf_counter()
            each()
            taken.append(time.perf_counter() - start)
    return [median(taken[1:]) for taken in times]


def _floats(count: int, seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(count, np.float32)


def kernels() -> None:
    """Print the table of the mixing kernels, and that of the checksum."""
    print("# bytes, chunk, mix us, mix_whole us, ratio", flush=True)
    half = np.float32(0.5)
    for nbytes in KERNEL_BYTES:
        passes = max(1, PASS_BYTES // nbytes)
        dst, src = _floats(nbytes // 4, 1), _floats(nbytes // 4, 2)
        for chunk in CHUNKS:
            undo = np.zeros(chunk // 4, np.float32)
            plain, whole = in_turns(
                (
                    lambda: mixed(dst, src, half, len(undo), passes),  # noqa: B023
                    lambda: mixed_whole(dst, src, half, undo, passes),  # noqa: B023
                ),
                REPEATS if passes > 1 else REPEATS // 3,
            )
            figures = f"{1e6 * plain / passes:.1f} {1e6 * whole / passes:.1f} {whole / plain:.2f}"
            print(nbytes, chunk, figures, flush=True)
    print("# bytes, XXH64 us, GB/s", flush=True)
    for nbytes in ROUND_BYTES[1:]:
        data, passes = _floats(nbytes // 4, 3), PASS_BYTES // nbytes
        address = data.ctypes.data
        (taken,) = in_turns([lambda: hashed(address, nbytes, passes)], REPEATS)  # noqa: B023
        each = taken / passes
        print(nbytes, f"{1e6 * each:.1f} {1e-9 * nbytes / each:.1f}", flush=True)


def rounds(plain: Group, verified: Group) -> None:
    """Print the table of blocking rounds on rank 0. Collective."""
    schedule = Dissemination(plain.size)
    if plain.rank == 0:
        print("# bytes, allow us, skip us, ratio, verify us, ratio to skip", flush=True)
    for nbytes in ROUND_BYTES:
        array = np.ones(nbytes // 4, np.float32)
        boxes = [group.mailbox(nbytes) for group in (plain, verified)]
        passes = 200 if nbytes < 1 << 20 else 10

        def run(group: Group, policy: str) -> None:
            box = boxes[group is verified]  # noqa: B023
            for _ in range(passes):  # noqa: B023
                group.exchange(array, schedule=schedule, mailbox=box, nonfinite=policy)  # noqa: B023

        plain.agree(f"ready {nbytes}", {})
        allow, skip, verify = in_turns(
            (
                lambda: run(plain, "allow"),  # noqa: B023
                lambda: run(plain, "skip"),  # noqa: B023
                lambda: run(verified, "skip"),  # noqa: B023
            ),
            REPEATS,
        )
        if plain.rank == 0:
            micro = [1e6 * each / passes for each in (allow, skip, verify)]
            print(
                f"{nbytes} {micro[0]:.1f} {micro[1]:.1f} {skip / allow:.2f} {micro[2]:.1f} "
                f"{verify / skip:.2f}",
                flush=True,
            )


def main() -> None:
    """Measure, and print on rank 0."""
    transport = sys.argv[1] if len(sys.argv) > 1 else "auto"
    with join(transport=transport) as plain, join(transport=transport, verify=True) as verified:
        if plain.rank == 0:
            kernels()
        plain.agree("kernels measured", {})
        rounds(plain, verified)


if __name__ == "__main__":
    main()
