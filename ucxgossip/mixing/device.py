"""Streams of arrays on a device: as `InPlace` and `Held`, but nobody waits for the mixes.

`post` records an event on the stream that computes: the engine reads the array once that has
completed. `wait` returns when this rank's values have left, the partner's have come and their mixes
are enqueued, and lets the computing stream wait for those. So the host waits for the partner, and
for the device to have done what came before the post; and a round ends in the books (its distance,
what was left out) when the next one by its mailbox is posted. What the books refuse is raised at
the wait after that, as for arrays on the CPU, and not in the midst of posting.

Held rounds mix behind a backward whose end the host does not see, and so does whatever comes in
after them, since there is one stream for it. So the next round goes by another mailbox
(`HELD_LANES`): with one the host would wait in `post` until backward has ended on the device, and
what it hands out next would find the device idle but for the optimizer's step.

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
from ucxgossip.engine.staging import Staging
from ucxgossip.errors import NonFiniteError
from ucxgossip.group import Group
from ucxgossip.mailbox import Mailbox
from ucxgossip.mixing.collective import Collective
from ucxgossip.mixing.direct import open_ways, serve
from ucxgossip.mixing.lanes import Lanes
from ucxgossip.mixing.meter import Meter
from ucxgossip.mixing.stream import State
from ucxgossip.schedule import Schedule

HELD_LANES = 2
"""Mailboxes of held streams, and of those posted with them, where any rank has a device."""


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
    """`InPlace` for an array on a device.

    lanes: how many mailboxes the rounds take in turn: so many may have mixes under way.
    """

    held = False

    def __init__(
        self,
        group: Group,
        array: DeviceArray,
        schedule: Schedule,
        meter: Meter,
        position: int = 0,
        what: str = "values",
        lanes: int = 1,
    ) -> None:
        self.what = what
        self.group, self.array, self.schedule, self.meter = group, array, schedule, meter
        self.buffer = array.buffer
        serve(group)
        self.lanes = Lanes.sharing(group, self.buffer.nbytes, lanes, what)
        self.stagings = {
            mailbox.index: group.engine.equip(mailbox, array.device)
            for mailbox in self.lanes.mailboxes
        }
        self.mailbox = self.lanes.at(position)  # of the last round
        self.position = position
        self.distance = 0.0
        self.open = self._begun = False
        self._running: dict[int, int] = {}  # by mailbox, the step whose round is not in the books
        self._joined: set[int] = set()  # streams that wait for the last round's mixes
        self._refused: NonFiniteError | None = None  # what an earlier round mixed, to be raised

    @property
    def staging(self) -> Staging:
        """The device side of the last round's mailbox."""
        return self.stagings[self.mailbox.index]

    @property
    def ways(self) -> set[int]:
        """The ranks into whose devices chunks are copied straight."""
        found = [set(staging.ways) for staging in self.stagings.values()]
        return set.intersection(*found) if found else set()

    def begin(self) -> None:
        """Open the ways to devices of this host, once; the first round follows the first step."""
        if not self._begun and self.group.size > 1:
            for staging in self.stagings.values():
                open_ways(self.group, staging)
        self._begun = True

    def post(self) -> None:
        """Start a round with what the current stream leaves in the array.

        No stream may touch the array until it has been through `wait`.
        """
        if self.group.size > 1:
            self.mailbox = self.lanes.at(self.position)
            self._end(self.mailbox)
            self.staging.ready()
            posted = self.group.post_step(
                self.mailbox,
                self.buffer,
                self.buffer,
                self.schedule,
                self.position,
                stride=len(self.lanes),
                held=self.held,
                whole=self.meter.quarantine.whole,
            )
            if posted:
                self.meter.posted(self.group, self.mailbox)
            self._joined.clear()
            self._running[self.mailbox.index] = self.meter.quarantine.step
            self.open = True
        self.position += 1

    def _end(self, mailbox: Mailbox) -> None:
        """Wait until the device has done its part of the mailbox's round, and count it."""
        step = self._running.get(mailbox.index)
        if step is not None:
            try:
                self.distance = self.meter.wait(self.group, mailbox, self.what, step=step) or 0.0
            except NonFiniteError as error:  # of a round that ended
                self._refused = self._refused or error
            finally:
                if not self.group.engine.active(mailbox):
                    del self._running[mailbox.index]

    def _join(self) -> None:
        """Wait until all of the round is enqueued, and let the current stream wait for that.

        The device has then done all that came before the post.
        """
        if self.open:
            self.group.look_around()
            whole = self.meter.launched(self.group, self.mailbox)
            self.open = False
            if whole:  # else broken off: the device has settled
                self._joined.add(self.staging.join_stream())
        elif self.mailbox.index in self._running and self._joined:
            stream = self.array.device.current_stream()
            if stream not in self._joined:
                self._joined.add(self.staging.join_stream())

    def _end_all(self) -> None:
        """End the rounds under way; what they refused is still to be raised."""
        self._join()
        for mailbox in self.lanes.oldest_first(self.position):
            self._end(mailbox)

    def _raise(self) -> None:
        refused, self._refused = self._refused, None
        if refused is not None:
            raise refused

    def wait(self) -> None:
        """The current stream may read the array, in what it is given from now on."""
        self._join()
        self._raise()

    def settle(self) -> None:
        """The current stream may write the array, in what it is given from now on."""
        self._join()
        self._raise()

    def finish(self) -> None:
        """End the rounds under way; returns once the device is done with them."""
        self._end_all()
        self._raise()

    def average(self, collective: Collective) -> None:
        """Finish, and replace the array by its mean over all ranks, on the host. Collective.

        What was refused until then is raised at the next wait: the others are here already.
        """
        self._end_all()
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
        self.lanes.restart()
        self.position = int(state["position"])

    def place(self) -> State:
        """The next step, and as which round of its mailbox each step goes."""
        return self.lanes.place(self.position)

    def enter(self, place: State, position: int) -> None:
        """Go on from `position`."""
        self.lanes.enter(place, position)
        self.position = position

    def give_back(self) -> None:
        """The mailboxes, without their device's side; the array is its owner's.

        Where no other rank's array is on a device, or it might still copy to slots on this one.
        """
        self.lanes.give_back()
        for mailbox in self.lanes.mailboxes:
            self.group.engine.unequip(mailbox)
        self.stagings.clear()


class DeviceHeld(DeviceInPlace):
    """`Held` for an array on a device: travels at once, mixes only at `settle`."""

    held = True

    def begin(self) -> None:
        """The first weights travel under the first step."""
        super().begin()
        self.post()

    def wait(self) -> None:
        """Nothing: a round that is held changes nothing."""

    def _join(self) -> None:
        """Let the round mix behind what the current stream holds, and that stream wait for it."""
        if self.open:
            self.staging.unheld()
            self.group.engine.unhold(self.mailbox)
        super()._join()

    def state(self) -> State:
        """The step of the round under way, which a resumed run posts again."""
        return {"position": self.position - int(self.open)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Post the round that was under way; the one that is now mixes into nothing."""
        loaded = self.array.read()
        self.finish()
        self.array.write(loaded)
        self.lanes.restart()
        self.position = int(state["position"])
        self.post()
