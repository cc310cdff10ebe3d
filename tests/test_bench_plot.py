"""ucxgossip.bench.plot: figures written, and what stands in their way told before."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from ucxgossip.bench.plot import Line, Points, check, draw
from ucxgossip.errors import ArgumentError, BenchError


def test_draws_a_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "curves.png"
    lines: dict[Line, Points] = {
        Line(method, manner, job): {8: 1.5, 65536: 20.0}
        for method in ("ours", *(f"peer {number}" for number in range(9)))
        for manner in ("", "by tensor")
        for job in ("2 ranks", "4 ranks")
    }
    draw(lines, "title", "time (us)", str(path))
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ArgumentError, match="cannot write"):
        draw(lines, "title", "time (us)", str(tmp_path))


def test_absent_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BenchError, match="bench put --plot: .* pip install matplotlib"):
        check("bench put", str(tmp_path / "curves.png"))


def test_folder_that_is_not_there() -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(ArgumentError, match="no such folder"):
        check("bench put", "/nowhere/at/all.png")
