"""What is mixed and when: the choices of `attach`, checked together before anything is made.

Averaging gradients alone does not train (the replicas drift apart); averaging the new weights
does; averaging both is the default, and docs/training.md says what skewed data and Adam want
beside it. So ``mix`` names the payloads, and
``combine`` when the weights are averaged: ``"atc"``, adapt then combine, ``avg(w - u)``;
``"awc"``, adapt while communicating, ``avg(w) - u``, whose exchange hides under the whole step.
The rule of GossipGraD's authors, ``(w_i(t+1) + w_j(t)) / 2``, is ``"awc"`` at half the learning
rate, and is not offered.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from ucxgossip.errors import ArgumentError
from ucxgossip.quarantine import check_policy
from ucxgossip.schedule import Dissemination, Rotated, Schedule, repeats

MIXES: dict[str, tuple[bool, bool]] = {
    "both": (True, True),
    "weights": (True, False),
    "gradients": (False, True),
    "push_sum": (True, False),
}
"""(weights travel, gradients travel) by name."""

COMBINES = ("atc", "awc")


@dataclass(frozen=True)
class Nesterov:
    """An outer optimizer: Nesterov momentum on what `local_steps` steps changed.

    With slow weights f, weights w and means over this rank and the one it receives from:
    ``d = mean(w - f); v = momentum * v + d; f = mean(f) + rate * (d + momentum * v); w = f``.
    DiLoCo's outer step (Douillard et al., arXiv 2311.08105) for pairs, as NoLoCo (Kolehmainen et
    al., arXiv 2506.10911) has it, which lets the difference of the slow weights enter the
    momentum; here it does not. Costs two payloads a round.
    """

    rate: float = 0.7
    momentum: float = 0.5

    def __post_init__(self) -> None:
        for name, value in (("rate", self.rate), ("momentum", self.momentum)):
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ArgumentError(f"Nesterov: {name} is {value!r}; must be a number")
        if not 0 < self.rate < math.inf:
            raise ArgumentError(f"Nesterov: rate is {self.rate}; must be positive")
        if not 0 <= self.momentum < 1:
            raise ArgumentError(f"Nesterov: momentum is {self.momentum}; must be from 0 to below 1")


@dataclass(frozen=True)
class Modes:
    """The choices of `attach`; `ArgumentError` where they do not go together."""

    mix: str = "both"
    combine: str = "atc"
    optimizer_state: bool = False
    buffers: bool = False
    staleness: int = 0
    local_steps: int = 1
    global_average_every: int | None = None
    outer: Nesterov | None = None
    noise_correction: bool = False
    nonfinite: str = "skip"

    def __post_init__(self) -> None:
        check_policy(self.nonfinite)
        for name, value, known in (
            ("mix", self.mix, tuple(MIXES)),
            ("combine", self.combine, COMBINES),
            ("optimizer_state", self.optimizer_state, (False, True)),
            ("buffers", self.buffers, (False, True)),
            ("noise_correction", self.noise_correction, (False, True)),
        ):
            if not any(value is each or (value == each and type(value) is str) for each in known):
                choices = ", ".join(repr(each) for each in known)
                raise ArgumentError(f"unknown {name} {value!r}; choose one of {choices}")
        _check_count("staleness", self.staleness, 0)
        _check_count("local_steps", self.local_steps, 1)
        if self.global_average_every is not None:
            _check_count("global_average_every", self.global_average_every, 1)
        if self.outer is not None and not isinstance(self.outer, Nesterov):
            raise ArgumentError(f"outer is {self.outer!r}; must be ug.Nesterov(...) or None")
        for wrong, message in self._conflicts():
            if wrong:
                raise ArgumentError(message)

    def _conflicts(self) -> list[tuple[bool, str]]:
        push_sum = self.mix == "push_sum"
        return [
            (
                push_sum and (self.combine != "atc" or self.staleness > 0),
                "mix='push_sum' waits for nobody already; leave combine and staleness alone",
            ),
            (
                push_sum and (self.optimizer_state or self.buffers),
                "mix='push_sum' moves weights only; leave optimizer_state and buffers False",
            ),
            (
                self.staleness > 0 and self.combine == "awc",
                "staleness mixes after the step what came in since; leave combine='atc'",
            ),
            (
                self.optimizer_state and not self.weights_travel,
                "optimizer_state travels with the weights; choose mix='both' or mix='weights'",
            ),
            (
                self.outer is not None
                and (push_sum or self.combine != "atc" or self.staleness > 0),
                "outer needs mix='both' or mix='weights', combine='atc' and staleness=0",
            ),
            (
                self.outer is not None and not self.weights_travel,
                "outer works on the weights; choose mix='both' or mix='weights'",
            ),
        ]

    @property
    def weights_travel(self) -> bool:
        """Whether weights are exchanged."""
        return MIXES[self.mix][0]

    @property
    def gradients_travel(self) -> bool:
        """Whether gradients are exchanged."""
        return MIXES[self.mix][1]

    @property
    def in_place(self) -> bool:
        """Whether weights are mixed where they are between two steps, so that readers must wait."""
        return self.weights_travel and self.combine == "atc" and self.staleness == 0

    def facts(self) -> dict[str, object]:
        """What all ranks must bring alike, as JSON values."""
        return {name.replace("_", " "): value for name, value in asdict(self).items()}


def default_schedule(mix: str, size: int) -> Schedule:
    """What `attach` takes where no schedule is given: push-sum needs partners that stay."""
    spread = Dissemination(size)
    return spread if mix == "push_sum" else Rotated(spread, seed=0)


def weights_shift(schedule: Schedule) -> int:
    """By how many rounds weights are ahead of the gradients of the same step, with ``"both"``.

    Weights go to another partner than gradients, for the same bytes: to that of the next period,
    which a rotated schedule draws anew, or else to the next one. The same partner would leave the
    mean of two gradients where two partners leave the mean of four (docs/training.md).
    """
    return 1 if repeats(schedule) else schedule.period


def _check_count(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ArgumentError(f"{name} is {value!r}; must be a whole number from {least} on")
