"""One rank of `bench exchange`, started by `exchange.run`: every method of a size in turn.

Before anything is timed each method does every round of its period once, from values that tell
ranks and places apart, and what it leaves is compared element by element: a figure of a method
that does not average is none.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from statistics import median
from typing import Any, TypedDict

import numpy as np

from ucxgossip import jit
from ucxgossip.bench import floors, gloo, mpi, mpirun
from ucxgossip.bench.blocks import in_order
from ucxgossip.bench.exchange import DEADLINE_S, FIXED, ONE_ARRAY
from ucxgossip.bench.exchange_device import Checked, OursOnDevice, open_shared
from ucxgossip.bench.payloads import ITEM, Payload, of, parse
from ucxgossip.bench.peer import Array, Arrays, Method
from ucxgossip.bench.report import say_in_force
from ucxgossip.bench.summary import summarize
from ucxgossip.device import Device
from ucxgossip.engine import Constants
from ucxgossip.errors import BenchError
from ucxgossip.group import Group, join
from ucxgossip.schedule import Dissemination, Rotated
from ucxgossip.tuning import Tuning

_PATTERN = 251
_TOLERANCE = 1e-3


class Found(TypedDict):
    """Of one method: medians and 99th percentile, spread (%), and each repeat's block, in turn."""

    us: float
    p99_us: float
    spread: float
    blocks_us: list[float]


class Ours:
    """Our round: `Group.exchange` of the array, or of all arrays at once."""

    name = "ours"

    def __init__(self, group: Group, data: Arrays) -> None:
        """Collective. Open a mailbox."""
        self._group = group
        self._schedule = Rotated(Dissemination(group.size), seed=0)
        self._box = group.mailbox(sum(array.nbytes for array in data.arrays), ring=True)
        self._arrays = data.arrays

    def once(self) -> None:
        """One round."""
        if len(self._arrays) == 1:
            self._group.exchange(self._arrays[0], schedule=self._schedule, mailbox=self._box)
        else:
            self._group.exchange(self._arrays, schedule=self._schedule, mailbox=self._box)

    def partner(self) -> int | None:
        """Whose values the next round averages with this rank's."""
        return self._schedule.round(self._group.rank, self._box.round).sender

    def close(self) -> None:
        """Nothing: the group keeps its mailboxes."""


class OneArray(Ours):
    """Our round of one array that has the bytes of all: what it costs that there are several."""

    name = ONE_ARRAY

    def __init__(self, group: Group, data: Arrays) -> None:
        """Collective. Allocate the array, open a mailbox."""
        nbytes = sum(array.nbytes for array in data.arrays)
        self.data = allocate(group, of(nbytes))
        super().__init__(group, self.data)


class Fixed(Ours):
    """Our round with the engine's own defaults: what its choice by transport and size is worth."""

    name = FIXED

    def __init__(self, transport: str, data: Arrays) -> None:
        """Collective. Join once more, open a mailbox."""
        tuning = Tuning(**asdict(Constants()))
        self._stack = ExitStack()
        group = self._stack.enter_context(join(transport=transport, tuning=tuning))
        super().__init__(group, data)

    def close(self) -> None:
        """Leave that group."""
        self._stack.close()


@jit.njit
def fill(array: Any, first: Any) -> None:
    """Values that tell ranks (`first`) and places apart."""
    for i in range(len(array)):
        array[i] = first + i % _PATTERN


@jit.njit
def misplaced(array: Any, first: Any) -> int:
    """The first place that does not hold what `fill` writes there; -1 if all do."""
    for i in range(len(array)):
        if not abs(array[i] - (first + i % _PATTERN)) <= _TOLERANCE:
            return i
    return -1


def check(name: str, method: Method, data: Arrays, barrier: Callable[[], object]) -> None:
    """Collective. Do each round of the period from known values; `BenchError` if the mean is not.

    Nobody's values change before all have begun: only what a method promises is relied on.
    """
    for _ in range((data.size - 1).bit_length()):
        partner = method.partner()
        for array in data.arrays:
            fill(array, np.float32(data.rank))
        barrier()
        method.once()
        mean = (data.size - 1) / 2 if partner is None else (data.rank + partner) / 2
        for number, array in enumerate(data.arrays):
            place = misplaced(array, np.float32(mean))
            if place >= 0:
                raise BenchError(
                    f"{name}, {data.size} ranks: element {place} of array {number} "
                    f"({array.nbytes} bytes) is {array[place]:g} on rank {data.rank}, and the "
                    f"mean is {mean + place % _PATTERN:g}"
                )


class Job:
    """One rank of the job: all methods of one size, measured in turn."""

    def __init__(self, repeats: int, seconds: float) -> None:
        import torch.distributed as dist

        self.repeats, self.seconds, self.dist = repeats, seconds, dist

    def _slowest(self, value: float) -> float:
        """The largest of all ranks' values."""
        import torch

        tensor = torch.tensor([value], dtype=torch.float64)
        self.dist.all_reduce(tensor, op=self.dist.ReduceOp.MAX)
        return float(tensor[0])

    def _block(self, once: Callable[[], object], rounds: int) -> tuple[float, list[float]]:
        """Mean seconds a round of the slowest rank, and this rank's single rounds."""
        self.dist.barrier()
        times = []
        begun = before = time.perf_counter()
        for _ in range(rounds):
            once()
            now = time.perf_counter()
            times.append(now - before)
            before = now
        return self._slowest((before - begun) / rounds), times

    def measure(self, methods: Mapping[str, Method]) -> dict[str, Found]:
        """Median and p99 (us) and spread (%) of each method, blocks in turn."""
        rounds = {}
        for name, method in methods.items():
            self._block(method.once, 3)
            rounds[name] = max(2, min(20000, round(self.seconds / self._block(method.once, 3)[0])))
        blocks: dict[str, list[float]] = {name: [] for name in methods}
        singles: dict[str, list[float]] = {name: [] for name in methods}
        for repeat in range(self.repeats):
            for name in in_order(methods, repeat):
                block, times = self._block(methods[name].once, rounds[name])
                blocks[name].append(block)
                singles[name] += times
        return {
            name: {
                "us": median(times) * 1e6,
                "p99_us": summarize(singles[name]).p99_us,
                "spread": 100 * (max(times) - min(times)) / median(times),
                "blocks_us": [each * 1e6 for each in times],
            }
            for name, times in blocks.items()
        }


def allocate(group: Group, payload: Payload) -> Arrays:
    """The payload's arrays, registered, each in memory of its own, as torch's tensors are."""
    arrays: list[Array] = [
        group.allocate(nbytes).view(np.float32, nbytes // ITEM) for nbytes in payload.arrays
    ]
    return Arrays(group.rank, group.size, arrays)


def make(
    names: Sequence[str], data: Arrays, api: Any, transport: str, group: Group
) -> dict[str, Method]:
    """Collective. The methods by name; api: mpi4py's MPI, or None where no peer needs it."""
    plain: tuple[Callable[[Arrays], Method], ...]
    plain = (gloo.GlooAllreduce, gloo.GlooGossip, floors.Sockets, floors.Copy)
    by_mpi = {each.name: each for each in mpi.METHODS}
    others: dict[str, Callable[[Arrays], Method]]
    others = {str(vars(each)["name"]): each for each in plain}
    others[ONE_ARRAY] = partial(OneArray, group)
    others[FIXED] = partial(Fixed, transport)
    return {
        name: by_mpi[name](data, api, transport) if name in by_mpi else others[name](data)
        for name in names
    }


def row(
    transport: str,
    ranks: int,
    payload: Payload,
    ours: Found,
    name: str,
    peer: Found | None,
) -> dict[str, Any]:
    """What is printed of one size beside one peer, or beside none ("")."""
    return {
        "bench": "exchange",
        "transport": transport,
        "ranks": ranks,
        "bytes": payload.nbytes,
        "payload": payload.name,
        "tensors": len(payload.arrays),
        "ours_us": ours["us"],
        "ours_p99_us": ours["p99_us"],
        "spread": ours["spread"],
        "peer": name or None,
        "peer_us": peer["us"] if peer else None,
        "peer_p99_us": peer["p99_us"] if peer else None,
        "peer_spread": peer["spread"] if peer else None,
        "ours_blocks_us": ours["blocks_us"],
        "peer_blocks_us": peer["blocks_us"] if peer else None,
        "speedup": peer["us"] / ours["us"] if peer else None,
    }


def measure_payload(
    group: Group,
    job: Job,
    payload: Payload,
    names: Sequence[str],
    api: Any,
    transport: str,
    device: Device | None = None,
) -> None:
    """Collective. Check and measure ours and the methods of `names`; rank 0 prints the rows."""
    data = allocate(group, payload)
    methods: dict[str, Method] = {}
    checked: dict[str, Method] = {}
    if device is None:
        methods["ours"] = Ours(group, data)
    else:
        ours = OursOnDevice(group, data, device)
        methods["ours"], checked["ours"] = ours, Checked(ours)
    methods |= make(names, data, api, transport, group)
    for name, method in methods.items():
        seen = checked.get(name, method)
        check(name, seen, getattr(method, "data", data), job.dist.barrier)
    found = job.measure(methods)
    for array in data.arrays:
        if not np.isfinite(array).all():
            raise BenchError(f"{payload.name}: the rounds that were timed gave no finite values")
    if group.rank == 0:
        for name in names or [""]:
            line = row(transport, group.size, payload, found["ours"], name, found.get(name))
            line["device"] = "cpu" if device is None else device.name
            print(json.dumps(line), flush=True)
    job.dist.barrier()
    for method in methods.values():
        method.close()


def main() -> None:
    """Measure what the arguments say; rank 0 prints a JSON object a line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--transport")
    parser.add_argument("--sizes")
    parser.add_argument("--against")
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--mpirun", action="store_true")
    options = parser.parse_args()
    names = [name for name in options.against.split(",") if name]
    with ExitStack() as stack:
        api = None
        if options.mpirun:
            mpirun.adopt_rank()
            api = stack.enter_context(mpi.mpi_job())
        group = stack.enter_context(join(transport=options.transport))
        stack.enter_context(gloo.gloo_job(DEADLINE_S))
        say_in_force(group)
        job = Job(options.repeats, options.seconds)
        device = open_shared() if options.device == "cuda" else None
        for payload in parse(options.sizes):
            measure_payload(group, job, payload, names, api, options.transport, device)


if __name__ == "__main__":
    main()
