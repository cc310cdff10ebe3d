"""Gossip over UCX, all-reduce and no communication, side by side on this machine.

Trains LeNet on scikit-learn's digits three times with the same processes, data and settings, and
shows what each way of communicating costs and what it is worth. This module runs the jobs and
shows their numbers; the training itself is in train_digits.py.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from curves import LABELS, draw
from launch import Job, JobFailed
from rich import box
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

WORKER = Path(__file__).with_name("train_digits.py")
PACKAGES = ("ucxgossip", "torch", "numpy", "numba", "libucx-cu12", "libucx-cu13")
INTERRUPTED = 130
Numbers = dict[str, Any]


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
        every = max(1, self.epochs // 6)
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
        f"{method:9} {event['epoch']:3}/{epochs}  loss {event['loss']:.4f}"
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


def run(method: str, args: argparse.Namespace, board: Board) -> Numbers:
    """One training job; its report."""
    with tempfile.TemporaryDirectory(prefix="ucxgossip-demo-") as folder:
        report = Path(folder) / "report.json"
        arguments = [
            *("--json-lines", "--report", str(report), "--method", method),
            *("--epochs", str(args.epochs), "--seed", str(args.seed)),
            *("--transport", args.transport, "--mix", args.mix),
        ]
        with Job(WORKER, arguments, ranks=args.ranks, deadline_s=args.deadline) as job:
            for event in job.events():
                board.update(method, event)
        numbers: Numbers = json.loads(report.read_text())
    return numbers


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


def environment(args: argparse.Namespace, seconds: float) -> Numbers:
    """Where and with what the numbers were measured."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": len(os.sched_getaffinity(0)),
        "packages": versions,
        "ranks": args.ranks,
        "transport": args.transport,
        "seconds": round(seconds, 1),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def curves(history: list[Numbers]) -> dict[str, list[Any]]:
    """A report's epochs as columns, with the seconds trained so far."""
    columns = {key: [epoch[key] for epoch in history] for key in history[0]}
    trained = 0.0
    columns["seconds"] = [trained := trained + s for s in columns["train_s"]]
    return columns


def write(args: argparse.Namespace, reports: dict[str, Numbers], seconds: float) -> None:
    """results.json and curves.png."""
    lines = {method: curves(report["history"]) for method, report in reports.items()}
    results = {
        "environment": environment(args, seconds),
        "rows": [report["row"] for report in reports.values()],
        "curves": lines,
    }
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    cores = len(os.sched_getaffinity(0))
    title = f"LeNet on digits, {args.ranks} ranks on {cores} cores, gossip on {args.transport}"
    draw(lines, title, args.out / "curves.png")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Train LeNet on digits by gossip over UCX, by all-reduce and without"
        " communication; compare accuracy, time and traffic.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--methods",
        type=method_list,
        default="gossip,allreduce,local",
        metavar="M,M",
        help="what to run, in this order",
    )
    parser.add_argument("--epochs", type=at_least(1), default=25, help="of each run")
    parser.add_argument("--ranks", type=at_least(1), default=4, help="processes of each run")
    parser.add_argument(
        "--seed", type=at_least(0), default=0, help="of weights, shards and batches"
    )
    parser.add_argument(
        "--transport",
        choices=("tcp", "shm", "auto"),
        default="tcp",
        help="what gossip runs on; all-reduce always uses TCP, so only tcp compares like with like",
    )
    parser.add_argument(
        "--mix", choices=("both", "weights", "gradients"), default="both", help="what gossip mixes"
    )
    parser.add_argument(
        "--deadline", type=float, default=150.0, metavar="S", help="seconds allowed for each run"
    )
    parser.add_argument(
        "--out", type=folder, default="out", metavar="DIR", help="for results and curves"
    )
    return parser.parse_args(argv)


def method_list(text: str) -> list[str]:
    """Comma-separated methods, for argparse."""
    methods = text.split(",")
    if unknown := [method for method in methods if method not in LABELS]:
        raise argparse.ArgumentTypeError(
            f"no method {', '.join(map(repr, unknown))}: choose from {', '.join(LABELS)}"
        )
    return list(dict.fromkeys(methods))


def at_least(lowest: int) -> Callable[[str], int]:
    """Whole numbers from `lowest`, for argparse."""

    def number(text: str) -> int:
        if not text.isdigit() or int(text) < lowest:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {lowest}")
        return int(text)

    return number


def folder(text: str) -> Path:
    """A folder, made where it is missing, for argparse."""
    path = Path(text)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error.strerror}") from None
    return path


def main(argv: list[str] | None = None) -> int:
    """Run the demo; the exit status."""
    args = parse(argv)
    console, complaints = Console(), Console(stderr=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))

    start = time.monotonic()
    board = Board(console, args.methods, args.epochs)
    reports: dict[str, Numbers] = {}
    try:
        with board.shown():
            for method in args.methods:
                reports[method] = run(method, args, board)
    except JobFailed as failure:
        sys.stderr.write(failure.output)
        complaints.print(f"{method}: {failure}", style="bold red", highlight=False)
        return 1
    except KeyboardInterrupt:
        complaints.print("interrupted")
        return INTERRUPTED
    seconds = time.monotonic() - start

    rows = [report["row"] for report in reports.values()]
    write(args, reports, seconds)
    console.print()
    console.print(result_table(rows))
    for line in notes(rows):
        console.print(line, highlight=False)
    console.print(f"{seconds:.0f} s in all; curves.png and results.json are in {args.out}/")
    return 0


if __name__ == "__main__":
    sys.exit(main())
