"""What a benchmark prints and keeps: the environment, the settings in force, rows as they come.

Settings are those of a rank, not what its parent believes: rank 0 says them, as a line of JSON,
before its first row, and they head the table with the rest of the environment.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ucxgossip.bench.environment import environment
from ucxgossip.bench.table import Column, Table
from ucxgossip.ucp import lib

if TYPE_CHECKING:
    from ucxgossip.group import Group  # slow to import, which `bench startup` would measure

Row = dict[str, Any]


def settings_in_force(chosen: Mapping[str, str]) -> str:
    """UCX settings of a context (`Context.settings`), and those of the environment beside them."""
    settings = {
        name.removeprefix("UCX_"): value
        for name, value in sorted(os.environ.items())
        if name.startswith("UCX_")
    }
    settings |= chosen
    return " ".join(f"{name}={value}" for name, value in settings.items())


def in_force(group: Group) -> dict[str, str]:
    """The group's UCX settings and its Tuning."""
    tuning = asdict(group.tuning).items()
    return {
        "settings": settings_in_force(group.context.settings),
        "tuning": " ".join(f"{name}={value}" for name, value in tuning),
    }


def say_in_force(group: Group) -> None:
    """Print `in_force` for the parent's `Report.take`, on rank 0."""
    if group.rank == 0:
        print(json.dumps(in_force(group)), flush=True)


class Report:
    """The environment, then the rows: printed as they come, and kept.

    facts: what was asked for, to stand in the environment.
    """

    def __init__(self, title: str, columns: Sequence[Column], facts: Mapping[str, object]) -> None:
        library = lib.load()
        self.facts = environment(".".join(map(str, library.version)), library.path)
        self.facts |= facts
        self.rows: list[Row] = []
        self._title, self._table, self._begun = f"ucxgossip {title}", Table(columns), False

    def begin(self, said: Mapping[str, object]) -> None:
        """Print the header, with what is in force; the first time only."""
        if not self._begun:
            self._begun = True
            self.facts |= said
            self._table.header(self._title, self.facts)

    def take(self, line: str) -> Row | None:
        """What a line of rank 0 says: a row that was found; None for settings, and other text."""
        if not line.startswith("{"):
            return None
        said: Row = json.loads(line)
        if "settings" not in said:
            return said
        self.begin(said)
        return None

    def row(self, row: Row) -> None:
        """Print a row and keep it."""
        self._table.row(row)
        self.rows.append(row)
