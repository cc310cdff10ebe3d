"""What a training run of `bench train` is given and what comes of it, simulated or real."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from ucxgossip.errors import ArgumentError

OPTIMIZERS = ("sgd", "adamw")
DECAYS = ("constant", "cosine")


@dataclass(frozen=True)
class Setting:
    """What a run is apart from its method and its data. batch: samples a rank and step."""

    ranks: int
    optimizer: str = "sgd"
    rate: float = 0.05
    decay: str = "constant"
    shards: str = "iid"
    steps: int = 300
    batch: int = 8
    seed: int = 0
    evaluations: int = 10

    def rate_at(self, step: int) -> float:
        """The learning rate of a step."""
        if self.decay == "constant":
            return self.rate
        return self.rate * 0.5 * (1 + math.cos(math.pi * step / self.steps))

    def evaluated_after(self) -> set[int]:
        """The numbers of steps done at which the replicas are judged; the last is `steps`."""
        count = min(self.evaluations, self.steps)
        return {round(self.steps * (k + 1) / count) for k in range(count)}


@dataclass
class Outcome:
    """What a run came to: lists by evaluation, the steps done at each, the weights at the end.

    accuracies: percent, of each replica; losses: mean test loss of each. consensus: relative RMS
    distance of the replicas, `nan` where they diverged.
    """

    steps: list[int] = field(default_factory=list)
    accuracies: list[list[float]] = field(default_factory=list)
    losses: list[list[float]] = field(default_factory=list)
    consensus: list[float] = field(default_factory=list)
    weights: NDArray[Any] | None = None
    step_ms: float | None = None


def make_optimizer(
    name: str, parameters: Iterable[Tensor], rate: float
) -> torch.optim.SGD | torch.optim.AdamW:
    """SGD with momentum 0.9, or AdamW as torch has it by default."""
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=rate, momentum=0.9)
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=rate)
    raise ArgumentError(f"unknown optimizer {name!r}; choose one of {', '.join(OPTIMIZERS)}")


def consensus(rows: Tensor) -> float:
    """``sqrt(mean_i |w_i - w|**2) / |w|`` of replicas as rows, w their mean."""
    wide = rows.double()
    mean = wide.mean(dim=0)
    return float((wide - mean).square().sum(dim=1).mean().sqrt() / mean.norm())
