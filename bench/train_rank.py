"""One rank of `bench train`: the runs of a job, one after another, by the method each names.

Started by `ucxgossip.bench.train` as ``python -m ucxgossip.bench.train_rank JOB``; JOB is a JSON
file. Every method goes through the same loop, and is judged outside the clock: replicas are
gathered over gloo, whatever the method.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.distributed as dist

from ucxgossip.bench import tasks
from ucxgossip.bench.gloo import gloo_job
from ucxgossip.bench.methods import NCCL, Method, parse
from ucxgossip.bench.models import loss
from ucxgossip.bench.setting import Outcome, Setting, consensus, make_optimizer
from ucxgossip.errors import ArgumentError
from ucxgossip.group import Group, join
from ucxgossip.torch_hook import Gossip, attach
from ucxgossip.torch_hook.attach import BUCKET_BYTES

_TIMEOUT_S = 120.0


class Replica:
    """This rank's model under one method: what the loop calls, and what is at rest when."""

    def __init__(
        self, plain: torch.nn.Module, called: torch.nn.Module, gossip: Gossip | None = None
    ) -> None:
        self.plain, self.called, self.gossip = plain, called, gossip

    def settle(self) -> None:
        """Wait for rounds under way."""
        if self.gossip is not None:
            self.gossip.wait()

    def flat(self) -> torch.Tensor:
        """The weights as one 1-D tensor."""
        return torch.cat([p.detach().flatten() for p in self.plain.parameters()])


@contextmanager
def trained_by(
    method: Method, model: torch.nn.Module, optimizer: torch.optim.Optimizer, group: Group
) -> Iterator[Replica]:
    """This rank's replica under `method` until the block ends. Collective."""
    if method.name in ("allreduce", NCCL):
        from torch.nn.parallel import DistributedDataParallel

        over = dist.new_group(backend="nccl") if method.name == NCCL else None
        yield Replica(model, DistributedDataParallel(model, process_group=over))
        if over is not None:
            dist.destroy_process_group(over)
    elif method.name == "lockstep":
        word = np.zeros(1, np.float32)
        box = group.mailbox(word.nbytes)

        def wait(*_: object) -> None:
            group.exchange(word, mailbox=box)

        handle = optimizer.register_step_post_hook(wait)
        yield Replica(model, model)
        handle.remove()
    elif not method.gossips:
        yield Replica(model, model)
    else:
        if method.simulated_only:
            raise ArgumentError(f"bench train: {method.name} has no real form; use --simulate")
        with attach(
            model,
            optimizer,
            group,
            mix=method.mix,
            combine=method.combine,
            optimizer_state=method.state,
            staleness=method.staleness,
            local_steps=method.local_steps,
            global_average_every=method.global_every or None,
            noise_correction=method.noise,
            bucket_bytes=BUCKET_BYTES if method.bucket_kib is None else method.bucket_kib << 10,
        ) as gossip:
            yield Replica(model, model, gossip)


def train(task: tasks.Task, method: Method, setting: Setting, group: Group) -> Outcome:
    """Train this rank's replica; the outcome of all ranks, the same on each. Collective."""
    model = task.model(setting.seed)
    optimizer = make_optimizer(setting.optimizer, model.parameters(), setting.rate)
    shard = task.shards(setting.ranks, setting.shards, setting.seed)[group.rank]
    outcome, when = Outcome(), setting.evaluated_after()
    times: list[float] = []
    with trained_by(method, model, optimizer, group) as replica:
        dist.barrier()
        for step in range(setting.steps):
            for each in optimizer.param_groups:
                each["lr"] = setting.rate_at(step)
            begun = time.perf_counter()
            chosen = torch.from_numpy(
                tasks.batch(shard, setting.batch, setting.seed, group.rank, step)
            )
            optimizer.zero_grad()
            made = loss(replica.called(task.inputs[chosen]), task.targets[chosen])
            made.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            times.append(time.perf_counter() - begun)
            if step + 1 in when:
                replica.settle()
                _judge(task, replica, outcome, step + 1)
                dist.barrier()
        outcome.weights = gathered(replica.flat()).numpy()
    outcome.step_ms = float(median(gathered(torch.tensor([median(times)])).flatten().tolist()))
    outcome.step_ms *= 1e3
    return outcome


@torch.no_grad()
def _judge(task: tasks.Task, replica: Replica, outcome: Outcome, step: int) -> None:
    """Add this moment's accuracy and loss of each replica, and their distance. Collective."""
    made = replica.plain(task.test_inputs)
    right = (made.argmax(dim=-1) == task.test_targets).double().mean()
    mine = torch.stack([100 * right, loss(made, task.test_targets).double()])
    accuracies, losses = gathered(mine).T.tolist()
    outcome.steps.append(step)
    outcome.accuracies.append(accuracies)
    outcome.losses.append(losses)
    outcome.consensus.append(consensus(gathered(replica.flat())))


def gathered(mine: torch.Tensor) -> torch.Tensor:
    """Every rank's 1-D tensor, as rows. Collective."""
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    return torch.stack(everyone)


def main() -> None:
    """Run the job in the file named by the first argument; rank 0 prints a line for each run."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    known: dict[str, tasks.Task] = {}
    with (
        join(transport=job["transport"], timeout=_TIMEOUT_S) as group,
        gloo_job(_TIMEOUT_S),
    ):
        for number, run in enumerate(job["runs"]):
            task = known.get(run["model"]) or tasks.load(run["model"])
            known[run["model"]] = task
            outcome = train(task, parse(run["method"]), Setting(**run["setting"]), group)
            if group.rank == 0:
                if job["weights"] and outcome.weights is not None:
                    np.save(Path(job["weights"]) / f"{number}.npy", outcome.weights)
                outcome.weights = None
                print(json.dumps({"run": number, "outcome": asdict(outcome)}), flush=True)


if __name__ == "__main__":
    main()
