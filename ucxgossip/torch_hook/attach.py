"""`attach`: one line that makes any torch model and optimizer gossip; checks before it changes."""

from __future__ import annotations

import torch
from torch.nn.parameter import is_lazy

from ucxgossip.errors import (
    AlreadyAttachedError,
    ArgumentError,
    ModelError,
    SparseGradientError,
)
from ucxgossip.group import Group
from ucxgossip.mixing import check_modes
from ucxgossip.schedule import Dissemination, Rotated, Schedule
from ucxgossip.torch_hook.bucket import check_device, partition
from ucxgossip.torch_hook.gossip import MARK, Gossip

BUCKET_BYTES = 1 << 22


def attach(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    group: Group,
    mix: str = "both",
    combine: str = "atc",
    optimizer_state: bool = False,
    schedule: Schedule | None = None,
    staleness: int = 0,
    bucket_bytes: int = BUCKET_BYTES,
) -> Gossip:
    """Make `model` and `optimizer` gossip within `group`. Collective.

    mix: ``"both"`` (gradients under backward, new weights under the next forward), ``"weights"``
    (half the bytes) or ``"gradients"`` (the replicas drift apart: for comparison only). combine:
    ``"atc"`` averages the weights after the optimizer's step, ``"awc"`` averages the weights from
    before it, beside it. schedule: `Rotated(Dissemination(size), seed=0)` by default.
    bucket_bytes: size of what travels at a time. optimizer_state and staleness are the places of
    modes to come; this release serves False (the optimizer's state stays local) and 0 (every rank
    waits for its partner).

    The model starts from rank 0's weights and buffers. Everything is checked, and agreed on by
    all ranks, before anything changes: `ModelError`, `ArrayError`, `AlreadyAttachedError`,
    `SparseGradientError`, `ScheduleError`, `ArgumentError`, `MismatchError`.
    """
    check_modes(mix, combine)
    if optimizer_state is not False or staleness != 0:
        raise ArgumentError(
            f"optimizer_state={optimizer_state!r}, staleness={staleness!r}: this release serves "
            "optimizer_state=False and staleness=0 only"
        )
    _check_model(model, optimizer)
    if bucket_bytes < 1:
        raise ArgumentError(f"bucket_bytes is {bucket_bytes}; must be at least 1")
    chosen = Rotated(Dissemination(group.size), seed=0) if schedule is None else schedule
    group.check_schedule(chosen)
    runs = partition(
        [(name, p) for name, p in model.named_parameters() if p.requires_grad], bucket_bytes
    )
    group.agree("attach", _facts(model, mix, combine, chosen, bucket_bytes))
    return Gossip(model, optimizer, group, mix, combine, chosen, runs)


def _check_model(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    if not isinstance(model, torch.nn.Module):
        raise ModelError(f"attach takes a torch.nn.Module, not {type(model).__name__}")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ModelError(f"attach takes a torch.optim.Optimizer, not {type(optimizer).__name__}")
    if hasattr(optimizer, MARK) or any(hasattr(p, MARK) for p in model.parameters()):
        raise AlreadyAttachedError(
            "the model or the optimizer is attached already; call detach() first"
        )
    own = {id(p) for p in model.parameters()}
    if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
        raise ModelError("the optimizer holds no parameter of the model")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise ModelError(f"{name} is not initialised yet; run one forward before attach")
        check_device(name, tensor)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding | torch.nn.EmbeddingBag) and module.sparse:
            raise SparseGradientError(
                f"module {name or 'model'} ({type(module).__name__}) makes sparse gradients, which "
                "have no fixed place in a bucket; build it with sparse=False"
            )


def _facts(
    model: torch.nn.Module, mix: str, combine: str, schedule: Schedule, bucket_bytes: int
) -> dict[str, object]:
    """What all ranks must bring alike."""
    return {
        "mix": mix,
        "combine": combine,
        "schedule": schedule.describe(),
        "bucket bytes": bucket_bytes,
        "parameters": {
            name: [list(p.shape), list(p.stride()), str(p.dtype), p.requires_grad]
            for name, p in model.named_parameters()
        },
        "buffers": {name: [list(b.shape), str(b.dtype)] for name, b in model.named_buffers()},
    }
