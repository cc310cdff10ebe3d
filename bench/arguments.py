"""Checks that several benches make before they start anything.

Rejected: types of argparse (a bench is called from Python, too).
"""

from __future__ import annotations

from pathlib import Path

from ucxgossip.errors import ArgumentError


def at_least_one(command: str, **numbers: int | None) -> None:
    """`ArgumentError` that names the first of `numbers` below 1; None is as usual."""
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise ArgumentError(f"{command}: {name} is {number}; must be at least 1")


def positive(command: str, **numbers: float) -> None:
    """`ArgumentError` that names the first of `numbers` that is not positive and finite."""
    for name, number in numbers.items():
        if not 0 < number < float("inf"):
            raise ArgumentError(f"{command}: {name} is {number:g}; must be positive")


def file_to_write(path: str) -> None:
    """`ArgumentError` for a path at which no file can be: told before hours of measuring."""
    if not Path(path).resolve().parent.is_dir():
        raise ArgumentError(f"cannot write {path}: there is no such folder")
    if Path(path).is_dir():
        raise ArgumentError(f"cannot write {path}: it is a folder")
