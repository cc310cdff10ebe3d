"""Streams of arrays on a device: as `InPlace` and `Held`, but nobody waits for the mixes.

`post` records an event on the stream that computes: the engine reads the array once that has
completed. `wait` returns when this rank's values have left, the partner's have come and their mixes
are enqueued, and lets the computing stream wait for those. So the host waits for the partner, and
for the device to have done what came before the post; and a round ends in the books (its distance,
what was left out) when the next one is posted.

Between devices of one host the chunks go straight (`direct`), opened by `begin`.

Rejected for now, and refused by name in `attach`: `Stale`, `PushSum` and `Outer`, which compute on
the array themselves; they want kernels of their own.

Untested on hardware: proved with a device whose events complete late (tests/fake_device.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ucxgossip.buffer import Buffer
from ucxgossip.device import Device, DeviceMemory
from ucxgossip.group import Group
from ucxgossip.mixing.collective import Collective
from ucxgossip.mixing.direct import open_ways, serve
from ucxgossip.mixing.meter import Meter
from ucxgossip.mixing.stream import State
from ucxgossip.schedule import Schedule


@dataclass(frozen=True)
class DeviceArray:
    """`count` elements of `dtype` from the start of `memory` on."""

    device: Device
    memory: DeviceMemory
    dtype: np.dtype[Any]
    count: int

    @property
    def buffer(self) -> Buffer:
        """What rounds are posted with; it keeps the memory alive."""
        nbytes = self.count * self.dtype.itemsize
        return Buffer(self.memory.address, nbytes, self.dtype, self.memory)

    def read(self) -> NDArray[Any]:
        """A copy in host memory, after the current stream's work; waits for it."""
        found = np.empty(self.count, self.dtype)
        self.device.read(self.memory.address, found)
        return found

    def write(self, values: NDArray[Any]) -> None:
        """Replace all values, after the current stream's work; waits for it."""
        self.device.write(self.memory.address, values)


class DeviceInPlace:
    """`InPlace` for an array on a device."""

    held = False

    def __init__(
        self,
        group: Group,
        array: DeviceArray,
        schedule: Schedule,
        meter: Meter,
        position: int = 0,
        what: str = "values",
    ) -> None:
        self.what = what
        self.group, self.array, self.schedule, self.meter = group, array, schedule, meter
        self.buffer = array.buffer
        serve(group)
        self.mailbox = group.mailbox(self.buffer.nbytes)
        self.staging = group.engine.equip(self.mailbox, array.device)
        self.position = position
        self.distance = 0.0
        self.open = False
        self._running = self._begun = False
        self._joined: set[int] = set()

    @property
    def ways(self) -> set[int]:
        """The ranks into whose devices chunks are copied straight."""
        return set(self.staging.ways)

    def begin(self) -> None:
        """Open the ways to devices of this host, once; the first round follows the first step."""
        if not self._begun and self.group.size > 1:
            open_ways(self.group, self.staging)
        self._begun = True

    def post(self) -> None:
        """Start a round with what the current stream leaves in the array.

        No stream may touch the array until it has been through `wait`.
        """
        if self.group.size > 1:
            self._end()
            self.staging.ready()
            posted = self.group.post_step(
                self.mailbox,
                self.buffer,
                self.buffer,
                self.schedule,
                self.position,
                held=self.held,
                whole=self.meter.quarantine.whole,
            )
            if posted:
                self.meter.posted(self.group, self.mailbox)
            self._joined.clear()
            self.open = self._running = True
        self.position += 1

    def _end(self) -> None:
        """Wait until the device has done its part of the last round, and count it."""
        if self._running:
            try:
                self.distance = self.meter.wait(self.group, self.mailbox, self.what) or 0.0
            finally:
                self._running = self.group.engine.active(self.mailbox)

    def _join(self) -> None:
        """Wait until all of the round is enqueued, and let the current stream wait for that.

        The device has then done all that came before the post.
        """
        if self.open:
            self.group.look_around()
            whole = self.meter.launched(self.group, self.mailbox)
            self.open = False
            if not whole:
                return  # broken off: the device has settled
            self._joined.add(self.staging.join_stream())
        elif self._running and self._joined:
            stream = self.array.device.current_stream()
            if stream not in self._joined:
                self._joined.add(self.staging.join_stream())

    def wait(self) -> None:
        """The current stream may read the array, in what it is given from now on."""
        self._join()

    def settle(self) -> None:
        """The current stream may write the array, in what it is given from now on."""
        self._join()

    def finish(self) -> None:
        """End the round under way; returns once the device is done with it."""
        self.settle()
        self._end()

    def average(self, collective: Collective) -> None:
        """Finish, and replace the array by its mean over all ranks, on the host. Collective."""
        self.finish()
        values = self.array.read()
        collective.average(values)
        self.array.write(values)

    def state(self) -> State:
        """The schedule's step of the next round."""
        self.finish()
        return {"position": self.position}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take the next round from where `state` was."""
        self.finish()
        self.group.restart(self.mailbox)
        self.position = int(state["position"])

    def place(self) -> State:
        """The next step, and as which round of the mailbox it goes."""
        return {"position": self.position, "round": self.mailbox.round}

    def enter(self, place: State, position: int) -> None:
        """Go on from `position`."""
        self.mailbox.round = int(place["round"]) + position - int(place["position"])
        self.position = position

    def give_back(self) -> None:
        """Nothing: the mailbox has staging of its device."""


class DeviceHeld(DeviceInPlace):
    """`Held` for an array on a device: travels at once, mixes only at `settle`."""

    held = True

    def begin(self) -> None:
        """The first weights travel under the first step."""
        super().begin()
        self.post()

    def wait(self) -> None:
        """Nothing: a round that is held changes nothing."""

    def settle(self) -> None:
        """Let the round mix behind what the current stream holds, and that stream wait for it."""
        if self.open:
            self.staging.unheld()
            self.group.engine.unhold(self.mailbox)
        self._join()

    def state(self) -> State:
        """The step of the round under way, which a resumed run posts again."""
        return {"position": self.position - int(self.open)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Post the round that was under way; the one that is now mixes into nothing."""
        loaded = self.array.read()
        self.finish()
        self.array.write(loaded)
        self.group.restart(self.mailbox)
        self.position = int(state["position"])
        self.post()
