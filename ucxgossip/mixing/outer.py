"""The outer optimizer's stream: slow weights and their change are what travels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ucxgossip.buffer import Buffer
from ucxgossip.group import Group
from ucxgossip.mixing.collective import Collective
from ucxgossip.mixing.meter import Meter
from ucxgossip.mixing.modes import Nesterov
from ucxgossip.mixing.stream import InPlace, State, array_of, registered
from ucxgossip.schedule import Schedule


class Outer:
    """The stream (see `stream.Stream`) of weights under `Nesterov`; the formula stands there."""

    def __init__(
        self,
        group: Group,
        buffer: Buffer,
        schedule: Schedule,
        meter: Meter,
        settings: Nesterov,
        position: int = 0,
    ) -> None:
        self.array, self.settings = array_of(buffer), settings
        count, dtype = len(self.array), self.array.dtype
        self._slow, self._change = (
            InPlace(group, registered(group, count, dtype), schedule, meter, position, what)
            for what in ("slow weights", "change of the weights")
        )
        self.velocity = np.zeros(count, dtype)
        self.open = False

    @property
    def distance(self) -> float:
        """Squared distance of the partners' slow weights in the last round."""
        return self._slow.distance

    @property
    def position(self) -> int:
        """The schedule's step of the next round."""
        return self._slow.position

    def begin(self) -> None:
        """The slow weights start where the weights do."""
        self._slow.array[:] = self.array

    def post(self) -> None:
        """Send the slow weights and how far the weights are from them."""
        np.subtract(self.array, self._slow.array, out=self._change.array)
        self._slow.post()
        self._change.post()
        self.open = True

    def wait(self) -> None:
        """Finish the outer step, if one is under way."""
        if not self.open:
            return
        self._slow.wait()
        self._change.wait()
        self.open = False
        self.velocity *= self.settings.momentum
        self.velocity += self._change.array
        self._slow.array += self.settings.rate * self._change.array
        self._slow.array += self.settings.rate * self.settings.momentum * self.velocity
        self.array[:] = self._slow.array

    settle = wait
    finish = wait

    def average(self, collective: Collective) -> None:
        """Finish, and replace the weights by their mean over all ranks. Collective."""
        self.wait()
        collective.average(self.array)
        self._slow.array[:] = self.array
        if collective.quarantine.whole and not np.isfinite(self.velocity).all():
            self.velocity[:] = 0  # of weights that the mean has just replaced

    def state(self) -> State:
        """Slow weights, velocity and the next step."""
        self.wait()
        return {
            "slow": self._slow.array.copy(),
            "velocity": self.velocity.copy(),
            "rounds": self._slow.state(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`."""
        loaded = self.array.copy()
        self.wait()
        self.array[:] = loaded
        self._slow.array[:], self.velocity[:] = state["slow"], state["velocity"]
        for stream in (self._slow, self._change):
            stream.load(state["rounds"])

    def place(self) -> State:
        """Where both streams are, slow weights and velocity."""
        return {
            "position": self.position,
            "slow": self._slow.place(),
            "change": self._change.place(),
            "values": self._slow.array.copy(),
            "velocity": self.velocity.copy(),
        }

    def enter(self, place: State, position: int) -> None:
        """Go on from `position`, with the slow weights of `place`."""
        self._slow.enter(place["slow"], position)
        self._change.enter(place["change"], position)
        self._slow.array[:], self.velocity[:] = place["values"], place["velocity"]

    def give_back(self) -> None:
        """Mailboxes and memory of both streams."""
        for stream in (self._slow, self._change):
            stream.give_back()
            stream.group.free(stream.buffer)
