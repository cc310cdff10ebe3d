"""Ranks that come to a running job: how they find it, what they take over, when they come in.

The members keep a `History` for them, and tell the store where they are (`running`). A guest runs
the same script from its start; what the others settled once it takes over, and it comes in when it
first needs the others, or with its models (`arrive`): docs/members.md.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

from ucxgossip import running
from ucxgossip.errors import (
    ExchangeError,
    ExchangeTimeoutError,
    GossipError,
    RankMissingError,
)
from ucxgossip.history import SPARE, History
from ucxgossip.mailbox import Layout, Mailbox
from ucxgossip.members import NOW, SHUT, STEP
from ucxgossip.membership import Membership, Setup

MODEL = "model"
"""What the keys of attached models begin with."""

_PATIENCE_S, _AGAIN_S = 2.0, 0.1
_FRESH_S, _FRESH = 5.0, 20.0
"""A guest that waits fetches weights anew after so many seconds, and times what that took."""


class Guests(Membership):
    """A membership that guests may come to, or that this rank comes to as one."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.tuning, self.verify = setup.tuning, setup.verify
        self._history = History()
        self._inherited: set[str] = set()
        self._unclaimed: dict[str, Mailbox] = {}
        self._spare: dict[int, Mailbox] = {}
        self._settled = 0
        self._arriving: list[tuple[Callable[[], None], Callable[[int], None]]] = []
        self._note = ""
        self._job = b""

    # --- finding the job --------------------------------------------------------------------------

    def _write_note(self) -> None:
        """Tell those who come later where the members are; one of them does."""
        if self._warden is not None and (self.rank == self.members[0] or self._came_late):
            if not self._store_is_there():
                return
            contacts, board = self._warden.contacts, self._meeting.board
            self._quietly(lambda: running.write(board, self._note, self._job, contacts))

    def _erase_note(self) -> None:
        """Nobody is to come any more; the lowest member says so."""
        if self.rank == self.members[0] and self._store_is_there():
            self._quietly(lambda: running.erase(self._meeting.board, self._note))

    # --- taking over ------------------------------------------------------------------------------

    def _tell_history(self, name: str) -> bytes | None:
        """The history, once it holds what the first meetings settled, as many as `name` says."""
        assert self._warden is not None
        with self._lock:
            self._history.door = self._warden.door
            ready = self._settled >= int(name.split()[1])
            return self._history.dump() if ready else None

    def _catch_up(self, passed: int) -> None:
        """Learn what the members settled in their first `passed` meetings."""
        assert self._warden is not None
        deadline = time.monotonic() + self.timeout
        blob, other = None, self.rank
        for turn in itertools.count():
            others = self.others
            if not others:  # this rank came in, and all others died
                return
            other = others[turn % len(others)]  # who came in with this rank may not know either
            try:
                blob = self._warden.fetch(other, f"history {passed}", _PATIENCE_S)
                error = None
            except ExchangeTimeoutError as late:
                error = late
            if blob is not None:
                break
            self._check_usable()
            if self._warden.over or time.monotonic() > deadline:
                ended = f"the job ended before rank {self.rank} could come in"
                self._fail(error or RankMissingError(ended, (other,)))
        assert blob is not None
        history = History.parse(blob, other)
        with self._lock:
            self._inherited |= history.news(self._history)
            known = len(self._history.mailboxes)
            self._history, self._settled = history, passed
            for name, nbytes, depth, ring, chunk in history.mailboxes[known:]:
                mailbox = self._open(self._layout(nbytes, depth, ring, chunk))
                if name == SPARE:
                    self._spare[mailbox.index] = mailbox
                else:
                    self._unclaimed[name] = mailbox
                if mailbox.index < len(self._view_facts.rounds):
                    mailbox.base = mailbox.round = self._view_facts.rounds[mailbox.index]

    def _look_up(self, settled: Callable[[], bool]) -> bool:
        """Whether the others have settled something before; if they will not, a guest comes in.

        While their door is not open to all, they may be at it, and a guest asks again.
        """
        if settled():
            return True
        deadline = time.monotonic() + self.timeout
        while self.guest:
            self._catch_up(0)
            if settled():
                return True
            if self._history.door == NOW or time.monotonic() > deadline:
                self.enter()
                return settled()
            time.sleep(_AGAIN_S)
        return False

    def _layout(self, nbytes: int, depth: int, ring: bool, chunk: int) -> Layout:
        return Layout(nbytes, depth, chunk, self.verify, self.size, ring)

    def _take_spare(self, layout: Layout) -> Mailbox | None:
        """The first mailbox of this layout that was given back, if any."""
        with self._lock:
            fitting = [i for i, mailbox in self._spare.items() if mailbox.layout == layout]
            return self._spare.pop(min(fitting)) if fitting else None

    def _open(self, layout: Layout) -> Mailbox:
        with self._lock:
            self.await_steady()
            mailbox = Mailbox(self.context, layout)
            try:
                self.engine.open(mailbox)
            except BaseException:
                mailbox.close()
                raise
            self._offer(mailbox)
        return mailbox

    def _takes_over(self, once: str) -> bool:
        """Whether the others settled this before; if not, a guest comes in now."""
        if not once:
            self.enter()
            return False
        if not self._look_up(lambda: once in self._inherited):
            return False
        self._inherited.discard(once)
        return True

    def _models_wait(self) -> bool:
        """Whether the members train models that this rank has not attached yet."""
        agreed = self._history.agreed
        return any(
            name.startswith(MODEL) and agreed.get(name) is not None for name in self._inherited
        )

    # --- coming in --------------------------------------------------------------------------------

    def enter(self, patience: float | None = None) -> bool:
        """Become a member, if this rank is a guest: the others go on with it from then on.

        Whatever needs the others does so by itself; `attach` does once the model has its weights.
        patience: seconds after which to give up for now; by default it goes on as long as members
        answer. Returns whether it is a member.
        """
        if not self.guest:
            return True
        self._check_usable()
        assert self._warden is not None
        if self._models_wait():
            raise ExchangeError(
                f"rank {self.rank} comes to a job whose ranks train already: it has to attach its "
                "models before it exchanges, or meets the others, in other ways"
            )
        self._warden.answer("history", self._tell_history)
        try:
            if not self._warden.enter(self.timeout, patience):
                return False
        except GossipError as error:
            self._fail(error)
        self._check_usable()
        self._catch_up(self._view_facts.passed)
        self._write_note()
        return True

    def arrive(
        self, clock: Callable[[], int], fetch: Callable[[], None], go_on: Callable[[int], None]
    ) -> None:
        """Attach one more of the models that the members have; with the last one, come in.

        clock: how many steps this rank has made with it. fetch: takes over what another rank has.
        go_on: called with the members' steps once this rank is one of them. Guests may have to
        wait (for the end of an epoch, say), and weights grow old: `fetch` is called anew then.
        """
        self._clocks.append(clock)
        self._arriving.append((fetch, go_on))
        if self._models_wait():
            return  # they have more
        self._let_in_between_steps()
        entered = not self.guest
        while True:
            start = time.monotonic()
            for fetch_one, _ in self._arriving:
                fetch_one()
            if entered or self.enter(max(_FRESH_S, _FRESH * (time.monotonic() - start))):
                break
        for (_, go_on_one), steps in zip(self._arriving, self._view_facts.steps, strict=False):
            go_on_one(steps)
        self._arriving.clear()

    # --- letting others in ------------------------------------------------------------------------

    def let_in(self, when: str) -> None:
        """From now on guests come in when all members are at the meeting `when`."""
        if self._warden is not None:
            self._warden.let_in(when)

    def begin_model(self) -> None:
        """A model is about to be attached: nobody may come in between."""
        self.let_in(SHUT)

    @property
    def _advice(self) -> str:
        return "gossip.detach() gives an attached model back" if self._clocks else ""

    def found_model(self, clock: Callable[[], int]) -> None:
        """Attach one more model, as all others do now."""
        self._clocks.append(clock)
        self._let_in_between_steps()

    def _let_in_between_steps(self) -> None:
        if self._warden is not None:
            self._warden.let_in(STEP, self._clocks[0])

    def rest(self, clock: Callable[[], int]) -> None:
        """Before a step of the model with this clock: stay while guests come in, if any."""
        if self._warden is not None and self._clocks[:1] == [clock]:
            self._warden.rest(clock(), self.timeout)

    def passed_step(self, clock: Callable[[], int]) -> None:
        """After a step of the model with this clock, before anybody is waited for."""
        if self._warden is not None and self._clocks[:1] == [clock]:
            self._warden.passed_step(clock())

    def end_model(self, label: str, clock: Callable[[], int]) -> None:
        """No more steps of a model; guests are too late when it was the last one."""
        with self._lock:
            if label in self._history.agreed:
                self._history.agreed[label] = None
        if clock in self._clocks:
            self._clocks.remove(clock)
        if self._clocks:
            self._let_in_between_steps()
        elif self._warden is not None:
            self._warden.no_more_steps()
