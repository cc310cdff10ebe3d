"""One rank of `bench kills`: trains, and tells how far it is and how long a step took at most.

``python -m ucxgossip.bench.kills_rank TRANSPORT STEPS SEED MIX [KEY]``, in torchrun's environment.
With KEY it goes on until the step that the job's store names by it, and STEPS is the most.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from ucxgossip.bench import tasks
from ucxgossip.bench.models import loss
from ucxgossip.bench.setting import make_optimizer
from ucxgossip.group import join
from ucxgossip.torch_hook import attach

SAY = 5
"""Steps between two lines."""
BATCH = 16


def _last_step(key: str) -> Callable[[], float]:
    """Asks the store, each SAY-th time, at which step the job ends."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store: Any = vars(torch.distributed)["TCPStore"](host, port)
    asked, known = 0, math.inf

    def last() -> float:
        nonlocal asked, known
        asked += 1
        if asked % SAY == 0 and store.check([key]):
            known = float(store.get(key))
        return known

    return last


def main() -> None:
    """Train LeNet on digits; a line `step N` now and again, and JSON at the end."""
    transport, steps, seed, mix = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    last = _last_step(sys.argv[5]) if len(sys.argv) > 5 else lambda: steps
    task = tasks.load("lenet")
    model = task.model(seed)
    optimizer = make_optimizer("sgd", model.parameters(), 0.05)
    with (
        join(transport=transport, timeout=120.0) as group,
        attach(model, optimizer, group, mix=mix) as gossip,
    ):
        shard = task.shards(group.size, "iid", seed)[group.rank]
        longest, before = 0.0, time.perf_counter()
        first = gossip.steps
        print(f"pid {os.getpid()} from {first}", flush=True)
        while gossip.steps < min(steps, last()):
            step = gossip.steps
            chosen = torch.from_numpy(tasks.batch(shard, BATCH, seed, group.rank, step))
            optimizer.zero_grad()
            loss(model(task.inputs[chosen]), task.targets[chosen]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            now = time.perf_counter()
            if step >= first + 2 * SAY:  # the first steps make connections
                longest = max(longest, now - before)
            before = now
            if step % SAY == 0:
                print(f"step {step}", flush=True)
        gossip.wait()
        with torch.no_grad():
            right = (model(task.test_inputs).argmax(dim=-1) == task.test_targets).double().mean()
        distance = gossip.consensus_distance()
        print(
            json.dumps(
                {
                    "accuracy": 100.0 * float(right),
                    "longest_s": longest,
                    "consensus": distance,
                    "steps": gossip.steps,
                    "lost": [loss.rank for loss in group.losses],
                    "members": list(group.members),
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
