"""The demo's figure: accuracy by epoch and by time, and how far the replicas are apart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

LABELS = {
    "gossip": "gossip over UCX",
    "allreduce": "all-reduce (DDP, gloo)",
    "local": "no communication",
}
COLOURS = {"gossip": "#d55e00", "allreduce": "#0072b2", "local": "#7f7f7f"}
Curves = Mapping[str, Mapping[str, Sequence[Any]]]


def draw(curves: Curves, title: str, path: Path) -> None:
    """Write the curves of all methods to `path` as PNG."""
    figure, panels = plt.subplots(1, 3, figsize=(13.5, 4.4), layout="constrained")
    _accuracy(panels[0], curves, "epoch", "epoch")
    _accuracy(panels[1], curves, "seconds", "seconds of training")
    _consensus(panels[2], curves)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _accuracy(axes: Axes, curves: Curves, over: str, label: str) -> None:
    for method, curve in curves.items():
        colour = COLOURS[method]
        axes.plot(curve[over], curve["accuracy"], color=colour, label=LABELS[method])
        axes.plot(curve[over], curve["worst_accuracy"], color=colour, linestyle=":", linewidth=1.2)
    axes.set(
        title="test accuracy (dotted: worst replica)",
        xlabel=label,
        ylabel="%",
        ylim=(_lower_limit(curves), 100),
    )
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)


def _lower_limit(curves: Curves) -> float:
    """Low enough for the last two thirds of every curve; the climb before would flatten them."""
    late = [a for c in curves.values() for a in c["worst_accuracy"][len(c["epoch"]) // 3 :]]
    return max(0.0, min(late, default=0.0) - 3)


def _consensus(axes: Axes, curves: Curves) -> None:
    identical: list[str] = []
    positive: list[float] = []
    for method, curve in curves.items():
        distances = [math.nan if d is None else d for d in curve["consensus"]]
        if any(distances):
            axes.semilogy(curve["epoch"], distances, color=COLOURS[method])
            positive.extend(d for d in distances if d > 0)
        else:
            identical.append(LABELS[method])
    if positive:
        axes.set_ylim(bottom=min(positive) / 10)  # room for the note below the curves
    if identical:
        note = f"{' and '.join(identical)}: exactly 0"
        axes.text(0.98, 0.02, note, transform=axes.transAxes, ha="right", va="bottom", fontsize=9)
    axes.set(title="consensus distance (relative RMS)", xlabel="epoch")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3, which="both")
