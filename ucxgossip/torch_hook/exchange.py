"""All that travels for one attached model: its streams, made, driven and saved together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils import _pytree as pytree

from ucxgossip.device import Device
from ucxgossip.errors import MismatchError
from ucxgossip.group import Group
from ucxgossip.mixing import (
    HELD_LANES,
    Collective,
    DeviceHeld,
    DeviceInPlace,
    Held,
    InPlace,
    Meter,
    Modes,
    Outer,
    PushSum,
    Stale,
    Stream,
    serve,
    weights_shift,
)
from ucxgossip.quarantine import Quarantine
from ucxgossip.schedule import Schedule
from ucxgossip.torch_hook.bucket import DTYPES, Bucket, Flat
from ucxgossip.torch_hook.state import ModelBuffers, OptimizerState


class Exchange:
    """Weights, gradients, the optimizer's state and the model's buffers, as `modes` says.

    device: what this rank's copy of the model is on, None for the CPU. devices: whether any rank's
    copy is on one.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        group: Group,
        modes: Modes,
        schedule: Schedule,
        runs: Sequence[Sequence[torch.nn.Parameter]],
        label: str = "model",
        device: Device | None = None,
        devices: bool = False,
    ) -> None:
        self.model, self.group, self.modes, self.schedule = model, group, modes, schedule
        # On a device the mixes of held weights, and of all behind them, end after backward.
        self._lanes = HELD_LANES if devices and modes.combine == "awc" else 1
        self.meter = Meter(quarantine=Quarantine(modes.nonfinite))
        serve(group)
        self.collective = Collective(group, self.meter.quarantine)
        self.buckets = [Bucket(group, run, modes.gradients_travel, device) for run in runs]
        # Whoever is wanted first comes first: backward completes the last bucket first.
        for bucket in reversed(self.buckets):
            if bucket.gradients is not None:
                bucket.gradients_stream = self._gradients_stream(bucket.gradients)
        for bucket in self.buckets:
            if modes.weights_travel:
                bucket.weights_stream = self._weights_stream(bucket)
        self.arrange(self.buckets)
        self.state = (
            OptimizerState(
                *(optimizer, self.buckets, group, schedule, self.meter, modes),
                *(label, self._lanes),
            )
            if modes.optimizer_state
            else None
        )
        self.buffers = (
            ModelBuffers(model, group, schedule, self.meter, modes) if modes.buffers else None
        )

    def _gradients_stream(self, flat: Flat) -> Stream:
        common = (self.group, flat.buffer, self.schedule, self.meter)
        if flat.on_device is not None:
            place = flat.on_device
            return DeviceInPlace(self.group, place, self.schedule, self.meter, what="gradients")
        if self.modes.staleness:
            return Stale(*common, self.modes.staleness, before=False, what="gradients")
        return InPlace(*common, what="gradients")

    def _weights_stream(self, bucket: Bucket) -> Stream:
        modes = self.modes
        common = (self.group, bucket.weights.buffer, self.schedule, self.meter)
        first = weights_shift(self.schedule) if modes.gradients_travel else 0
        place = bucket.weights.on_device
        if place is not None:
            on_device = DeviceHeld if modes.combine == "awc" else DeviceInPlace
            return on_device(
                self.group, place, self.schedule, self.meter, first, "weights", self._lanes
            )
        if modes.mix == "push_sum":
            return PushSum(*common, self.collective)
        if modes.outer is not None:
            return Outer(*common, modes.outer, first)
        if modes.staleness:
            return Stale(*common, modes.staleness, first, what="weights")
        make = Held if modes.combine == "awc" else InPlace
        return make(*common, first, "weights", self._lanes)

    def arrange(self, order: Sequence[Bucket]) -> None:
        """Send weights in this order of buckets from now on."""
        self._weights = [each.weights_stream for each in order if each.weights_stream is not None]

    # --- a step --------------------------------------------------------------------------------

    def begin(self) -> None:
        """The weights are equal on all ranks."""
        for bucket in self.buckets:
            for stream in (bucket.gradients_stream, bucket.weights_stream):
                if stream is not None:
                    stream.begin()
        if self.buffers is not None:
            self.buffers.begin()

    def settle(self) -> None:
        """Return once the optimizer may step."""
        for stream in self._weights:
            stream.settle()
        self.settle_state()

    def settle_state(self) -> None:
        """Return once the optimizer's state is whole."""
        if self.state is not None:
            self.state.settle()

    def post(self, stepped: bool) -> None:
        """Send what the step has left, in the order in which the next forward needs it.

        stepped: whether the optimizer did step.
        """
        position = self._position()
        for stream in self._weights:
            stream.post()
        if self.state is not None:
            self.state.post(position, stepped)
        if self.buffers is not None:
            self.buffers.post()

    def wait(self, buckets: Iterable[Bucket] | None = None) -> None:
        """Return once the weights of `buckets` (all by default) may be read."""
        for bucket in self.buckets if buckets is None else buckets:
            if bucket.weights_stream is not None:
                bucket.weights_stream.wait()

    def _position(self) -> int:
        return next((stream.position for stream in self._weights), 0)

    # --- exact, over all ranks -----------------------------------------------------------------

    @property
    def arrays(self) -> list[NDArray[Any]]:
        """The weights, one array a bucket; of a device's, copies in host memory."""
        return [bucket.weights.read() for bucket in self.buckets]

    def broadcast(self) -> None:
        """Rank 0's weights, frozen parameters and buffers to all."""
        for bucket in self.buckets:
            values = bucket.weights.read()
            self.collective.broadcast(values)
            bucket.weights.write(values)
        rest = [p.data for p in self.model.parameters() if not p.requires_grad]
        rest += list(self.model.buffers())
        if not rest:
            return
        blob = np.concatenate([_bytes_of(tensor) for tensor in rest])
        self.collective.broadcast(blob)
        start = 0
        for tensor in rest:
            nbytes = tensor.numel() * tensor.element_size()
            _set_bytes(tensor, blob[start : start + nbytes])
            start += nbytes

    def finish(self) -> None:
        """End every round under way."""
        for bucket in self.buckets:
            for stream in (bucket.gradients_stream, bucket.weights_stream):
                if stream is not None:
                    stream.finish()
        for part in (self.state, self.buffers):
            if part is not None:
                part.finish()

    def average_weights(self) -> None:
        """The exact mean on all ranks; nothing is under way then."""
        for bucket in self.buckets:
            if bucket.weights_stream is not None:
                bucket.weights_stream.average(self.collective)
            else:
                values = bucket.weights.read()
                self.collective.average(values)
                bucket.weights.write(values)

    def average_buffers(self) -> None:
        """The exact mean of the float buffers on all ranks.

        In quarantine each element's mean is over the ranks where it is finite. A mask's infinities
        stay; a NaN is replaced.
        """
        if self.buffers is not None:
            self.buffers.finish()
        for buffer in self.model.buffers():
            if buffer.dtype in DTYPES and buffer.numel():
                own = buffer.detach().cpu().numpy().reshape(-1)
                flat = self._mean_of_finite(own)
                buffer.copy_(torch.from_numpy(flat).view(buffer.shape))

    def _mean_of_finite(self, own: NDArray[Any]) -> NDArray[Any]:
        """The mean over ranks of each element of a buffer, where there is one."""
        finite = np.isfinite(own)
        if not self.meter.quarantine.whole:
            flat = own.copy()
            self.collective.average(flat)
            return np.where(finite, flat, own)  # a mask's -inf has no mean
        flat, share = np.where(finite, own, 0), finite.astype(own.dtype)
        self.collective.average(flat)
        self.collective.average(share)
        wanted = (share > 0) & ~np.isinf(own)
        return np.where(wanted, flat / np.where(wanted, share, 1), own)

    # --- checkpoints ---------------------------------------------------------------------------

    def save(self) -> dict[str, Any]:
        """What a resumed run needs beside the tensors themselves."""
        self.wait()
        saved = {
            "weights": [_state(bucket.weights_stream) for bucket in self.buckets],
            "gradients": [_state(bucket.gradients_stream) for bucket in self.buckets],
            "optimizer": [] if self.state is None else self.state.state(),
            "buffers": [] if self.buffers is None else self.buffers.state(),
        }
        found: dict[str, Any] = pytree.tree_map(_to_torch, saved)
        return found

    def quiet(self) -> None:
        """End every round under way and let none of them change weights or buffers."""
        weights = [bucket.weights.tensor.clone() for bucket in self.buckets]
        buffers = [each.clone() for each in self.model.buffers()]
        self.finish()
        for bucket, values in zip(self.buckets, weights, strict=True):
            bucket.weights.tensor.copy_(values)
        for buffer, value in zip(self.model.buffers(), buffers, strict=True):
            buffer.copy_(value)

    def load(self, saved: Mapping[str, Any]) -> None:
        """Continue from `saved`. After `quiet`, and a meeting of all ranks."""
        saved = pytree.tree_map(_to_numpy, dict(saved))
        for bucket, weights, gradients in zip(
            self.buckets, saved["weights"], saved["gradients"], strict=True
        ):
            if bucket.weights_stream is not None:
                bucket.weights_stream.load(weights)
            if bucket.gradients_stream is not None:
                bucket.gradients_stream.load(gradients)
        if self.state is not None:
            self.state.load(saved["optimizer"], self._position())
        if self.buffers is not None:
            self.buffers.load(saved["buffers"])

    # --- ranks that come in --------------------------------------------------------------------

    @property
    def complete(self) -> bool:
        """Whether every stream that there will be is there."""
        return self.state is None or bool(self.state.streams)

    def _streams(self) -> list[Stream]:
        """Every stream there is, in the same order on all ranks."""
        found = [each for b in self.buckets for each in (b.gradients_stream, b.weights_stream)]
        streams = [stream for stream in found if stream is not None]
        streams += [] if self.state is None else self.state.streams
        return streams + ([] if self.buffers is None else self.buffers.streams)

    def places(self) -> list[dict[str, Any]]:
        """Where each stream is, for `enter` on a rank that comes in."""
        places = [stream.place() for stream in self._streams()]
        found: list[dict[str, Any]] = pytree.tree_map(_to_torch, places)
        return found

    def enter(self, places: Sequence[Mapping[str, Any]], later: int) -> None:
        """Go on with the others, who were at `places` so many rounds ago.

        Their gradients of the step under way have been put already: this rank passes them over.
        """
        streams = self._streams()
        if len(places) != len(streams):
            raise MismatchError(
                f"the others exchange {len(places)} arrays of this model, this rank {len(streams)}"
            )
        found = pytree.tree_map(_to_numpy, list(places))
        for stream, place in zip(streams, found, strict=True):
            stream.enter(place, int(place["position"]) + later)
        if self.buffers is not None:
            self.buffers.begin()

    # --- the end -------------------------------------------------------------------------------

    def adopt(self) -> None:
        """Move the parameters' data into the buckets."""
        for bucket in self.buckets:
            bucket.adopt()

    def release(self) -> None:
        """Give parameters, gradients and state memory of their own again."""
        if self.state is not None:
            self.state.release()
        for bucket in self.buckets:
            bucket.release()

    def give_back(self, streams: bool) -> None:
        """After `finish` and `release`: memory and mailboxes, for the next model to have.

        Not those of push-sum's channels, whose messages wait for nobody. streams: False where any
        rank keeps its mailboxes, which have staging of its device: then all ranks keep theirs.
        """
        for bucket in self.buckets:
            bucket.give_back(self.group, streams)
        for part in (self.state, self.buffers):
            if part is not None:
                part.give_back(streams)
        self.collective.give_back()

    def stats(self) -> dict[str, Any]:
        """The part of `Gossip.stats` that the rounds make."""
        meter = self.meter
        streams = [each.weights_stream or each.gradients_stream for each in self.buckets]
        distance = sum(stream.distance for stream in streams if stream is not None)
        ways = [
            stream.ways
            for bucket in self.buckets
            for stream in (bucket.gradients_stream, bucket.weights_stream)
            if isinstance(stream, DeviceInPlace)
        ]
        masses = [stream.mass for stream in streams if isinstance(stream, PushSum)]
        hidden = 1.0 - meter.wait_s / meter.exchange_s if meter.exchange_s > 0 else 1.0
        return {
            "rounds": meter.rounds,
            "bytes": meter.nbytes,
            "waits": meter.waits,
            "wait_s": meter.wait_s,
            "exchange_s": meter.exchange_s,
            "hidden": min(1.0, max(0.0, hidden)),
            "distance": distance,
            "disagreement": float(np.sqrt(distance)),
            "skipped": meter.skipped,
            "nonfinite": dict(sorted(meter.quarantine.counts.items())),
            "staleness": meter.staleness(),
            "mass": float(np.mean(masses)) if masses else 1.0,
            "members": len(self.group.members),
            "broken": meter.broken,
            "direct_ways": len(set.intersection(*ways)) if ways else 0,
            "lost": [dict(loss._asdict()) for loss in self.group.losses],
            "came": [dict(each._asdict()) for each in self.group.arrivals],
        }


def _state(stream: Stream | None) -> dict[str, Any] | None:
    return None if stream is None else stream.state()


def _to_torch(value: object) -> object:
    """Arrays as tensors, which ``torch.load(weights_only=True)`` admits."""
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


def _to_numpy(value: object) -> object:
    return value.numpy() if isinstance(value, torch.Tensor) else value


def _bytes_of(tensor: torch.Tensor) -> NDArray[np.uint8]:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _set_bytes(tensor: torch.Tensor, blob: NDArray[np.uint8]) -> None:
    flat = torch.from_numpy(blob.copy()).view(tensor.dtype)
    with torch.no_grad():
        tensor.copy_(flat.view(tensor.shape))
