"""bench.neighbour: what a busy core costs the one beside it."""

import os

import pytest

from ucxgossip.bench import neighbour


def test_ratios_are_of_paired_times(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([9.0, 1.0, 3.0, 1.0, 2.0, 2.0, 2.0])  # the first one warms up
    monkeypatch.setattr(neighbour, "_timed", lambda: next(times))
    before = os.sched_getaffinity(0)
    if len(before) < 2:
        pytest.skip("there is one core")
    assert neighbour.neighbour_cost(3) == [1.0, 2.0, 3.0]
    assert os.sched_getaffinity(0) == before


def test_one_core_has_no_neighbour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    assert neighbour.neighbour_cost() == []
    assert neighbour.describe([]) == "there is one core"


def test_median_and_range() -> None:
    assert neighbour.describe([1.0, 1.5, 3.0]) == "1.50 (1.00 to 3.00)"


def test_the_process_beside_it_ends_also_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("there is one core")
    started = []
    popen = neighbour.subprocess.Popen

    def start(*arguments: object, **options: object) -> object:
        started.append(popen(*arguments, **options))
        return started[-1]

    calls = iter([0.1, 0.1])
    monkeypatch.setattr(neighbour.subprocess, "Popen", start)
    monkeypatch.setattr(neighbour, "_timed", lambda: next(calls))
    before = os.sched_getaffinity(0)
    with pytest.raises(StopIteration):
        neighbour.neighbour_cost(1)
    assert [process.poll() is not None for process in started] == [True]
    assert os.sched_getaffinity(0) == before
