"""An attached model: what its hooks do under backward, after the step and before a forward.

With ``mix="both"`` and ``combine="atc"`` a step goes: gradients are put bucket by bucket as
backward completes them and averaged in place, all of them before ``backward()`` returns (so that
clipping and scaling see whole gradients); the optimizer steps; the new weights are put and
averaged under the next forward, where each module waits for its own buckets only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray

from ucxgossip.errors import (
    AccumulationError,
    ArgumentError,
    ClosedError,
    ExchangeError,
    GossipError,
    SparseGradientError,
)
from ucxgossip.group import Group
from ucxgossip.mixing import Collective, Held, InPlace, Meter, Modes, Outer, PushSum, Stale, Stream
from ucxgossip.schedule import Schedule
from ucxgossip.torch_hook.bucket import Bucket
from ucxgossip.torch_hook.forward import Forward, Hook
from ucxgossip.torch_hook.state import ModelBuffers, OptimizerState

MARK = "_ucxgossip"
"""Attribute by which parameters and optimizers know that they are attached."""


class Scaler(Protocol):
    """What is used of ``torch.amp.GradScaler``."""

    def is_enabled(self) -> bool:
        """Whether gradients are scaled at all."""

    def get_scale(self) -> float:
        """The factor on this rank's gradients."""


class Writer(Protocol):
    """What is used of ``torch.utils.tensorboard.SummaryWriter``."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int | None = None) -> object:
        """Log one number."""


class Gossip:
    """A model that gossips. Made by `attach`; `detach()` or the end of ``with`` undoes it."""

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        group: Group,
        modes: Modes,
        schedule: Schedule,
        runs: Sequence[Sequence[torch.nn.Parameter]],
        scaler: Scaler | None = None,
    ) -> None:
        self.model, self.optimizer, self.group = model, optimizer, group
        self.modes, self.schedule = modes, schedule
        self._scaler = scaler
        self._collective = Collective(group)
        self._meter = Meter()
        self._steps = 0
        self._synchronising = True
        self._detached = False
        self._in_backward: int | None = None
        self._went_backward = False  # a backward has ended since the last step
        self._stepping = False
        self._scale = 1.0
        self._buckets = [Bucket(group, run, modes.gradients_travel) for run in runs]
        self._make_streams()
        for bucket in self._buckets:
            bucket.adopt()
        self._broadcast()
        self._begin()
        self._handles: list[Any] = []
        self._forward = Forward(model, self._buckets, self._wait_weights)
        self._install()

    # --- setting up ----------------------------------------------------------------------------

    def _make_streams(self) -> None:
        """One stream for each array that travels; whoever is wanted first comes first."""
        group, schedule, meter, modes = self.group, self.schedule, self._meter, self.modes
        for bucket in reversed(self._buckets):
            if bucket.gradients is not None:
                common = (group, bucket.gradients.buffer, schedule, meter)
                bucket.gradients_stream = (
                    Stale(*common, modes.staleness, before=False)
                    if modes.staleness
                    else InPlace(*common)
                )
        for bucket in self._buckets:
            if modes.weights_travel:
                bucket.weights_stream = self._weights_stream(bucket)
        self._state = (
            OptimizerState(self.optimizer, self._buckets, group, schedule, meter, modes)
            if modes.optimizer_state
            else None
        )
        self._model_buffers = (
            ModelBuffers(self.model, group, schedule, meter, modes) if modes.buffers else None
        )

    def _weights_stream(self, bucket: Bucket) -> Stream:
        modes = self.modes
        common = (self.group, bucket.weights.buffer, self.schedule, self._meter)
        # Weights go to another partner than the same step's gradients: what a rank computes then
        # reaches four in a step, for the same bytes (docs/training.md).
        first = int(modes.gradients_travel)
        if modes.mix == "push_sum":
            return PushSum(*common, self._collective)
        if modes.outer is not None:
            return Outer(*common, modes.outer, first)
        if modes.staleness:
            return Stale(*common, modes.staleness, first)
        return Held(*common, first) if modes.combine == "awc" else InPlace(*common, first)

    def _broadcast(self) -> None:
        """Rank 0's weights, frozen parameters and buffers to all."""
        for bucket in self._buckets:
            self._collective.broadcast(bucket.weights.array)
        rest = [p.data for p in self.model.parameters() if not p.requires_grad]
        rest += list(self.model.buffers())
        if rest:
            blob = np.concatenate([_bytes_of(tensor) for tensor in rest])
            self._collective.broadcast(blob)
            start = 0
            for tensor in rest:
                nbytes = tensor.numel() * tensor.element_size()
                _set_bytes(tensor, blob[start : start + nbytes])
                start += nbytes

    def _install(self) -> None:
        setattr(self.optimizer, MARK, True)
        keep = self._handles.append
        for bucket in self._buckets:
            for index, parameter in enumerate(bucket.parameters):
                setattr(parameter, MARK, True)
                hook: Callable[..., None] = self._note_backward
                if self.modes.gradients_travel:
                    hook = functools.partial(self._on_gradient, bucket, index)
                register: Any = parameter.register_post_accumulate_grad_hook
                keep(register(hook))
        keep(self.optimizer.register_step_pre_hook(self._before_step))
        keep(self.optimizer.register_step_post_hook(self._after_step))
        keep(self.optimizer.register_state_dict_pre_hook(self._before_optimizer_state))
        keep(self.optimizer.register_load_state_dict_pre_hook(self._before_optimizer_state))
        self._own_zero_grad = vars(self.optimizer).get("zero_grad")
        self._original_zero_grad = self.optimizer.zero_grad
        self.optimizer.zero_grad = self._zero_grad  # type: ignore[method-assign]
        if self.modes.in_place:
            self._handles += self._forward.install()
            for register in (
                self.model.register_state_dict_pre_hook,
                self.model.register_load_state_dict_pre_hook,
            ):
                chosen: Any = register
                keep(chosen(Hook(self._before_state_dict)))

    # --- gradients, under backward -------------------------------------------------------------

    def _zero_grad(self, set_to_none: bool = True) -> None:
        """The optimizer's ``zero_grad``; gradients that travel are zeroed where they are.

        Gradients that no step used (a `GradScaler` found them infinite) make this rank take part
        in the step's rounds all the same.
        """
        skipped = self._went_backward and not self._stepping and self._in_backward is None
        if skipped and not self.group.failed:
            self.skip_step()
        self._original_zero_grad(set_to_none)
        held = {id(p) for each in self.optimizer.param_groups for p in each["params"]}
        for bucket in self._buckets:
            bucket.reset_gradients(held)

    def _note_backward(self, _: torch.Tensor) -> None:
        self._went_backward |= self._synchronising

    def _due(self, step: int) -> bool:
        """Whether the `step`-th step (from 1 on) has a round."""
        return step % self.modes.local_steps == 0

    def _on_gradient(self, bucket: Bucket, index: int, parameter: torch.Tensor) -> None:
        if parameter.grad is not None and parameter.grad.layout != torch.strided:
            raise SparseGradientError(
                f"a parameter of shape {tuple(parameter.shape)} got a {parameter.grad.layout} "
                "gradient, which has no fixed place in a bucket"
            )
        if not self._synchronising:
            return
        if not self._due(self._steps + 1):
            self._went_backward = True
            return
        if self._in_backward is None:
            self._in_backward = _backward_number()
            self._start_gradients()
            torch.autograd.Variable._execution_engine.queue_callback(self._after_backward)
        if self._in_backward != _backward_number():
            raise self._broken_backward()
        if bucket.posted:
            raise AccumulationError(
                "a gradient arrived for a bucket that is being exchanged; run all but the last "
                "backward of a step under gossip.no_sync()"
            )
        if bucket.receive(index):
            self._post_gradients(bucket)

    def _start_gradients(self) -> None:
        scaler = self._scaler
        self._scale = scaler.get_scale() if scaler is not None and scaler.is_enabled() else 1.0
        for bucket in self._buckets:
            bucket.start_backward()

    def _post_gradients(self, bucket: Bucket) -> None:
        bucket.posted = True
        if bucket.gradients is None or bucket.gradients_stream is None:
            return
        if self._scale != 1.0:  # each rank has its own
            bucket.gradients.tensor.mul_(1.0 / self._scale)
        bucket.gradients_stream.post()

    def _settle_gradients(self) -> None:
        for bucket in self._buckets:
            if bucket.gradients is not None and bucket.gradients_stream is not None:
                bucket.gradients_stream.settle()
                if self._scale != 1.0:
                    bucket.gradients.tensor.mul_(self._scale)

    def _after_backward(self) -> None:
        """Send what backward left out, and wait: gradients are whole when ``backward()`` ends."""
        self._in_backward = None
        unused: list[tuple[Bucket, int]] = []
        for bucket in self._buckets:
            if bucket.posted:
                continue
            for index, received in enumerate(bucket.received):
                if not received:
                    bucket.take_in(index)
                    unused.append((bucket, index))
            self._post_gradients(bucket)
        self._settle_gradients()
        self._went_backward = True
        for bucket, index in unused:
            # Unused here and by the partner: the optimizer is to see no gradient at all.
            if not bool(bucket.parameters[index].grad.any()):  # type: ignore[union-attr]
                bucket.parameters[index].grad = None

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Gradients of a ``backward()`` in here stay local and accumulate, as in DDP."""
        before, self._synchronising = self._synchronising, False
        try:
            yield
        finally:
            self._synchronising = before

    def _broken_backward(self) -> ExchangeError:
        return ExchangeError(
            "the last backward() ended in an exception after some of its gradients were put; the "
            "ranks are out of step. End the job, or detach() and attach() on all ranks"
        )

    # --- weights, after the step ---------------------------------------------------------------

    def _streams(self) -> list[Stream]:
        """The weights' streams, in the order in which a forward needs them."""
        return [
            bucket.weights_stream
            for bucket in self._forward.order
            if bucket.weights_stream is not None
        ]

    def _begin(self) -> None:
        for bucket in self._buckets:
            if bucket.weights_stream is not None:
                bucket.weights_stream.begin()

    def _before_step(self, *_: object) -> None:
        self._check_attached()
        if self._in_backward is not None:
            raise self._broken_backward()
        for bucket in self._buckets:
            bucket.check_in_place()
        self._stepping = True
        for stream in self._streams():
            stream.settle()
        if self._state is not None:
            self._state.settle()

    def _after_step(self, *_: object) -> None:
        self._steps += 1
        self._went_backward = self._stepping = False
        every = self.modes.global_average_every
        if every is not None and self._steps % every == 0:
            self._average_weights()
        elif self._due(self._steps):
            position = self._position()
            for stream in self._streams():
                stream.post()
            if self._state is not None:
                self._state.post(position)
            if self._model_buffers is not None:
                self._model_buffers.post()

    def _position(self) -> int:
        """The schedule's step of the weights' next round."""
        return next((stream.position for stream in self._streams()), 0)

    def _wait_weights(self, buckets: Iterable[Bucket]) -> None:
        for bucket in buckets:
            if bucket.weights_stream is not None:
                bucket.weights_stream.wait()

    def _before_state_dict(self, *_: object) -> None:
        if not self.group.failed:  # after a failure nothing moves any more: an emergency checkpoint
            self.wait()

    def _before_optimizer_state(self, *_: object) -> None:
        if self._state is not None and not self.group.failed:
            self._state.settle()

    def wait(self) -> None:
        """Block until every weight round under way has ended; the parameters are whole then.

        Called by the hooks before a forward, a step and a ``state_dict()``; call it before reading
        parameters by other ways (``model.parameters()``, a metric on weights). Under ``"awc"`` and
        with staleness there is nothing to wait for: the weights change in the step only, and may
        not be written by others between steps.
        """
        self._check_attached()
        self._wait_weights(self._buckets)

    def skip_step(self) -> None:
        """Take part in a step's rounds without taking the step, the weights staying as they are.

        For a rank that has no batch where others have one, or leaves out a step that others take:
        ranks of a gossip job must run the same number of rounds. Gradients that were not exchanged
        yet count as zero. Called by the hooks where `GradScaler` skips a step, and by
        `shuffled`.
        """
        self._check_attached()
        due = self.modes.gradients_travel and self._due(self._steps + 1)
        if due and not self._went_backward:
            self._start_gradients()
            for bucket in self._buckets:
                bucket.set_zero()
                self._post_gradients(bucket)
            self._settle_gradients()
            for bucket in self._buckets:
                bucket.set_zero()
        self._before_step()
        self._after_step()

    # --- what a user asks ----------------------------------------------------------------------

    def _arrays(self) -> list[NDArray[Any]]:
        return [bucket.weights.array for bucket in self._buckets]

    def _whole(self) -> None:
        """End every round under way."""
        self._check_attached()
        for bucket in self._buckets:
            for stream in (bucket.gradients_stream, bucket.weights_stream):
                if stream is not None:
                    stream.finish()
        for part in (self._state, self._model_buffers):
            if part is not None:
                part.finish()

    def _average_weights(self) -> None:
        for bucket in self._buckets:
            if bucket.weights_stream is not None:
                bucket.weights_stream.average(self._collective)
            else:
                self._collective.average(bucket.weights.array)
        self._begin()

    def consensus_distance(self) -> float:
        """Relative RMS distance of the replicas, ``sqrt(mean_i |w_i - w|**2) / |w|``. Collective.

        Exact; moves the weights through O(log p) rounds, so for a log line, not for each step.
        """
        self.wait()
        return self._collective.consensus_distance(self._arrays())

    def synchronize(self) -> None:
        """Replace the weights and the float buffers by their mean over all ranks. Collective.

        For an evaluation or a checkpoint of one common model; equal on all ranks to rounding.
        """
        self._check_attached()
        if self._model_buffers is not None:
            self._model_buffers.finish()
        self._average_weights()
        for buffer in self.model.buffers():
            if buffer.dtype in (torch.float32, torch.float64) and buffer.numel():
                flat = buffer.detach().numpy().reshape(-1).copy()
                self._collective.average(flat)
                buffer.copy_(torch.from_numpy(flat).view(buffer.shape))

    def stats(self) -> dict[str, Any]:
        """What was exchanged so far, by this rank.

        steps: optimizer steps, skipped ones included; rounds: exchanges of one array; bytes:
        payload put; waits: how often the training thread blocked, wait_s: for how many seconds;
        exchange_s: seconds from post to end, over all rounds; hidden: the part of that under
        compute, 0 to 1; distance: squared distance to the partner's weights (its gradients, with
        ``mix="gradients"``) in the last round, measured while mixing, and disagreement its root;
        skipped: rounds that push-sum left out; staleness: by rank received from, how many own
        steps late its values were mixed on average; mass: mean push-sum mass, 1 elsewhere.
        """
        meter = self._meter
        streams = [b.weights_stream or b.gradients_stream for b in self._buckets]
        distance = sum(stream.distance for stream in streams if stream is not None)
        masses = [stream.mass for stream in streams if isinstance(stream, PushSum)]
        hidden = 1.0 - meter.wait_s / meter.exchange_s if meter.exchange_s > 0 else 1.0
        return {
            "steps": self._steps,
            "rounds": meter.rounds,
            "bytes": meter.nbytes,
            "waits": meter.waits,
            "wait_s": meter.wait_s,
            "exchange_s": meter.exchange_s,
            "hidden": min(1.0, max(0.0, hidden)),
            "distance": distance,
            "disagreement": float(np.sqrt(distance)),
            "skipped": meter.skipped,
            "staleness": meter.staleness(),
            "mass": float(np.mean(masses)) if masses else 1.0,
        }

    def write(self, writer: Writer, step: int | None = None) -> None:
        """Log `stats` to a TensorBoard ``SummaryWriter`` under ``gossip/``, at `step`.

        step: the optimizer steps so far by default. Staleness goes as its mean and its maximum.
        """
        found = self.stats()
        edges = list(found.pop("staleness").values()) or [0.0]
        found |= {"staleness_mean": sum(edges) / len(edges), "staleness_max": max(edges)}
        at = found.pop("steps") if step is None else step
        found.pop("steps", None)
        for name, value in found.items():
            writer.add_scalar(f"gossip/{name}", value, at)

    # --- checkpoints ---------------------------------------------------------------------------

    def _facts(self) -> dict[str, Any]:
        return {
            **self.modes.facts(),
            "schedule": self.schedule.describe(),
            "buckets": [len(array) for array in self._arrays()],
        }

    def state_dict(self) -> dict[str, Any]:
        """What this rank needs, beside model and optimizer, to go on bit for bit. Collective.

        Each rank saves its own three: ``model.state_dict()``, ``optimizer.state_dict()`` and this.
        """
        self.wait()
        return {
            "facts": self._facts(),
            "steps": self._steps,
            "weights": [_state(bucket.weights_stream) for bucket in self._buckets],
            "gradients": [_state(bucket.gradients_stream) for bucket in self._buckets],
            "optimizer": [] if self._state is None else self._state.state(),
            "buffers": [] if self._model_buffers is None else self._model_buffers.state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken. Collective.

        After `attach` (which gives all ranks rank 0's weights) load this rank's own model, then
        its optimizer, then this. `ArgumentError` if the modes, the schedule or the buckets differ.
        """
        self._check_attached()
        saved, here = state["facts"], self._facts()
        for name in here:
            if saved.get(name) != here[name]:
                raise ArgumentError(
                    f"the checkpoint has {name}: {saved.get(name)!r}, this run has {here[name]!r}"
                )
        kept = [array.copy() for array in self._arrays()]
        buffers = [each.clone() for each in self.model.buffers()]
        self._whole()  # rounds under way end, and mix into what is put back below
        for array, values in zip(self._arrays(), kept, strict=True):
            array[:] = values
        for each, value in zip(self.model.buffers(), buffers, strict=True):
            each.copy_(value)
        self.group.agree("load_state_dict", {"steps": state["steps"]})
        self._steps, self._went_backward = int(state["steps"]), False
        for bucket, weights, gradients in zip(
            self._buckets, state["weights"], state["gradients"], strict=True
        ):
            if bucket.weights_stream is not None:
                bucket.weights_stream.load(weights)
            if bucket.gradients_stream is not None:
                bucket.gradients_stream.load(gradients)
        if self._state is not None:
            self._state.load(state["optimizer"])
        if self._model_buffers is not None:
            self._model_buffers.load(state["buffers"])

    # --- the end -------------------------------------------------------------------------------

    def _check_attached(self) -> None:
        if self._detached:
            raise ClosedError("this model was detached")

    def detach(self) -> None:
        """Finish the rounds under way and leave the model as it was found. Collective.

        Parameters keep their values, in memory of their own; hooks are gone; the optimizer's
        ``zero_grad`` is its own again. After a failure of the group no round is waited for.
        Further calls do nothing.
        """
        if self._detached:
            return
        try:
            if not self.group.failed:
                self._whole()
        except GossipError as error:
            self.group.abort(str(error))
            raise
        finally:
            self._leave()

    def _leave(self) -> None:
        self._detached = True
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        del self.optimizer.zero_grad
        if self._own_zero_grad is not None:
            self.optimizer.zero_grad = self._own_zero_grad  # type: ignore[method-assign]
        delattr(self.optimizer, MARK)
        if self._state is not None:
            self._state.release()
        for bucket in self._buckets:
            for parameter in bucket.parameters:
                delattr(parameter, MARK)
            bucket.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.detach()
        elif not self._detached:
            # Rounds may be under way that will never end: stop them, and tell the others.
            self.group.abort(f"{type(error).__name__}: {error}")
            self._leave()


def _state(stream: Stream | None) -> dict[str, Any] | None:
    return None if stream is None else stream.state()


def _backward_number() -> int:
    """Which backward pass this thread is in; -1 outside of one."""
    return int(torch._C._current_graph_task_id())


def _bytes_of(tensor: torch.Tensor) -> NDArray[np.uint8]:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()


def _set_bytes(tensor: torch.Tensor, blob: NDArray[np.uint8]) -> None:
    flat = torch.from_numpy(blob.copy()).view(tensor.dtype)
    with torch.no_grad():
        tensor.copy_(flat.view(tensor.shape))
