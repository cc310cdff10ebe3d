"""`attach`: one line that makes any torch model and optimizer gossip; checks before it changes."""

from __future__ import annotations

import torch
from torch.nn.parameter import is_lazy

from ucxgossip.errors import (
    AlreadyAttachedError,
    ArgumentError,
    ModelError,
    ScheduleError,
    SparseGradientError,
)
from ucxgossip.group import Group
from ucxgossip.guests import MODEL
from ucxgossip.mixing import Modes, Nesterov, check_push_sum, default_schedule
from ucxgossip.schedule import (
    Schedule,
    check_rounds,
    endless,
)
from ucxgossip.torch_hook.bucket import partition
from ucxgossip.torch_hook.device import check_modes, device_of
from ucxgossip.torch_hook.gossip import MARK, Gossip
from ucxgossip.torch_hook.noise import check_noise_correction
from ucxgossip.torch_hook.scaler import Scaler, check_scaler
from ucxgossip.torch_hook.state import check_optimizer_state

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
    *,
    buffers: bool = False,
    local_steps: int = 1,
    global_average_every: int | None = None,
    outer: Nesterov | None = None,
    noise_correction: bool = False,
    scaler: Scaler | None = None,
    nonfinite: str = "skip",
) -> Gossip:
    """Make `model` and `optimizer` gossip within `group`. Collective.

    What: mix is ``"both"`` (gradients under backward, new weights under the next forward),
    ``"weights"`` (half the bytes), ``"gradients"`` (the replicas drift apart, and train hardly
    better than alone: for comparison only) or ``"push_sum"`` (weights, and nobody waits: see
    `ucxgossip.mixing.push_sum`). optimizer_state: momentum, or Adam's m and v, travel with the
    weights. buffers: the float buffers (statistics of batch norm) do, one step late.

    When: combine is ``"atc"`` (weights are averaged after the optimizer's step) or ``"awc"`` (the
    weights from before the step, beside it). staleness=k: what comes in is mixed up to k steps
    late, against a snapshot of its step. local_steps=k: a round only every k-th step.
    global_average_every=h: the exact mean of all ranks after every h-th step, which waits for
    all. outer: an outer optimizer over the rounds, `ug.Nesterov`. noise_correction: Adam and AdamW
    make steps as large as under all-reduce (docs/training.md), for three more copies of the
    parameters.

    With whom: schedule is `Rotated(Dissemination(size), seed=0)` by default, `Dissemination(size)`
    for push_sum. bucket_bytes: size of what travels at a time. scaler: the `GradScaler` in use, if
    any: ranks may differ in their scale, so gradients travel without it.

    nonfinite: what a rank does with a chunk in which its own or its partner's values hold a NaN or
    an infinity: ``"skip"`` leaves it unmixed, counts (``stats()["nonfinite"]``) and warns;
    ``"raise"`` ends with `NonFiniteError`, where the values came in and where they were made, at
    the next wait of the training thread (on a device one or two rounds later); ``"allow"`` mixes
    it.

    Where: the model is on the CPU, or as a whole on one CUDA device (untested on hardware:
    docs/gpu.md). There a step waits until the device has computed what it sends and the
    partner's has come, not for the mixes; push_sum, staleness, outer, buffers and noise_correction
    are refused; ranks need not all have a device.

    The model starts from rank 0's weights and buffers. Everything is checked, and agreed on by
    all ranks, before anything changes: `ModelError`, `ArrayError`, `AlreadyAttachedError`,
    `SparseGradientError`, `ScheduleError`, `ArgumentError`, `MismatchError`; on CUDA
    `BackendError` (`NoDeviceError`, `MissingExtraError`, `CudaVersionError`), `DeviceError`. An
    optimizer that proves to keep no state where optimizer_state=True is a `ModelError` of its first
    step.
    """
    modes = Modes(
        mix,
        combine,
        optimizer_state,
        buffers,
        staleness,
        local_steps,
        global_average_every,
        outer,
        noise_correction,
        nonfinite,
    )
    if not isinstance(group, Group):
        raise ArgumentError(f"group is {group!r}; pass what ug.join() returned")
    _check_model(model, optimizer)
    device = device_of([*model.named_parameters(), *model.named_buffers()])
    if device is not None:
        check_modes(modes, device)
    check_scaler(scaler)
    if modes.optimizer_state:
        check_optimizer_state(optimizer)
    if modes.noise_correction:
        check_noise_correction(modes, optimizer)
    if isinstance(bucket_bytes, bool) or not isinstance(bucket_bytes, int) or bucket_bytes < 1:
        raise ArgumentError(f"bucket_bytes is {bucket_bytes!r}; must be at least 1")
    chosen = _choose(schedule, group, modes)
    runs = partition(
        [(name, p) for name, p in model.named_parameters() if p.requires_grad], bucket_bytes
    )
    label = group.label(MODEL)
    group.begin_model()
    late = group.agree("attach", _facts(model, modes, chosen, bucket_bytes), once=label)
    return Gossip(model, optimizer, group, modes, chosen, runs, scaler, label, late, device)


def _choose(schedule: Schedule | None, group: Group, modes: Modes) -> Schedule:
    """The schedule, if it fits the group and goes on for ever."""
    if schedule is None:
        return default_schedule(modes.mix, group.size)
    group.check_schedule(schedule)
    if not endless(schedule):
        raise ScheduleError(
            f"{schedule.describe()} ends after {schedule.period} steps, and training would go on "
            f"without mixing; pass one that goes on, such as ug.Rotated(ug.BaseTwo({group.size}))"
        )
    check_rounds(schedule)
    if modes.mix == "push_sum":
        check_push_sum(schedule)
    return schedule


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
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding | torch.nn.EmbeddingBag) and module.sparse:
            raise SparseGradientError(
                f"module {name or 'model'} ({type(module).__name__}) makes sparse gradients, which "
                "have no fixed place in a bucket; build it with sparse=False"
            )


def _facts(
    model: torch.nn.Module, modes: Modes, schedule: Schedule, bucket_bytes: int
) -> dict[str, object]:
    """What all ranks must bring alike; orders beside, which a comparison by name does not see."""
    names = [name for name, _ in model.named_parameters()]
    return {
        **modes.facts(),
        "schedule": schedule.describe(),
        "bucket bytes": bucket_bytes,
        "parameters": {
            name: {
                "shape": list(p.shape),
                "strides": list(p.stride()),
                "dtype": str(p.dtype),
                "requires_grad": p.requires_grad,
            }
            for name, p in model.named_parameters()
        },
        "order of parameters": names,
        "model buffers": {
            name: {"shape": list(b.shape), "dtype": str(b.dtype)}
            for name, b in model.named_buffers()
        },
        "order of model buffers": [name for name, _ in model.named_buffers()],
    }
