"""`ucxgossip bench kernels`: the mixing kernels beside what memory can do, and beside torch.

Everything runs in turn, in another order each time, so that what changes the machine's speed
changes all of a repeat's figures; the ratios are taken repeat by repeat. Each backend's result is
checked before it is timed.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ucxgossip import jit
from ucxgossip.bench.arguments import at_least_one
from ucxgossip.bench.environment import environment
from ucxgossip.bench.summary import summarize
from ucxgossip.bench.table import Column, Table
from ucxgossip.errors import ArgumentError, BenchError
from ucxgossip.kernels import host
from ucxgossip.kernels.contract import ITEMSIZE, PAIRS

COLUMNS = (
    Column("backend", "backend", "", "", 10),
    Column("dst", "dst", "", "", 8),
    Column("src", "src", "", "", 8),
    Column("bytes", "bytes", "B", "d", 11),
    Column("threads", "threads", "", "d", 7),
    Column("us", "call", "us", ".1f", 10),
    Column("spread_percent", "spread", "%", ".0f", 6),
    Column("GBps", "mix", "GB/s", ".1f", 8),
    Column("bound_GBps", "bound", "GB/s", ".1f", 8),
    Column("fraction", "of bound", "", ".2f", 8),
    Column("speedup", "add_mul/it", "", ".2f", 10),
)
DEVICES = ("cpu", "cuda")
_ALPHA = 0.5
_CALLS_S = 0.003  # a figure is the mean of calls that take about so long
_CHECKED = 1000  # elements at either end
_TORCH = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

Row = dict[str, Any]
Pair = tuple[str, str]
Call = Callable[[], object]
Timer = Callable[[Call, int], float]


@dataclass(frozen=True)
class Entrant:
    """What is timed. mixes: its result is the mean of dst and src, which can be checked."""

    name: str
    call: Call
    mixes: bool = True


def parse_pairs(text: str) -> list[Pair]:
    """Types of dst and src out of "float32,float32/bfloat16": src is as dst where it is left out.

    `ArgumentError` for what the kernels do not serve.
    """
    found = []
    for each in text.split(","):
        dst, _, src = each.strip().partition("/")
        pair = (dst, src or dst)
        if pair not in PAIRS:
            served = ", ".join("/".join(known) for known in PAIRS)
            raise ArgumentError(f"--pairs {text!r}: {each!r} is none of {served}")
        found.append(pair)
    return found


def run(
    device: str = "cpu",
    sizes: Sequence[int] | None = None,
    pairs: Sequence[Pair] | None = None,
    threads: Sequence[int] | None = None,
    repeats: int = 15,
) -> tuple[dict[str, object], list[Row]]:
    """Print the table, return (environment, rows): a row a backend, pair, size and threads.

    sizes: bytes of dst. `MissingExtraError`, `NoDeviceError`: device is "cuda" and cannot be had.
    """
    if device not in DEVICES:
        raise ArgumentError(f"bench kernels: device is {device!r}; choose one of cpu, cuda")
    pairs = PAIRS if pairs is None else pairs
    for size in sizes or ():
        for dst, _ in pairs:
            if size % ITEMSIZE[dst]:
                raise ArgumentError(f"bench kernels: {size} bytes are no whole number of {dst}")
    at_least_one("bench kernels", repeats=repeats)
    if min(threads or [1]) < 1:
        raise ArgumentError(f"bench kernels: threads are {threads}; must be at least 1 each")
    facts = environment(None, None)
    table = Table(COLUMNS)
    title = "ucxgossip bench kernels: dst += alpha * (src - dst)"
    rows: list[Row] = []
    if device == "cuda":
        from ucxgossip.bench import kernels_cuda

        backends = kernels_cuda.backends()  # refuses before anything is printed
        facts["gpu"] = kernels_cuda.describe()
        table.header(f"{title}, beside a copy", facts)
        for size in sizes or [1 << 30]:
            for pair in pairs:
                entrants = kernels_cuda.entrants(backends, pair, size)
                found = measure(entrants, kernels_cuda.CALLS, repeats, kernels_cuda.timed)
                rows += _print(table, make_rows(found, device, pair, size, None))
        return facts, rows
    table.header(f"{title}, beside a triad", facts)
    for size in sizes or [102_400_000]:
        for pair in pairs:
            for count in threads or sorted({1, host.thread_count()}):
                found = measure_cpu(pair, size, count, repeats)
                rows += _print(table, make_rows(found, device, pair, size, count))
    return facts, rows


def _print(table: Table, rows: list[Row]) -> list[Row]:
    for row in rows:
        table.row(row)
    return rows


def measure(
    entrants: Sequence[Entrant], calls: int | None, repeats: int, timed: Timer
) -> dict[str, list[float]]:
    """Seconds a call of each entrant, repeat by repeat. calls: in one figure; None: to be found."""
    counts = {}
    for entrant in entrants:
        timed(entrant.call, 1)  # warm
        once = min(timed(entrant.call, 1) for _ in range(2))
        counts[entrant.name] = calls or max(1, int(_CALLS_S / max(once, 1e-9)))
    found: dict[str, list[float]] = {entrant.name: [] for entrant in entrants}
    for repeat in range(repeats):
        for entrant in random.Random(repeat).sample(list(entrants), len(entrants)):
            count = counts[entrant.name]
            entrant.call()  # what the one before it left in the caches is no part of the figure
            found[entrant.name].append(timed(entrant.call, count) / count)
    return found


def make_rows(
    found: dict[str, list[float]], device: str, pair: Pair, size: int, threads: int | None
) -> list[Row]:
    """A row an entrant out of its seconds; "bound" must be among them, and is the first row."""
    dst, src = pair
    count = size // ITEMSIZE[dst]
    moved = count * (2 * ITEMSIZE[dst] + ITEMSIZE[src])
    bound_bytes = 3 * size if device == "cpu" else 2 * size
    bound = [1e-9 * bound_bytes / each for each in found["bound"]]
    rows = []
    for name, times in found.items():
        summary = summarize(times)
        rates = bound if name == "bound" else [1e-9 * moved / each for each in times]
        ratios = [rate / best for rate, best in zip(rates, bound, strict=True)]
        others = found.get("add_mul")
        speedups = [other / own for other, own in zip(others or [], times, strict=False)]
        rows.append(
            {
                "bench": "kernels",
                "device": device,
                "backend": ("triad" if device == "cpu" else "copy") if name == "bound" else name,
                "dst": dst,
                "src": src,
                "bytes": size,
                "threads": threads,
                "us": summary.median_us,
                "spread_percent": 100 * summary.iqr_us / summary.median_us,
                "GBps": median(rates),
                "bound_GBps": median(bound),
                "fraction": median(ratios),
                "speedup": median(speedups) if speedups and name != "bound" else None,
            }
        )
    return rows


# --- on the CPU --------------------------------------------------------------------------------


@jit.njit
def _triad(a: Any, b: Any, c: Any, scale: Any) -> None:
    for i in range(len(a)):
        a[i] = b[i] + scale * c[i]


@jit.njit
def _axpy(a: Any, b: Any, scale: Any) -> None:
    for i in range(len(a)):
        a[i] += scale * b[i]


def measure_cpu(pair: Pair, size: int, threads: int, repeats: int) -> dict[str, list[float]]:
    """Seconds a call of the triad and of each backend, all on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return measure(_cpu_entrants(pair, size, threads), None, repeats, _timed)
    finally:
        torch.set_num_threads(before)


def _timed(call: Call, count: int) -> float:
    begun = time.perf_counter()
    for _ in range(count):
        call()
    return time.perf_counter() - begun


def _cpu_entrants(pair: Pair, size: int, threads: int) -> list[Entrant]:
    count = size // ITEMSIZE[pair[0]]
    draw = torch.Generator().manual_seed(0)
    dst, src = (torch.randn(count, generator=draw).to(_TORCH[kind]) for kind in pair)
    own, theirs = as_numpy(dst), as_numpy(src)
    triad = [np.full(size // 4, value, np.float32) for value in (0.0, 1.0, 2.0)]
    scale = np.float32(_ALPHA)

    def bound() -> None:
        a, b, c = triad
        host.in_parts(lambda part: _triad(a[part], b[part], c[part], scale), len(a), threads)

    def numba() -> None:
        host.mix_(own, theirs, _ALPHA, threads=threads)

    def axpy() -> None:
        # Adds and takes away in turn, so that the sums stay where they are.
        nonlocal scale
        scale = -scale
        host.in_parts(lambda part: _axpy(own[part], theirs[part], scale), count, threads)

    entrants = [
        Entrant("bound", bound, mixes=False),
        Entrant("numba", numba),
        Entrant("add_mul", lambda: dst.add_(src).mul_(_ALPHA)),
        Entrant("lerp", lambda: dst.lerp_(src.to(dst.dtype), _ALPHA)),
    ]
    if pair == ("float32", "float32"):
        entrants.insert(2, Entrant("axpy", axpy, mixes=False))
    for entrant in entrants:
        if entrant.mixes:
            check(entrant, dst, src)
    return entrants


def as_numpy(tensor: torch.Tensor) -> NDArray[Any]:
    """A CPU tensor's memory as the array that `host.mix_` takes: bfloat16 as uint16."""
    view = tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor
    found: NDArray[Any] = view.numpy()
    return found


def check(entrant: Entrant, dst: torch.Tensor, src: torch.Tensor) -> None:
    """`BenchError` unless a call leaves the mean of `dst` and `src` in `dst`, at both ends."""

    def ends(tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensor[:_CHECKED], tensor[-_CHECKED:]]).double()

    wanted = (ends(dst) + ends(src)) / 2
    entrant.call()
    tolerance = 2 * torch.finfo(dst.dtype).eps
    if not torch.allclose(ends(dst), wanted, rtol=tolerance, atol=4 * tolerance):
        raise BenchError(f"bench kernels: {entrant.name} did not leave the mean")
