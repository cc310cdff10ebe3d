"""Blocks of rounds of several methods, in turn in the same processes, for jobs in a gloo group.

A block runs between two barriers and takes as long as its slowest rank. Methods take turns, block
by block, so that what a method is compared with saw the same machine a moment before.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
_TRIED = 3
_MOST = 20_000


class Block(NamedTuple):
    """Seconds a round of the slowest rank, and the share of all cores that was idle meanwhile."""

    seconds: float
    idle: float


def slowest(value: float) -> float:
    """The largest of all ranks' values. Collective."""
    tensor = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return float(tensor[0])


def block(once: Callable[[], object], rounds: int) -> Block:
    """Call `once` so many times after a barrier. Collective."""
    dist.barrier()
    busy, begun = _cores(), time.perf_counter()
    for _ in range(rounds):
        once()
    taken = time.perf_counter() - begun
    idle, total = (after - before for before, after in zip(busy, _cores(), strict=True))
    return Block(slowest(taken / rounds), idle / total if total else 0.0)


def in_order(methods: Iterable[T], repeat: int) -> list[T]:
    """The methods in the order of a repeat, shuffled by its number: the same on all ranks.

    Turns that merely rotate leave each method behind the same other.
    """
    chosen = list(methods)
    return random.Random(repeat).sample(chosen, len(chosen))


def in_turns(
    methods: Mapping[str, Callable[[], object]], repeats: int, seconds: float
) -> dict[str, list[Block]]:
    """The blocks of each method, about `seconds` long; warmed up before. Collective."""
    rounds = {}
    for name, once in methods.items():
        block(once, _TRIED)
        rounds[name] = max(2, min(_MOST, round(seconds / block(once, _TRIED).seconds)))
    found: dict[str, list[Block]] = {name: [] for name in methods}
    for repeat in range(repeats):
        for name in in_order(methods, repeat):
            found[name].append(block(methods[name], rounds[name]))
    return found


def _cores() -> tuple[int, int]:
    """Ticks that this machine's cores have spent idle, and in all (proc(5), /proc/stat)."""
    # user, nice, system, idle, iowait, irq, softirq, steal; guests are counted among users.
    ticks = [int(each) for each in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return ticks[3] + ticks[4], sum(ticks)
