"""What else a step leaves behind: the optimizer's state and the model's buffers.

The optimizer makes its state in its first step, so that is when it is moved into registered
memory: every float tensor of the state that has its parameter's shape (momentum; Adam's m and v,
together, since one without the other does not fit it). Buffers (the statistics of batch norm) are
written by every forward and may be replaced, so they are copied out and in; their rounds end one
step late, and a rank waits only for what is later than that.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ucxgossip.errors import ArgumentError, ModelError
from ucxgossip.group import Group
from ucxgossip.mixing import DeviceInPlace, InPlace, Meter, Modes, Stale, Stream
from ucxgossip.schedule import Schedule
from ucxgossip.torch_hook.bucket import DTYPES, Bucket, Flat


def check_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """`ModelError` for an optimizer that is known to keep no state that could be mixed."""
    plain = isinstance(optimizer, torch.optim.SGD)
    if plain and not any(each.get("momentum") for each in optimizer.param_groups):
        raise ModelError(
            "optimizer_state=True, but SGD without momentum keeps no state; leave it False"
        )


class OptimizerState:
    """The state tensors of one optimizer, exchanged after each step with the weights."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        buckets: Sequence[Bucket],
        group: Group,
        schedule: Schedule,
        meter: Meter,
        modes: Modes,
        label: str = "model",
        lanes: int = 1,
    ) -> None:
        self._lanes = lanes
        self.label = f"optimizer state of {label}"
        self.optimizer, self.buckets, self.group = optimizer, list(buckets), group
        self.schedule, self.meter, self.modes = schedule, meter, modes
        self.flats: list[tuple[Bucket, str, Flat]] = []
        self.streams: list[Stream] = []
        self._loaded: Sequence[Mapping[str, Any]] | None = None
        self._tried = 0
        self._stepped = False

    def _names(self, bucket: Bucket) -> list[str]:
        names = {
            name
            for parameter in bucket.parameters
            for name, value in self.optimizer.state.get(parameter, {}).items()
            if torch.is_tensor(value)
            and value.shape == parameter.shape
            and value.dtype == parameter.dtype
            and value.ndim > 0
        }
        return sorted(names)

    def _make(self, position: int, stepped: bool) -> None:
        """Registered memory and a stream for every kind of state that any rank has.

        Not before every rank has stepped: a `GradScaler` may have skipped the first on some.
        """
        self._tried += 1
        mine = json.dumps([stepped, [self._names(bucket) for bucket in self.buckets]])
        key = f"{self.label}, step {self._tried}"
        everyone = json.loads(self.group.share(key, mine.encode(), _union, once=self.label))
        if everyone is None:
            return
        for bucket, names in zip(self.buckets, everyone, strict=True):
            for name in names:
                flat = Flat(self.group, bucket.parameters, bucket.device)
                self.flats.append((bucket, name, flat))
                with self.group.naming(self.label):
                    self.streams.append(self._stream(flat, position, name))
        if not self.flats:
            raise ModelError(
                f"optimizer_state=True, but {type(self.optimizer).__name__} keeps no state of its "
                "parameters' shape; leave it False"
            )
        if self._loaded is not None:
            _check_kinds(self._loaded, self.streams)
            for stream, state in zip(self.streams, self._loaded, strict=True):
                stream.load(state)
            self._loaded = None

    def _stream(self, flat: Flat, position: int, name: str) -> Stream:
        common = (self.group, flat.buffer, self.schedule, self.meter)
        if flat.on_device is not None:
            place = flat.on_device
            common_there = (self.group, place, self.schedule, self.meter)
            return DeviceInPlace(*common_there, position, name, self._lanes)
        if self.modes.staleness:
            return Stale(*common, self.modes.staleness, position, what=name)
        return InPlace(*common, position, name, self._lanes)

    def _adopt(self) -> None:
        """Make every state tensor live in its place; those the optimizer made anew are copied."""
        state = self.optimizer.state
        for bucket, name, flat in self.flats:
            for parameter, view in zip(bucket.parameters, flat.views, strict=True):
                entry = state.get(parameter)
                if entry and name in entry and entry[name] is not view:
                    view.copy_(entry[name])
                    entry[name] = view

    def take_over(self) -> None:
        """Make what the others made after their first step; the optimizer has its state."""
        while not self.flats:
            self._make(0, stepped=True)
        self._adopt()
        self._stepped = True

    def post(self, position: int, stepped: bool) -> None:
        """Send the state that the step left; `position` is the weights' step of the schedule."""
        self._stepped |= stepped
        if not self.flats:
            self._make(position, self._stepped)
        self._adopt()
        for stream in self.streams:
            stream.post()

    def settle(self) -> None:
        """Return once the optimizer may step."""
        for stream in self.streams:
            stream.settle()

    def finish(self) -> None:
        """End all rounds under way."""
        for stream in self.streams:
            stream.finish()

    def state(self) -> list[dict[str, Any]]:
        """Of each stream, what a resumed run needs."""
        return [stream.state() for stream in self.streams]

    def load(self, states: Sequence[Mapping[str, Any]], position: int) -> None:
        """Continue from `states`: at once, or when the first step makes the streams.

        Without any they go on at `position`: the state was saved before its first round.
        """
        if not self.streams:
            self._loaded = list(states) or None
            return
        states = list(states) or [{"position": position, "pending": []} for _ in self.streams]
        _check_kinds(states, self.streams)
        for stream, each in zip(self.streams, states, strict=True):
            stream.load(each)

    def release(self) -> None:
        """Give the state memory of its own again."""
        for bucket, name, flat in self.flats:
            for parameter, view in zip(bucket.parameters, flat.views, strict=True):
                entry = self.optimizer.state.get(parameter)
                if entry and entry.get(name) is view:
                    entry[name] = view.clone()

    def give_back(self, streams: bool) -> None:
        """After `release`: memory, and the streams' mailboxes, for others to have."""
        for _, _, flat in self.flats:
            flat.give_back(self.group)
        for stream in self.streams if streams else ():
            stream.give_back()


def _check_kinds(states: Sequence[Mapping[str, Any]], streams: Sequence[Stream]) -> None:
    if len(states) != len(streams):
        raise ArgumentError(
            f"the checkpoint has {len(states)} arrays of optimizer state, this optimizer makes "
            f"{len(streams)}; use the same optimizer with the same settings"
        )


def _union(blobs: list[bytes]) -> bytes:
    """The names that any rank has, bucket by bucket; null until all have stepped.

    A parameter may be unused on some ranks.
    """
    told = [json.loads(blob) for blob in blobs]
    if not all(stepped for stepped, _ in told):
        return b"null"
    buckets = zip(*(names for _, names in told), strict=True)
    return json.dumps(
        [sorted({n for names in bucket for n in names}) for bucket in buckets]
    ).encode()


class ModelBuffers:
    """The float buffers of a model, mixed one step late.

    What is infinite or NaN when all ranks have rank 0's buffers is a mask, and no damage: zeros
    travel in its place, so that it holds nothing in quarantine.
    """

    def __init__(
        self, model: torch.nn.Module, group: Group, schedule: Schedule, meter: Meter, modes: Modes
    ) -> None:
        self.model, self.group, self.meter = model, group, meter
        self._masks: dict[str, torch.Tensor] | None = None
        self.parts: list[tuple[list[str], Flat, Stream]] = []
        for dtype in DTYPES:
            named = [(name, each) for name, each in self._buffers().items() if each.dtype == dtype]
            if named:
                flat = Flat(group, [each for _, each in named])
                late = max(1, modes.staleness)
                stream = Stale(group, flat.buffer, schedule, meter, late, what="buffers")
                self.parts.append(([name for name, _ in named], flat, stream))

    @property
    def streams(self) -> list[Stream]:
        """One for each dtype."""
        return [stream for _, _, stream in self.parts]

    def _buffers(self) -> dict[str, torch.Tensor]:
        return {name: each for name, each in self.model.named_buffers() if each.numel()}

    def begin(self) -> None:
        """The buffers are equal on all ranks. Calls after the first do nothing."""
        if self._masks is None:
            self._masks = {}
            for name, each in self._buffers().items() if self.meter.quarantine.whole else ():
                mask = ~each.detach().isfinite()
                if bool(mask.any()):
                    self._masks[name] = mask

    def _copy(self, out: bool) -> None:
        buffers, masks = self._buffers(), self._masks or {}
        with torch.no_grad():
            for names, flat, _ in self.parts:
                for name, view in zip(names, flat.views, strict=True):
                    if out:
                        view.copy_(buffers[name])
                        if name in masks:
                            view[masks[name]] = 0
                        continue
                    mixed = view.isfinite()  # a mask's -inf has no difference to another
                    if name in masks:
                        mixed &= ~masks[name]
                    buffers[name].copy_(torch.where(mixed, view, buffers[name]))

    def post(self) -> None:
        """Add what has come in, and send what the buffers hold now."""
        self._copy(out=True)
        for _, _, stream in self.parts:
            stream.post()
        self._copy(out=False)

    def finish(self) -> None:
        """Add what is under way."""
        self._copy(out=True)
        for _, _, stream in self.parts:
            stream.finish()
        self._copy(out=False)

    def state(self) -> list[dict[str, Any]]:
        """Of each dtype's stream, what a resumed run needs."""
        return [stream.state() for _, _, stream in self.parts]

    def load(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Continue from `states`."""
        for (_, _, stream), each in zip(self.parts, states, strict=True):
            stream.load(each)

    def give_back(self, streams: bool) -> None:
        """After `finish`: memory, and the streams' mailboxes, for others to have."""
        for _, flat, stream in self.parts:
            flat.give_back(self.group)
            if streams:
                stream.give_back()
