"""One rank of `bench kills`: trains, and tells how far it is and how long a step took at most.

``python -m ucxgossip.bench.kills_rank TRANSPORT STEPS SEED MIX``, in torchrun's environment.
"""

from __future__ import annotations

import json
import sys
import time

import torch

from ucxgossip.bench import tasks
from ucxgossip.bench.models import loss
from ucxgossip.bench.setting import make_optimizer
from ucxgossip.group import join
from ucxgossip.torch_hook import attach

SAY = 5
"""Steps between two lines."""
BATCH = 16


def main() -> None:
    """Train LeNet on digits; a line `step N` now and again, and JSON at the end."""
    transport, steps, seed, mix = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    task = tasks.load("lenet")
    model = task.model(seed)
    optimizer = make_optimizer("sgd", model.parameters(), 0.05)
    with (
        join(transport=transport, timeout=120.0) as group,
        attach(model, optimizer, group, mix=mix) as gossip,
    ):
        shard = task.shards(group.size, "iid", seed)[group.rank]
        longest, before = 0.0, time.perf_counter()
        for step in range(steps):
            chosen = torch.from_numpy(tasks.batch(shard, BATCH, seed, group.rank, step))
            optimizer.zero_grad()
            loss(model(task.inputs[chosen]), task.targets[chosen]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            now = time.perf_counter()
            if step >= 2 * SAY:  # the first steps make connections
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
                    "lost": [loss.rank for loss in group.losses],
                    "members": list(group.members),
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
