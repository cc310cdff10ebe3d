"""Who comes in: ranks that ask to join a job that runs, and how this one does so itself.

A guest knocks at all doors until a member tells it who is there; when it may come in is for the
members' `Door` to say, and the leader proposes it with the next view. A rank that was started again
before anybody noticed its death is told to wait, and its predecessor is probed.

Rejected: guests that ask only the leader (who that is, a guest cannot know, and it may be dying).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from ucxgossip.errors import ExchangeTimeoutError, RankMissingError
from ucxgossip.members.agreement import Message, View
from ucxgossip.members.door import NOW, OVER, SHUT, STEP, Door
from ucxgossip.members.links import Outgoing
from ucxgossip.members.trial import Trial
from ucxgossip.members.watch import Setup

_KNOCK_S = 0.5
_SILENT_S = 10.0


class Porter(Trial):
    """A watch that guests may come to, or whose rank comes as one."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._door = Door(
            self.rank,
            self._say,
            lambda: self.view.members,
            self._agreement.admit,
            lambda guest: self._send(guest, {"kind": "over"}),
        )
        self._strangers: dict[int, Outgoing] = {}
        self._unreached: set[int] = set()
        self._refused: set[int] = set()
        self._answered, self._answered_at = False, 0.0
        self._handlers.update(
            {
                "pause": self._on_pause,
                "go": self._on_go,
                "paused": self._door.on_paused,
                "knock": self._on_knock,
                "welcome": self._on_welcome,
                "later": self._on_later,
                "over": self._on_over,
            }
        )

    # --- what the group of a guest calls, in its own threads -----------------------------------

    @property
    def reachable(self) -> tuple[int, ...]:
        """The members but for those to whom a guest has lost its connection."""
        return tuple(rank for rank in self.members if rank not in self._unreached)

    def knock(self, timeout: float) -> bool:
        """As a guest: find the members that there are; False if there are none."""
        start = time.monotonic()

        def look() -> bool | None:
            if self.view.epoch >= 0:
                return True
            gone = self._refused.issuperset(self._contacts)
            silent = not self._answered and time.monotonic() - start > _SILENT_S
            return False if gone or silent else None

        return bool(self._ask_to(look, timeout, timeout, "to tell who the members are"))

    def enter(self, timeout: float, patience: float | None = None) -> bool:
        """As a guest, who has knocked: become a member; whether it came to that.

        patience: seconds to wait, for ever by default while members answer. Raises
        `RankMissingError` if all members left, `ExchangeTimeoutError` if none answers for
        `timeout` seconds.
        """
        most = math.inf if patience is None else patience

        def look() -> bool | None:
            return True if self._inside else None

        found = self._ask_to(look, timeout, most, "to let it in", enter=True)
        if found is None and self._over:
            raise RankMissingError(
                f"the job ended before rank {self.rank} could come in", self.view.members
            )
        return found is not None

    def _ask_to(
        self,
        found: Callable[[], bool | None],
        timeout: float,
        patience: float,
        what: str,
        enter: bool = False,
    ) -> bool | None:
        """Knock at all doors, again and again, until `found` knows.

        None if the job ends before, or after `patience` seconds; `ExchangeTimeoutError` if nobody
        answers for `timeout` seconds.
        """
        start = self._answered_at = time.monotonic()
        while True:
            self._do(lambda: self._knock(enter))
            with self._changed:
                self._changed.wait_for(
                    lambda: found() is not None or self._over or self._stop, _KNOCK_S
                )
                known = found()
            now = time.monotonic()
            if known is not None or self._over or self._stop or now - start > patience:
                return known
            waited = now - self._answered_at
            if waited >= timeout:
                rank = min(self.view.members or self._contacts)
                raise ExchangeTimeoutError(
                    f"rank {self.rank} waited {waited:.1f} s for rank {rank} {what}. Does the job "
                    "that it would join still run?",
                    rank,
                    what,
                    waited,
                )

    def _knock(self, enter: bool) -> None:
        if self._agreement.inside:
            return
        for rank in self.view.members or list(self._contacts):
            self._send(rank, {"kind": "knock", "address": list(self.address), "enter": enter})

    # --- what the group of a member calls, in its own threads ----------------------------------

    @property
    def door(self) -> str:
        """When guests may come in, as far as this rank knows: see `Door`."""
        return self._door.kind

    def let_in(self, when: str, clock: Callable[[], int] | None = None) -> None:
        """Say when guests may come in: see `Door`. clock: how many steps this rank has made."""

        def command() -> None:
            if clock is not None:
                self._door.clock = clock
            if self._door.kind in (NOW, SHUT, STEP):  # a meeting stays
                self._door.kind = when
            self._door.over = False

        self._do(command)

    def rest(self, steps: int, timeout: float) -> None:
        """Between two steps, of which this rank has made so many: stay while guests come in.

        Returns at once unless the leader asks for it.
        """
        if self._door.pause is None:
            return
        deadline, told = time.monotonic() + timeout, -1
        with self._changed:
            while not self._over and not self._stop and time.monotonic() < deadline:
                pause = self._door.pause
                if pause is None or steps < pause.steps:
                    return
                if pause.ticket != told:
                    told = pause.ticket
                    self._do(partial(self._door.report, steps, told))
                self._changed.wait(_KNOCK_S)

    def passed_step(self, steps: int) -> None:
        """This rank has made so many steps, and tells so where guests wait."""
        if self._door.pause is not None:
            self._do(lambda: self._door.passed(steps))

    def no_more_steps(self) -> None:
        """This rank will not `rest` again."""

        def command() -> None:
            self._door.over = True
            if self._door.pause is not None:
                self._door.report(OVER, self._door.pause.ticket)

        self._do(command)

    # --- what the watch brings about -----------------------------------------------------------

    def _look(self, now: float) -> None:
        super()._look(now)
        self._door.look()

    def _install(self, view: View) -> None:
        self._unreached.clear()
        self._door.reset()
        for link in self._strangers.values():
            self._drop(link)
        self._strangers.clear()
        super()._install(view)

    def _every_link(self) -> list[Outgoing]:
        return [*super()._every_link(), *self._strangers.values()]

    def _lost(self, link: Outgoing) -> None:
        super()._lost(link)
        if self._strangers.get(link.to) is link:
            del self._strangers[link.to]

    def _judge(self, rank: int, refused: bool) -> None:
        if not self._agreement.inside:
            self._unreached.add(rank)
            if refused:
                self._refused.add(rank)
            self._notify()
        elif rank not in self.view.members:
            self._door.gone(rank)
            self._agreement.turn_away(rank)
        else:
            super()._judge(rank, refused)

    # --- messages ------------------------------------------------------------------------------

    def _say(self, rank: int, message: Message) -> None:
        """As `_send`, to this rank too."""
        if rank == self.rank:
            self._receive(rank, message)
        else:
            self._send(rank, message)

    def _on_pause(self, sender: int, message: Message) -> None:
        self._door.on_pause(sender, message)
        self._notify()

    def _on_go(self, sender: int, message: Message) -> None:
        self._door.on_go(sender, message)
        self._notify()

    def _on_knock(self, sender: int, message: Message) -> None:
        """A guest: somebody who has the token, with a rank that nobody else has."""
        address = message["address"]
        if not self._agreement.inside:
            return
        if sender in self.view.members:
            if self._contacts[sender] == address:
                self._send(sender, self.view.message())
            else:
                self._probe(sender)  # it was killed, and started again before anybody noticed
                self._tell_stranger(sender, address, {"kind": "later"})
            return
        if sender in self._links and self._contacts.get(sender) != address:
            self._drop(self._links.pop(sender))
        self._contacts[sender] = address
        if self._leaving:
            self._send(sender, {"kind": "over"})
            return
        contacts = [[rank, self._contacts[rank]] for rank in self.view.members]
        view = self.view.message()
        told = {"view": view, "contacts": contacts, "door": self._door.kind}
        self._send(sender, {"kind": "welcome", **told})
        if message["enter"] and self.view.leader == self.rank and not self._agreement.changing:
            self._door.knock(sender)

    def _tell_stranger(self, rank: int, address: Sequence[Any], message: Message) -> None:
        """A message to a process that brings the rank of a member, which it is not."""
        old = self._strangers.pop(rank, None)
        if old is not None:
            self._drop(old)
        link = self._strangers[rank] = self._connect(rank, address=address)
        link.send(message)
        if link.lost:
            self._lost(link)

    def _on_later(self, _: int, __: Message) -> None:
        self._answered, self._answered_at = True, time.monotonic()

    def _on_over(self, _: int, __: Message) -> None:
        if not self._agreement.inside:
            self._end()

    def _on_welcome(self, sender: int, message: Message) -> None:
        self._answered, self._answered_at = True, time.monotonic()
        self._unreached.discard(sender)
        view = View.parse(message["view"])
        if not self._agreement.inside and view.epoch >= self.view.epoch:
            for rank, (host, port) in message["contacts"]:
                self._contacts[rank] = [host, port]
            self._door.kind = str(message["door"])  # it may lead as soon as it is in
            if view.epoch > self.view.epoch and self.rank not in view.members:
                self._agreement.view = view
        self._notify()
