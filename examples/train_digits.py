"""One rank of the demo: LeNet on digits, by gossip, by all-reduce or without communication.

    torchrun --standalone --nproc-per-node 4 train_digits.py --method gossip

The loop in `train_epoch` is an ordinary training loop and the same for all three methods; what
differs is in the three functions of `METHODS`. A process group over gloo serves every method
alike, but only outside the timed part: to start epochs together and to bring the ranks' numbers
to rank 0 for the report. Gossip itself neither needs nor uses it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import digits
import torch
import torch.distributed as dist

# Unused, but needed before init_process_group: its functions keep the process group of the time
# of their import as a default argument. Imported later (the first optimizer does), it keeps gloo's
# threads alive past destroy_process_group; about one job in six then aborted at exit.
import torch.distributed.nn
import torch.nn.functional as F
from models import LeNet, flat_parameters
from report import Epoch, Numbers, Traffic, announce, over_ranks, run_row
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Optimizer

SETTINGS = ("epochs", "batch", "lr", "momentum", "seed")
GOSSIP_SETTINGS = ("mix", "combine", "transport", "shuffle")
REPORT_TIMEOUT = timedelta(seconds=60)
Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass
class Method:
    """A way to train together, as the training loop and the report see it."""

    model: nn.Module
    traffic: Callable[[int], Traffic]  # after so many steps
    consensus_distance: Callable[[], float]
    settle: Callable[[], None] = lambda: None  # until the parameters are at rest
    batches: Callable[[Batches], Batches] = lambda loader: loader


@contextmanager
def gossip(model: nn.Module, optimizer: Optimizer, args: argparse.Namespace) -> Iterator[Method]:
    """Average with one partner a step, over UCX, beside forward and backward."""
    import ucxgossip as ug

    def traffic(steps: int) -> Traffic:
        stats = exchange.stats()
        return Traffic(stats["bytes"], stats["exchange_s"], stats["wait_s"])

    with (
        ug.join(transport=args.transport) as group,
        ug.attach(
            model,
            optimizer,
            group,
            mix=args.mix,
            combine=args.combine,
            schedule=ug.Rotated(ug.Dissemination(group.size), seed=0),
        ) as exchange,
    ):
        method = Method(model, traffic, exchange.consensus_distance, settle=exchange.wait)
        if args.shuffle:
            method.batches = exchange.shuffled
        yield method


@contextmanager
def allreduce(model: nn.Module, optimizer: Optimizer, args: argparse.Namespace) -> Iterator[Method]:
    """Average all gradients over all ranks each step: PyTorch's DDP over gloo."""
    size = dist.get_world_size()
    parameter_bytes = flat_parameters(model).nbytes

    def traffic(steps: int) -> Traffic:
        # Computed, not counted: what gloo's ring all-reduce sends.
        return Traffic(steps * parameter_bytes * 2 * (size - 1) / size)

    yield Method(DistributedDataParallel(model), traffic, lambda: consensus_distance(model))


@contextmanager
def local(model: nn.Module, optimizer: Optimizer, args: argparse.Namespace) -> Iterator[Method]:
    """Every rank for itself, on its own part of the data."""
    yield Method(model, lambda steps: Traffic(0), lambda: consensus_distance(model))


Entry = Callable[[nn.Module, Optimizer, argparse.Namespace], AbstractContextManager[Method]]
METHODS: dict[str, Entry] = {"gossip": gossip, "allreduce": allreduce, "local": local}


def consensus_distance(model: nn.Module) -> float:
    """Relative RMS distance of the replicas: sqrt(mean |w_i - mean w|^2) / |mean w|. Collective."""
    mine = flat_parameters(model)
    replicas = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(replicas, mine)
    stacked = torch.stack(replicas).double()
    center = stacked.mean(dim=0)
    spread = (stacked - center).square().sum(dim=1).mean().sqrt()
    return float(spread / center.norm())


def train_epoch(model: nn.Module, optimizer: Optimizer, batches: Batches) -> float:
    """One pass over `batches`; the mean loss."""
    losses = []
    for x, y in batches:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return statistics.fmean(losses)


@torch.no_grad()
def accuracy(model: nn.Module, samples: digits.Samples) -> float:
    """Percent of `samples` that this rank's own replica names rightly."""
    model.eval()
    right = model(samples.images).argmax(dim=1) == samples.labels
    model.train()
    return 100 * float(right.double().mean())


def train(args: argparse.Namespace) -> None:
    """Train for all epochs; rank 0 prints every epoch and writes the report."""
    rank, size = dist.get_rank(), dist.get_world_size()
    train_set, test_set = digits.load()
    shard = digits.shard(train_set, rank, size, args.seed)
    loader = digits.Loader(shard, args.batch, rank=rank, seed=args.seed)

    torch.manual_seed(args.seed)  # the same first weights on every rank
    model = LeNet()
    optimizer = SGD(model.parameters(), lr=args.lr, momentum=args.momentum)

    history: list[Numbers] = []
    with METHODS[args.method](model, optimizer, args) as method:
        before = method.traffic(0)
        for epoch in range(1, args.epochs + 1):
            dist.barrier()  # so that no rank's evaluation is timed as another's wait
            start = time.perf_counter()
            loss = train_epoch(method.model, optimizer, method.batches(loader))
            method.settle()  # inside the clock: an exchange left unfinished is not free
            train_s = time.perf_counter() - start
            after = method.traffic(epoch * len(loader))

            mine = Epoch(loss, train_s, accuracy(model, test_set), after.since(before))
            before = after
            distance = method.consensus_distance()
            ranks: list[Any] | None = [None] * size if rank == 0 else None
            dist.gather_object(mine, ranks)
            if ranks is not None:
                history.append({"epoch": epoch} | over_ranks(ranks, distance, len(loader)))
                announce(args.method, args.epochs, history[-1], as_json=args.json_lines)
    if rank == 0 and args.report:
        row = {"method": args.method, "model": "lenet", "ranks": size, **run_row(history)}
        report = {"row": row | {"setting": setting(args)}, "history": history}
        args.report.write_text(json.dumps(report, indent=1) + "\n")


def setting(args: argparse.Namespace) -> dict[str, Any]:
    """What the run was asked to do."""
    keys = SETTINGS + GOSSIP_SETTINGS if args.method == "gossip" else SETTINGS
    return {key: getattr(args, key) for key in keys}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; exits with a message where it, or the way of starting, is wrong."""
    parser = argparse.ArgumentParser(
        description="Train LeNet on digits on one rank of a job that torchrun started.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--method", choices=sorted(METHODS), default="gossip")
    parser.add_argument("--epochs", type=positive, default=25)
    parser.add_argument("--batch", type=positive, default=8, help="samples per rank and step")
    parser.add_argument("--lr", type=float, default=0.08, help="learning rate, constant")
    parser.add_argument("--momentum", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0, help="of weights, shards and batches")
    parser.add_argument("--mix", choices=("both", "weights", "gradients"), default="both")
    parser.add_argument("--combine", choices=("atc", "awc"), default="atc")
    parser.add_argument("--transport", choices=("tcp", "shm", "auto"), default="tcp")
    parser.add_argument(
        "--shuffle",
        action="store_true",
        help="gossip also passes samples around the ring; the other methods have no such thing,"
        " so leave it off to compare what averaging alone does",
    )
    parser.add_argument("--report", type=Path, help="file for the numbers, as JSON")
    parser.add_argument("--json-lines", action="store_true", help="print epochs as @{...} lines")
    args = parser.parse_args(argv)
    if "RANK" not in os.environ:
        parser.error("no RANK in the environment: start this script with torchrun")
    return args


def positive(text: str) -> int:
    """A whole number from 1, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def main(argv: list[str] | None = None) -> None:
    """Run one rank."""
    args = parse(argv)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=REPORT_TIMEOUT)
    try:
        train(args)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
