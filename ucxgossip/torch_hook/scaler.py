"""A `GradScaler` that skips the steps of one rank: noticed where it happens.

``GradScaler.step`` leaves the optimizer's step out when a gradient is infinite, on the ranks that
saw it and on no others. Rejected: noticing it at the next ``zero_grad`` (too late for the last
step, and gradients are also dropped for other reasons).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from ucxgossip.errors import ArgumentError


class Scaler(Protocol):
    """What is used of ``torch.amp.GradScaler``."""

    def is_enabled(self) -> bool:
        """Whether gradients are scaled at all."""

    def get_scale(self) -> float:
        """The factor on this rank's gradients."""

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        """Step the optimizer, unless a gradient is infinite."""


def check_scaler(scaler: object) -> None:
    """`ArgumentError` for what is no `GradScaler` (nor None), its class among it."""
    calls = ("is_enabled", "get_scale", "step")
    wrong = isinstance(scaler, type) or not all(callable(getattr(scaler, c, None)) for c in calls)
    if scaler is not None and wrong:
        raise ArgumentError(f"scaler is {scaler!r}; pass the GradScaler that steps, or None")


class Watch:
    """Calls `after` when ``scaler.step`` has ended for `optimizer`, until `remove`."""

    def __init__(
        self, scaler: Scaler, optimizer: torch.optim.Optimizer, after: Callable[[], None]
    ) -> None:
        self._scaler, self._optimizer, self._after = scaler, optimizer, after
        self._own = vars(scaler).get("step")
        self._original = scaler.step
        self._ours = self._step
        self._watching = True
        scaler.step = self._ours  # type: ignore[method-assign]

    def _step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        result = self._original(optimizer, *args, **kwargs)
        if self._watching and optimizer is self._optimizer:
            self._after()
        return result

    def remove(self) -> None:
        """Stop watching. Another watch may stand over this one, and is left in its place."""
        self._watching = False
        if vars(self._scaler).get("step") is self._ours:
            del self._scaler.step
            if self._own is not None:
                self._scaler.step = self._own  # type: ignore[method-assign]
