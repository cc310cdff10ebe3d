"""What every schedule is: a `Round` for each rank and step, the same on all ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ucxgossip.errors import ScheduleError


@dataclass(frozen=True, slots=True)
class Round:
    """One rank's part in one step.

    to: rank that gets this rank's payload; sender: rank whose payload comes in (either may be
    None). weight: of what is received, ``x += weight * (received - x)``.
    """

    to: int | None
    sender: int | None
    weight: float = 0.5


@runtime_checkable
class Schedule(Protocol):
    """What `attach` and `exchange` take: `size` ranks, rounds that repeat in shape by `period`.

    A class may also have `repeats` and `endless`; the functions of these names say what they mean.
    """

    @property
    def size(self) -> int:
        """Number of ranks."""

    @property
    def period(self) -> int:
        """Steps after which what a rank knows has reached all; at least 1."""

    def round(self, rank: int, step: int) -> Round:
        """The part of `rank` in `step`."""

    def describe(self) -> str:
        """The schedule as an expression; ranks compare it when they meet."""


ALONE = Round(None, None)

Rounds = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]
"""Many rounds: to, sender (-1: none) and weight, one element each."""


def many(schedule: Schedule, ranks: NDArray[np.int64], steps: NDArray[np.int64]) -> Rounds:
    """``round(ranks[i], steps[i])`` for each i.

    A schedule may have a method ``rounds(ranks, steps)`` that does the same without a loop: one
    round costs 2 us from Python, a whole exchange over shared memory not much more.
    """
    own = getattr(schedule, "rounds", None)
    if callable(own):
        found: Rounds = own(ranks, steps)
        return found
    parts = [schedule.round(int(r), int(s)) for r, s in zip(ranks, steps, strict=True)]
    return (
        np.array([-1 if part.to is None else part.to for part in parts], np.int64),
        np.array([-1 if part.sender is None else part.sender for part in parts], np.int64),
        np.array([part.weight for part in parts], np.float64),
    )


def shifted(size: int, ranks: NDArray[np.int64], distances: NDArray[np.int64] | int) -> Rounds:
    """Rounds in which every rank puts to the one `distances` (below `size`) further."""
    weights = np.full(len(ranks), 0.5)
    if size == 1:
        nobody = np.full(len(ranks), -1, np.int64)
        return nobody, nobody.copy(), weights
    to, sender = ranks + distances, ranks - distances
    # NumPy's remainder takes 10 ns a number.
    return to - size * (to >= size), sender + size * (sender < 0), weights


def repeats(schedule: Schedule) -> bool:
    """Whether ``round(rank, step) == round(rank, step + period)`` is promised for every step."""
    return bool(getattr(schedule, "repeats", False))


def endless(schedule: Schedule) -> bool:
    """Whether the rounds go on for ever; finite schedules leave all alone from `period` on."""
    return bool(getattr(schedule, "endless", True))


def check_size(name: str, size: object) -> None:
    """Raise `ScheduleError` where `size` is no number of ranks."""
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ScheduleError(f"{name}: size is {size!r}; must be a positive whole number of ranks")


def check_whole(name: str, what: str, value: object, least: int) -> None:
    """Raise `ScheduleError` where `value` is no whole number from `least` on."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ScheduleError(f"{name}: {what} is {value!r}; must be a whole number from {least} on")


def check_inner(name: str, inner: object) -> None:
    """Raise `ScheduleError` where `inner` is no schedule (a class is none)."""
    if isinstance(inner, type) or not isinstance(inner, Schedule):
        raise ScheduleError(f"{name}: {inner!r} is not a schedule")


def check_place(schedule: Schedule, rank: int, step: int) -> None:
    """Raise `ScheduleError` for a rank that `schedule` does not have, or a negative step."""
    if not 0 <= rank < schedule.size:
        raise ScheduleError(f"{schedule.describe()}: no rank {rank}; ranks are 0 to size - 1")
    if step < 0:
        raise ScheduleError(f"{schedule.describe()}: step is {step}; must not be negative")


def rounds_to_reach(size: int) -> int:
    """ceil(log2 size), and 1 for a single rank."""
    return max(1, (size - 1).bit_length())
