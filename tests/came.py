"""One rank of test_came.py: ``python came.py TRANSPORT MODES``; MODES are `attach`'s, as JSON.

Trains until the step that the store's `stop` names. Prints `rank R starts at S`, now and again
`rank R at S`, and at the end `rank R ends JSON`.
"""

import faulthandler
import importlib
import json
import logging
import os
import signal
import sys
from contextlib import ExitStack
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from torch.distributed import TCPStore

import fake_device as fake
import ucxgossip as ug

TIMEOUT_S = 60.0
SAY = 10


class Net(torch.nn.Module):
    """With batch norm, whose statistics are buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = torch.nn.Linear(8, 32), torch.nn.BatchNorm1d(32)
        self.last = torch.nn.Linear(32, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.norm(self.first(x))))


def main() -> None:
    faulthandler.register(signal.SIGUSR1)  # when a test has waited in vain
    transport, modes = sys.argv[1], json.loads(sys.argv[2])
    rank = int(os.environ["RANK"])
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="log %(message)s")
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(host, port, timeout=timedelta(seconds=TIMEOUT_S))
    random = np.random.default_rng(rank)
    model = Net()
    kind = modes.pop("optimizer", "sgd")
    shuffles, looks = modes.pop("shuffles", False), modes.pop("looks", 0)
    if modes.pop("device", None) == rank:
        attach_module: Any = importlib.import_module("ucxgossip.torch_hook.attach")
        attach_module.device_of = lambda _: fake.FakeDevice(pace=3)
    second = Net() if modes.pop("models", 1) == 2 else None
    if "outer" in modes:
        modes["outer"] = ug.Nesterov(**modes["outer"])
    optimizer: torch.optim.Optimizer = (
        torch.optim.SGD(model.parameters(), 0.01, momentum=0.5)
        if kind == "sgd"
        else torch.optim.AdamW(model.parameters(), 0.01)
    )
    with ExitStack() as stack:
        group = stack.enter_context(ug.join(transport=transport, timeout=TIMEOUT_S, dead_after=2.0))
        gossip = stack.enter_context(ug.attach(model, optimizer, group, **modes))
        if second is not None:
            beside = torch.optim.SGD(second.parameters(), 0.02)
            other = stack.enter_context(ug.attach(second, beside, group, **modes))
        say(f"rank {rank} starts at {gossip.steps}")

        def step(x: torch.Tensor) -> None:
            optimizer.zero_grad()
            ((model(x) - x.sum(1, keepdim=True)) ** 2).mean().backward()
            optimizer.step()
            if second is not None:
                beside.zero_grad()
                ((second(x) - model(x).detach()) ** 2).mean().backward()
                beside.step()
                assert other.steps == gossip.steps
            if looks and gossip.steps % looks == 0:
                gossip.synchronize()
                assert gossip.consensus_distance() < 1e-6
            if gossip.steps % SAY == 0:
                say(f"rank {rank} at {gossip.steps}")

        seen: set[float] = set()
        if shuffles:
            train_shuffled(gossip, store, step, seen)
        else:
            while not over(store, gossip.steps):
                step(batch(random))
        gossip.wait()
        end = {
            "steps": gossip.steps,
            "members": list(group.members),
            "consensus": gossip.consensus_distance(),
            "finite": all(bool(p.isfinite().all()) for p in model.parameters()),
            "seen": sorted(seen),
            "chunks": sorted({each.layout.chunk for each in group.engine.mailboxes}),
            **{name: gossip.stats()[name] for name in ("lost", "came", "mass")},
        }
    say(f"rank {rank} ends {json.dumps(end)}")


def say(line: str) -> None:
    """In one write: all ranks share a pipe."""
    os.write(1, f"{line}\n".encode())


def batch(random: np.random.Generator) -> torch.Tensor:
    return torch.from_numpy(random.standard_normal((16, 8)).astype(np.float32))


def over(store: TCPStore, steps: int) -> bool:
    """Whether the training ends before the next step."""
    return store.check(["stop"]) and steps >= int(store.get("stop"))


def train_shuffled(gossip: Any, store: TCPStore, step: Any, seen: set[float]) -> None:
    """Epochs of few batches; each batch holds its maker's rank, `seen` whose batches came."""
    mine = torch.full((16, 8), float(gossip.group.rank))
    batches = gossip.shuffled([mine + 0.01 * torch.randn(16, 8) for _ in range(5)])
    while not over(store, gossip.steps):
        seen.clear()
        for x in batches:
            seen.add(round(float(x.mean())))
            step(x)


if __name__ == "__main__":
    main()
