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
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ucxgossip.bench import tasks, train_report
from ucxgossip.bench.environment import environment
from ucxgossip.bench.plot import check as check_plot
from ucxgossip.bench.setting import Outcome
from ucxgossip.bench.spawn import run_ranks
from ucxgossip.bench.train_plan import Plan, Run, check_shards
from ucxgossip.errors import BenchError

_START_S = 120.0
_STEP_S = 2.0
_WIDTH = 120
_JOB_RUNS = 60  # a group keeps the memory of its rounds until it is closed


def run(
    plan: Plan, transport: str = "auto", plot: str | None = None
) -> tuple[dict[str, object], list[dict[str, Any]]]:
    """Train, print the table, return (environment, rows): one row a method and number of ranks."""
    if plot:
        check_plot("bench train", plot)
    facts = _facts(plan, transport)
    task = tasks.load(plan.model)
    for count in plan.ranks:
        check_shards(task, plan, count)
    rows: list[dict[str, Any]] = []
    with _progress(sum(len(plan.runs(count)) for count in plan.ranks)) as advance:
        for count in plan.ranks:
            outcomes = _outcomes(task, plan, count, transport, advance)
            rows += _rows(plan, count, outcomes, task.text)
    train_report.add_efficiency(rows)
    _print(plan, facts, rows, task.text)
    if plot:
        train_report.draw(rows, task.text, plot)
    return facts, rows


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
        found: list[Outcome] = []
        for start in range(0, len(runs), _JOB_RUNS):
            part = runs[start : start + _JOB_RUNS]
            found += real(plan.model, part, transport, lambda each: advance(_label(each)))
        return found
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
        f"{plan.seeds} {'seed' if plan.seeds == 1 else 'seeds'}, {how}"
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
