"""ucxgossip.bench.floors: the loops average right, and the floors leave the mean they say."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ucxgossip.bench import floor_loops as loops
from ucxgossip.bench.floor_loops import CHUNK, FLAGS, RING, Word
from ucxgossip.bench.spawn import run_ranks

# Less than a chunk, some chunks and a rest, and more than the ring holds.
COUNTS = [1, 1000, 3 * CHUNK // 4 + 7, RING // 2 + 5]

GUARD = 16
both = pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "interpreted"])


def version(loop: Any, compiled: bool) -> Callable[[Any], int]:
    found: Callable[[Any], int] = loop if compiled else loop.py_func
    return found


def words(array: Any, out: int, into: int, box: int) -> Any:
    made = np.zeros(len(Word), np.int64)
    made[Word.SOURCE], made[Word.NBYTES] = array.ctypes.data, array.nbytes
    made[Word.OUT], made[Word.IN], made[Word.BOX] = out, into, box
    return made


def arrays(count: int) -> tuple[list[Any], list[Any], Any]:
    """Two arrays between guards: whole, without the guards, and the mean that both shall become."""
    whole = [np.full(count + 2 * GUARD, np.nan, np.float32) for _ in range(2)]
    inner = [each[GUARD:-GUARD] for each in whole]
    for rank, array in enumerate(inner):
        array[:] = np.arange(count) % 251 + 10 * rank
    return whole, inner, (inner[0] + inner[1]) / 2


def in_threads(run: Callable[[Any], int], sides: list[Any], rounds: int = 1) -> list[int]:
    ends = [1, 1]

    def body(rank: int) -> None:
        for _ in range(rounds):
            ends[rank] = run(sides[rank])

    threads = [threading.Thread(target=body, args=(rank,), daemon=True) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return ends


@both
@pytest.mark.parametrize("count", COUNTS)
def test_swap(count: int, compiled: bool) -> None:
    whole, inner, mean = arrays(count)
    rings = [np.zeros(RING, np.uint8) for _ in range(2)]
    left, right = socket.socketpair()
    with left, right:
        sides = []
        for link, array, ring in zip((left, right), inner, rings, strict=True):
            link.setblocking(False)
            sides.append(words(array, link.fileno(), link.fileno(), ring.ctypes.data))
        assert in_threads(version(loops.swap, compiled), sides) == [loops.DONE] * 2
    for array, guarded in zip(inner, whole, strict=True):
        np.testing.assert_array_equal(array, mean)
        assert np.isnan(guarded[:GUARD]).all() and np.isnan(guarded[-GUARD:]).all()


@both
def test_swap_notices_a_partner_that_is_gone(compiled: bool) -> None:
    ring, array = np.zeros(RING, np.uint8), np.zeros(1 << 20, np.float32)
    left, right = socket.socketpair()
    with left:
        left.setblocking(False)
        right.close()
        side = words(array, left.fileno(), left.fileno(), ring.ctypes.data)
        assert version(loops.swap, compiled)(side) == loops.GONE


@both
@pytest.mark.parametrize("count", COUNTS)
def test_copy(count: int, compiled: bool) -> None:
    whole, inner, mean = arrays(count)
    edges = np.zeros((2, FLAGS + RING), np.uint8)
    counts = np.zeros((2, 2), np.int64)
    sides = [
        words(array, edges[1 - rank].ctypes.data, edges[rank].ctypes.data, counts[rank].ctypes.data)
        for rank, array in enumerate(inner)
    ]
    assert in_threads(version(loops.copy, compiled), sides, rounds=3) == [loops.DONE] * 2
    for array, guarded in zip(inner, whole, strict=True):
        np.testing.assert_array_equal(array, mean)
        assert np.isnan(guarded[:GUARD]).all() and np.isnan(guarded[-GUARD:]).all()
    assert (counts == 3 * -(-4 * count // CHUNK)).all()


@pytest.mark.parametrize("loop", [loops.swap, loops.copy])
def test_partner_that_does_not_answer(loop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loops, "_DEADLINE_NS", 10_000_000)
    array, memory = np.zeros(8, np.float32), np.zeros((3, FLAGS + RING), np.uint8)
    counts = np.zeros(2, np.int64)
    left, right = socket.socketpair()
    with left, right:
        left.setblocking(False)
        if loop is loops.swap:
            side = words(array, left.fileno(), left.fileno(), memory[0].ctypes.data)
        else:
            side = words(array, *(each.ctypes.data for each in (memory[1], memory[2], counts)))
        assert loop.py_func(side) == loops.TIMED_OUT


RANK = """
import os
import numpy as np
import torch.distributed as dist
from ucxgossip.bench.exchange_rank import check
from ucxgossip.bench.floors import Copy, Sockets
from ucxgossip.bench.gloo import gloo_job
from ucxgossip.bench.peer import Arrays

with gloo_job(deadline_s=60):
    rank, size = dist.get_rank(), dist.get_world_size()
    before = len(os.listdir("/proc/self/fd"))
    for counts in ([2], [300_000, 3, 70_000]):
        data = Arrays(rank, size, [np.empty(count, np.float32) for count in counts])
        for method in (Sockets(data), Copy(data)):
            for _ in range(2):
                check(method.name, method, data, dist.barrier)
            dist.barrier()
            method.close()
    assert len(os.listdir("/proc/self/fd")) <= before
    print("well")
"""


@pytest.mark.spawn
@pytest.mark.usefixtures("forked_ranks")
@pytest.mark.parametrize("ranks", [2, 3])
def test_means_of_ranks(ranks: int) -> None:
    pytest.importorskip("torch")
    printed: list[str] = []
    run_ranks(["-c", RANK], ranks, on_line=printed.append, deadline_s=120)
    assert printed == ["well"]
