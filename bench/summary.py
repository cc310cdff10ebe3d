"""How a list of times becomes a figure: the median, what the worst did, and how they spread.

Medians, because on a shared machine a mean tells about the neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ucxgossip.errors import ArgumentError


@dataclass(frozen=True)
class Summary:
    """Times in microseconds: median, 99th percentile, interquartile range; and how many."""

    median_us: float
    p99_us: float
    iqr_us: float
    count: int


def summarize(seconds: Sequence[float]) -> Summary:
    """Summarize times given in seconds; below a hundred of them p99 is near the slowest."""
    if len(seconds) == 0:
        raise ArgumentError("no times to summarize: measure at least one round")
    q1, median, q3, p99 = np.percentile(np.asarray(seconds, dtype=np.float64), [25, 50, 75, 99])
    return Summary(float(median) * 1e6, float(p99) * 1e6, float(q3 - q1) * 1e6, len(seconds))
