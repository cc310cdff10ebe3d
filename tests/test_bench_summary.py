"""ucxgossip.bench.summary: microseconds from seconds."""

from __future__ import annotations

import pytest

from ucxgossip.bench.summary import summarize
from ucxgossip.errors import ArgumentError


def test_median_p99_and_spread() -> None:
    summary = summarize([n * 1e-6 for n in range(101)])
    assert summary.median_us == pytest.approx(50)
    assert summary.p99_us == pytest.approx(99)
    assert summary.iqr_us == pytest.approx(50)
    assert summary.count == 101


def test_one_time_is_its_own_summary() -> None:
    summary = summarize([2e-3])
    assert (summary.median_us, summary.p99_us, summary.iqr_us) == pytest.approx((2000, 2000, 0))


def test_nothing_to_summarize() -> None:
    with pytest.raises(ArgumentError, match="no times"):
        summarize([])
