"""Small models, their batches, and what `attach` should do with them, in plain torch."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from ucxgossip.schedule import BaseTwo, Dissemination, Hypercube, Ring, Schedule

Job = Callable[..., list[Any]]
F = nn.functional
STEPS = 9


def small_model(seed: int = 0) -> nn.Sequential:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def batch(rank: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * rank + step)
    x = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (4,), generator=generator)


def flat(model: nn.Module) -> np.ndarray:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]).numpy().copy()


def make_optimizer(name: str, model: nn.Module) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, step: int
) -> torch.Tensor:
    optimizer.zero_grad()
    x, y = batch(rank, step)
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.detach()


class Fails(torch.autograd.Function):
    """A layer whose backward raises."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError("on purpose")


class Reference:
    """All ranks in turn in plain torch: what `attach` should do, written down once more."""

    def __init__(self, size: int, optimizer: str, schedule: Schedule, **modes: Any) -> None:
        self.size, self.schedule = size, schedule
        self.mix, self.combine = modes.pop("mix", "both"), modes.pop("combine", "atc")
        self.with_state = modes.pop("optimizer_state", False)
        self.stale = modes.pop("staleness", 0)
        self.local = modes.pop("local_steps", 1)
        self.every = modes.pop("global_average_every", None)
        self.outer = modes.pop("outer", None)
        assert not modes
        self.models = [small_model(0) for _ in range(size)]
        self.optimizers = [make_optimizer(optimizer, model) for model in self.models]
        # With both, weights go to another partner than the step's gradients.
        ahead = 1 if isinstance(schedule, Dissemination | Hypercube | BaseTwo | Ring) else None
        self.ahead = (schedule.period if ahead is None else ahead) if self.mix == "both" else 0
        self.gradient_round, self.weight_round = 0, self.ahead
        self.corrections: list[list[torch.Tensor]] = []
        self.slow = [[p.detach().clone() for p in m.parameters()] for m in self.models]
        self.velocity = [[torch.zeros_like(p) for p in m.parameters()] for m in self.models]

    def weights(self) -> list[list[torch.Tensor]]:
        return [[p.data for p in model.parameters()] for model in self.models]

    def deltas(self, tensors: list[torch.Tensor], step: int) -> list[torch.Tensor]:
        parts = [self.schedule.round(rank, step) for rank in range(self.size)]
        return [
            torch.zeros_like(own)
            if part.sender is None
            else part.weight * (tensors[part.sender] - own)
            for own, part in zip(tensors, parts, strict=True)
        ]

    def average(self, rows: list[list[torch.Tensor]], step: int) -> None:
        for tensors in zip(*rows, strict=True):
            for own, delta in zip(tensors, self.deltas(list(tensors), step), strict=True):
                own.add_(delta)

    def states(self) -> list[list[torch.Tensor]]:
        return [
            [
                value
                for p in model.parameters()
                for value in optimizer.state[p].values()
                if torch.is_tensor(value) and value.shape == p.shape
            ]
            for model, optimizer in zip(self.models, self.optimizers, strict=True)
        ]

    def step(self, number: int) -> None:
        due = (number + 1) % self.local == 0
        for rank, model in enumerate(self.models):
            self.optimizers[rank].zero_grad()
            x, y = batch(rank, number)
            F.cross_entropy(model(x), y).backward()
        if self.mix in ("both", "gradients") and due:
            self.average(
                [[p.grad for p in model.parameters()] for model in self.models],  # type: ignore[misc]
                self.gradient_round,
            )
            self.gradient_round += 1
        weights_travel = self.mix != "gradients"
        if weights_travel and self.combine == "awc":
            self.average(self.weights(), self.weight_round)
        for each in self.optimizers:
            each.step()
        if weights_travel and self.combine == "awc":
            self.weight_round += 1
        else:
            if self.every and (number + 1) % self.every == 0:
                self.average_all()
            if weights_travel and due:
                self.exchange_weights()

    def average_all(self) -> None:
        for tensors in zip(*self.weights(), strict=True):
            mean = torch.stack(tensors).mean(0)
            for each in tensors:
                each.copy_(mean)

    def exchange_weights(self) -> None:
        if self.outer:
            self.outer_step()
        elif self.stale:
            assert self.stale == 1  # the only lateness that does not hang on timing
            self.apply_corrections()
            self.corrections = [
                self.deltas(list(tensors), self.weight_round)
                for tensors in zip(*self.weights(), strict=True)
            ]
        else:
            self.average(self.weights(), self.weight_round)
        if self.with_state:
            self.average(self.states(), self.weight_round)
        self.weight_round += 1

    def apply_corrections(self) -> None:
        for tensors, deltas in zip(
            zip(*self.weights(), strict=True), self.corrections, strict=False
        ):
            for own, delta in zip(tensors, deltas, strict=True):
                own.add_(delta)
        self.corrections = []

    def outer_step(self) -> None:
        change = [
            [w - s for w, s in zip(own, slow, strict=True)]
            for own, slow in zip(self.weights(), self.slow, strict=True)
        ]
        self.average(change, self.weight_round)
        self.average(self.slow, self.weight_round)
        rate, momentum = self.outer.rate, self.outer.momentum
        for own, slow, d, v in zip(self.weights(), self.slow, change, self.velocity, strict=True):
            for i, each in enumerate(own):
                v[i].mul_(momentum).add_(d[i])
                slow[i].add_(rate * (d[i] + momentum * v[i]))
                each.copy_(slow[i])

    def run(self, steps: int) -> list[np.ndarray]:
        for number in range(steps):
            self.step(number)
        if self.stale:
            self.apply_corrections()
        return [flat(model) for model in self.models]
