"""Whether a schedule is one: `check_rounds`, for those that users write."""

from __future__ import annotations

from numbers import Integral, Real

import numpy as np

from ucxgossip.errors import ScheduleError
from ucxgossip.schedule.base import Round, Schedule, check_inner, check_size, check_whole, many

STEPS = 64
"""Most steps looked at."""

RANKS = 1024
"""Most ranks looked at in a step; in larger jobs they are spread evenly."""


def check_rounds(schedule: Schedule) -> None:
    """Raise `ScheduleError` where a round of the first period cannot be carried out.

    That is: a rank that does not exist, a rank that exchanges with itself, a weight outside 0 to 1,
    or a put and a receipt that do not belong together (so that some rank would receive two, or wait
    for ever); or a method ``rounds`` that says otherwise than ``round``. Looks at `STEPS` steps and
    `RANKS` ranks at most.
    """
    check_inner("check_rounds", schedule)
    name = schedule.describe()
    check_size(name, schedule.size)
    check_whole(name, "period", schedule.period, 1)
    for step in range(min(schedule.period, STEPS)):
        parts: dict[int, Round] = {}
        for rank in range(0, schedule.size, -(-schedule.size // RANKS)):
            fault = _fault(schedule, parts, rank, step)
            if fault:
                raise ScheduleError(f"{name}: rank {rank} in step {step} {fault}")
        fault = _rounds_fault(schedule, parts, step)
        if fault:
            raise ScheduleError(f"{name}: its method rounds {fault}")


def _part(schedule: Schedule, parts: dict[int, Round], rank: int, step: int) -> Round:
    if rank not in parts:
        parts[rank] = schedule.round(rank, step)
    return parts[rank]


def _fault(schedule: Schedule, parts: dict[int, Round], rank: int, step: int) -> str | None:
    """What is wrong with one part, as the end of a sentence about its rank."""
    part = _part(schedule, parts, rank, step)
    fault = _form_fault(part, rank, schedule.size)
    if fault:
        return fault
    if part.to is not None:
        other = _part(schedule, parts, part.to, step)
        if getattr(other, "sender", None) != rank:
            return f"puts to rank {part.to}, which has {_received(other)}"
    if part.sender is not None:
        other = _part(schedule, parts, part.sender, step)
        if getattr(other, "to", None) != rank:
            return f"waits for rank {part.sender}, which has {_put(other)}"
    return None


def _rounds_fault(schedule: Schedule, parts: dict[int, Round], step: int) -> str | None:
    """What is wrong with the vectorised form, if there is one: it must say what ``round`` says."""
    if not callable(getattr(schedule, "rounds", None)):
        return None
    ranks = np.array(sorted(parts), np.int64)
    try:
        to, sender, weights = many(schedule, ranks, np.full(len(ranks), step, np.int64))
        found = list(zip(to.tolist(), sender.tolist(), weights.tolist(), strict=True))
    except Exception as error:  # a user's code
        return f"fails on arrays of ranks and steps: {type(error).__name__}: {error}"
    if len(found) != len(ranks):
        return f"gives {len(found)} rounds for {len(ranks)} ranks"
    for rank, said in zip(ranks.tolist(), found, strict=True):
        part = parts[rank]
        wanted = tuple(-1 if other is None else int(other) for other in (part.to, part.sender))
        if said != (*wanted, float(part.weight)):
            return (
                f"gives rank {rank} in step {step} to, sender, weight {said}, its method round "
                f"{(*wanted, float(part.weight))}"
            )
    return None


def _form_fault(part: object, rank: int, size: int) -> str | None:
    if not isinstance(part, Round):
        return f"has {part!r}, which is not a Round"
    for verb, other in (("puts to", part.to), ("receives from", part.sender)):
        if other is None:
            continue
        if isinstance(other, bool) or not isinstance(other, Integral) or not 0 <= other < size:
            return f"{verb} rank {other!r}; ranks are 0 to {size - 1}"
        if other == rank:
            return f"{verb} itself"
    weight: object = part.weight
    if isinstance(weight, bool) or not isinstance(weight, Real) or not 0 <= float(weight) <= 1:
        return f"has weight {weight!r}; must be a number from 0 to 1"
    return None


def _received(part: object) -> str:
    sender = getattr(part, "sender", None)
    return "nobody as its sender" if sender is None else f"rank {sender!r} as its sender"


def _put(part: object) -> str:
    to = getattr(part, "to", None)
    return "nobody to put to" if to is None else f"rank {to!r} to put to"
