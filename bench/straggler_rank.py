"""One rank of `bench stragglers`: blocks of steps by every method, with a slow rank and without.

Started by `ucxgossip.bench.stragglers` as ``python -m ucxgossip.bench.straggler_rank JOB``; JOB
is a JSON file. The last rank is the slow one, since rank 0 holds the store and prints.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
import torch.distributed as dist

from ucxgossip.bench import tasks
from ucxgossip.bench.gloo import gloo_job
from ucxgossip.bench.methods import Method, parse
from ucxgossip.bench.models import loss
from ucxgossip.bench.setting import make_optimizer
from ucxgossip.bench.train_plan import BATCH, RATES
from ucxgossip.bench.train_rank import Replica, gathered, trained_by
from ucxgossip.group import Group, join

MODEL = "lenet"
_TIMEOUT_S = 120.0
_SETTLING = 5
"""First steps of a block that are not counted: ranks come from a barrier together."""


class Course:
    """One replica of this rank, trained by a method, with the last rank slow or not."""

    def __init__(
        self, task: tasks.Task, method: Method, group: Group, job: dict[str, Any], slowed: bool
    ) -> None:
        self.task, self.method, self.group = task, method, group
        self.late = slowed and group.rank == group.size - 1
        self.pause_s = job["compute_ms"] * 1e-3 * (job["slow"] if self.late else 1.0)
        self.steps: int = job["steps"]
        if self.late and method.mix == "push_sum":
            self.steps = max(1, round(job["steps"] / job["slow"]))
        self.done = 0
        self.step_ms: list[float] = []
        self.shard = task.shards(group.size, "iid", 0)[group.rank]
        model = task.model(0)
        self.optimizer = make_optimizer("sgd", model.parameters(), RATES[MODEL, "sgd"])
        self._stack = ExitStack()
        self.replica: Replica = self._stack.enter_context(
            trained_by(method, model, self.optimizer, group)
        )

    def block(self) -> None:
        """Some steps after a barrier; keeps the time a step of the ranks that are not slow.

        A rank's mean, for with staleness most steps are short and some long; the median over those
        ranks. Collective.
        """
        dist.barrier()
        times = []
        for _ in range(self.steps):
            begun = time.perf_counter()
            time.sleep(self.pause_s)  # the compute of a device: it takes no core
            self._step()
            times.append(1e3 * (time.perf_counter() - begun))
        counted = times[_SETTLING:] or times
        mine = gathered(torch.tensor([fmean(counted)], dtype=torch.float64)).flatten().tolist()
        self.step_ms.append(median(mine[:-1]))

    def _step(self) -> None:
        chosen = tasks.batch(self.shard, BATCH[MODEL], 0, self.group.rank, self.done)
        inputs = self.task.inputs[torch.from_numpy(chosen)]
        self.optimizer.zero_grad()
        made = loss(self.replica.called(inputs), self.task.targets[torch.from_numpy(chosen)])
        made.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.done += 1

    @torch.no_grad()
    def result(self) -> dict[str, Any]:
        """Step times; accuracies (%) by rank; the last one's mass; share skipped. Collective."""
        self.replica.settle()
        made = self.replica.plain(self.task.test_inputs)
        right = 100 * (made.argmax(dim=-1) == self.task.test_targets).double().mean()
        mass, skipped = 1.0, 0.0
        if self.replica.gossip is not None:
            stats = self.replica.gossip.stats()
            mass = stats["mass"]
            skipped = 100 * stats["skipped"] / max(1, stats["skipped"] + stats["rounds"])
        table = gathered(torch.tensor([float(right), mass, skipped], dtype=torch.float64))
        return {
            "step_ms": self.step_ms,
            "accuracies": table[:, 0].tolist(),
            "mass": float(table[-1, 1]),
            "skipped": float(table[:, 2].mean()),
        }

    def close(self) -> None:
        """Detach. Collective."""
        self._stack.close()


def main() -> None:
    """Run the job in the file named by the first argument; rank 0 prints a line a method."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    task = tasks.load(MODEL)
    with (
        join(transport=job["transport"], timeout=_TIMEOUT_S) as group,
        gloo_job(_TIMEOUT_S),
    ):
        courses = [
            [Course(task, parse(name), group, job, slowed) for slowed in (False, True)]
            for name in job["methods"]
        ]
        for _ in range(job["repeats"]):
            for pair in courses:
                for course in pair:
                    course.block()
        for name, (even, slowed) in zip(job["methods"], courses, strict=True):
            dist.barrier()
            found = {"method": name, "even": even.result(), "slowed": slowed.result()}
            if group.rank == 0:
                print(json.dumps(found), flush=True)
        for pair in courses:
            for course in pair:
                course.close()


if __name__ == "__main__":
    main()
