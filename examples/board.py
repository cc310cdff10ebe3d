"""What the demo shows on the terminal: progress while the jobs run, and the table at the end."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from rich import box
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

Numbers = dict[str, Any]
PLAIN_LINES = 5  # of each run


class Board:
    """Progress while the jobs run: one live table, or plain lines where there is no terminal."""

    def __init__(self, console: Console, methods: list[str], epochs: int) -> None:
        self.console = console
        self.epochs = epochs
        self.latest: dict[str, Numbers] = {method: {} for method in methods}
        self._live = Live(console=console, get_renderable=self._table, refresh_per_second=8)

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        if not self.console.is_terminal:
            yield
            return
        with self._live:
            yield

    def update(self, method: str, event: Numbers) -> None:
        self.latest[method] = event
        every = max(1, self.epochs // PLAIN_LINES)
        last = event["epoch"] == self.epochs
        if not self.console.is_terminal and (last or event["epoch"] % every == 0):
            print(_plain_line(method, self.epochs, event), flush=True)

    def _table(self) -> Table:
        table = Table(box=None, padding=(0, 1, 0, 0))
        table.add_column("method")
        for heading in (
            "\nepoch",
            "\nloss",
            "mean\n%",
            "worst\n%",
            "replicas\napart",
            "exchange\nms",
            "hidden\nms",
            "waited\nms",
        ):
            table.add_column(heading, justify="right")
        table.add_column()
        for method, event in self.latest.items():
            done = event.get("epoch", 0)
            table.add_row(
                method,
                f"{done}/{self.epochs}",
                number(event.get("loss"), ".4f"),
                number(event.get("accuracy"), ".1f"),
                number(event.get("worst_accuracy"), ".1f"),
                distance(event.get("consensus")),
                number(event.get("exchange_ms"), ".2f"),
                number(event.get("hidden_ms"), ".2f"),
                number(event.get("waited_ms"), ".2f"),
                ProgressBar(total=self.epochs, completed=done, width=10),
            )
        return table


def _plain_line(method: str, epochs: int, event: Numbers) -> str:
    line = (
        f"{method:9} {event['epoch']:3}/{epochs}  loss {number(event['loss'], '.4f')}"
        f"  accuracy {event['accuracy']:5.1f} %, worst {event['worst_accuracy']:5.1f} %"
        f"  apart {distance(event['consensus'])}"
    )
    if event["exchange_ms"] is None:
        return line
    return line + (
        f"  exchange {event['exchange_ms']:.2f} ms:"
        f" {event['hidden_ms']:.2f} hidden, {event['waited_ms']:.2f} waited"
    )


def number(value: float | None, form: str, missing: str = "-") -> str:
    """`value` formatted, or `missing` where nothing was measured."""
    return missing if value is None else format(value, form)


def distance(value: float | None) -> str:
    """A consensus distance; replicas that are bit for bit the same are 0 apart."""
    return "0" if value == 0 else number(value, ".0e")


def result_table(rows: list[Numbers]) -> Table:
    """The runs side by side."""
    table = Table(box=box.SIMPLE, title="After the last epoch; times and bytes per step of a rank")
    table.add_column("method", no_wrap=True)
    for heading in (
        "mean\naccuracy\n%",
        "worst\naccuracy\n%",
        "replicas\napart",
        "step\n\nms",
        "exchange\n\nms",
        "of it\nhidden\n%",
        "sent\n\nkB",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        hidden = None if row["hidden"] is None else 100 * row["hidden"]
        table.add_row(
            row["method"],
            f"{row['accuracy']:.1f}",
            f"{row['worst_accuracy']:.1f}",
            distance(row["consensus"]),
            f"{row['step_ms']:.1f}",
            number(row["exchange_ms"], ".1f"),
            number(hidden, ".0f"),
            f"{row['bytes_per_step'] / 1e3:.0f}",
        )
    return table


def notes(rows: list[Numbers]) -> list[str]:
    """What a reader of the table must know to read it rightly."""
    lines = []
    methods = {row["method"]: row for row in rows}
    if "allreduce" in methods:
        lines.append(
            "What all-reduce sends is computed, for a ring: 2(p-1)/p of the gradients. "
            "Its exchange time cannot be told from outside."
        )
    if (gossip := methods.get("gossip")) and gossip["setting"]["mix"] == "both":
        lines.append(
            "Gossip sends gradients and weights, each to one partner a step, whatever the number "
            "of ranks; --mix weights sends half."
        )
    return lines
