"""When guests may come in: at once, between two steps of a training, or at a meeting of all.

A guest goes on from one step, so all members must be at one: what they did together before it is
done, and nothing after it has begun. Between meetings nobody knows where the others are, so the
leader asks all to *pause* before the optimizer's next step once they have made so many, one more
than it has itself. Who has fewer goes on up to there; who has more says so, and all go on to that
one's. Whoever pauses has posted all that those with fewer steps need, and nobody pauses who has
fewer than another: so all get there. Then the guests are admitted, and the new view ends the pause.

Rejected: working out from the rounds where the others are (an exact mean that some have ended and
others have not begun would meet one rank too many, or too few); a meeting every so many steps to
ask for guests (all would wait for the slowest, guests or not).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

NOW, SHUT, STEP = "", "shut", "step"
"""Kinds of doors; any other is the name of a meeting. Shut: all are about to train."""
PATIENCE_S = 60.0
"""How long all may take to pause."""
ANY = -1
"""In place of steps, where ranks need not be at the same one."""
OVER = -2
"""In place of steps: there will be no more."""

Message = dict[str, Any]


class Pause(NamedTuple):
    """Stay where `steps` are reached, and tell `leader`, who asked with this ticket."""

    leader: int
    ticket: int
    steps: int


class Door:
    """One rank's part; not thread-safe. Nothing in it waits.

    kind: NOW, SHUT, STEP, or the name of the meeting where guests come in. pause: what the leader
    asks of this rank. clock: how many steps it has made. over: it makes no more. send: hands a
    message to a rank. members: tells the members. admit: lets a guest in. refuse: tells a guest
    that it is too late.
    """

    def __init__(
        self,
        rank: int,
        send: Callable[[int, Message], None],
        members: Callable[[], tuple[int, ...]],
        admit: Callable[[int], None],
        refuse: Callable[[int], None],
    ) -> None:
        self.rank, self.kind = rank, NOW
        self.guests: set[int] = set()
        self.pause: Pause | None = None
        self.over = False
        self.clock: Callable[[], int] = lambda: ANY
        self._send, self._members, self._admit, self._refuse = send, members, admit, refuse
        self._ticket = 0
        self._since: float | None = None
        self._reports: dict[int, int] = {}
        self._goal = ANY

    # --- the leader's side ---------------------------------------------------------------------

    def knock(self, guest: int) -> None:
        """`guest` would like to come in."""
        if self.over:
            self._refuse(guest)
            return
        if self.kind == SHUT:
            return
        self.guests.add(guest)
        own = self.clock()
        if self.kind == NOW or (self.kind == STEP and own == ANY):
            self.open()
        elif self.kind == STEP and self._since is None:
            self._ask(own + 1)

    def open(self) -> None:
        """Let all guests in that wait."""
        guests, self.guests = self.guests, set()
        for guest in sorted(guests):
            self._admit(guest)

    def gone(self, guest: int) -> None:
        """`guest` waits no longer."""
        self.guests.discard(guest)
        if not self.guests and self._since is not None:
            self._tell_all_to_go()

    def _ask(self, steps: int) -> None:
        self._ticket += 1
        self._reports, self._goal = {}, steps
        self._since = self._since or time.monotonic()
        message = {"kind": "pause", "ticket": self._ticket, "steps": steps}
        for rank in self._members():
            # This rank's own answer may have led to another question, or to none.
            if self._since is not None and self._ticket == message["ticket"]:
                self._send(rank, message)

    def on_paused(self, sender: int, message: Message) -> None:
        """A member has stopped at so many steps, or has made more than it was to."""
        if self._since is None or int(message["ticket"]) != self._ticket:
            return
        self._reports[sender] = int(message["steps"])
        if OVER in self._reports.values():
            guests, self.guests = self.guests, set()
            for guest in guests:
                self._refuse(guest)
            self._tell_all_to_go()
        elif self._reports[sender] > self._goal:
            self._ask(self._reports[sender])
        elif set(self._reports) >= set(self._members()):
            self.open()

    def look(self) -> None:
        """Give up what has lasted too long; guests ask again."""
        if self._since is not None and time.monotonic() - self._since > PATIENCE_S:
            self.guests.clear()
            self._tell_all_to_go()

    def _tell_all_to_go(self) -> None:
        self._since = None
        for rank in self._members():
            self._send(rank, {"kind": "go", "ticket": self._ticket})

    # --- every member's side -------------------------------------------------------------------

    def on_pause(self, sender: int, message: Message) -> None:
        """The leader asks this rank to stop."""
        self.pause = Pause(sender, int(message["ticket"]), int(message["steps"]))
        if self.over:
            self.report(OVER, self.pause.ticket)
        else:
            self.passed(self.clock())

    def on_go(self, sender: int, message: Message) -> None:
        """It takes that back."""
        if self.pause is not None and self.pause.leader == sender:
            self.pause = None

    def passed(self, steps: int) -> None:
        """This rank has made so many steps by now."""
        if self.pause is not None and steps > self.pause.steps:
            self.report(steps, self.pause.ticket)

    def report(self, steps: int, ticket: int) -> None:
        """This rank has stopped after so many steps, or has made more.

        ticket: of the question that this answers; there may be another one by now.
        """
        if self.pause is not None and self.pause.ticket == ticket:
            answer = {"kind": "paused", "ticket": ticket, "steps": steps}
            self._send(self.pause.leader, answer)

    def reset(self) -> None:
        """The members have changed: whoever still waits asks again."""
        self.pause, self._since = None, None
        self.guests.clear()
