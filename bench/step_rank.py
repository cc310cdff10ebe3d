"""One rank of `bench step`: blocks of training steps by every method, in turn.

Started by `ucxgossip.bench.step`, whose docstring says what stands in for what, as
``python -m ucxgossip.bench.step_rank JOB``; JOB is a JSON file.
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ucxgossip.bench import tasks
from ucxgossip.bench.blocks import in_order, slowest
from ucxgossip.bench.gloo import gloo_job
from ucxgossip.bench.methods import parse
from ucxgossip.bench.models import loss
from ucxgossip.bench.report import say_in_force
from ucxgossip.bench.setting import make_optimizer
from ucxgossip.bench.train_plan import BATCH, RATES
from ucxgossip.bench.train_rank import trained_by
from ucxgossip.group import Group, join

_TIMEOUT_S = 120.0
_BATCHES = 8
_WARM_UP = 5
_BLOCK_S = 0.5


class Pace:
    """How long forward and backward take without communication, for ranks that stand in.

    pause: seconds that this rank sleeps in their place; 0 where it computes.
    """

    def __init__(self, computes: bool) -> None:
        self.computes = computes
        self.pause = 0.0
        self._own = 0.0
        if not computes:
            # The kernel wakes a sleeper up to 50 us late unless told otherwise.
            with suppress(OSError):
                Path("/proc/self/timerslack_ns").write_text("1", encoding="ascii")

    def measured(self, seconds: float) -> None:
        """A local forward and backward took so long on this rank, pause included. Collective."""
        theirs = slowest(seconds if self.computes else 0.0)
        if not self.computes:
            self._own = seconds - self.pause
            self.pause = max(0.0, theirs - self._own)


class Course:
    """One replica of this rank, trained by a method."""

    def __init__(
        self,
        task: tasks.Task,
        name: str,
        group: Group,
        pace: Pace,
        batch: int,
        where: torch.device,
    ) -> None:
        self.name, self.pace, self._where = name, pace, where
        self._method = parse(name, devices=True)
        self.step_ms: list[float] = []
        self.exchange_s, self.wait_s, self.steps = 0.0, 0.0, 0
        shard = task.shards(group.size, "iid", 0)[group.rank]
        chosen = torch.from_numpy(np.resize(shard, _BATCHES * batch)).reshape(_BATCHES, batch)
        self._batches = [
            (task.inputs[each].to(where), task.targets[each].to(where)) for each in chosen
        ]
        model = task.model(0).to(where)
        if not pace.computes:
            _stand_in(model, pace)
        self._optimizer = make_optimizer("sgd", model.parameters(), RATES[task.name, "sgd"])
        self._stack = ExitStack()
        self._replica = self._stack.enter_context(
            trained_by(self._method, model, self._optimizer, group)
        )

    def block(self, steps: int, counted: bool = True) -> float:
        """So many steps after a barrier, until their rounds have ended. Collective.

        Returns the seconds a step of the slowest rank that computes.
        """
        before = self._stats()
        self._finish()
        dist.barrier()
        computed, begun = 0.0, time.perf_counter()
        for number in range(steps):
            computed += self._step(*self._batches[number % _BATCHES])
        self._replica.settle()
        self._finish()
        taken = time.perf_counter() - begun
        step_s = slowest(taken / steps if self.pace.computes else 0.0)
        if self.name == "local":
            self.pace.measured(computed / steps)
        if counted:
            after = self._stats()
            self.step_ms.append(1e3 * step_s)
            self.exchange_s += after[0] - before[0]
            self.wait_s += after[1] - before[1]
            self.steps += steps
        return step_s

    def _step(self, inputs: torch.Tensor, targets: torch.Tensor) -> float:
        """One step; the seconds of forward and backward."""
        self._optimizer.zero_grad()
        begun = time.perf_counter()
        made = self._replica.called(inputs)
        if self.pace.computes:
            made = loss(made, targets)
        made.backward()
        ended = time.perf_counter()
        self._optimizer.step()
        return ended - begun

    def _finish(self) -> None:
        """Wait for the device."""
        if self._where.type == "cuda":
            torch.cuda.synchronize(self._where)

    def _stats(self) -> tuple[float, float]:
        if self._replica.gossip is None:
            return 0.0, 0.0
        stats = self._replica.gossip.stats()
        return stats["exchange_s"], stats["wait_s"]

    def found(self, model: str, local: Course) -> dict[str, Any]:
        """What `step.make_row` takes."""
        # Rounds of awc end in the next step, when they are let mix, whenever they came.
        gossips = self._replica.gossip is not None and self._method.combine != "awc"
        hidden = 1 - self.wait_s / self.exchange_s if gossips and self.exchange_s else None
        return {
            "model": model,
            "method": self.name,
            "step_ms": self.step_ms,
            "local_ms": local.step_ms,
            "exchange_ms": 1e3 * self.exchange_s / self.steps if gossips else None,
            "hidden": None if hidden is None else min(1.0, max(0.0, hidden)),
        }

    def close(self) -> None:
        """Detach. Collective."""
        self._stack.close()


def _stand_in(model: torch.nn.Module, pace: Pace) -> None:
    """Let a call of `model` sleep, and its backward give zeros to every parameter."""
    parameters = list(model.parameters())

    def forward(_: torch.Tensor) -> torch.Tensor:
        time.sleep(pace.pause)
        return 0.0 * torch.stack([each.sum() for each in parameters]).sum()

    model.forward = forward


def placed(rank: int, ranks: int, cores: int | None, computing: int) -> tuple[set[int], set[int]]:
    """The cores of this rank's training thread, and those of its other threads."""
    there = sorted(os.sched_getaffinity(0))
    if cores is None:
        return set(there), set(there)
    if cores == 1:
        return {there[rank]}, {there[rank]}
    if computing == ranks:
        return {there[2 * rank]}, {there[2 * rank + 1]}
    rest = set(there[1:])
    return ({there[0]} if rank == 0 else rest), rest


def placed_on(device: str) -> torch.device:
    """The CPU, or of the CUDA devices there are the one of this rank's number on its host."""
    if device == "cpu":
        return torch.device("cpu")
    number = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def measure(model: str, group: Group, pace: Pace, job: dict[str, Any], own: set[int]) -> None:
    """All methods on one model; rank 0 prints a line for each. Collective."""
    task, batch = tasks.load(model), job["batch"] or BATCH[model]
    everywhere, where = os.sched_getaffinity(0), placed_on(job["device"])
    courses = [Course(task, name, group, pace, batch, where) for name in job["methods"]]
    # Threads inherit the place of the one that starts them, so the others have been started.
    os.sched_setaffinity(0, own)
    alone_s, *_ = [course.block(_WARM_UP, counted=False) for course in courses]
    steps = job["steps"] or max(_WARM_UP, round(_BLOCK_S / alone_s))
    for repeat in range(job["repeats"]):
        # Local first, for the pace.
        for course in (courses[0], *in_order(courses[1:], repeat)):
            course.block(steps)
    if group.rank == 0:
        for course in courses:
            print(json.dumps(course.found(model, courses[0])), flush=True)
    os.sched_setaffinity(0, everywhere)
    for course in courses:
        course.close()


def main() -> None:
    """Run the job in the file named by the first argument."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    own, others = placed(rank, ranks, job["cores"], job["computing"])
    os.sched_setaffinity(0, others)
    pace = Pace(computes=rank < job["computing"])
    with (
        join(transport=job["transport"], timeout=_TIMEOUT_S) as group,
        gloo_job(_TIMEOUT_S),
    ):
        say_in_force(group)
        for model in job["models"]:
            measure(model, group, pace, job, own)


if __name__ == "__main__":
    main()
