"""The thread that keeps watch: pulses, suspicion, messages, and the change of views.

Each rank sends its pulse to the next WATCHERS members of the ring and hears those of the ones
before it. A connection that breaks is probed: a host that refuses the next one proves that the
process is gone, within a millisecond of its death. Silence takes longer (`dead_after`), and
stretches with the longest gap seen between two pulses, so that an overloaded machine is no death.
A warden that was itself held up (a stopped process, Python's lock kept for seconds) judges nobody
by the time that it slept.
"""

from __future__ import annotations

import base64
import json
import logging
import math
import os
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from ucxgossip import forks
from ucxgossip.errors import ExchangeTimeoutError, MismatchError, RankMissingError
from ucxgossip.members.agreement import Agreement, Facts, Message, View
from ucxgossip.members.door import NOW, OVER, SHUT, STEP, Door
from ucxgossip.members.links import Address, Incoming, Outgoing, listen
from ucxgossip.members.pulse import GOODBYE, Pulse
from ucxgossip.trust import Seal

WATCHERS = 2
LINKS = 64
"""Connections for messages that are kept, beside those of pulses."""
TICK = 0.05
_PROBE_S = 1.0
_RETRY_S = 0.01
_AGAIN_S = 1.0
_KNOCK_S = 0.5
_SILENT_S = 10.0
_LAST_WORD_S = 0.5
_STALL_S = 0.5
_STRETCH = 10.0
_DECAY = 0.999
_MOST_S = 30.0

_RESULTS = 64
_TOGETHER, _OUT_OF_STEP = b"=", b"!"

Merge = Callable[[list[bytes], Sequence[int]], bytes]

log = logging.getLogger("ucxgossip")


class Warden:
    """This rank's watch over the others.

    seal: signs all that goes between wardens. freeze, install, expelled: see `Agreement`; called
    in the warden's thread. aborted: called with (rank, reason) when another rank ends the job.
    dead_after: seconds of silence, at least, after which a rank is taken for dead.
    """

    def __init__(
        self,
        rank: int,
        host: str,
        seal: Seal,
        dead_after: float,
        freeze: Callable[[int], Facts],
        install: Callable[[View], None],
        expelled: Callable[[str], None],
        aborted: Callable[[int, str], None],
    ) -> None:
        self.rank, self.dead_after = rank, dead_after
        self._seal, self._aborted = seal, aborted
        self._install_group, self._expel_group = install, expelled
        self._listener = listen(host)
        self.address: Address = self._listener.getsockname()[:2]
        self._agreement = Agreement(
            rank, View(-1, ()), self._send, freeze, self._install, self._expel
        )
        self._contacts: dict[int, Any] = self._agreement.contacts
        self._pulse = Pulse()
        self._selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = socket.socketpair()
        for each in (self._wake_read, self._wake_write):
            each.setblocking(False)
        self._commands: deque[Callable[[], None]] = deque()
        self._links: dict[int, Outgoing] = {}
        self._pulses: dict[int, Outgoing] = {}
        self._probes: dict[int, tuple[float, Outgoing]] = {}
        self._retries: dict[int, tuple[float, float]] = {}
        self._heard: dict[int, float] = {}
        self._gap = 0.0
        self._changing = time.monotonic()
        self._offers: dict[str, bytes] = {}
        self._answerers: dict[str, Callable[[str], bytes | None]] = {}
        self._door = Door(
            rank,
            self._say,
            lambda: self.view.members,
            self._agreement.admit,
            lambda guest: self._send(guest, {"kind": "over"}),
        )
        self._strangers: dict[int, Outgoing] = {}
        self._unreached: set[int] = set()
        self._refused: set[int] = set()
        self._answered, self._answered_at = False, 0.0
        self._wanted: list[tuple[int, Message]] = []
        self._answers: dict[str, bytes] = {}
        self._arrivals: dict[tuple[int, int], dict[int, tuple[str, bytes]]] = {}
        self._merges: dict[int, Merge] = {}
        self._results: dict[int, bytes] = {}
        self._alive: set[int] = set()
        self._passed = 0
        self._inside = False
        self._changed = threading.Condition()
        self._stop = False
        self._over = False
        self._leaving = False
        self._thread = threading.Thread(target=self._run, name="ucxgossip-warden", daemon=True)
        self._answerers["absent"] = self._absent
        forks.watch(self)

    # --- what the group calls, in its own threads ----------------------------------------------

    @property
    def view(self) -> View:
        """The view in force."""
        return self._agreement.view

    @property
    def passed(self) -> tuple[int, str]:
        """How many meetings this rank has passed, and in hexadecimal what the last one gave."""
        with self._changed:
            return self._passed, self._results.get(self._passed, b"").hex()

    def start(self, contacts: Mapping[int, Address], guest: bool = False) -> None:
        """Begin to watch the ranks of `contacts`, which are the members of the first view.

        guest: not yet; they are members of a job that runs already (`knock`, `enter`).
        """
        self._contacts.update({rank: [*address] for rank, address in contacts.items()})
        self._inside = not guest
        if not guest:
            self._agreement.view = View(0, tuple(sorted(contacts)))
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._selector.register(self._wake_read, selectors.EVENT_READ, self._woken)
        self._watch()
        self._pulse.start()
        self._thread.start()

    def _do(self, command: Callable[[], None]) -> None:
        """Have the thread run `command`."""
        self._commands.append(command)
        with suppress(OSError):
            self._wake_write.send(b"x")

    def suspect(self, rank: int) -> None:
        """Something went wrong with `rank`: find out whether it lives."""
        self._do(lambda: self._probe(rank))

    def offer(self, name: str, blob: bytes) -> None:
        """Give `blob` to whoever asks this rank for `name`, until something else is offered."""

        def command() -> None:
            self._offers[name] = blob
            self._serve()

        self._do(command)

    def answer(self, kind: str, answerer: Callable[[str], bytes | None]) -> None:
        """Let `answerer` answer what is asked for by names that begin with the word `kind`.

        It is called with the name in the warden's thread, and again if it returned None.
        """
        self._do(lambda: self._answerers.update({kind: answerer}))

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

    @property
    def over(self) -> bool:
        """Whether the job has ended for this rank."""
        return self._over

    @property
    def door(self) -> str:
        """When guests may come in, as far as this rank knows: see `Door`."""
        return self._door.kind

    @property
    def contacts(self) -> dict[int, Address]:
        """Where the members' wardens listen."""
        return {r: (str(self._contacts[r][0]), int(self._contacts[r][1])) for r in self.members}

    @property
    def members(self) -> tuple[int, ...]:
        """Those of the view in force."""
        return self.view.members

    @property
    def reachable(self) -> tuple[int, ...]:
        """The members but for those to whom a guest has lost its connection."""
        return tuple(rank for rank in self.members if rank not in self._unreached)

    def fetch(self, rank: int, name: str, timeout: float) -> bytes | None:
        """What `rank` offers as `name`; None if it is no member, or the view changes before."""
        epoch = self.view.epoch
        key = f"{epoch} {rank} {name}"
        with self._changed:
            self._answers.pop(key, None)
        message = {"kind": "want", "epoch": epoch, "name": name, "key": key}
        self._do(lambda: self._send(rank, message))
        found: bytes | None = self._wait(
            lambda: self._answers.pop(key, None),
            lambda: self.view.epoch != epoch or rank not in self.reachable,
            timeout,
            rank,
            f"to tell where its {name!r} is",
        )
        return found

    def meet(
        self, epoch: int, name: str, blob: bytes, merge: Merge, timeout: float
    ) -> bytes | None:
        """Meet all members: what `merge` makes of their blobs, in the order of ranks. Collective.

        merge: called with the blobs and their ranks, on the leader alone. None: the view changed,
        and all meet again. Raises `RankMissingError` when the time is up, `MismatchError` where
        ranks meet for different things.
        """
        number = self._passed + 1

        def arrive() -> None:
            encoded = base64.b64encode(blob).decode()
            message = {"epoch": epoch, "number": number, "name": name, "blob": encoded}
            if self.view.leader == self.rank:
                self._merges[number] = merge
                self._arrive(self.rank, message)
            else:
                self._send(self.view.leader, {"kind": "arrive", **message})

        if self.view.epoch == epoch:
            self._do(arrive)
        start = time.monotonic()
        try:
            found: bytes | None = self._wait(
                lambda: self._results.get(number),
                lambda: self.view.epoch != epoch,
                timeout,
                self.view.leader,
                f"at {name!r}",
            )
        except ExchangeTimeoutError:
            absent = self._ask_who_is_absent(epoch, number)
            raise RankMissingError(
                f"rank {self.rank} waited {time.monotonic() - start:.1f} s for rank"
                f"{'s' if len(absent) != 1 else ''} {', '.join(map(str, absent))} at {name!r}. "
                "Do all ranks make the same calls, in the same order?",
                absent,
            ) from None
        if found is None and self._over:
            # Whoever ended the job may have done so because of what all are about to be told.
            with self._changed:
                self._changed.wait_for(lambda: number in self._results, _LAST_WORD_S)
                found = self._results.get(number)
        if found is None:
            return None
        if found[:1] == _OUT_OF_STEP:
            raise MismatchError(found[1:].decode())
        return found[1:]

    def _ask_who_is_absent(self, epoch: int, number: int) -> tuple[int, ...]:
        leader = self.view.leader
        try:
            blob = self.fetch(leader, f"absent {epoch} {number}", _PROBE_S)
        except ExchangeTimeoutError:
            blob = None
        return (leader,) if blob is None else tuple(json.loads(blob))

    def _absent(self, name: str) -> bytes:
        _, epoch, number = name.split()
        here = self._arrivals.get((int(epoch), int(number)), {})
        return json.dumps([rank for rank in self.view.members if rank not in here]).encode()

    def doubt(self, ranks: Sequence[int], epoch: int, timeout: float) -> bool:
        """Find out whether `ranks` live: True if they all do, False if the view changed.

        True as well when neither is known after `timeout` seconds.
        """
        with self._changed:
            self._alive.difference_update(ranks)
        for rank in ranks:
            self.suspect(rank)
        with self._changed:
            self._changed.wait_for(
                lambda: self.view.epoch != epoch or self._alive.issuperset(ranks) or self._over,
                timeout,
            )
            return self.view.epoch == epoch

    def _wait(
        self,
        found: Callable[[], Any],
        given_up: Callable[[], bool],
        timeout: float,
        rank: int,
        what: str,
    ) -> Any:
        """What `found` gives once it is not None; None once `given_up`."""
        start = time.monotonic()
        with self._changed:
            while True:
                value = found()
                if value is not None:
                    return value
                if given_up() or self._stop or self._over:
                    return None
                left = start + timeout - time.monotonic()
                if left <= 0:
                    waited = time.monotonic() - start
                    raise ExchangeTimeoutError(
                        f"rank {self.rank} waited {waited:.1f} s for rank {rank} {what}. Is it "
                        "alive?",
                        rank,
                        what,
                        waited,
                    )
                self._changed.wait(min(left, 1.0))

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

    def close(self) -> None:
        """Say goodbye and end the thread. Further calls do nothing."""
        if self._stop:
            return
        if self._thread.ident is not None:
            self._do(self._on_stop)
            if self._thread is not threading.current_thread():
                self._thread.join()
        self._stop = True
        self._pulse.close()
        for link in self._every_link():
            link.close()
        for key in list(self._selector.get_map().values()):
            if isinstance(key.data, Incoming):
                key.data.goodbye()
                key.data.close()
        self._selector.close()
        for each in (self._listener, self._wake_read, self._wake_write):
            each.close()

    def _on_stop(self) -> None:
        deadline = time.monotonic() + _PROBE_S  # what is still to be said, an abort for one
        while any(link.wants_write for link in self._links.values()):
            self._poll(TICK)
            if time.monotonic() > deadline:
                break
        self._stop = True

    def _every_link(self) -> list[Outgoing]:
        probes = [link for _, link in self._probes.values()]
        return [
            *self._links.values(),
            *self._pulses.values(),
            *self._strangers.values(),
            *probes,
        ]

    # --- the thread ----------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._keep_watch()
        except BaseException as error:  # nobody may wait for a thread that is gone
            self._expel(f"rank {self.rank} can watch over the others no longer: {error!r}")
            raise

    def _keep_watch(self) -> None:
        before = time.monotonic()
        while not self._stop:
            self._poll(TICK)
            now = time.monotonic()
            if now - before > _STALL_S:  # it was this process that was held up
                self._heard = dict.fromkeys(self._heard, now)
            before = now
            while self._commands:
                self._commands.popleft()()
            self._look(now)

    def _poll(self, timeout: float) -> None:
        for key, _ in self._selector.select(timeout):
            self._dispatch(key.data)

    def _dispatch(self, ready: Incoming | Outgoing | Callable[[], None]) -> None:
        if isinstance(ready, Incoming):
            self._read(ready)
        elif not isinstance(ready, Outgoing):
            ready()
        elif not ready.lost:  # what was ready before it may have led to its end
            self._step(ready)

    def _woken(self) -> None:
        with suppress(BlockingIOError):
            self._wake_read.recv(4096)

    def _accept(self) -> None:
        with suppress(OSError):
            accepted, _ = self._listener.accept()
            link = Incoming(self._seal, self.rank, accepted)
            self._selector.register(accepted, selectors.EVENT_READ, link)

    def _read(self, link: Incoming) -> None:
        for message in link.step():
            self._receive(link.sender, message)
        now = time.monotonic()
        if link.pulse and not link.lost and link.sender in self._heard:
            self._gap = max(self._gap * _DECAY, now - self._heard[link.sender])
            self._heard[link.sender] = now
        if link.lost:
            self._selector.unregister(link.socket)
            link.close()
            if link.forged:
                log.warning("rank %d refused a connection without the job's token", self.rank)
            elif link.pulse and link.beat == GOODBYE:
                self._heard.pop(link.sender, None)
            elif link.pulse and link.sender in self._heard:
                self._probe(link.sender)

    def _receive(self, sender: int, message: Message) -> None:
        handler = {
            "hello": lambda *_: None,
            "want": self._on_want,
            "have": self._on_have,
            "arrive": self._arrive,
            "release": self._on_release,
            "abort": self._on_abort,
            "view?": self._on_question,
            "same": self._on_same,
            "pause": self._on_pause,
            "go": self._on_go,
            "paused": self._door.on_paused,
            "knock": self._on_knock,
            "welcome": self._on_welcome,
            "later": self._on_later,
            "over": self._on_over,
        }.get(str(message["kind"]))
        if handler is not None:
            handler(sender, message)
        else:
            self._agreement.receive(sender, message)

    def _connect(
        self, rank: int, pulse: bool = False, address: Sequence[Any] | None = None
    ) -> Outgoing:
        host, port = self._contacts[rank] if address is None else address
        link = Outgoing(self._seal, self.rank, rank, (host, port), pulse)
        if not link.lost:
            events = selectors.EVENT_READ | selectors.EVENT_WRITE
            self._selector.register(link.socket, events, link)
        return link

    def _drop(self, link: Outgoing) -> None:
        with suppress(KeyError, ValueError):
            self._selector.unregister(link.socket)
        self._pulse.remove(link.socket.fileno())
        link.close()

    def _step(self, link: Outgoing) -> None:
        was_open = link.open
        link.step()
        if link.lost:
            self._lost(link)
            return
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if link.wants_write else 0)
        self._selector.modify(link.socket, events, link)
        if link.pulse and link.open and not was_open:
            self._pulse.add(link.socket.fileno())

    def _lost(self, link: Outgoing) -> None:
        refused, rank = link.refused, link.to
        self._drop(link)
        if self._links.get(rank) is link:
            del self._links[rank]
            if not link.goodbye:
                self._judge(rank, refused)
        elif self._pulses.get(rank) is link:
            del self._pulses[rank]
            if not link.goodbye:
                self._judge(rank, refused)
        elif self._strangers.get(rank) is link:
            del self._strangers[rank]
        elif rank in self._probes and self._probes[rank][1] is link:
            since, _ = self._probes.pop(rank)
            if refused:
                self._suspect(rank, proven=True)
            elif time.monotonic() - since < _PROBE_S:  # a process that is just being taken down
                self._retries[rank] = (since, time.monotonic() + _RETRY_S)
            else:
                self._suspect(rank, proven=False)

    def _judge(self, rank: int, refused: bool) -> None:
        if not self._agreement.inside:
            self._unreached.add(rank)
            if refused:
                self._refused.add(rank)
            self._notify()
        elif rank not in self.view.members:
            self._door.gone(rank)
            self._agreement.turn_away(rank)
        elif refused:
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

    def _send(self, rank: int, message: Message) -> None:
        link = self._links.get(rank)
        if link is None:
            if rank not in self._contacts:
                return
            link = self._links[rank] = self._connect(rank)
        link.send(message)
        if link.lost:
            self._lost(link)
        elif link.wants_write:
            events = selectors.EVENT_READ | selectors.EVENT_WRITE
            self._selector.modify(link.socket, events, link)

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

    def _look(self, now: float) -> None:
        """Silence, connections that do not come about, a change of members that does not end."""
        if self._wanted:
            self._serve()
        if not self._agreement.changing:
            self._changing = now
        elif now - self._changing > _AGAIN_S:
            self._changing = now
            self._agreement.retry()
            self._probe_leader()
        patience = max(self.dead_after, min(_STRETCH * self._gap, _MOST_S))
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
        for link in [*self._links.values(), *self._pulses.values()]:
            if not link.open and not link.lost and now - link.since > patience:
                self._lost(link)

        self._door.look()
        if len(self._links) > LINKS:
            self._close_unused(now)

    def _close_unused(self, now: float) -> None:
        """Close links beyond LINKS, the least recently used first; they are made again at need."""
        for link in sorted(self._links.values(), key=lambda link: link.used):
            if len(self._links) > LINKS and link.idle and now - link.used > _AGAIN_S:
                del self._links[link.to]
                self._drop(link)

    def _neighbours(self, direction: int) -> list[int]:
        """The next (+1) or last (-1) WATCHERS members on the ring."""
        members = self.view.members
        place = members.index(self.rank)
        near = range(1, min(WATCHERS, len(members) - 1) + 1)
        return [members[(place + direction * k) % len(members)] for k in near]

    # --- messages ------------------------------------------------------------------------------

    def _install(self, view: View) -> None:
        self._unreached.clear()
        if view.facts.passed > self._passed:  # the last leader died before it could tell this rank
            self._passed_now(view.facts.passed, bytes.fromhex(view.facts.result))
        self._arrivals = {key: who for key, who in self._arrivals.items() if key[0] >= view.epoch}
        self._wanted = [  # guests do not hear of views
            (sender, message)
            for sender, message in self._wanted
            if int(message["epoch"]) >= view.epoch or sender not in view.members
        ]
        for rank in [rank for rank in self._links if rank not in view.members]:
            self._drop(self._links.pop(rank))
        self._door.reset()
        self._watch()
        self._install_group(view)
        self._inside = True  # only now: the group knows from where it goes on
        self._notify()
        self._release_arrived()

    def _expel(self, reason: str) -> None:
        self._expel_group(reason)
        self._end()

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()

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

    def _on_want(self, sender: int, message: Message) -> None:
        self._wanted.append((sender, message))
        self._serve()

    def _serve(self) -> None:
        waiting, self._wanted = self._wanted, []
        for sender, message in waiting:
            name = str(message["name"])
            answerer = self._answerers.get(name.partition(" ")[0])
            blob = self._offers.get(name) if answerer is None else answerer(name)
            if blob is None:
                self._wanted.append((sender, message))
            else:
                answer = {"key": message["key"], "blob": base64.b64encode(blob).decode()}
                self._send(sender, {"kind": "have", **answer})

    def _on_have(self, _: int, message: Message) -> None:
        with self._changed:
            self._answers[str(message["key"])] = base64.b64decode(message["blob"])
            self._changed.notify_all()

    def _arrive(self, sender: int, message: Message) -> None:
        key = int(message["epoch"]), int(message["number"])
        blob = base64.b64decode(message["blob"])
        self._arrivals.setdefault(key, {})[sender] = (str(message["name"]), blob)
        self._release_arrived()

    def _release_arrived(self) -> None:
        members = self.view.members
        for (epoch, number), here in list(self._arrivals.items()):
            if epoch != self.view.epoch or not set(members) <= set(here):
                continue
            if self._door.guests and here[members[0]][0] == self._door.kind:
                self._door.open()
                if self._agreement.changing or self.view.epoch != epoch:
                    return  # they meet again, with the guests
            del self._arrivals[epoch, number]
            names = [here[rank][0] for rank in members]
            other = next((rank for rank in members if here[rank][0] != names[0]), None)
            if other is None:
                blobs = [here[rank][1] for rank in members]
                result = _TOGETHER + self._merges.pop(number)(blobs, members)
            else:
                text = (
                    f"rank {members[0]} is at {names[0]!r}, rank {other} at {here[other][0]!r}; "
                    "all ranks must make the same calls, in the same order"
                )
                result = _OUT_OF_STEP + text.encode()
            encoded = base64.b64encode(result).decode()
            for rank in members:
                if rank != self.rank:
                    self._send(rank, {"kind": "release", "number": number, "result": encoded})
            self._passed_now(number, result)

    def _on_release(self, _: int, message: Message) -> None:
        self._passed_now(int(message["number"]), base64.b64decode(message["result"]))

    def _passed_now(self, number: int, result: bytes) -> None:
        with self._changed:
            self._passed = max(self._passed, number)
            self._results[number] = result
            self._results.pop(number - _RESULTS, None)
            self._changed.notify_all()

    def _on_abort(self, sender: int, message: Message) -> None:
        self._aborted(sender, str(message["reason"]))
        self._end()

    def _end(self) -> None:
        """The job is over for this rank: nobody waits any longer."""
        with self._changed:
            self._over = True
            self._changed.notify_all()

    def disown(self) -> None:
        """In a forked child: keep no connection open, which would tell others that this rank lives.

        The parent's are not touched by it.
        """
        self._stop = True
        descriptors = [link.socket.fileno() for link in self._every_link()]
        with suppress(Exception):
            descriptors += [key.fd for key in self._selector.get_map().values()]
        for descriptor in {fd for fd in descriptors if fd >= 0}:
            with suppress(OSError):
                os.close(descriptor)
