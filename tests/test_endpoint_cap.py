"""Endpoints beyond the cap are closed, and made again at need, while rounds go on."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import ucxgossip as ug
from ucxgossip import errors
from ucxgossip.engine.engine import LEAST_ENDPOINTS
from ucxgossip.mixing import Collective

RANKS, ROUNDS = 8, 120


def tuning() -> ug.Tuning:
    return ug.Tuning(endpoints=LEAST_ENDPOINTS, chunk=512, ring=3)


@pytest.mark.parametrize("transport", ["tcp", "shm"])
@pytest.mark.parametrize(("streams", "ring"), [(1, False), (3, False), (2, True)])
def test_rounds_go_on_with_few_endpoints(
    job: Callable[..., list[Any]], transport: str, streams: int, ring: bool
) -> None:
    """Every rank meets every other one, and none keeps more than its share of connections."""

    def body(group: ug.Group) -> tuple[list[float], int, int]:
        arrays = [np.full(700, float(group.rank) + 100 * index) for index in range(streams)]
        boxes = [group.mailbox(array.nbytes, ring=ring) for array in arrays]
        assert all(box.layout.ring == ring for box in boxes)
        most = 0
        for _ in range(ROUNDS):
            for array, box in zip(arrays, boxes, strict=True):
                group.exchange(array, mailbox=box)
            most = max(most, len(group.engine.endpoints))
        for array in arrays:
            assert (array == array[0]).all()
        assert all(box.intact() for box in boxes)
        return [float(array[0]) for array in arrays], most, len(group._used)

    ends = job(RANKS, body, transport, timeout=60.0, tuning=tuning())
    schedule = ug.Rotated(ug.Dissemination(RANKS), seed=0)
    values = np.arange(RANKS, dtype=float)
    for step in range(ROUNDS):
        senders = [schedule.round(rank, step).sender for rank in range(RANKS)]
        values = (values + values[senders]) / 2
    for rank, (found, most, used) in enumerate(ends):
        expected = [values[rank] + 100 * index for index in range(streams)]
        assert found == pytest.approx(expected, rel=1e-12)
        assert most <= LEAST_ENDPOINTS
        assert used == RANKS - 1


@pytest.mark.parametrize("transport", ["tcp", "shm"])
def test_exact_means_with_few_endpoints(job: Callable[..., list[Any]], transport: str) -> None:
    def body(group: ug.Group) -> float:
        collective, mean = Collective(group), np.array([float(group.rank)])
        for _ in range(20):
            group.exchange(np.ones(10))
            collective.average(mean)
        return float(mean[0])

    ends = job(RANKS, body, transport, timeout=60.0, tuning=tuning())
    assert ends == pytest.approx([(RANKS - 1) / 2] * RANKS)


def test_too_few_endpoints_are_refused() -> None:
    with pytest.raises(errors.ArgumentError, match="endpoints is 3; a whole number from 4"):
        ug.Tuning(endpoints=3)
