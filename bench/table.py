"""Rows of a benchmark as text and as JSON.

The text looks like that of nccl-tests and the OSU micro-benchmarks, so that tables can be laid
side by side: `#` before all that is not a figure, the size first, columns aligned to the right,
and each row printed as soon as it is measured.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import TextIO

from ucxgossip.errors import ArgumentError

_FACTORS = {
    "": 1,
    "B": 1,
    "K": 1 << 10,
    "M": 1 << 20,
    "G": 1 << 30,
    "KIB": 1 << 10,
    "MIB": 1 << 20,
    "GIB": 1 << 30,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)")


@dataclass(frozen=True)
class Column:
    """One column: its key in a row, its heading, its unit and how a number in it is printed."""

    key: str
    heading: str
    unit: str = ""
    format: str = ""
    width: int = 12

    def text(self, value: object) -> str:
        """Return `value` as printed: "-" for None, text as it is, numbers by `format`."""
        if value is None:
            return "-"
        return value if isinstance(value, str) else format(value, self.format)


class Table:
    """Prints rows as they come, under a commented header."""

    def __init__(self, columns: Sequence[Column], stream: TextIO | None = None) -> None:
        """Print to `stream`, by default what is standard output at the time of each call."""
        self.columns = tuple(columns)
        self._stream = stream

    def header(self, title: str, environment: Mapping[str, object]) -> None:
        """Print the title, the environment, the headings and the units, each line commented."""
        self._print(f"# {title}")
        widest = max((len(key) for key in environment), default=0)
        for key, value in environment.items():
            self._print(f"#   {key:<{widest}}  {'-' if value is None else value}")
        self._print("#")
        self._print(self._line([column.heading for column in self.columns], "#"))
        units = [f"({column.unit})" if column.unit else "" for column in self.columns]
        self._print(self._line(units, "#"))

    def row(self, values: Mapping[str, object]) -> None:
        """Print one row; a key that is absent counts as None."""
        cells = [column.text(values.get(column.key)) for column in self.columns]
        self._print(self._line(cells, " "))

    def _line(self, cells: Sequence[str], mark: str) -> str:
        columns = zip(cells, self.columns, strict=True)
        return (mark + " ".join(f"{cell:>{column.width}}" for cell, column in columns)).rstrip()

    def _print(self, line: str) -> None:
        print(line, file=self._stream or sys.stdout, flush=True)


def write_json(
    path: str | Path, environment: Mapping[str, object], rows: Sequence[Mapping[str, object]]
) -> None:
    """Write `{"environment": {...}, "rows": [...]}`; nothing is written if a value is not JSON."""
    document = {"environment": dict(environment), "rows": [dict(row) for row in rows]}
    try:
        # NaN and infinity are not JSON, and no figure that was measured.
        text = json.dumps(document, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"the rows for {path} cannot be written as JSON: {error}") from error
    try:
        Path(path).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise ArgumentError(f"cannot write {path}: {error}") from error


def parse_sizes(text: str) -> list[int]:
    """Read sizes in bytes from a list such as "8,64K,4M,102.4MB".

    A single letter is a power of two, as in nccl-tests and ucx_perftest (K = 1024, M = 2**20);
    KB, MB and GB are powers of ten, KiB, MiB and GiB powers of two.
    """
    return [_parse_size(size.strip(), text) for size in text.split(",")]


def _parse_size(size: str, text: str) -> int:
    match = _SIZE.fullmatch(size)
    factor = _FACTORS.get(match[2].upper()) if match else None
    if match is None or factor is None:
        raise ArgumentError(
            f"size {size!r} in {text!r}: write bytes as in 8, 64K (65536), 4M (2**22) or "
            "102.4MB (102400000), separated by commas"
        )
    count = Decimal(match[1]) * factor
    if count != int(count) or count < 1:
        raise ArgumentError(
            f"size {size!r} in {text!r} is {count.normalize():f} bytes: sizes are whole numbers "
            "of at least 1"
        )
    return int(count)
