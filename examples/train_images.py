"""One rank of a training run on images, by gossip over UCX.

    torchrun --nproc-per-node 4 examples/train_images.py --model resnet50 --data synthetic
    torchrun --nproc-per-node 4 examples/train_images.py --model cifarnet --data cifar10:DIR

`train_epoch` is an ordinary training loop; what makes it gossip is `ug.join` and `ug.attach`
in `train`. At the end of each epoch all replicas become their mean, which is then evaluated.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from images import Data, DataError, load
from models import MODELS
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader, DistributedSampler, Subset

import ucxgossip as ug

SYNTHETIC_STEPS = 20
Batches = Iterable[tuple[Tensor, Tensor]]


class Diverged(Exception):
    """The loss is no finite number any more."""


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
def evaluate(model: nn.Module, batches: Batches) -> tuple[int, int]:
    """How many images the model names rightly, and of how many."""
    right = seen = 0
    model.eval()
    for x, y in batches:
        right += int((model(x).argmax(dim=1) == y).sum())
        seen += len(y)
    model.train()
    return right, seen


def train(args: argparse.Namespace) -> None:
    """Train for all epochs; rank 0 prints what came of each."""
    architecture = MODELS[args.model]
    data = load(args.data, architecture.shape, architecture.classes)
    torch.manual_seed(args.seed)
    model = architecture.factory(data.classes)
    optimizer = SGD(model.parameters(), lr=args.lr, momentum=args.momentum)

    with ug.join(transport=args.transport) as group:
        torch.manual_seed(args.seed + 1 + group.rank)  # of dropout and of how images are cut
        sampler, loader, validation = loaders(data, group, args)
        steps = min(args.steps, len(loader))
        with ug.attach(model, optimizer, group, mix=args.mix, combine=args.combine) as gossip:
            for epoch in range(1, args.epochs + 1):
                sampler.set_epoch(epoch)
                start = time.perf_counter()
                loss = train_epoch(model, optimizer, islice(loader, steps))
                gossip.wait()  # inside the clock: an exchange left unfinished is not free
                seconds = time.perf_counter() - start

                apart = gossip.consensus_distance()
                gossip.synchronize()
                right, seen = evaluate(model, validation)
                loss, seconds, right, seen = gossip.average([loss, seconds, right, seen])
                if group.rank == 0:
                    rate = steps * args.batch * group.size / seconds
                    accuracy = f"  accuracy {100 * right / seen:.1f} %" if seen else ""
                    print(
                        f"epoch {epoch}/{args.epochs}  loss {loss:.4f}{accuracy}"
                        f"  {rate:.1f} images/s  apart {apart:.1e} before synchronize()"
                        f"\n  rank 0 so far: {told(gossip.stats())}",
                        flush=True,
                    )
                if not math.isfinite(loss):
                    raise Diverged(f"the loss is {loss}; try a smaller --lr")


def loaders(
    data: Data, group: ug.Group, args: argparse.Namespace
) -> tuple[DistributedSampler[Any], DataLoader[Any], Batches]:
    """This rank's share of the training images, drawn anew each epoch, and of the validation."""
    options: dict[str, Any] = {"batch_size": args.batch, "num_workers": args.workers}
    if args.workers:
        options["persistent_workers"] = True
    sampler: DistributedSampler[Any] = DistributedSampler(
        data.train, group.size, group.rank, seed=args.seed, drop_last=True
    )
    loader = DataLoader(data.train, sampler=sampler, drop_last=True, **options)
    if not len(loader):
        raise DataError(f"--batch {args.batch}: each rank has {len(sampler)} images only")
    if data.validation is None:
        return sampler, loader, []
    mine = Subset(data.validation, range(group.rank, len(data.validation), group.size))
    return sampler, loader, DataLoader(mine, **options)


def told(stats: dict[str, Any]) -> str:
    """`gossip.stats()` for people."""
    return (
        f"{stats['bytes'] / 1e6:.1f} MB sent in {stats['rounds']} rounds,"
        f" {100 * stats['hidden']:.0f} % of {stats['exchange_s']:.2f} s hidden,"
        f" waited {stats['waits']} times, {stats['wait_s']:.2f} s"
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Train a network on images by gossip over UCX: one rank of a job that torchrun"
        " started (without torchrun, a job of one rank).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", choices=tuple(MODELS), default="cifarnet", help="what to train")
    parser.add_argument(
        "--data",
        default="synthetic",
        metavar="SOURCE",
        help="synthetic (noise, for speed), cifar10:DIR (DIR holds cifar-10-batches-py) or"
        " imagenet:DIR (DIR holds train/CLASS/*.JPEG and perhaps val/CLASS/*.JPEG)",
    )
    parser.add_argument(
        "--epochs", type=positive, default=1, metavar="N", help="passes over the data"
    )
    parser.add_argument(
        "--steps",
        type=positive,
        metavar="N",
        help=f"at most so many an epoch (default: all the data; {SYNTHETIC_STEPS} of synthetic)",
        default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--batch", type=positive, default=32, metavar="N", help="images a rank and step"
    )
    parser.add_argument("--lr", type=number, default=0.01, help="learning rate of SGD, constant")
    parser.add_argument(
        "--momentum", type=number, default=0.9, metavar="M", help="of SGD; each rank has its own"
    )
    parser.add_argument(
        "--mix", choices=("both", "weights", "gradients"), default="both", help="what travels"
    )
    parser.add_argument(
        "--combine",
        choices=("atc", "awc"),
        default="atc",
        help="average after the step, or beside it",
    )
    parser.add_argument(
        "--transport", choices=("auto", "tcp", "shm"), default="auto", help="of the exchange"
    )
    parser.add_argument(
        "--workers", type=whole, default=0, metavar="N", help="processes a rank that read images"
    )
    parser.add_argument(
        "--seed", type=whole, default=0, metavar="N", help="of weights, shards and batches"
    )
    args = parser.parse_args(argv)
    if "steps" not in args:
        args.steps = SYNTHETIC_STEPS if args.data == "synthetic" else sys.maxsize
    return args


def whole(text: str) -> int:
    """A whole number from 0, for argparse."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def positive(text: str) -> int:
    """A whole number from 1, for argparse."""
    if (number := whole(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def number(text: str) -> float:
    """A finite number from 0, for argparse."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a finite number from 0")
    return value


def main(argv: list[str] | None = None) -> int:
    """Run one rank; the exit status."""
    args = parse(argv)
    try:
        train(args)
    except (DataError, Diverged, ug.errors.GossipError) as error:
        print(f"train_images: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
