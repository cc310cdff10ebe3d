"""`ucxgossip bench train`: what accuracy each way of training together reaches, and at what cost.

Methods are paired: for a seed, all start from the same weights and see the same batches. Each may
be given its own best rate (`rates`), without which a comparison of methods compares rates. With
`simulate` all ranks are computed in one process, which gives accuracies only; otherwise each rank
is a process, all methods run in turn in the same processes, and step times are measured too.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ucxgossip.bench import tasks, train_report
from ucxgossip.bench.environment import environment
from ucxgossip.bench.methods import Method, parse
from ucxgossip.bench.setting import DECAYS, OPTIMIZERS, Outcome, Setting
from ucxgossip.bench.spawn import run_ranks
from ucxgossip.errors import ArgumentError, BenchError

STEPS = {"lenet": 1000, "convnet": 1000, "gpt": 400}
BATCH = {"lenet": 16, "convnet": 16, "gpt": 8}
"""Samples a rank and step."""

RATES = {
    ("lenet", "sgd"): 0.02,
    ("lenet", "adamw"): 3e-3,
    ("convnet", "sgd"): 0.02,
    ("convnet", "adamw"): 3e-3,
    ("gpt", "sgd"): 0.1,
    ("gpt", "adamw"): 2e-3,
}
"""Rates at which all-reduce does well."""

_START_S = 120.0
_STEP_S = 2.0
_WIDTH = 120


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


def run(
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
    transport: str = "auto",
    plot: str | None = None,
) -> tuple[dict[str, object], list[dict[str, Any]]]:
    """Train, print the table, return (environment, rows): one row a method and number of ranks.

    rates: of several, each method's best is reported (`train_report.best`).
    """
    plan = _plan(model, ranks, methods, optimizer, rates, shards, decay, steps, batch, seeds)
    plan = replace(plan, simulate=simulate)
    if not simulate:
        _check_real(plan)
    if plot:
        train_report.check_plot(plot)
    facts = _facts(plan, transport)
    task = tasks.load(model)
    for count in ranks:
        _check_shards(task, plan, count)
    rows: list[dict[str, Any]] = []
    total = sum(len(plan.runs(count)) for count in ranks)
    with _progress(total) as advance:
        for count in ranks:
            outcomes = _outcomes(task, plan, count, transport, advance)
            rows += _rows(plan, count, outcomes, task.text)
    train_report.add_efficiency(rows)
    _print(plan, facts, rows, task.text)
    if plot:
        train_report.draw(rows, task.text, plot)
    return facts, rows


def _plan(
    model: str,
    ranks: Sequence[int],
    methods: Sequence[str],
    optimizer: str,
    rates: Sequence[float] | None,
    shards: str,
    decay: str,
    steps: int | None,
    batch: int | None,
    seeds: int,
) -> Plan:
    """The plan; `ArgumentError` for whatever cannot be served."""
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
        parse(name)
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
    for what, number in (("steps", setting.steps), ("batch", setting.batch), ("seeds", seeds)):
        if number < 1:
            raise ArgumentError(f"bench train: {what} is {number}; must be at least 1")
    if min(ranks) < 1:
        raise ArgumentError(f"bench train: no job of {min(ranks)} ranks")
    return Plan(model, ranks, methods, chosen, setting, seeds, simulate=True)


def _check_real(plan: Plan) -> None:
    """`ArgumentError` for a method that can only be simulated."""
    for name in plan.methods:
        if parse(name).simulated_only:
            raise ArgumentError(
                f"bench train: method {name!r} exists in simulation only; add --simulate"
            )


def _check_shards(task: tasks.Task, plan: Plan, count: int) -> None:
    length = len(task.shards(count, plan.setting.shards, 0)[0])
    if length < plan.setting.batch:
        raise ArgumentError(
            f"bench train: {count} ranks leave {length} samples each, fewer than a batch of "
            f"{plan.setting.batch}; give fewer ranks or a smaller --batch"
        )


def _facts(plan: Plan, transport: str) -> dict[str, object]:
    if plan.simulate:
        return environment(None, None)
    from ucxgossip.ucp import lib

    library = lib.load()
    facts = environment(".".join(map(str, library.version)), library.path)
    facts["transport"] = transport
    return facts


def _outcomes(
    task: tasks.Task, plan: Plan, count: int, transport: str, advance: Callable[[str], None]
) -> list[Outcome]:
    """What came of each of ``plan.runs(count)``, in their order."""
    runs = plan.runs(count)
    if not plan.simulate:
        return real(plan.model, runs, transport, lambda each: advance(_label(each)))
    import torch

    from ucxgossip.bench.simulate import simulate

    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as a rank; small matrices gain nothing from more
    try:
        outcomes = []
        for each in runs:
            outcomes.append(simulate(task, each.method, each.setting))
            advance(_label(each))
        return outcomes
    finally:
        torch.set_num_threads(before)


def _label(run: Run) -> str:
    setting = run.setting
    return f"{setting.ranks} ranks, seed {setting.seed}, rate {setting.rate:g}, {run.method.name}"


def real(
    model: str,
    runs: Sequence[Run],
    transport: str,
    done: Callable[[Run], None] = lambda each: None,
    weights: str | None = None,
) -> list[Outcome]:
    """Outcomes of runs on one number of ranks, each rank a process, all runs in the same ones.

    done: called after each run. weights: folder for the replicas' last weights, ``0.npy`` for the
    first run and so on.
    """
    outcomes: list[Outcome] = []

    def take(line: str) -> None:
        if line.startswith("{"):
            found = json.loads(line)
            done(runs[found["run"]])
            outcomes.append(Outcome(**found["outcome"]))

    described = [
        {"model": model, "method": each.method.name, "setting": asdict(each.setting)}
        for each in runs
    ]
    with tempfile.TemporaryDirectory(prefix="ucxgossip-train-") as folder:
        job = Path(folder) / "job.json"
        job.write_text(json.dumps({"transport": transport, "weights": weights, "runs": described}))
        run_ranks(
            ["-m", "ucxgossip.bench.train_rank", str(job)],
            runs[0].setting.ranks,
            on_line=take,
            deadline_s=_START_S + _STEP_S * sum(each.setting.steps for each in runs),
        )
    if len(outcomes) != len(runs):
        raise BenchError(f"bench train: {len(outcomes)} outcomes where {len(runs)} were due")
    return outcomes


def _rows(
    plan: Plan, count: int, outcomes: Sequence[Outcome], by_loss: bool
) -> list[dict[str, Any]]:
    """One row a method, at its best rate."""
    rows = []
    paired = list(zip(plan.runs(count), outcomes, strict=True))
    for name in plan.methods:
        tried = []
        for rate in plan.rates:
            mine = [
                (each, outcome)
                for each, outcome in paired
                if each.method.name == name and each.setting.rate == rate
            ]
            tried.append(
                train_report.make_row(
                    plan.model, name, mine[0][0].setting, [o for _, o in mine], plan.simulate
                )
            )
        rows.append(train_report.best(tried, by_loss))
    return rows


def _print(plan: Plan, facts: dict[str, object], rows: list[dict[str, Any]], by_loss: bool) -> None:
    setting, console = plan.setting, Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)
    how = "simulated" if plan.simulate else f"real processes, {facts['transport']}"
    print(
        f"# ucxgossip bench train, {plan.model}, {setting.optimizer}, {setting.shards} shards, "
        f"{setting.decay} rate, {setting.steps} steps of {setting.batch} samples a rank, "
        f"{plan.seeds} seeds, {how}"
    )
    for key, value in facts.items():
        print(f"#   {key:<22}  {'-' if value is None else value}")
    console.print(train_report.table(rows, by_loss))


@contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    """A bar on standard error where that is a terminal; the function moves it by one run."""
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    with bar:
        line = bar.add_task("training", total=total)
        yield lambda what: bar.update(line, advance=1, description=what)
