"""Streams: the rounds of one flat array, in the manners that wait differently.

| stream | mixes | who waits |
|---|---|---|
| `InPlace` | in the array, when it arrives | readers of the array, before they read |
| `Held` | in the array, when the owner says so | the owner, before its next step |
| `Stale` | beside the array, added at a later step | the owner, only for what is k steps late |
| `PushSum` (push_sum.py) | at a step boundary, whatever has come | nobody |
| `Outer` (outer.py) | slow weights and their change, then the array | as `InPlace` |

All have the same verbs: `begin` once the array holds its first values, `post` after it was
written, `settle` before the owner writes it, `wait` before anybody reads it, `finish` to end all
rounds under way, `average` for the exact mean (`begin` again after it), and `state`/`load` so that
a resumed run continues with the same partners.
Rejected: a flag for each manner in one class (every verb would be a table of cases).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ucxgossip.buffer import Buffer
from ucxgossip.errors import NonFiniteError
from ucxgossip.group import Group
from ucxgossip.mailbox import Mailbox
from ucxgossip.mixing.collective import Collective
from ucxgossip.mixing.lanes import Lanes
from ucxgossip.mixing.meter import Meter
from ucxgossip.schedule import Schedule

State = dict[str, Any]


class Stream(Protocol):
    """One flat array that is exchanged round by round."""

    @property
    def distance(self) -> float:
        """Squared distance to the partner's array in the last round mixed."""

    @property
    def position(self) -> int:
        """The schedule's step of the next round."""

    def begin(self) -> None:
        """The array holds its first values, equal on all ranks."""

    def post(self) -> None:
        """Start a round with what the array holds now."""

    def settle(self) -> None:
        """Return once the owner may write the array."""

    def wait(self) -> None:
        """Return once the array is whole and may be read."""

    def finish(self) -> None:
        """End all rounds under way and mix them. Collective where ranks do not run in step."""

    def average(self, collective: Collective) -> None:
        """Finish, and replace the array by its mean over all ranks. Collective."""

    def state(self) -> State:
        """What a resumed run needs; nothing under way is lost."""

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`. All ranks have met since their last round."""

    def place(self) -> State:
        """Where the stream is, for a rank that comes in: ``"position"``, and what belongs to it."""

    def enter(self, place: State, position: int) -> None:
        """Go on from `position` with the others, who were at `place` before."""

    def give_back(self) -> None:
        """After `finish`, the last call: others may have mailboxes and memory of its own."""


def registered(group: Group, count: int, dtype: np.dtype[Any]) -> Buffer:
    """`count` zeros in registered memory."""
    region = group.allocate(count * dtype.itemsize)
    return Buffer.of(region.view(dtype, count), region)


def array_of(buffer: Buffer) -> NDArray[Any]:
    """The array whose memory `buffer` is."""
    array = buffer.owner
    assert isinstance(array, np.ndarray)
    return array


class InPlace:
    """Rounds that put the array from where it is and mix into it as soon as the partner's comes.

    lanes: how many mailboxes they take in turn; partners have as many (`DeviceHeld`).
    """

    held = False

    def __init__(
        self,
        group: Group,
        buffer: Buffer,
        schedule: Schedule,
        meter: Meter,
        position: int = 0,
        what: str = "values",
        lanes: int = 1,
    ) -> None:
        self.what = what
        self.group, self.buffer, self.schedule, self.meter = group, buffer, schedule, meter
        self.array = array_of(buffer)
        self.lanes = Lanes.sharing(group, buffer.nbytes, lanes, what)
        self.mailbox = self.lanes.at(position)  # of the last round
        self.position = position
        self.open = False
        self.distance = 0.0

    def begin(self) -> None:
        """Nothing: the first round follows the first step."""

    def post(self) -> None:
        """Start a round; the array may not be touched until `wait`."""
        if self.group.size > 1:
            self.mailbox = self.lanes.at(self.position)
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
            self.open = True
        self.position += 1

    def wait(self) -> None:
        """Wait for the round under way, if any."""
        if self.open:
            self.group.look_around()
            try:
                self.distance = self.meter.wait(self.group, self.mailbox, self.what) or 0.0
            finally:  # interrupted or failed, it is open still: nobody reads it as if it were whole
                self.open = self.group.engine.active(self.mailbox)

    def settle(self) -> None:
        """Wait for the round under way, if any."""
        self.wait()

    def finish(self) -> None:
        """Wait for the round under way, if any."""
        self.settle()

    def average(self, collective: Collective) -> None:
        """Finish, and replace the array by its mean over all ranks. Collective."""
        self.finish()
        collective.average(self.array)

    def state(self) -> State:
        """The schedule's step of the next round."""
        self.wait()
        return {"position": self.position}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take the next round from where `state` was."""
        self.wait()
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
        """The mailboxes; the array is its owner's."""
        self.lanes.give_back()


class Held(InPlace):
    """Rounds that travel at once but mix only at `settle`: ``avg(w) - u``.

    Between steps the array is whole, and may be read but not written.
    """

    held = True

    def begin(self) -> None:
        """The first weights travel under the first step."""
        self.post()

    def wait(self) -> None:
        """Nothing: a round that is held changes nothing."""

    def settle(self) -> None:
        """Let the round mix, and wait for it."""
        if self.open:
            self.group.engine.unhold(self.mailbox)
            super().wait()

    def state(self) -> State:
        """The step of the round under way, which a resumed run posts again."""
        return {"position": self.position - int(self.open)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Post the round that was under way; the one that is now mixes into nothing."""
        loaded = self.array.copy()
        self.settle()
        self.array[:] = loaded
        self.lanes.restart()
        self.position = int(state["position"])
        self.post()


@dataclass
class _Flight:
    """Every `lateness`-th round of a `Stale` stream: its mailbox and its snapshot."""

    mailbox: Mailbox
    snapshot: Buffer
    number: int = -1
    flying: bool = False
    pending: bool = False


class Stale:
    """Rounds that may end up to `lateness` steps late, each mixed against its own snapshot.

    ``w += (w_j(t) - w_i(t)) / (2 k)`` with k = lateness and w(t) the snapshots of step t: since a
    round is a permutation, what one rank gains another loses, and the mean over ranks stays, at
    whatever step each rank adds it. The schedule's weight is divided by k: with the full 1/2, k
    corrections under way would pull further than the distance, and any lateness of two steps or
    more diverges on a schedule without rotation (the square of a mode at a small angle a of a
    permutation grows by ``1 - w a**2 + (2 k - 1) w**2 a**2`` a step, so that w must be below
    1 / (2 k - 1)).

    A correction that is left out because of a NaN or an infinity is zero on the rank that leaves it
    out alone, so that the mean moves by it.

    before: add what has come in before the snapshot is taken (weights), or after and until
    `settle` (gradients, whose old corrections must not travel on).
    """

    def __init__(
        self,
        group: Group,
        buffer: Buffer,
        schedule: Schedule,
        meter: Meter,
        lateness: int,
        position: int = 0,
        before: bool = True,
        what: str = "values",
    ) -> None:
        self.what = what
        self.group, self.schedule, self.meter = group, schedule, meter
        self.array, self.nbytes = array_of(buffer), buffer.nbytes
        self.position, self.before = position, before
        self.distance = 0.0
        self._flights = [
            _Flight(
                group.mailbox(buffer.nbytes), registered(group, len(self.array), self.array.dtype)
            )
            for _ in range(lateness)
        ]
        self.lanes = Lanes(group, [flight.mailbox for flight in self._flights], what)

    def begin(self) -> None:
        """Nothing: the first round follows the first step."""

    def post(self) -> None:
        """Add what has come in, snapshot the array and send it."""
        if self.group.size == 1:
            self.position += 1
            return
        flight = self._flights[self.position % len(self.lanes)]
        if self.before:
            self._collect()
        self._end(flight)
        correction = array_of(flight.snapshot).copy() if flight.pending else None
        if correction is not None and self.before:
            self.array += correction
        array_of(flight.snapshot)[:] = self.array
        if correction is not None and not self.before:
            self.array += correction
        flight.pending, flight.flying, flight.number = False, True, self.position
        posted = self.group.post_step(
            flight.mailbox,
            flight.snapshot,
            flight.snapshot,
            self.schedule,
            self.position,
            stride=len(self.lanes),
            weight=1.0 / len(self.lanes),
            how="delta",
            whole=self.meter.quarantine.whole,
        )
        if posted:
            self.meter.posted(self.group, flight.mailbox)
        if not self.before:
            self._collect()
        self.position += 1

    def _end(self, flight: _Flight) -> None:
        """Wait for its round; the snapshot is a correction then, if it ended whole."""
        if flight.flying:
            late = self.position - flight.number
            try:
                distance = self.meter.wait(self.group, flight.mailbox, self.what, late)
            except NonFiniteError:  # it ended; what was left out is zero in the correction
                flight.flying, flight.pending = False, True
                raise
            flight.flying, flight.pending = False, distance is not None
            self.distance = distance or 0.0

    def _collect(self) -> None:
        """Add the corrections of all rounds that have ended, the oldest first."""
        for flight in sorted(self._flights, key=lambda flight: flight.number):
            if flight.flying and not self.group.engine.active(flight.mailbox):
                self._end(flight)
            if flight.pending:
                self.array += array_of(flight.snapshot)
                flight.pending = False

    def settle(self) -> None:
        """Add what has come in since, where old corrections must not travel on."""
        if not self.before:
            self._collect()

    def wait(self) -> None:
        """Nothing: the array changes in `post` and `settle` only."""

    def finish(self) -> None:
        """Wait for every round under way and add its correction."""
        for flight in self._flights:
            self._end(flight)
        self._collect()

    def average(self, collective: Collective) -> None:
        """Finish, and replace the array by its mean over all ranks. Collective."""
        self.finish()
        collective.average(self.array)

    def state(self) -> State:
        """The next step and the corrections under way, which a resumed run adds in its turn."""
        for flight in self._flights:
            self._end(flight)
        pending = [
            (flight.number, array_of(flight.snapshot).copy())
            for flight in self._flights
            if flight.pending
        ]
        return {"position": self.position, "pending": pending}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue with the corrections of `state`."""
        for flight in self._flights:
            self._end(flight)
            flight.pending = False
        self.lanes.restart()
        self.position = int(state["position"])
        for number, correction in state["pending"]:
            flight = self._flights[number % len(self.lanes)]
            flight.number, flight.pending = number, True
            array_of(flight.snapshot)[:] = correction

    def place(self) -> State:
        """The next step, and as which round of its mailbox each step goes."""
        return self.lanes.place(self.position)

    def enter(self, place: State, position: int) -> None:
        """Go on from `position`."""
        self.lanes.enter(place, position)
        for flight in self._flights:
            flight.pending = flight.flying = False
        self.position = position

    def give_back(self) -> None:
        """Mailboxes and snapshots."""
        self.lanes.give_back()
        for flight in self._flights:
            self.group.free(flight.snapshot)
