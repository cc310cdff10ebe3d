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
from collections.abc import Callable
from pathlib import Path
from typing import Any

from board import Board, notes, result_table
from curves import LABELS, draw
from launch import Job, JobFailed
from rich.console import Console

WORKER = Path(__file__).with_name("train_digits.py")
PACKAGES = ("ucxgossip", "torch", "numpy", "numba", "libucx-cu12", "libucx-cu13")
INTERRUPTED = 130
Numbers = dict[str, Any]


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
    where = f"{seconds:.0f} s in all; curves.png and results.json are in {args.out}/"
    console.print(where, highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
