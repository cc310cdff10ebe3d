"""Times over sizes as a figure, for the benches that measure several sizes.

A colour is a method, a mark the manner in which it was called, a dash the job. matplotlib is
optional, and its absence is told before anything is measured.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import NamedTuple

from ucxgossip.bench.arguments import file_to_write
from ucxgossip.errors import ArgumentError, BenchError

SWATCHES = ("#7f7f7f", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
DASHES = ("-", "--", ":", "-.")
_MARKS = ("o", "s", "^", "D")

Points = dict[float, float]
"""Time by size."""


class Line(NamedTuple):
    """One line of the figure: the method, how it was called, and the job that it ran in."""

    method: str
    manner: str
    job: str


def check(command: str, path: str) -> None:
    """`BenchError` without matplotlib, `ArgumentError` for a path that cannot be written."""
    if importlib.util.find_spec("matplotlib") is None:
        raise BenchError(f"{command} --plot: matplotlib is not installed; pip install matplotlib")
    file_to_write(path)


def draw(lines: Mapping[Line, Points], title: str, label: str, path: str) -> None:
    """Write a PNG: each line's times over its sizes in bytes, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    methods, manners, jobs = (list(dict.fromkeys(each)) for each in zip(*lines, strict=True))
    figure, axes = plt.subplots(figsize=(8, 6), layout="constrained")
    for line, points in lines.items():
        axes.plot(
            sorted(points),
            [points[size] for size in sorted(points)],
            color=SWATCHES[methods.index(line.method) % len(SWATCHES)],
            linestyle=DASHES[jobs.index(line.job) % len(DASHES)],
            marker=_MARKS[manners.index(line.manner) % len(_MARKS)],
            markersize=4,
            linewidth=2.2 if line.method == "ours" else 1.2,
            label=", ".join(filter(None, line)),
        )
    axes.set(xscale="log", yscale="log", xlabel="size (bytes)", ylabel=label)
    axes.set_title(title, fontsize="medium")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, fontsize="small")
    try:
        figure.savefig(path, dpi=150, format="png")
    except OSError as error:
        raise ArgumentError(f"cannot write {path}: {error}") from error
    finally:
        plt.close(figure)
