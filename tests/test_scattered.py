"""Rounds of several arrays: the list of their pieces, and exchanges of lists."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import ucxgossip as ug
from ucxgossip import errors
from ucxgossip.buffer import Buffer
from ucxgossip.engine import words as w
from ucxgossip.mailbox import Layout
from ucxgossip.scattered import array_at, gather, lay_out, piece_at, pieces_in
from ucxgossip.schedule import Dissemination, Rotated

Job = Callable[..., list[Any]]
CANARY = 7.0
MANY = [1] * 40 + [300, 1, 2, 5000, 1, 1, 1, 77, 40_000, 3]
"""Elements of arrays: chunks in one piece, in some, and in more than are put by themselves."""


@pytest.fixture(params=["tcp", "shm"])
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng()


@pytest.mark.parametrize("sizes", [[8], [1, 2, 3], [5] * 9, [100, 1, 1, 1, 100], [64, 4096, 64]])
def test_pieces_are_those_of_the_arrays_one_behind_the_other(
    sizes: list[int], random: np.random.Generator
) -> None:
    arrays = [random.integers(0, 256, size, np.uint8) for size in sizes]
    table = lay_out([each.ctypes.data for each in arrays], sizes)
    payload, address = np.concatenate(arrays), int(table.ctypes.data)
    for _ in range(200):
        offset = int(random.integers(len(payload)))
        nbytes = int(random.integers(1, len(payload) - offset + 1))
        out = np.full(nbytes + 2, 0xA5, np.uint8)
        gather(address, offset, nbytes, out.ctypes.data + 1, bool(random.integers(2)))
        np.testing.assert_array_equal(out[1:-1], payload[offset : offset + nbytes])
        assert out[0] == out[-1] == 0xA5
        first = array_at(address, offset)
        ends = np.cumsum(sizes)
        assert first == int(np.searchsorted(ends, offset, side="right"))
        last = int(np.searchsorted(ends, offset + nbytes - 1, side="right"))
        assert pieces_in(address, offset, nbytes) == last - first + 1
        start, length = piece_at(address, first, offset, nbytes)
        assert start == arrays[first].ctypes.data + offset - (ends[first] - sizes[first])
        assert length == min(nbytes, ends[first] - offset)


def guarded(values: list[np.ndarray]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Arrays of these values, and the larger ones that they are the middle of."""
    raw = [np.full(len(each) + 16, CANARY, each.dtype) for each in values]
    arrays = [each[8:-8] for each in raw]
    for array, value in zip(arrays, values, strict=True):
        array[:] = value
    return arrays, raw


def alive(raw: list[np.ndarray]) -> bool:
    return all((each[:8] == CANARY).all() and (each[-8:] == CANARY).all() for each in raw)


def values_of(rank: int, sizes: list[int], dtype: Any = np.float32) -> list[np.ndarray]:
    random = np.random.default_rng([rank, *sizes])
    return [random.standard_normal(size).astype(dtype) for size in sizes]


CASES = {
    "one message": ([1, 30, 7, 0, 200], 256 << 10, 4),
    "more arrays than a message has room for": ([3] * 700, 256 << 10, 4),
    "whole slots": (MANY, 8 << 10, 0),
    "a ring": (MANY, 8 << 10, 4),
    "a ring of small chunks": (MANY, 64, 3),
    "few large ones": ([200_001, 3, 100_000, 50_000], 128 << 10, 4),
}


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("case", CASES)
def test_a_list_is_averaged_as_its_arrays_are(
    job: Job, transport: str, case: str, size: int, verify: bool
) -> None:
    sizes, chunk, ring = CASES[case]
    schedule, steps = Rotated(Dissemination(size), seed=2), 5
    dtype = np.float64 if case == "a ring" else np.float32
    eager = {} if chunk > 64 else {"eager": 0}
    tuning = ug.Tuning(chunk=chunk, ring=ring, **eager)

    def body(group: ug.Group) -> list[np.ndarray]:
        arrays, raw = guarded(values_of(group.rank, sizes, dtype))
        for _ in range(steps):
            assert group.exchange(arrays, schedule=schedule) is arrays
        assert alive(raw)
        (box,) = group.engine.mailboxes[-1:]
        assert box.intact()
        return arrays

    expected = [np.concatenate(values_of(rank, sizes, dtype)) for rank in range(size)]
    for step in range(steps):
        senders = [schedule.round(rank, step).sender for rank in range(size)]
        expected = [
            mine + dtype(0.5) * (expected[sender] - mine)
            for mine, sender in zip(expected, senders, strict=True)
        ]
    found = job(size, body, transport, tuning=tuning, verify=verify)
    for rank, arrays in enumerate(found):
        np.testing.assert_array_equal(np.concatenate(arrays), expected[rank])


def test_without_mixing_what_came_is_returned_as_a_list(job: Job, transport: str) -> None:
    sizes = [5, 30_000, 2]

    def body(group: ug.Group) -> list[np.ndarray]:
        arrays = values_of(group.rank, sizes)
        came = group.exchange(tuple(arrays), mix=False)
        for mine, start in zip(arrays, values_of(group.rank, sizes), strict=True):
            np.testing.assert_array_equal(mine, start)
        return came

    for rank, came in enumerate(job(2, body, transport)):
        for array, value in zip(came, values_of(1 - rank, sizes), strict=True):
            np.testing.assert_array_equal(array, value)


def test_a_list_whose_arrays_change_is_looked_at_again(job: Job) -> None:
    """Rounds that are laid out ahead are those of the arrays, not of the list."""

    def body(group: ug.Group) -> tuple[list[float], list[float]]:
        first = [np.full(10, float(group.rank), np.float32) for _ in range(3)]
        arrays = list(first)
        for _ in range(5):
            group.exchange(arrays)
        second = np.full(10, 4.0 + 2 * group.rank, np.float32)
        arrays[1] = second
        first[1][:] = 9.0
        group.exchange(arrays)
        return [float(each[0]) for each in arrays], [float(each[0]) for each in first]

    for now, before in job(2, body, "shm"):
        assert now == [0.5, 5.0, 0.5]
        assert before == [0.5, 9.0, 0.5]


def test_one_array_and_lists_of_the_same_size_share_a_mailbox(job: Job) -> None:
    """What travels is the payload: how each side cuts it up is its own affair."""

    def body(group: ug.Group) -> float:
        array = np.full(40_000, float(group.rank), np.float64)
        box = group.mailbox(array.nbytes, ring=True)
        parts = array if group.rank else [array[:100], array[100:39_999], array[39_999:]]
        group.exchange(parts, mailbox=box)
        assert (array == array[0]).all()
        return float(array[0])

    assert job(2, body, "tcp") == [0.5, 0.5]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_only_the_array_that_is_not_finite_is_left_out(
    job: Job, transport: str, bad: float
) -> None:
    def body(group: ug.Group) -> tuple[list[np.ndarray], dict[int, int]]:
        arrays = [np.full(100, float(group.rank), np.float32) for _ in range(3)]
        if group.rank:
            arrays[1][17] = bad
        group.exchange(arrays)
        return arrays, group.nonfinite

    (mine, told), (other, own) = job(2, body, transport)
    assert told == own == {1: 1}
    assert (mine[0] == 0.5).all() and (mine[1] == 0.0).all() and (mine[2] == 0.5).all()
    assert (other[0] == 0.5).all() and (other[2] == 0.5).all()
    assert (np.delete(other[1], 17) == 1.0).all()


def test_requests_of_pieces_are_all_given_back(job: Job) -> None:
    def body(group: ug.Group) -> int:
        arrays = values_of(group.rank, [100_000] * 7)
        box = group.mailbox(sum(each.nbytes for each in arrays), depth=2)
        for _ in range(4):
            group.exchange(arrays, mailbox=box)
        row = group.engine.table[box.index]
        count = w.PIECES * int(row[w.WINDOW])
        return int(np.count_nonzero(_requests(int(row[w.REQUESTS]), count)))

    assert job(2, body, "tcp") == [0, 0]


def _requests(address: int, count: int) -> np.ndarray:
    from ucxgossip import jit

    return jit.view_words(address, count)


A, B = np.zeros(4, np.float32), np.zeros(4, np.float64)


@pytest.mark.parametrize(
    ("arrays", "word"),
    [
        ([], "a list of them"),
        ([A, [1.0]], "array 1 of 2"),
        ([A, B], "float64, the first is float32"),
        ([A, A], "overlap"),
        ([A[:3], A[2:]], "overlap"),
        ([A[::2]], "contiguous"),
        ([np.zeros(0, np.float32)], "empty"),
        ({"weight": A}, "dict"),
        ([np.zeros(4, np.int32)], "int32"),
    ],
)
def test_bad_lists_are_refused(store: Any, arrays: Any, word: str) -> None:
    with ug.join(0, 1, store, "shm") as group, pytest.raises(errors.ArrayError, match=word):
        group.exchange(arrays)


def test_lists_alone(store: Any) -> None:
    with ug.join(0, 1, store, "shm") as group:
        arrays = [np.ones(3, np.float32), np.zeros(2, np.float32)]
        assert group.exchange(arrays) is arrays
        came = group.exchange(arrays, mix=False)
        assert [each.tolist() for each in came] == [[1, 1, 1], [0, 0]]
        assert came[0] is not arrays[0]


def test_what_a_buffer_holds() -> None:
    arrays = [np.arange(3.0), np.zeros(0), np.arange(2.0)]
    buffer = Buffer.of_all(arrays)
    assert buffer.nbytes == 40
    assert all(mine is array for mine, array in zip(buffer.contents, arrays, strict=True))
    assert [each.tolist() for each in buffer.copy().contents] == [[0, 1, 2], [], [0, 1]]
    assert Layout(buffer.nbytes, 2, 8).chunks == 5
