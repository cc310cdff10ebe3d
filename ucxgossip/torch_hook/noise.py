"""The noise correction of Adam and AdamW: their step sizes under gossip as under all-reduce.

Why and which formula: `ucxgossip.kernels.second_moment`. The running mean of the noise is kept in
the optimizer's own state, as ``exp_avg_noise``, so that a checkpoint of the optimizer holds it and
``optimizer_state=True`` mixes it with the moments that it belongs to.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ucxgossip.errors import ArgumentError, ModelError
from ucxgossip.kernels.second_moment import correct, noise_share
from ucxgossip.mixing import Modes
from ucxgossip.schedule import Schedule
from ucxgossip.torch_hook.bucket import Bucket

NOISE = "exp_avg_noise"
"""The state entry of the running mean of the noise."""


def check_noise_correction(modes: Modes, optimizer: torch.optim.Optimizer) -> None:
    """`ArgumentError` or `ModelError` where there is nothing that could be corrected."""
    if not modes.gradients_travel or modes.staleness or modes.local_steps != 1:
        raise ArgumentError(
            "noise_correction measures what the gradients of partners differ by in each step; it "
            "needs mix='both', staleness=0 and local_steps=1"
        )
    if not isinstance(optimizer, torch.optim.Adam):
        raise ModelError(
            f"noise_correction is for Adam and AdamW, not {type(optimizer).__name__}; leave it "
            "False (SGD's step does not depend on the noise)"
        )
    if any(each.get("amsgrad") or each.get("capturable") for each in optimizer.param_groups):
        raise ModelError("noise_correction does not serve amsgrad or capturable; leave it False")


class _Part:
    """What one bucket needs: the half difference of its gradients, and room for its moments."""

    def __init__(self, bucket: Bucket) -> None:
        assert bucket.gradients is not None
        self.bucket = bucket
        self.mixed = bucket.gradients.array
        self.half = np.zeros_like(self.mixed)
        self.raw = np.zeros_like(self.mixed)
        self.share = 0.0
        self.largest, self.value = 0, 0.0


class NoiseCorrection:
    """Sees each bucket's gradients before and after their exchange, and each step of Adam."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        buckets: Sequence[Bucket],
        schedule: Schedule,
        rank: int,
    ) -> None:
        self.optimizer, self.schedule, self.rank = optimizer, schedule, rank
        self.parts = {id(bucket): _Part(bucket) for bucket in buckets}
        self._touched: list[tuple[NDArray[Any], NDArray[Any]]] = []

    def before_exchange(self, bucket: Bucket) -> None:
        """Keep this rank's own gradients."""
        part = self.parts[id(bucket)]
        part.half[:] = part.mixed

    def after_exchange(self, bucket: Bucket, position: int) -> None:
        """Turn them into half the difference with the partner's; `position` of the round."""
        part = self.parts[id(bucket)]
        this = self.schedule.round(self.rank, position)
        weight = this.weight if this.sender is not None else 0.0
        part.share = noise_share(weight, self.schedule.size) if weight else 0.0
        np.subtract(part.mixed, part.half, out=part.half)
        part.half *= part.half.dtype.type(1 / (2 * weight) if weight else 0.0)
        part.largest = int(np.argmax(np.abs(part.mixed)))
        part.value = float(part.mixed[part.largest])

    def before_step(self) -> None:
        """Put moments in place from which the step arrives at the corrected ones."""
        self._touched.clear()
        for part in self.parts.values():
            if part.value:
                # Clipping and unscaling since backward scale all gradients by one factor.
                part.half *= part.half.dtype.type(float(part.mixed[part.largest]) / part.value)
            for parameter, settings, half, raw in self._parameters(part):
                state = self.optimizer.state.get(parameter, {})
                if NOISE in state and parameter.grad is not None:
                    moment = _flat(state["exp_avg_sq"])
                    kind = moment.dtype.type
                    correct(
                        moment,
                        _flat(state[NOISE]),
                        raw,
                        _effective(parameter, settings),
                        half,
                        kind(settings["betas"][1]),
                        kind(part.share),
                        kind(2 / max(2, self.schedule.size)),
                    )
                    self._touched.append((moment, raw))

    def after_step(self) -> None:
        """Put the uncorrected moments back; Adam's first step makes the state."""
        for moment, raw in self._touched:
            moment[:] = raw
        self._touched.clear()
        for part in self.parts.values():
            for parameter, settings, half, _ in self._parameters(part):
                state = self.optimizer.state.get(parameter)
                if state and NOISE not in state and "exp_avg_sq" in state:
                    rest = (1 - settings["betas"][1]) * part.share
                    state[NOISE] = torch.zeros_like(state["exp_avg_sq"])
                    _flat(state[NOISE])[:] = half.dtype.type(rest) * half * half

    def _parameters(
        self, part: _Part
    ) -> Iterable[tuple[torch.nn.Parameter, dict[str, Any], NDArray[Any], NDArray[Any]]]:
        """Each parameter that the optimizer holds: its settings, half difference and raw room."""
        settings = {id(p): each for each in self.optimizer.param_groups for p in each["params"]}
        assert part.bucket.gradients is not None
        for parameter, view in zip(
            part.bucket.parameters, part.bucket.gradients.views, strict=True
        ):
            if id(parameter) in settings:
                start = view.storage_offset()
                end = start + view.numel()
                yield parameter, settings[id(parameter)], part.half[start:end], part.raw[start:end]


def _flat(tensor: torch.Tensor) -> NDArray[Any]:
    """The tensor's memory in its own order; it is dense, as Adam makes it like the parameter."""
    return tensor.detach().as_strided((tensor.numel(),), (1,), tensor.storage_offset()).numpy()


def _effective(parameter: torch.nn.Parameter, settings: dict[str, Any]) -> NDArray[Any]:
    """The gradient that Adam squares: with L2 decay, if that is not decoupled."""
    gradient = parameter.grad
    assert gradient is not None
    decay = settings["weight_decay"]
    if decay and not settings.get("decoupled_weight_decay"):
        sign = -1.0 if settings.get("maximize") else 1.0
        gradient = gradient.add(parameter.detach(), alpha=sign * decay)
    return _flat(gradient)
