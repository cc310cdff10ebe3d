"""bench.integrity: it times what it says, and prints one row for each size."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import ucxgossip as ug
from ucxgossip.bench import integrity
from ucxgossip.kernels.checksum import xxh64


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integrity, "KERNEL_BYTES", (4096, 1 << 15))
    monkeypatch.setattr(integrity, "ROUND_BYTES", (8, 4096))
    monkeypatch.setattr(integrity, "REPEATS", 3)
    monkeypatch.setattr(integrity, "PASS_BYTES", 1 << 15)


def test_both_kernels_do_the_same_work() -> None:
    rng = np.random.default_rng(0)
    dst, src = (rng.standard_normal(5000).astype(np.float32) for _ in range(2))
    other, half = dst.copy(), np.float32(0.5)
    undo = np.zeros(1024, np.float32)
    plain = integrity.mixed(dst, src, half, 1024, 3)
    whole = integrity.mixed_whole(other, src, half, undo, 3)
    assert plain == pytest.approx(whole)
    np.testing.assert_array_equal(dst, other)
    expected = xxh64(src.ctypes.data, src.nbytes, 0) ^ xxh64(src.ctypes.data, src.nbytes, 1)
    assert integrity.hashed(src.ctypes.data, src.nbytes, 2) == expected


def test_turns_are_interleaved() -> None:
    order: list[str] = []
    found = integrity.in_turns((lambda: order.append("a"), lambda: order.append("b")), 2)
    assert order == ["a", "b"] * 3
    assert len(found) == 2 and all(each >= 0 for each in found)


def rows(text: str) -> list[list[float]]:
    return [[float(x) for x in line.split()] for line in text.splitlines() if line[0] != "#"]


def test_tables(
    as_ranks: Callable[..., list[Any]], store: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    integrity.kernels()
    found = rows(capsys.readouterr().out)
    sizes = [(4096, 1 << 16), (4096, 1 << 18), (1 << 15, 1 << 16), (1 << 15, 1 << 18)]
    assert [tuple(row[:2]) for row in found[:4]] == sizes
    assert [row[0] for row in found[4:]] == [4096]

    def rank(number: int) -> None:
        with (
            ug.join(number, 2, store, "shm", 30.0) as plain,
            ug.join(number, 2, store, "shm", 30.0, verify=True) as verified,
        ):
            integrity.rounds(plain, verified)

    assert as_ranks(2, rank) == [None, None]
    found = rows(capsys.readouterr().out)
    assert [row[0] for row in found] == [8, 4096]
    assert all(len(row) == 6 and min(row[1:]) > 0 for row in found)
