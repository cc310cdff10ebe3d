"""What `bench train` is asked to do: checked before anything runs, and spelt out run by run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ucxgossip.bench import tasks
from ucxgossip.bench.arguments import at_least_one
from ucxgossip.bench.methods import Method, parse
from ucxgossip.bench.setting import DECAYS, OPTIMIZERS, Setting
from ucxgossip.errors import ArgumentError

STEPS = {"lenet": 1000, "convnet": 1000, "resnet20": 300, "resnet50": 300, "gpt": 400, "gpt4": 400}
BATCH = {"lenet": 16, "convnet": 16, "resnet20": 16, "resnet50": 32, "gpt": 8, "gpt4": 24}
"""Samples a rank and step."""

RATES = {
    ("lenet", "sgd"): 0.02,
    ("lenet", "adamw"): 3e-3,
    ("convnet", "sgd"): 0.02,
    ("convnet", "adamw"): 3e-3,
    ("resnet20", "sgd"): 0.02,
    ("resnet20", "adamw"): 3e-3,
    ("resnet50", "sgd"): 0.02,
    ("resnet50", "adamw"): 1e-3,
    ("gpt", "sgd"): 0.1,
    ("gpt", "adamw"): 3e-3,
    ("gpt4", "sgd"): 0.1,
    ("gpt4", "adamw"): 1e-3,
}
"""Rates at which all-reduce does well; resnet50's are guesses (`bench step` has it, for GPUs)."""


@dataclass(frozen=True)
class Run:
    """One training: a method at a setting."""

    method: Method
    setting: Setting


@dataclass(frozen=True)
class Plan:
    """What was asked for, checked."""

    model: str
    ranks: Sequence[int]
    methods: Sequence[str]
    rates: Sequence[float]
    setting: Setting  # of each run, but for ranks, rate and seed
    seeds: int
    simulate: bool

    def runs(self, count: int) -> list[Run]:
        """All runs on `count` ranks: methods in turn, so that they see the same machine."""
        setting = replace(self.setting, ranks=count)
        return [
            Run(parse(name), replace(setting, rate=rate, seed=seed))
            for seed in range(self.seeds)
            for rate in self.rates
            for name in self.methods
        ]


def make(
    model: str,
    ranks: Sequence[int],
    methods: Sequence[str],
    optimizer: str = "sgd",
    rates: Sequence[float] | None = None,
    shards: str = "iid",
    decay: str = "constant",
    steps: int | None = None,
    batch: int | None = None,
    seeds: int = 5,
    simulate: bool = False,
) -> Plan:
    """The plan, with defaults by model and optimizer; `ArgumentError` for what cannot be served.

    rates: of several, each method's best is reported (`train_report.best`).
    """
    for what, value, known in (
        ("model", model, tuple(tasks.TASKS)),
        ("optimizer", optimizer, OPTIMIZERS),
        ("shards", shards, tasks.SHARDS),
        ("decay", decay, DECAYS),
    ):
        if value not in known:
            raise ArgumentError(
                f"bench train: unknown {what} {value!r}; choose one of {', '.join(known)}"
            )
    for name in methods:
        if parse(name).simulated_only and not simulate:
            raise ArgumentError(
                f"bench train: method {name!r} exists in simulation only; add --simulate"
            )
    for what, values in (("method", methods), ("number of ranks", ranks)):
        if not values or len(set(values)) != len(values):
            raise ArgumentError(f"bench train: name at least one {what}, and none twice")
    chosen = [RATES[model, optimizer]] if rates is None else list(rates)
    if not chosen or min(chosen) <= 0:
        raise ArgumentError(f"bench train: rates must be positive, not {chosen}")
    setting = Setting(
        ranks=min(ranks),
        optimizer=optimizer,
        decay=decay,
        shards=shards,
        steps=STEPS[model] if steps is None else steps,
        batch=BATCH[model] if batch is None else batch,
    )
    at_least_one("bench train", steps=setting.steps, batch=setting.batch, seeds=seeds)
    if min(ranks) < 1:
        raise ArgumentError(f"bench train: no job of {min(ranks)} ranks")
    return Plan(model, ranks, methods, chosen, setting, seeds, simulate)


def check_shards(task: tasks.Task, plan: Plan, count: int) -> None:
    """`ArgumentError` where `count` ranks leave each too few samples for a batch."""
    length = len(task.shards(count, plan.setting.shards, 0)[0])
    if length < plan.setting.batch:
        raise ArgumentError(
            f"bench train: {count} ranks leave {length} samples each, fewer than a batch of "
            f"{plan.setting.batch}; give fewer ranks or a smaller --batch"
        )
