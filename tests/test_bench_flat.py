"""bench.flat: rows grow from the fewest ranks on; a run says what it measured, or why not."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from ucxgossip.bench import flat
from ucxgossip.bench.network import Network
from ucxgossip.cli import main
from ucxgossip.errors import ArgumentError, BenchError

KEYS = {
    "bench", "ranks", "bytes", "rate", "wire_us", "ours_us", "ours_spread", "ours_idle",
    "ours_growth", "allreduce_us", "allreduce_spread", "allreduce_idle", "allreduce_growth",
}  # fmt: skip


def found(ranks: int, nbytes: int, ours: float, theirs: float) -> dict[str, Any]:
    rest = {f"{name}_{what}": 1.0 for name in ("ours", "allreduce") for what in ("spread", "idle")}
    return {"ranks": ranks, "bytes": nbytes, "ours_us": ours, "allreduce_us": theirs, **rest}


def test_growth_is_from_the_fewest_ranks_of_a_size() -> None:
    rows: list[dict[str, Any]] = []
    for each in (found(2, 8, 10.0, 20.0), found(2, 16, 30.0, 30.0), found(8, 8, 11.0, 35.0)):
        rows.append(flat.make_row(each, "1gbit", rows))
    assert all(set(row) == KEYS for row in rows)
    assert [row["ours_growth"] for row in rows] == [1.0, 1.0, 1.1]
    assert [row["allreduce_growth"] for row in rows] == [1.0, 1.0, 1.75]
    assert rows[1]["wire_us"] == pytest.approx(0.128)


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"ranks": []}, "ranks"),
        ({"ranks": [1, 2]}, "ranks"),
        ({"ranks": [2, 2]}, "ranks"),
        ({"ranks": [2, 1000]}, "ranks"),
        ({"sizes": [6]}, "sizes"),
        ({"sizes": []}, "sizes"),
        ({"sizes": [8, 8]}, "sizes"),
        ({"rate": "fast"}, "rate"),
        ({"repeats": 0}, "repeats"),
        ({"seconds": 0.0}, "seconds"),
        ({"seconds": float("nan")}, "seconds"),
        ({"plot": "no/such/folder/x.png"}, "folder"),
        ({"congestion": "swift"}, "swift"),
    ],
    ids=str,
)
def test_bad_arguments_make_nothing(changed: dict[str, Any], word: str) -> None:
    if "plot" in changed:
        pytest.importorskip("matplotlib")
    with pytest.raises(ArgumentError, match=word):
        flat.run(**({"ranks": [2], "sizes": [8]} | changed))


def test_who_may_not_measure_is_told_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    path = tmp_path / "none.json"
    assert main(["bench", "flat", "--ranks", "2", "--json", str(path)]) == 2
    assert "root" in capsys.readouterr().err
    assert main(["bench", "flat", "--transport", "shm", "--json", str(path)]) == 2
    assert "only tcp" in capsys.readouterr().err
    assert main(["bench", "flat", "--ranks", "two", "--json", str(path)]) == 2
    assert not path.exists()


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows: list[dict[str, Any]] = []
    for ranks in (2, 4):
        for nbytes in (1 << 20, 1 << 22):
            rows.append(flat.make_row(found(ranks, nbytes, 10.0, 20.0), "1gbit", rows))
    path = tmp_path / "flat.png"
    flat.draw(rows, str(path))
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.spawn
def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        with Network(1, "100mbit"):
            pass
    except BenchError as error:
        pytest.skip(str(error))
    path = tmp_path / "rows.json"
    shape = ["--ranks", "3,2", "--sizes", "64K", "--rate", "100mbit", "--repeats", "2"]
    assert main(["bench", "flat", *shape, "--seconds", "0.05", "--json", str(path)]) == 0
    document = json.loads(path.read_text())
    assert document["environment"]["rate"] == "100mbit"
    assert [row["ranks"] for row in document["rows"]] == [2, 3]
    for row in document["rows"]:
        assert set(row) == KEYS
        assert row["bench"] == "flat" and row["bytes"] == 65536
        assert row["wire_us"] == pytest.approx(5242.88)
        assert 0 <= row["ours_idle"] <= 100
        # A link is no faster than its rate, but for the few bytes that may pass at once.
        assert min(row["ours_us"], row["allreduce_us"]) > row["wire_us"] / 2
    assert document["rows"][0]["ours_growth"] == 1.0
    lines = [line for line in capsys.readouterr().out.splitlines() if line[0] != "#"]
    assert len(lines) == 2
