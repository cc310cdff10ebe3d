"""What `bench train` shows: outcomes over seeds as a row, rows as a table, curves as a figure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean, median, stdev
from typing import Any

from rich import box
from rich.table import Table

from ucxgossip.bench.plot import DASHES, SWATCHES
from ucxgossip.bench.setting import Outcome, Setting
from ucxgossip.errors import ArgumentError

Row = dict[str, Any]


def make_row(
    model: str, method: str, setting: Setting, outcomes: Sequence[Outcome], simulated: bool
) -> Row:
    """One method at one rate over all seeds; `setting` is that of any seed.

    Figures are those of the last evaluation, means over seeds; worst_* are of each seed's worst
    replica; None where replicas diverged. curve: the same over steps.
    """
    finals = [each.accuracies[-1] for each in outcomes]
    means, worsts = [fmean(each) for each in finals], [min(each) for each in finals]
    curve: dict[str, Any] = {
        "steps": outcomes[0].steps,
        "accuracy": _over_seeds(outcomes, lambda o, k: fmean(o.accuracies[k])),
        "worst_accuracy": _over_seeds(outcomes, lambda o, k: min(o.accuracies[k])),
        "loss": _over_seeds(outcomes, lambda o, k: fmean(o.losses[k])),
        "worst_loss": _over_seeds(outcomes, lambda o, k: max(o.losses[k])),
        "consensus": _over_seeds(outcomes, lambda o, k: o.consensus[k]),
    }
    times = [each.step_ms for each in outcomes if each.step_ms is not None]
    return {
        "bench": "train",
        "model": model,
        "ranks": setting.ranks,
        "method": method,
        "accuracy": fmean(means),
        "worst_accuracy": fmean(worsts),
        "consensus": curve["consensus"][-1],
        "step_ms": median(times) if times else None,
        "efficiency": None,
        "optimizer": setting.optimizer,
        "shards": setting.shards,
        "decay": setting.decay,
        "rate": setting.rate,
        "steps": setting.steps,
        "batch": setting.batch,
        "seeds": len(outcomes),
        "accuracy_std": stdev(means) if len(means) > 1 else None,
        "worst_std": stdev(worsts) if len(worsts) > 1 else None,
        "loss": curve["loss"][-1],
        "worst_loss": curve["worst_loss"][-1],
        "simulated": simulated,
        "curve": curve,
    }


def _over_seeds(
    outcomes: Sequence[Outcome], value: Callable[[Outcome, int], float]
) -> list[float | None]:
    """The mean of `value` at each evaluation; None where it is not a number for some seed."""
    points = [
        fmean([value(outcome, k) for outcome in outcomes]) for k in range(len(outcomes[0].steps))
    ]
    return [point if math.isfinite(point) else None for point in points]


def best(rows: Sequence[Row], by_loss: bool) -> Row:
    """The row of the rate at which the worst replica did best: by loss or by accuracy."""
    if by_loss:
        return min(rows, key=lambda r: math.inf if r["worst_loss"] is None else r["worst_loss"])
    return max(rows, key=lambda row: -1.0 if row["consensus"] is None else row["worst_accuracy"])


def add_efficiency(rows: Sequence[Row]) -> None:
    """Set each row's efficiency: the step time of ``local`` at its ranks, over its own."""
    alone = {row["ranks"]: row["step_ms"] for row in rows if row["method"] == "local"}
    for row in rows:
        if row["step_ms"] and alone.get(row["ranks"]):
            row["efficiency"] = alone[row["ranks"]] / row["step_ms"]


def table(rows: Sequence[Row], by_loss: bool) -> Table:
    """The rows side by side."""
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column("method", no_wrap=True)
    columns: list[tuple[str, Callable[[Row], str]]] = [
        ("ranks", lambda r: str(r["ranks"])),
        ("rate", lambda r: f"{r['rate']:g}"),
        ("accuracy\n%", lambda r: _spread(r, "accuracy", "accuracy_std")),
        ("worst\n%", lambda r: _spread(r, "worst_accuracy", "worst_std")),
    ]
    if by_loss:
        columns += [
            ("loss\n", lambda r: _number(r["loss"], ".3f")),
            ("worst\nloss", lambda r: _number(r["worst_loss"], ".3f")),
        ]
    columns.append(("replicas\napart", lambda r: _number(r["consensus"], ".1e")))
    if any(row["step_ms"] is not None for row in rows):
        columns += [
            ("step\nms", lambda r: _number(r["step_ms"], ".2f")),
            ("efficiency\n", lambda r: _number(r["efficiency"], ".2f")),
        ]
    for heading, _ in columns:
        shown.add_column(heading, justify="right", no_wrap=True)
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        last = following is not None and following["ranks"] != row["ranks"]
        shown.add_row(row["method"], *(text(row) for _, text in columns), end_section=last)
    return shown


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _spread(row: Row, key: str, deviation: str) -> str:
    """``96.5 ± 0.3``: a mean over seeds and their standard deviation."""
    return f"{row[key]:.1f}" + ("" if row[deviation] is None else f" ± {row[deviation]:.1f}")


def draw(rows: Sequence[Row], by_loss: bool, path: str) -> None:
    """Write a PNG: for each number of ranks, the worst replica and the distance over steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    counts = list(dict.fromkeys(row["ranks"] for row in rows))
    names = list(dict.fromkeys(row["method"] for row in rows))
    figure, panels = plt.subplots(
        len(counts), 2, figsize=(11, 0.8 + 3.6 * len(counts)), layout="constrained", squeeze=False
    )
    key, label = (
        ("worst_loss", "test loss, worst replica")
        if by_loss
        else ("worst_accuracy", "test accuracy, worst replica (%)")
    )
    for (left, right), count in zip(panels, counts, strict=True):
        for row in (row for row in rows if row["ranks"] == count):
            turn, place = divmod(names.index(row["method"]), len(SWATCHES))
            look = {"color": SWATCHES[place], "linestyle": DASHES[turn % len(DASHES)]}
            curve = row["curve"]
            left.plot(curve["steps"], _gaps(curve[key]), label=row["method"], **look)
            right.plot(curve["steps"], _gaps(curve["consensus"], True), **look)
        left.set(title=f"{count} ranks", xlabel="steps", ylabel=label)
        right.set(title=f"{count} ranks", xlabel="steps", ylabel="distance of the replicas")
        right.set_yscale("log")
        for axes in (left, right):
            axes.grid(alpha=0.3)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)))
    row = rows[0]
    how = "simulated" if row["simulated"] else "real processes"
    figure.suptitle(
        f"{row['model']}, {row['optimizer']}, {row['shards']} shards, {row['decay']} rate, "
        f"mean of {row['seeds']} seeds ({how})"
    )
    try:
        figure.savefig(path, dpi=150, format="png")
    except OSError as error:
        raise ArgumentError(f"cannot write {path}: {error}") from error
    finally:
        plt.close(figure)


def _gaps(values: Sequence[float | None], positive: bool = False) -> list[float]:
    """What can be drawn; gaps where replicas diverged, or are equal on a logarithmic axis."""
    return [math.nan if v is None or (positive and v <= 0) else v for v in values]
