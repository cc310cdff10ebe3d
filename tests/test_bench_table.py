"""ucxgossip.bench.table: sizes read, rows printed, JSON written."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from ucxgossip.bench.table import Column, Table, parse_sizes, write_json
from ucxgossip.errors import ArgumentError

COLUMNS = (
    Column("bytes", "size", "B", "d"),
    Column("transport", "transport"),
    Column("latency_us", "latency", "us", ".2f"),
)


def test_sizes() -> None:
    assert parse_sizes("8,64K,4M,102.4MB") == [8, 65536, 1 << 22, 102_400_000]
    assert parse_sizes(" 1kb , 1KiB,1.5k,2G ") == [1000, 1024, 1536, 2 << 30]


@pytest.mark.parametrize("text", ["", "8,", "0", "-8", "8X", "1.5", "0.3K", "1e6", "8 16", "K"])
def test_sizes_that_cannot_be_read(text: str) -> None:
    with pytest.raises(ArgumentError, match="size"):
        parse_sizes(text)


def test_table_is_commented_aligned_and_streamed() -> None:
    stream = io.StringIO()
    table = Table(COLUMNS, stream)
    table.header("put", {"kernel": "Linux", "torch": None})
    header = stream.getvalue().splitlines()
    assert all(line.startswith("#") for line in header)
    assert any(line.split()[1:] == ["torch", "-"] for line in header)
    table.row({"bytes": 8, "transport": "tcp", "latency_us": 11.25})
    table.row({"bytes": 102_400_000, "latency_us": None})
    first, second = stream.getvalue().splitlines()[len(header) :]
    assert first.split() == ["8", "tcp", "11.25"]
    assert second.split() == ["102400000", "-", "-"]
    assert len(first) == len(second) == len(header[-2])


def test_json_has_environment_and_rows(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    write_json(path, {"kernel": "Linux"}, [{"bench": "put", "bytes": 8, "peer": None}])
    assert json.loads(path.read_text()) == {
        "environment": {"kernel": "Linux"},
        "rows": [{"bench": "put", "bytes": 8, "peer": None}],
    }


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object()])
def test_json_takes_no_figure_that_was_not_measured(tmp_path: Path, value: object) -> None:
    path = tmp_path / "out.json"
    with pytest.raises(ArgumentError, match="JSON"):
        write_json(path, {}, [{"latency_us": value}])
    assert not path.exists()
