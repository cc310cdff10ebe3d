"""Push-sum: gossip that waits for nobody and loses nothing.

Each rank holds values z and a mass m, 1 at first; ``sum(m z)`` over all ranks, messages under way
included, is what gossip keeps. A rank halves its mass and puts (z, m/2) to its partner; whoever
receives (y, n) takes ``z += n / (m + n) * (y - z)`` and ``m += n``. If the partner's slot is not
free, nothing is put and the mass stays; if nothing has come, nothing is added: either side may
skip a round, and the mean keeps. Where nobody skips, m is 1 after each round and the weight 1/2:
the rounds of `InPlace`, bit for bit. Kempe, Dobra, Gehrke 2003; stochastic gradient push, Assran
et al. 2019 (arXiv 1811.10792).

This is push-sum written in z, the values that the model computes with, where the paper keeps
x = m z: the sender then puts its weights as they are, and the receiver runs the same mix as every
other mode. The paper takes the optimizer's step on x, which in z is the step divided by m: else
updates would count by mass, and a slow rank, which takes in more than it gives away, would drown
those of the others. A rank that holds little divides by 1 / MOST at least.

When members are lost, a message that its receiver had not read gives its mass back to its sender;
what a lost rank held is lost with it. The mean of those who live stays theirs, weighted by mass.
A message that holds a NaN or an infinity is dropped whole with its mass: what is kept from then on
is the mean over the mass that is left. One that would meet a NaN here stays in its slot, so that
its sender finds the slot full and keeps its mass, where dropping would drain all ranks of theirs.
The unit is the message, not the chunk, since its mass is one; so it is looked through before it is
mixed.

Half of the mass goes, whatever weight the schedule gives a round. Each edge of the schedule has
slots of its own (`Channel`), log2 p for `Dissemination`, since a slot shared by several senders
would make the fast ones wait for the slow. Schedules that rotate would need one for every other
rank, and are refused.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ucxgossip.buffer import Buffer
from ucxgossip.channel import Channel
from ucxgossip.errors import ScheduleError
from ucxgossip.group import Group
from ucxgossip.kernels.cpu import CAME_IN, OWN, distance_of, mix, spoiled
from ucxgossip.mixing.collective import Collective
from ucxgossip.mixing.meter import Meter
from ucxgossip.mixing.stream import State, array_of
from ucxgossip.schedule import ALONE, Round, Schedule, repeats

TAIL = 16
"""Bytes after the values: mass (float64) and the sender's step (int64)."""

MOST = 4.0
"""By how much an update grows at most, where a rank's mass is small."""

LEAST_MASS = 2.0**-40
"""A rank with less keeps it: another halving would not be worth a message."""


def check_push_sum(schedule: Schedule) -> None:
    """`ScheduleError` for a schedule whose partners are not the same in each period."""
    if not repeats(schedule):
        raise ScheduleError(
            f"mix='push_sum' keeps a slot for each partner, and {schedule.describe()} has a new "
            f"one each period; pass schedule=ug.Dissemination({schedule.size})"
        )


@dataclass
class _Sent:
    """The last messages of an edge, as (number, mass): those that may not have been read."""

    last: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=8))


class PushSum:
    """The stream (see `stream.Stream`) whose rounds wait for nobody."""

    def __init__(
        self, group: Group, buffer: Buffer, schedule: Schedule, meter: Meter, collective: Collective
    ) -> None:
        check_push_sum(schedule)
        self.group, self.meter, self.collective = group, meter, collective
        self.array, self.nbytes = array_of(buffer), buffer.nbytes
        self.mass, self.position, self.distance = 1.0, 0, 0.0
        self._open = False
        self._before: NDArray[Any] | None = None
        region = group.allocate(self.nbytes + TAIL)
        raw = region.view(np.uint8, self.nbytes + TAIL)
        self.outgoing = Buffer.of(raw, region)
        self._values = region.view(self.array.dtype, len(self.array))
        self._mass = region.view(np.float64, 1, self.nbytes)
        self._step = region.view(np.int64, 1, self.nbytes + 8)
        self.schedule, self._epoch = schedule, group.epoch
        self.edges = [
            Channel(group, self.nbytes + TAIL, part.to, part.sender)
            for part in (self._parts() if group.size > 1 else [])
        ]
        self._sent = [_Sent() for _ in self.edges]
        self._spoiled(self.array[:0])  # compiled here rather than in a step
        spoiled(self.array[:0], self.array[:0])

    def _parts(self) -> list[Round]:
        """This rank's part in each step of a period, as many as if all ranks were there."""
        living, count = self.group.living(self.schedule), self.schedule.period
        parts = [living.round(self.group.rank, step) for step in range(living.period)]
        return [*parts, *[ALONE] * count][:count]

    def _follow(self) -> None:
        """After a change of members: new partners, and what nobody has read is one's own again."""
        while self._epoch != self.group.epoch:
            with self.group.lock:
                self.group.await_steady()
                epoch, parts = self.group.epoch, self._parts()
                for edge, sent in zip(self.edges, self._sent, strict=True):
                    if edge.to in self.group.members:
                        read = self.group.left_behind(edge.mailbox, edge.to)
                        if read is not None:
                            self.mass += sum(m for number, m in sent.last if number >= read)
                    sent.last.clear()
            for edge, part in zip(self.edges, parts, strict=True):
                edge.follow(part.to, part.sender)
            self._epoch = epoch

    def begin(self) -> None:
        """Nothing: the first message follows the first step."""

    def post(self) -> None:
        """Put to this step's partner unless its slot is full, then take what has come."""
        self._weigh()
        self.position += 1
        self._open = True
        if self.edges:
            self.group.look_around()
            self._follow()
            period = min(len(self.edges), self.group.living(self.schedule).period)
            self._put((self.position - 1) % period)
            self._collect()

    def _put(self, index: int) -> None:
        edge = self.edges[index]
        if edge.to is None:
            return
        # One outgoing copy for all edges: the last put may still read it.
        if any(each.busy for each in self.edges) or not edge.free or self.mass < LEAST_MASS:
            self.meter.skipped += 1
            return
        with self.group.lock:
            self.group.await_steady()
            if self._epoch != self.group.epoch:
                return
            self.mass /= 2
            self._values[:] = self.array
            self._mass[0], self._step[0] = self.mass, self.position
            self._sent[index].last.append((edge.sent, self.mass))
            edge.put(self.outgoing)
            self.meter.posted(self.group, edge.mailbox)

    def wait(self) -> None:
        """Take what has come, once a step: the first forward may change weights, no later one."""
        if self._open:
            self._open = False
            self._collect()

    def _collect(self) -> None:
        self._weigh()  # another optimizer may have stepped since the last round
        with self.group.lock:  # what is read here, its sender must not take back
            self.group.await_steady()
            if self._epoch == self.group.epoch:
                for edge in self.edges:
                    while edge.arrived and self._take(edge):
                        continue

    def _spoiled(self, values: Any) -> int:
        """As `kernels.cpu.spoiled`, for a message and this rank's values; 0 if all may be mixed."""
        if not self.meter.quarantine.whole:
            return 0
        if np.isfinite(distance_of(self.array, values, self.array.dtype.type(0))):
            return 0
        return int(spoiled(self.array, values))

    def _take(self, edge: Channel, last: bool = False) -> bool:
        """Take the oldest message, or drop it; False if it stays in its slot, which ends at last.

        `NonFiniteError` with that policy.
        """
        assert edge.sender is not None
        values = edge.view(self.array.dtype, len(self.array))
        found = self._spoiled(values)
        if found:
            leaves = last or bool(found & CAME_IN)
            if leaves:
                edge.release()
            whose = {edge.sender: int(found & CAME_IN != 0), self.group.rank: int(found & OWN != 0)}
            self.meter.quarantine.left_out(self.group.rank, whose, "weights")
            return leaves
        mass = float(edge.view(np.float64, 1, self.nbytes)[0])
        step = int(edge.view(np.int64, 1, self.nbytes + 8)[0])
        total = self.mass + mass
        self.distance = float(mix(self.array, values, self.array.dtype.type(mass / total)))
        self.mass = total
        edge.release()
        self.meter.mixed(edge.sender, max(0, self.position - step))
        return True

    def settle(self) -> None:
        """Remember the array of before the step, where its update is to be weighed by mass."""
        if self.mass != 1.0 and self._before is None:
            self._before = self.array.copy()

    def _weigh(self) -> None:
        """Divide what the steps since the last round have changed by the mass."""
        if self._before is not None:
            factor = self.array.dtype.type(min(MOST, 1.0 / self.mass))
            self.array -= self._before
            self.array *= factor
            self.array += self._before
            self._before = None

    def finish(self) -> None:
        """Take every message that was ever put here. Collective: no rank puts meanwhile."""
        self._weigh()
        if self.edges:
            self.group.together(self._drain, self._follow)

    def _drain(self, epoch: int) -> bool:
        """Take every message under way; whether the members stayed those of `epoch`."""
        self._follow()
        if self._epoch != epoch:
            return False
        for edge in self.edges:
            edge.wait_sent()
        row = np.array([edge.sent for edge in self.edges], np.int64)
        sent = self.collective.table_within(row, epoch)
        if sent is None:
            return False
        for index, edge in enumerate(self.edges):
            while edge.sender is not None and edge.taken < sent[edge.sender, index]:
                if not edge.wait_arrived(self.group.timeout):
                    return False
                with self.group.lock:
                    self.group.await_steady()
                    if self.group.epoch != epoch:
                        return False
                    self._take(edge, last=True)
        return True

    def average(self, collective: Collective) -> None:
        """Finish, and take the mass-weighted mean on all ranks, each with mass 1. Collective."""
        self.finish()
        collective.average(self.array, self.mass)
        self.mass = 1.0

    def state(self) -> State:
        """Mass and step, with nothing under way."""
        self.finish()
        return {"position": self.position, "mass": self.mass}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue with the mass of `state`."""
        loaded = self.array.copy()
        self._before = None
        self.finish()
        self.array[:] = loaded
        self.position, self.mass = int(state["position"]), float(state["mass"])

    def place(self) -> State:
        """The next step."""
        return {"position": self.position}

    def enter(self, place: State, position: int) -> None:
        """Go on from `position` with a mass of 1: the mean is over one rank more."""
        self.position, self.mass = position, 1.0

    def give_back(self) -> None:
        """Nothing: a message may still be on its way, which nobody waits for."""
