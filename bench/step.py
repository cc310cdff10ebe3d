"""`ucxgossip bench step`: what communication adds to the training step of a real model.

Every method, and `local`, which does not communicate, trains replicas of its own in the same
processes, in blocks that take turns; a method's ratio is its time a step over that of `local` in
the same repeat. `lockstep` sends nothing but a word to the step's partner and waits for the
partner's, as methods do whose ranks go step by step together: what steps that do not all take
equally long cost there, however fast the communication is. A rank computes with one thread. Its
batches are made before the clock starts, and a block ends when its rounds have ended.

Where the threads run decides what is measured, so `--cores` pins them:

- ``--cores 1``: a core a rank, for all its threads. The engine takes its time from the compute.
- ``--cores 2``: two cores a rank, one for the training thread alone, one for the others: the
  engine, the wardens, gloo's. Machines with fewer than two cores for each rank still have two for
  one: then rank 0 alone computes, and the others *stand in* on the cores that are left, together
  with rank 0's engine. A rank that stands in has the same model, optimizer and hooks and takes part
  in all that is communicated, but in place of forward and backward it sleeps for as long as
  rank 0's take (without communication), and its gradients are zeros. What rank 0 pays is measured
  on a core of its own, with partners that are neither early nor late, as on hosts of their own;
  its engine's core carries the partners' communication too, which is to its disadvantage.
- neither: the kernel places them.

A core is free only where the machine has it: "a core beside a busy one takes", in the environment,
is what the one slows down by when the other works (`neighbour`), and the engine's work does so too.

Rejected for one free core on a machine of two: both training threads on one core and both engines
on the other. The contention is in `local` as well, but while one rank waits for a round the other
computes, on a core that `local` would give it too: whatever is waited for comes out as free.
Rejected also: compute that is a sleep on all ranks (`bench stragglers` does that; here memory and
caches are to be shared with communication as they are in use).
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from ucxgossip.bench.arguments import at_least_one
from ucxgossip.bench.methods import NCCL, parse
from ucxgossip.bench.neighbour import describe, neighbour_cost
from ucxgossip.bench.pair import check_device
from ucxgossip.bench.report import Report
from ucxgossip.bench.spawn import run_ranks
from ucxgossip.bench.table import Column
from ucxgossip.errors import ArgumentError, BenchError

MODELS = "convnet,gpt,resnet20,gpt4"
METHODS = "lockstep,gossip-both-atc,gossip-weights-atc,gossip-weights-awc,allreduce"
COLUMNS = (
    Column("model", "model", "", "", 8),
    Column("ranks", "ranks", "", "d", 5),
    Column("method", "method", "", "", 26),
    Column("step_ms", "step", "ms", ".2f", 8),
    Column("local_ms", "local", "ms", ".2f", 8),
    Column("ratio", "ratio", "", ".3f", 7),
    Column("spread", "spread", "%", ".1f", 7),
    Column("exchange_ms", "exchange", "ms", ".2f", 9),
    Column("hidden", "hidden", "", ".2f", 7),
)
_START_S = 180.0
_STEP_S = 1.0
"""A step of a model of ours, generously: for the deadline only."""
_STEPS = 30
"""Of a block of half a second, whose steps are longer the fewer they are: likewise."""
_EASY_BATCH = 16

Row = dict[str, Any]


def run(
    transport: str,
    models: Sequence[str],
    ranks: int,
    methods: Sequence[str],
    cores: int | None = None,
    batch: int | None = None,
    steps: int | None = None,
    repeats: int = 9,
    device: str = "cpu",
) -> tuple[dict[str, object], list[Row]]:
    """Print the table, return (environment, rows): one row for each (model, method).

    `local` comes first, named or not. cores: for each rank, 1 or 2; None: threads are not pinned.
    batch: samples a rank and step; as in `bench train` by default. steps: of a method in a repeat;
    by default as many as take half a second without communication.
    exchange_ms: from post to end of all rounds of a step; hidden: the part of that under compute;
    both None without rounds, and under awc, where a round ends with the next step. device: "cuda"
    trains on CUDA devices, which the ranks share where there are fewer. Untested on hardware.
    """
    methods = ["local", *(name for name in methods if name != "local")]
    _check(models, ranks, methods, cores, batch, steps, repeats)
    gpu = _check_device(device, ranks, methods, cores)
    computing = ranks if cores != 2 or len(os.sched_getaffinity(0)) >= 2 * ranks else 1
    facts: dict[str, object] = {"transport": transport, "ranks": ranks, "computing": computing}
    facts |= {"pinned": cores, "batch": batch, "steps": steps, "repeats": repeats}
    facts |= {"device": device} | ({"gpu": gpu} if gpu else {})
    facts["a core beside a busy one takes"] = describe(neighbour_cost())
    report = Report(f"bench step: {ranks} ranks, {computing} of them compute", COLUMNS, facts)
    job = {
        "transport": transport,
        "models": list(models),
        "methods": methods,
        "cores": cores,
        "computing": computing,
        "device": device,
        "batch": batch,
        "steps": steps,
        "repeats": repeats,
    }

    def take(line: str) -> None:
        found = report.take(line)
        if found is not None:
            row = make_row(found, transport, ranks)
            report.row({**row, "computing": computing, "device": device})

    count = len(models) * len(methods)
    samples = max(1.0, (batch or 0) / _EASY_BATCH)
    with tempfile.TemporaryDirectory(prefix="ucxgossip-step-") as folder:
        path = Path(folder) / "job.json"
        path.write_text(json.dumps(job))
        run_ranks(
            ["-m", "ucxgossip.bench.step_rank", str(path)],
            ranks,
            on_line=take,
            deadline_s=_START_S + (repeats + 1) * count * (steps or _STEPS) * _STEP_S * samples,
        )
    if len(report.rows) != count:
        raise BenchError(f"bench step: {len(report.rows)} rows where {count} were due")
    return report.facts, report.rows


def _check(
    models: Sequence[str],
    ranks: int,
    methods: Sequence[str],
    cores: int | None,
    batch: int | None,
    steps: int | None,
    repeats: int,
) -> None:
    """`ArgumentError` for what cannot be measured."""
    from ucxgossip.bench import tasks

    there = len(os.sched_getaffinity(0))
    if ranks < 2:
        raise ArgumentError(f"bench step: {ranks} ranks; at least 2 communicate")
    if cores not in (None, 1, 2):
        raise ArgumentError(f"bench step: cores is {cores}; 1 or 2 for each rank")
    if cores is not None and there < (ranks if cores == 1 else 2):
        raise ArgumentError(
            f"bench step: this process may run on {there} cores, too few to pin {ranks} ranks with "
            f"--cores {cores}"
        )
    at_least_one("bench step", steps=steps, repeats=repeats, batch=batch)
    for name in models:
        if name not in tasks.TASKS:
            raise ArgumentError(f"unknown model {name!r}; choose one of {', '.join(tasks.TASKS)}")
    for what, names in (("model", models), ("method", methods)):
        if not names or len(set(names)) != len(names):
            raise ArgumentError(f"bench step: name at least one {what}, and none twice")
    for name in methods:
        if parse(name, devices=True).simulated_only:
            raise ArgumentError(f"bench step: method {name!r} exists in simulation only")


def _check_device(device: str, ranks: int, methods: Sequence[str], cores: int | None) -> str | None:
    """What the devices are, None for the CPU; a named error for what cannot be measured on them.

    The driver is asked and not torch: a context made here would stay on the device beside the
    ranks'.
    """
    check_device(device)
    if device == "cpu":
        if NCCL in methods:
            raise ArgumentError(f"bench step: {NCCL} is for --device cuda")
        return None
    if cores == 2 and len(os.sched_getaffinity(0)) < 2 * ranks:
        raise ArgumentError("bench step: with --device cuda all ranks compute; leave --cores out")
    from ucxgossip.device import driver
    from ucxgossip.torch_hook.device import check_cuda

    check_cuda()
    cuda = driver.load()
    if NCCL in methods and cuda.count() < ranks:
        raise ArgumentError(
            f"bench step: {NCCL} needs a device a rank, and there are {cuda.count()} for {ranks}"
        )
    return f"{cuda.name(0)}, CUDA {cuda.version}, {cuda.count()} seen"


def make_row(found: Row, transport: str, ranks: int) -> Row:
    """A row out of what the ranks found: ms a step by repeat, of the method and of `local`."""
    pairs = zip(found["step_ms"], found["local_ms"], strict=True)
    ratios = [mine / local for mine, local in pairs]
    return {
        "bench": "step",
        "transport": transport,
        "model": found["model"],
        "ranks": ranks,
        "method": found["method"],
        "step_ms": median(found["step_ms"]),
        "local_ms": median(found["local_ms"]),
        "ratio": median(ratios),
        "spread": 100 * (max(ratios) - min(ratios)) / median(ratios),
        "exchange_ms": found["exchange_ms"],
        "hidden": found["hidden"],
    }
