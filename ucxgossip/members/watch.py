"""Who lives: pulses, suspicion, and the change of views.

Each rank sends its pulse to the next WATCHERS members of the ring and hears those of the ones
before it. A connection that breaks is probed: a host that refuses the next one proves that the
process is gone, within a millisecond of its death. Silence takes longer (`dead_after`), and
stretches with the longest gap seen between two pulses, so that an overloaded machine is no death.
A warden that was itself held up (a stopped process, Python's lock kept for seconds) judges nobody
by the time that it slept.

Rejected: hearing the pulses of all (a connection for each pair of ranks; that one notices is
enough, since the leader then asks all); taking a broken connection for a death (a network breaks
connections whose ends live).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ucxgossip.members.agreement import Agreement, Facts, Message, View
from ucxgossip.members.links import Address, Outgoing
from ucxgossip.members.switchboard import Switchboard
from ucxgossip.trust import Seal

WATCHERS = 2
_PROBE_S = 1.0
_RETRY_S = 0.01
_AGAIN_S = 1.0
_STRETCH = 10.0
_DECAY = 0.999
_MOST_S = 30.0


@dataclass(frozen=True)
class Setup:
    """What a warden is made of: see `Warden`."""

    rank: int
    host: str
    seal: Seal
    dead_after: float
    freeze: Callable[[int], Facts]
    install: Callable[[View], None]
    expelled: Callable[[str], None]
    aborted: Callable[[int, str], None]


class Watch(Switchboard):
    """A switchboard whose rank watches over others, and agrees with them on who lives."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup.rank, setup.host, setup.seal, setup.expelled)
        self.dead_after = setup.dead_after
        self._aborted, self._install_group = setup.aborted, setup.install
        self._agreement = Agreement(
            self.rank, View(-1, ()), self._send, setup.freeze, self._install, self._expel
        )
        self._agreement.contacts = self._contacts
        self._pulses: dict[int, Outgoing] = {}
        self._probes: dict[int, tuple[float, Outgoing]] = {}
        self._retries: dict[int, tuple[float, float]] = {}
        self._heard: dict[int, float] = {}
        self._gap = 0.0
        self._changing = time.monotonic()
        self._alive: set[int] = set()
        self._inside = False
        self._leaving = False
        self._handlers.update(
            {"abort": self._on_abort, "view?": self._on_question, "same": self._on_same}
        )

    # --- what the group calls, in its own threads ----------------------------------------------

    @property
    def view(self) -> View:
        """The view in force."""
        return self._agreement.view

    @property
    def members(self) -> tuple[int, ...]:
        """Those of the view in force."""
        return self.view.members

    @property
    def contacts(self) -> dict[int, Address]:
        """Where the members' wardens listen."""
        return {r: (str(self._contacts[r][0]), int(self._contacts[r][1])) for r in self.members}

    def start(self, contacts: Mapping[int, Address], guest: bool = False) -> None:
        """Begin to watch the ranks of `contacts`, which are the members of the first view.

        guest: not yet; they are members of a job that runs already (`knock`, `enter`).
        """
        self._contacts.update({rank: [*address] for rank, address in contacts.items()})
        self._inside = not guest
        if not guest:
            self._agreement.view = View(0, tuple(sorted(contacts)))
        self._begin()
        self._watch()
        self._pulse.start()
        self._thread.start()

    def suspect(self, rank: int) -> None:
        """Something went wrong with `rank`: find out whether it lives."""
        self._do(lambda: self._probe(rank))

    def doubt(self, ranks: Sequence[int], epoch: int, timeout: float) -> bool:
        """Find out whether `ranks` live: True if they all do, False if the view changed.

        True as well when neither is known after `timeout` seconds, or when this rank's part ends.
        """
        with self._changed:
            self._alive.difference_update(ranks)
        for rank in ranks:
            self.suspect(rank)
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self.view.epoch != epoch
                    or self._alive.issuperset(ranks)
                    or self._over
                    or self._stop
                ),
                timeout,
            )
            return self.view.epoch == epoch

    def abort(self, reason: str) -> None:
        """Tell all members that this rank ends the job."""

        def command() -> None:
            for rank in self.view.members:
                if rank != self.rank:
                    self._send(rank, {"kind": "abort", "reason": reason[:4096]})

        self._do(command)

    def leave(self) -> None:
        """From now on others may go without being missed."""
        self._do(self._on_leave)

    def _on_leave(self) -> None:
        self._leaving = True

    # --- watching ------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Send pulses to those who follow in the ring, and expect those of the ones before."""
        if not self._agreement.inside:
            return
        after, before = self._neighbours(+1), self._neighbours(-1)
        for rank in [rank for rank in self._pulses if rank not in after]:
            self._drop(self._pulses.pop(rank))
        now = time.monotonic()
        self._heard = {rank: self._heard.get(rank, now) for rank in before}
        for rank in after:
            if rank not in self._pulses:
                self._open_pulse(rank)

    def _open_pulse(self, rank: int) -> None:
        link = self._pulses[rank] = self._connect(rank, pulse=True)
        if link.lost:
            self._lost(link)

    def _felt(self, rank: int) -> None:
        now = time.monotonic()
        if rank in self._heard:
            self._gap = max(self._gap * _DECAY, now - self._heard[rank])
            self._heard[rank] = now

    def _felt_last(self, rank: int, goodbye: bool) -> None:
        if goodbye:
            self._heard.pop(rank, None)
        elif rank in self._heard:
            self._probe(rank)

    def _held_up(self, now: float) -> None:
        self._heard = dict.fromkeys(self._heard, now)

    def _look(self, now: float) -> None:
        """Silence, connections that do not come about, a change of members that does not end."""
        if not self._agreement.changing:
            self._changing = now
        elif now - self._changing > _AGAIN_S:
            self._changing = now
            self._agreement.retry()
            self._probe_leader()
        patience = self._patience()
        for rank, heard in list(self._heard.items()):
            if now - heard > patience and rank not in self._agreement.suspects:
                self._suspect(rank, proven=False)
        for rank, (since, when) in list(self._retries.items()):
            if now >= when:
                del self._retries[rank]
                self._probe(rank, since)
        for rank, (since, link) in list(self._probes.items()):
            if link.open:  # it lives
                del self._probes[rank]
                self._drop(link)
                if rank in self._neighbours(+1) and rank not in self._pulses:
                    self._open_pulse(rank)
            elif now - since > patience:
                del self._probes[rank]
                self._drop(link)
                self._suspect(rank, proven=False)
        for link in self._every_link():
            if not link.open and not link.lost and now - link.since > patience:
                self._lost(link)

    def _patience(self) -> float:
        """Seconds of silence after which a rank is taken for dead, as things are now."""
        return max(self.dead_after, min(_STRETCH * self._gap, _MOST_S))

    def _neighbours(self, direction: int) -> list[int]:
        """The next (+1) or last (-1) WATCHERS members on the ring."""
        members = self.view.members
        place = members.index(self.rank)
        near = range(1, min(WATCHERS, len(members) - 1) + 1)
        return [members[(place + direction * k) % len(members)] for k in near]

    # --- suspicion -----------------------------------------------------------------------------

    def _every_link(self) -> list[Outgoing]:
        probes = [link for _, link in self._probes.values()]
        return [*super()._every_link(), *self._pulses.values(), *probes]

    def _lost(self, link: Outgoing) -> None:
        super()._lost(link)
        refused, rank = link.refused, link.to
        if self._pulses.get(rank) is link:
            del self._pulses[rank]
            if not link.goodbye:
                self._judge(rank, refused)
        elif rank in self._probes and self._probes[rank][1] is link:
            since, _ = self._probes.pop(rank)
            if refused:
                self._suspect(rank, proven=True)
            elif time.monotonic() - since < _PROBE_S:  # a process that is just being taken down
                self._retries[rank] = (since, time.monotonic() + _RETRY_S)
            else:
                self._suspect(rank, proven=False)

    def _judge(self, rank: int, refused: bool) -> None:
        if refused:
            self._suspect(rank, proven=True)
        else:
            self._probe(rank)

    def _suspect(self, rank: int, proven: bool) -> None:
        if self._leaving or self._stop:
            return
        self._agreement.suspect(rank, proven)

    def _probe(self, rank: int, since: float | None = None) -> None:
        """Try to connect to `rank`, which tells a dead process from a broken connection."""
        if rank in self._probes or rank not in self.view.members or rank == self.rank:
            return
        self._retries.pop(rank, None)
        link = self._connect(rank)
        self._probes[rank] = (time.monotonic() if since is None else since, link)
        link.send({"kind": "view?", "epoch": self.view.epoch})
        if link.lost:
            self._lost(link)

    def _probe_leader(self) -> None:
        """Who waits for the leader of a change need not be one that hears its pulse."""
        suspects, members = self._agreement.suspects, self.view.members
        leader = next(rank for rank in members if rank == self.rank or rank not in suspects)
        if leader not in self._retries:  # whose time would begin anew
            self._probe(leader)

    # --- views and messages --------------------------------------------------------------------

    def _install(self, view: View) -> None:
        """Take up `view`, which the members have agreed on."""
        for rank in [rank for rank in self._links if rank not in view.members]:
            self._drop(self._links.pop(rank))
        self._watch()
        self._install_group(view)
        self._inside = True  # only now: the group knows from where it goes on
        self._notify()

    def _on_other(self, sender: int, message: Message) -> None:
        self._agreement.receive(sender, message)

    def _on_question(self, sender: int, message: Message) -> None:
        if int(message["epoch"]) < self.view.epoch:
            self._send(sender, self.view.message())
        else:
            self._send(sender, {"kind": "same", "changing": self._agreement.changing})

    def _on_same(self, sender: int, message: Message) -> None:
        # While members change, a rank closes its connections, which is no failure of theirs.
        if not message["changing"] and not self._agreement.changing:
            with self._changed:
                self._alive.add(sender)
                self._changed.notify_all()

    def _on_abort(self, sender: int, message: Message) -> None:
        if sender not in self.view.members:  # it was left out, and the others go on without it
            return
        self._aborted(sender, str(message["reason"]))
        self._end()
