"""What every schedule is: a `Round` for each rank and step, the same on all ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

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
