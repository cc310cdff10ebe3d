"""Which way a chunk is stored: what is tried, what is chosen, for how long."""

import numpy as np
import pytest

from ucxgossip.engine import ways
from ucxgossip.mailbox import WAYS


def run(fields: np.ndarray, chunks: int, kept: int, streamed: int) -> list[bool]:
    """Store so many chunks, of which each takes so many nanoseconds; which went past the caches."""
    done = []
    for _ in range(chunks):
        done.append(bool(ways.streams_next(fields)))
        ways.note(fields, streamed if done[-1] else kept)
    return done


@pytest.mark.parametrize(
    ("kept", "streamed", "chosen"),
    [(10, 12, False), (100, 12, True), (100, 70, False), (100, 60, True), (0, 0, False)],
)
def test_each_way_is_tried_and_the_quicker_one_taken(
    kept: int, streamed: int, chosen: bool
) -> None:
    fields = np.zeros(WAYS, np.int64)
    done = run(fields, ways.PERIOD, kept, streamed)
    assert done[: ways.TRIAL] == [False] * ways.TRIAL
    assert done[ways.TRIAL : 2 * ways.TRIAL] == [True] * ways.TRIAL
    assert done[2 * ways.TRIAL :] == [chosen] * (ways.PERIOD - 2 * ways.TRIAL)


def test_the_choice_follows_the_machine() -> None:
    fields = np.zeros(WAYS, np.int64)
    rest = ways.PERIOD - 2 * ways.TRIAL
    for kept, chosen in ((10, False), (100, True), (100, True), (10, False)):
        assert run(fields, ways.PERIOD, kept, 12)[-rest:] == [chosen] * rest


def test_one_slow_chunk_decides_nothing() -> None:
    """Somebody else's time slice fell into it."""
    fields = np.zeros(WAYS, np.int64)
    for part in range(2 * ways.TRIAL):
        slow = part in (ways.TRIAL - 1, ways.TRIAL // 2 + 1)
        ways.note(fields, 4_000_000 if slow else 10)
    assert not ways.streams_next(fields)
    assert fields[ways.KEPT_NS] == fields[ways.STREAMED_NS] == 10


def test_what_lines_cost_that_the_other_way_left_does_not_count() -> None:
    fields = np.zeros(WAYS, np.int64)
    for part in range(2 * ways.TRIAL):
        ways.note(fields, 1000 if part % ways.TRIAL < ways.TRIAL // 2 else 10)
    assert fields[ways.KEPT_NS] == fields[ways.STREAMED_NS] == 10
