"""What is told about values that were left out: counted always, logged now and then, or raised."""

import logging
from typing import Any

import pytest

from ucxgossip import quarantine
from ucxgossip.errors import ArgumentError, NonFiniteError
from ucxgossip.quarantine import Quarantine


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(quarantine.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize("policy", ["stop", "", None, True, 1, ["skip"]])
def test_unknown_policy(policy: Any) -> None:
    with pytest.raises(ArgumentError, match="choose one of 'skip', 'raise', 'allow'"):
        Quarantine(policy)


def test_which_policies_leave_out() -> None:
    assert [Quarantine(each).whole for each in quarantine.POLICIES] == [True, True, False]


def test_counts_by_rank_and_warns_once_a_second(
    caplog: pytest.LogCaptureFixture, clock: list[float]
) -> None:
    kept = Quarantine()
    with caplog.at_level(logging.WARNING, "ucxgossip"):
        kept.left_out(0, {3: 0, 0: 0}, "weights")
        assert not caplog.records and not kept.counts
        kept.step = 4
        kept.left_out(0, {3: 2, 0: 0}, "weights")
        clock[0] += 0.99
        kept.left_out(0, {3: 1, 0: 1}, "gradients")
        assert len(caplog.records) == 1
        clock[0] += 0.01
        kept.left_out(0, {0: 5}, "gradients", step=9)
    assert kept.counts == {3: 3, 0: 6}
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith("rank 0, step 4: rank 3's weights held NaN or Inf (2 chunks)")
    assert second.startswith("rank 0, step 9: its own gradients held NaN or Inf (5 chunks)")
    assert second.endswith("so far, by rank: {0: 6, 3: 3}")


def test_raises_and_counts() -> None:
    kept = Quarantine("raise")
    kept.left_out(1, {0: 0, 1: 0}, "weights")
    with pytest.raises(NonFiniteError, match="rank 0's and its own weights .*3 chunks") as caught:
        kept.left_out(1, {0: 2, 1: 1}, "weights", 7)
    assert (caught.value.rank, caught.value.what, caught.value.step) == (0, "weights", 7)
    assert kept.counts == {0: 2, 1: 1}


def test_policy_of_one_call(caplog: pytest.LogCaptureFixture) -> None:
    kept = Quarantine()
    with pytest.raises(NonFiniteError):
        kept.left_out(0, {1: 1}, "array", 0, "raise")
    assert not caplog.records
