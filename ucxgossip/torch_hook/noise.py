"""The noise correction of Adam and AdamW: their step sizes under gossip as under all-reduce.

Why and which formula: `ucxgossip.kernels.second_moment`. The running mean of the noise is kept in
the optimizer's own state, as ``exp_avg_noise``, so that a checkpoint of the optimizer holds it and
``optimizer_state=True`` mixes it with the moments that it belongs to. Gradients that were left out
for a NaN or an infinity show no difference, and count as noise of zero in that step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ucxgossip.errors import ArgumentError, ModelError
from ucxgossip.group import Group
from ucxgossip.kernels.second_moment import correct, noise_share
from ucxgossip.mixing import Modes
from ucxgossip.schedule import Schedule
from ucxgossip.torch_hook.bucket import Bucket

NOISE = "exp_avg_noise"
"""The state entry of the running mean of the noise."""


def check_noise_correction(modes: Modes, optimizer: torch.optim.Optimizer) -> None:
    """`ArgumentError` or `ModelError` where there is nothing that could be corrected."""
    if modes.mix != "both" or modes.staleness or modes.local_steps != 1:
        raise ArgumentError(
            "noise_correction measures what the gradients of partners differ by in each step; it "
            "needs mix='both', staleness=0 and local_steps=1"
        )
    if not isinstance(optimizer, torch.optim.Adam):
        raise ModelError(
            f"noise_correction is for Adam and AdamW, not {type(optimizer).__name__}; leave it "
            "False (SGD's step does not depend on the noise)"
        )
    for each in optimizer.param_groups:
        for name in ("amsgrad", "capturable", "fused"):
            if each.get(name):
                raise ModelError(
                    f"noise_correction does not serve {type(optimizer).__name__}({name}=True)"
                )
        if not each["betas"][1]:
            raise ModelError("noise_correction needs a second beta above 0; Adam has no v without")


@dataclass
class _Piece:
    """One parameter that the optimizer holds, its place in the bucket, and its largest gradient."""

    parameter: torch.nn.Parameter
    place: slice
    largest: int = 0
    value: float = 0.0


class _Part:
    """What one bucket needs: the half difference of its gradients, and room for its moments."""

    def __init__(self, bucket: Bucket, held: set[int]) -> None:
        assert bucket.gradients is not None
        self.mixed = bucket.gradients.array
        self.half = np.zeros_like(self.mixed)
        self.raw = np.zeros_like(self.mixed)
        self.share = 0.0
        self.pieces = [
            _Piece(parameter, slice(view.storage_offset(), view.storage_offset() + view.numel()))
            for parameter, view in zip(bucket.parameters, bucket.gradients.views, strict=True)
            if id(parameter) in held and view.numel()
        ]


class NoiseCorrection:
    """Sees each bucket's gradients before and after their exchange, and each step of Adam."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        buckets: Sequence[Bucket],
        schedule: Schedule,
        group: Group,
    ) -> None:
        self.optimizer, self.schedule, self.group = optimizer, schedule, group
        held = {id(p) for each in optimizer.param_groups for p in each["params"]}
        self.parts = {id(bucket): _Part(bucket, held) for bucket in buckets}
        self._touched: list[tuple[NDArray[Any], NDArray[Any]]] = []
        self._first: list[tuple[torch.nn.Parameter, NDArray[Any]]] = []

    def before_exchange(self, bucket: Bucket) -> None:
        """Keep this rank's own gradients."""
        part = self.parts[id(bucket)]
        part.half[:] = part.mixed

    def after_exchange(self, bucket: Bucket, position: int) -> None:
        """Turn them into half the difference with the partner's; `position` of the round."""
        part = self.parts[id(bucket)]
        living = self.group.living(self.schedule)
        this = living.round(self.group.rank, position)
        weight = this.weight if this.sender is not None else 0.0
        part.share = noise_share(weight, len(self.group.members)) if weight else 0.0
        with np.errstate(invalid="ignore"):  # an overflow here, whose step a scaler will skip
            np.subtract(part.mixed, part.half, out=part.half)
        part.half *= part.half.dtype.type(1 / (2 * weight) if weight else 0.0)
        for piece in part.pieces:
            mixed = part.mixed[piece.place]
            piece.largest = int(np.argmax(np.abs(mixed)))
            piece.value = float(mixed[piece.largest])

    def before_step(self) -> None:
        """Put moments in place from which the step arrives at the corrected ones."""
        self.restore()
        self._first.clear()
        settings = {id(p): each for each in self.optimizer.param_groups for p in each["params"]}
        for part in self.parts.values():
            for piece in part.pieces:
                half, raw = part.half[piece.place], part.raw[piece.place]
                if piece.value:
                    # Clipping and unscaling since backward scale a gradient by one factor.
                    now = float(part.mixed[piece.place][piece.largest])
                    half *= half.dtype.type(now / piece.value)
                chosen = settings.get(id(piece.parameter))
                if chosen is not None and piece.parameter.grad is not None:
                    self._correct(piece.parameter, chosen, half, raw, part.share)

    def _correct(
        self,
        parameter: torch.nn.Parameter,
        settings: dict[str, Any],
        half: NDArray[Any],
        raw: NDArray[Any],
        share: float,
    ) -> None:
        state, kind = self.optimizer.state.get(parameter, {}), half.dtype.type
        beta = settings["betas"][1]
        if NOISE not in state:
            rest = kind((1 - beta) * share)
            self._first.append((parameter, rest * half * half))
            return
        moment = _flat(state["exp_avg_sq"])
        correct(
            moment,
            _flat(state[NOISE]),
            raw,
            _effective(parameter, settings),
            half,
            kind(beta),
            kind(share),
            kind(2 / max(2, len(self.group.members))),
        )
        self._touched.append((moment, raw))

    def after_step(self) -> None:
        """Put the uncorrected moments back; Adam's first step makes the state."""
        self.restore()
        for parameter, noise in self._first:
            state = self.optimizer.state.get(parameter)
            if state and "exp_avg_sq" in state:
                state[NOISE] = torch.zeros_like(state["exp_avg_sq"])
                _flat(state[NOISE])[:] = np.where(np.isfinite(noise), noise, 0)
        self._first.clear()

    def restore(self) -> None:
        """Put the uncorrected moments back, also after a step that raised an exception."""
        for moment, raw in self._touched:
            moment[:] = raw
        self._touched.clear()


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
