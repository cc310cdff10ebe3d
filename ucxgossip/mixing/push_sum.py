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
other mode. The optimizer's step is taken on z; a rank's update so counts by its mass.

Half of the mass goes, whatever weight the schedule gives a round. Each edge of the schedule has
slots of its own (`Channel`), log2 p for `Dissemination`, since a slot shared by several senders
would make the fast ones wait for the slow. Schedules that rotate would need one for every other
rank, and are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ucxgossip.buffer import Buffer
from ucxgossip.channel import Channel
from ucxgossip.errors import ScheduleError
from ucxgossip.group import Group
from ucxgossip.kernels.cpu import mix
from ucxgossip.mixing.collective import Collective
from ucxgossip.mixing.meter import Meter
from ucxgossip.mixing.stream import State, array_of
from ucxgossip.schedule import Schedule, repeats

TAIL = 16
"""Bytes after the values: mass (float64) and the sender's step (int64)."""

LEAST_MASS = 2.0**-40
"""A rank with less keeps it: another halving would not be worth a message."""


def check_push_sum(schedule: Schedule) -> None:
    """`ScheduleError` for a schedule whose partners are not the same in each period."""
    if not repeats(schedule):
        raise ScheduleError(
            f"mix='push_sum' keeps a slot for each partner, and {schedule.describe()} has a new "
            f"one each period; pass schedule=ug.Dissemination({schedule.size})"
        )


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
        region = group.allocate(self.nbytes + TAIL)
        raw = region.view(np.uint8, self.nbytes + TAIL)
        self.outgoing = Buffer.of(raw, region)
        self._values = region.view(self.array.dtype, len(self.array))
        self._mass = region.view(np.float64, 1, self.nbytes)
        self._step = region.view(np.int64, 1, self.nbytes + 8)
        parts = [schedule.round(group.rank, step) for step in range(schedule.period)]
        self.edges = [
            Channel(group, self.nbytes + TAIL, part.to, part.sender)
            for part in (parts if group.size > 1 else [])
        ]

    def begin(self) -> None:
        """Nothing: the first message follows the first step."""

    def post(self) -> None:
        """Put to this step's partner unless its slot is full, then take what has come."""
        self.position += 1
        self._open = True
        if self.edges:
            self.group.look_around()
            self._put(self.edges[(self.position - 1) % len(self.edges)])
            self._collect()

    def _put(self, edge: Channel) -> None:
        if edge.to is None:
            return
        # One outgoing copy for all edges: the last put may still read it.
        if any(each.busy for each in self.edges) or not edge.free or self.mass < LEAST_MASS:
            self.meter.skipped += 1
            return
        self.mass /= 2
        self._values[:] = self.array
        self._mass[0], self._step[0] = self.mass, self.position
        edge.put(self.outgoing)
        self.meter.posted(self.group, edge.mailbox)

    def wait(self) -> None:
        """Take what has come, once a step: the first forward may change weights, no later one."""
        if self._open:
            self._open = False
            self._collect()

    def _collect(self) -> None:
        for edge in self.edges:
            while edge.arrived:
                self._take(edge)

    def _take(self, edge: Channel) -> None:
        values = edge.view(self.array.dtype, len(self.array))
        mass = float(edge.view(np.float64, 1, self.nbytes)[0])
        step = int(edge.view(np.int64, 1, self.nbytes + 8)[0])
        total = self.mass + mass
        self.distance = float(mix(self.array, values, self.array.dtype.type(mass / total)))
        self.mass = total
        edge.release()
        assert edge.sender is not None
        self.meter.mixed(edge.sender, max(0, self.position - step))

    def settle(self) -> None:
        """Nothing: the array changes in `post` and `wait` only."""

    def finish(self) -> None:
        """Take every message that was ever put here. Collective: no rank puts meanwhile."""
        if not self.edges:
            return
        for edge in self.edges:
            edge.wait_sent()
        sent = self.collective.table(np.array([edge.sent for edge in self.edges], np.int64))
        for index, edge in enumerate(self.edges):
            while edge.sender is not None and edge.taken < sent[edge.sender, index]:
                edge.wait_arrived(self.group.timeout)
                self._take(edge)

    def average(self, collective: Collective) -> None:
        """Finish, and take the mass-weighted mean on all ranks, each with mass 1. Collective."""
        self.finish()
        self.array *= self.array.dtype.type(self.mass)
        collective.average(self.array)
        self.mass = 1.0

    def state(self) -> State:
        """Mass and step, with nothing under way."""
        self.finish()
        return {"position": self.position, "mass": self.mass}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue with the mass of `state`."""
        loaded = self.array.copy()
        self.finish()
        self.array[:] = loaded
        self.position, self.mass = int(state["position"]), float(state["mass"])
