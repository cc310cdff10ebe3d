"""Who is in the group: its members and their epochs, what they agree on, and when it is over.

`Group` builds on this. Three things change who is in: a rank dies, a guest comes in, a rank ends
the job with an error. The first two make a new epoch, on which all members agree
(`ucxgossip.members`, docs/members.md): rounds stand still meanwhile (`steady`), those under way are
broken off, and what must happen in one epoch is done again (`together`).

Rejected: a membership that groups hold and ask (every public method would be there twice).
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn

from ucxgossip import forks, running
from ucxgossip.engine import Engine, Tuning
from ucxgossip.errors import (
    ArgumentError,
    ExchangeError,
    ExchangeTimeoutError,
    ExpelledError,
    GossipError,
    MismatchError,
    PeerError,
    UCXError,
)
from ucxgossip.history import History, plain
from ucxgossip.mailbox import Layout, Mailbox, parse_description
from ucxgossip.members import STEP, Facts, View, Warden
from ucxgossip.rendezvous import Rendezvous, first_difference
from ucxgossip.schedule import Living, Schedule
from ucxgossip.store import Place, launcher_serves
from ucxgossip.trust import Seal
from ucxgossip.ucp.context import Context
from ucxgossip.ucp.memory import RemoteKey

NOT_YET = b"null"
_SLICE = 1.0
_PATIENCE = 10.0
_FRESH_S, _FRESH = 5.0, 20.0
"""A guest that waits fetches weights anew after so many seconds, and times what that took."""
MODEL = "model"
"""What the keys of attached models begin with."""

log = logging.getLogger("ucxgossip")


class Change(NamedTuple):
    """A rank that was lost or came: since which epoch, and when (seconds since 1970)."""

    rank: int
    epoch: int
    when: float


class JobGoneError(Exception):
    """The job that a note tells of has ended; never leaves `join`."""


def _nothing(blobs: list[bytes], ranks: Sequence[int]) -> bytes:
    return b"together"


class Membership:
    """The ranks of a job that live, as far as this one knows.

    size: how many ranks there may be. members: those in the group now, ascending. epoch: counts
    the changes of members. losses, arrivals: who left and who came, and when. guest: this rank is
    not in yet (`enter`).
    """

    def __init__(
        self,
        context: Context,
        engine: Engine,
        meeting: Rendezvous,
        size: int,
        tuning: Tuning,
        verify: bool,
        dead_after: float,
    ) -> None:
        self.context, self.engine, self.tuning, self.verify = context, engine, tuning, verify
        self.rank, self.size, self.timeout = meeting.rank, size, meeting.timeout
        self._meeting = meeting
        self._dead_after, self._patience = dead_after, 2.0 * dead_after + 2.0
        self._closed = False
        self._forked = False
        self._failure: GossipError | None = None
        self._failure_told = False
        self.members: tuple[int, ...] = tuple(range(meeting.size))
        self.epoch = 0
        self.losses: list[Change] = []
        self.arrivals: list[Change] = []
        self.guest = False
        self._came_late = False
        self._lock = threading.RLock()
        self._steady_again = threading.Condition(self._lock)
        self._frozen: int | None = None
        self._froze = 0.0
        self._livings: dict[int, tuple[Schedule, Living]] = {}
        self._taken: dict[int, Callable[[], int]] = {}
        self._capped = size - 1 > tuning.endpoints
        self._uses, self._used = 0, dict[int, int]()
        self._pinned: dict[int, tuple[int, ...]] = {}
        self._told: dict[tuple[int, str], bytes] = {}
        self._view_facts = Facts()
        self._history = History()
        self._inherited: set[str] = set()
        self._unclaimed: dict[str, Mailbox] = {}
        self._settled = 0
        self._clocks: list[Callable[[], int]] = []
        self._arriving: list[tuple[Callable[[], None], Callable[[int], None]]] = []
        self._naming = "mailbox"
        self._names: dict[str, int] = {}
        self._note = ""
        self._job = b""
        self._warden: Warden | None = None

    # --- coming in -----------------------------------------------------------------------------

    def _found(self, place: Place, facts: Mapping[str, object], note: str) -> None:
        """Begin the job with the other founders. note: the key to tell of it by."""
        self._note = note
        self._meeting.agree("join", facts)
        self._history.agreed["join"] = plain(facts)
        if self.size > 1:
            seal = self._meeting.meet()
            self._job = seal.job
            self._warden = self._make_warden(place, seal)
            self._meet_wardens(self._warden)
            self._write_note()

    def _visit(
        self, place: Place, facts: Mapping[str, object], note: str, found: running.Running
    ) -> None:
        """Come to a job that runs, as a guest; `JobGoneError` if it does not run any more."""
        self.guest = self._came_late = True
        self._note, self._job = note, found.number
        seal = self._meeting.board.seal.of_job(found.number)
        self._warden = self._make_warden(place, seal)
        self._warden.start(found.contacts, guest=True)
        try:
            if not self._warden.knock(self.timeout):
                raise JobGoneError
            self.members, self.epoch = self._warden.view.members, self._warden.view.epoch
            self._catch_up(0)
            self.agree("join", facts, once="join")
        except BaseException:
            self._warden.close()
            raise
        log.info("rank %d: found a job of ranks %s", self.rank, list(self.members))

    def _make_warden(self, place: Place, seal: Seal) -> Warden:
        return Warden(
            self.rank,
            place.own_host(),
            seal,
            self._dead_after,
            self._freeze,
            self._install,
            self._expel,
            self._on_abort,
        )

    def _meet_wardens(self, warden: Warden) -> None:
        """Start this rank's warden and tell all founders where it listens."""
        meeting = self._meeting
        try:
            meeting.publish("warden", json.dumps(warden.address).encode())
            if self.rank == 0:
                blobs = [meeting.collect("warden", rank) for rank in self.members]
                meeting.publish("wardens", json.dumps([json.loads(b) for b in blobs]).encode())
            addresses = json.loads(meeting.collect("wardens", 0))
            meeting.agree("wardens", {})
            warden.offer("worker 0", self.engine.worker.address)
            warden.answer("history", self._tell_history)
            warden.start({rank: (host, port) for rank, (host, port) in enumerate(addresses)})
        except BaseException:
            warden.close()
            raise

    def _write_note(self) -> None:
        """Tell those who come later where the members are; one of them does."""
        if self._warden is not None and (self.rank == self.members[0] or self._came_late):
            if not self._store_is_there():
                return
            contacts, board = self._warden.contacts, self._meeting.board
            self._quietly(lambda: running.write(board, self._note, self._job, contacts))

    def _store_is_there(self) -> bool:
        """Whether the store did not go with rank 0."""
        return launcher_serves() or 0 not in [loss.rank for loss in self.losses]

    def _erase_note(self) -> None:
        """Nobody is to come any more; the lowest member says so."""
        if self.rank == self.members[0] and self._store_is_there():
            self._quietly(lambda: running.erase(self._meeting.board, self._note))

    def _tell_history(self, name: str) -> bytes | None:
        """The history, once it holds what the first meetings settled, as many as `name` says."""
        with self._lock:
            ready = self._settled >= int(name.split()[1])
            return self._history.dump() if ready else None

    def _catch_up(self, passed: int) -> None:
        """Learn what the members settled in their first `passed` meetings."""
        assert self._warden is not None
        deadline = time.monotonic() + self.timeout
        blob, other = None, self.rank
        while blob is None:
            others = self.others
            if not others:  # this rank came in, and all others died
                return
            other = others[0]
            try:
                blob = self._warden.fetch(other, f"history {passed}", _PATIENCE)
            except ExchangeTimeoutError as error:
                if time.monotonic() > deadline:
                    self._fail(error)
            self._check_usable()
        history = History.parse(blob, other)
        with self._lock:
            self._inherited |= history.news(self._history)
            known = len(self._history.mailboxes)
            self._history, self._settled = history, passed
            for name, nbytes, depth in history.mailboxes[known:]:
                mailbox = self._open(nbytes, depth)
                self._unclaimed[name] = mailbox
                if mailbox.index < len(self._view_facts.rounds):
                    mailbox.base = mailbox.round = self._view_facts.rounds[mailbox.index]

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

    @property
    def others(self) -> list[int]:
        """The other members; of a guest those that it can reach."""
        if self._warden is None:
            return []
        return [rank for rank in self._warden.reachable if rank != self.rank]

    def fetch_from(self, rank: int, name: str) -> bytes | None:
        """What `rank` offers as `name`, if it is a member; None if it is none (any more)."""
        assert self._warden is not None
        try:
            return self._warden.fetch(rank, name, self.timeout)
        except ExchangeTimeoutError as error:
            self._fail(error)

    def answer(self, kind: str, answerer: Callable[[str], bytes | None]) -> None:
        """Answer what other ranks fetch by names that begin with `kind`; None: ask again soon."""
        if self._warden is not None:
            self._warden.answer(kind, answerer)

    def let_in(self, when: str) -> None:
        """From now on guests come in when all members are at the meeting `when`."""
        if self._warden is not None:
            self._warden.let_in(when)

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
        if any(name.startswith(MODEL) for name in self._inherited):
            return  # they have more
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
        self._let_in_between_steps()

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

    def end_model(self, clock: Callable[[], int]) -> None:
        """No more steps with this clock; guests are too late when it was the last one."""
        if clock in self._clocks:
            self._clocks.remove(clock)
        if self._warden is not None and not self._clocks:
            self._warden.no_more_steps()

    # --- agreement -----------------------------------------------------------------------------

    def agree(self, name: str, facts: Mapping[str, object], once: str = "") -> bool:
        """Meet all members and check that they bring the same facts. Collective.

        `MismatchError` where they do not, with the same message on every rank. once: a key, under
        which it is done once in the life of the group; who comes later compares with what was
        agreed, and need not meet. Returns whether that was so.
        """
        mine = plain(facts)
        if self._takes_over(once):
            first = self.members[0]
            difference = first_difference(self._history.agreed[once], mine, self.rank, first=first)
            if difference:
                raise MismatchError(f"{name}: {difference}")
            return True

        def record() -> None:
            if once:
                self._history.agreed[once] = mine

        self._compare(name, mine, record)
        return False

    def _compare(self, name: str, mine: Any, record: Callable[[], None]) -> None:
        """Meet all members, who all bring the same facts, and record it; `MismatchError` else."""

        def compare(blobs: list[bytes], ranks: Sequence[int]) -> bytes:
            first = json.loads(blobs[0])
            for blob, rank in zip(blobs, ranks, strict=True):
                difference = first_difference(first, json.loads(blob), rank, first=ranks[0])
                if difference:
                    return f"{name}: {difference}".encode()
            return b""

        def settle(message: bytes) -> None:
            if not message:
                record()

        message = self._meet(name, json.dumps(mine).encode(), compare, settle)
        if message:  # whoever left may have left because of it
            raise MismatchError(message.decode())
        self._check_usable()

    def share(
        self, name: str, blob: bytes, merge: Callable[[list[bytes]], bytes], once: str = ""
    ) -> bytes:
        """What `merge` makes of the blobs of all members, in order. Collective.

        For what is rare and small: it goes through the member with the lowest rank. once: as in
        `agree`; who comes later gets what was merged then (``null`` means not yet, and is not
        kept).
        """
        if self._takes_over(once):
            return self._history.shared[once]

        def record(merged: bytes) -> None:
            if once and merged != NOT_YET:
                self._history.shared[once] = merged

        return self._meet(name, blob, lambda blobs, _: merge(blobs), record)

    def _takes_over(self, once: str) -> bool:
        """Whether the others settled this before; if not, a guest comes in now."""
        if once not in self._inherited:
            self.enter()
        if once not in self._inherited:
            return False
        self._inherited.discard(once)
        return True

    def _meet(
        self,
        name: str,
        blob: bytes,
        merge: Callable[[list[bytes], Sequence[int]], bytes],
        record: Callable[[bytes], None] = lambda _: None,
    ) -> bytes:
        while True:
            with self.steady():
                epoch = self.epoch
            if self._warden is None:
                found: bytes | None = merge([blob], [self.rank])
            else:
                try:
                    found = self._warden.meet(epoch, name, blob, merge, self.timeout)
                except MismatchError:
                    raise
                except GossipError as error:
                    self._fail(error)
            if found is not None:
                self._settle(record, found)
                return found
            self._check_usable()

    def _settle(self, record: Callable[[bytes], None], found: bytes) -> None:
        """Write down what a meeting gave, for those who come later."""
        with self._lock:
            record(found)
            if self._warden is not None:
                self._settled = self._warden.passed[0]

    def together(self, operation: Callable[[int], bool], undo: Callable[[], None]) -> int:
        """Do `operation` until all members have done it in one epoch; which. Collective.

        operation: called with the epoch, outside of which it may post nothing; whether all its
        rounds ended. undo: brings back what it changed, to do it again.
        """
        self.enter()
        while True:
            with self.steady():
                epoch = self.epoch
            if operation(epoch) and self._confirm(epoch):
                return epoch
            undo()
            self._await_change(epoch)

    def _confirm(self, epoch: int) -> bool:
        """Meet all members: whether all have come here in `epoch`. Collective."""
        if self._warden is None:
            return True
        try:
            found = self._warden.meet(epoch, "together", b"", _nothing, self.timeout)
        except GossipError as error:
            self._fail(error)
        if found is None:
            return False
        self._settle(lambda _: None, found)
        return True

    # --- mailboxes and partners ----------------------------------------------------------------

    def label(self, kind: str) -> str:
        """``"model 0"``, ``"model 1"``: the same on all ranks, which ask in the same order."""
        count = self._names.get(kind, 0)
        self._names[kind] = count + 1
        return f"{kind} {count}"

    @contextmanager
    def naming(self, name: str) -> Iterator[None]:
        """Mailboxes made in this block belong to `name`, by which a guest finds its own."""
        before, self._naming = self._naming, name
        try:
            yield
        finally:
            self._naming = before

    def mailbox(self, nbytes: int, depth: int = 2) -> Mailbox:
        """A stream of rounds of at most `nbytes` each, `depth` of which may wait. Collective."""
        self._check_usable()
        if isinstance(nbytes, bool) or not isinstance(nbytes, int) or nbytes < 1:
            raise ArgumentError(f"mailbox of {nbytes!r} bytes; must be a positive whole number")
        layout = Layout(nbytes, depth, self.tuning.chunk, self.verify)
        name = self.label(self._naming)
        if name not in self._unclaimed:
            self.enter()
        if name in self._unclaimed:
            mailbox = self._unclaimed.pop(name)
            if mailbox.layout != layout:
                known = mailbox.layout
                raise MismatchError(
                    f"{name}: rank {self.members[0]} has {known.nbytes} bytes in {known.depth} "
                    f"slots, rank {self.rank} has {nbytes} in {depth}"
                )
            return mailbox
        mailbox = self._open(nbytes, depth)

        def record() -> None:
            self._history.mailboxes.append((name, nbytes, depth))

        self._compare(f"mailbox {mailbox.index}", {"bytes": nbytes, "depth": depth}, record)
        return mailbox

    def _open(self, nbytes: int, depth: int) -> Mailbox:
        with self.steady():
            layout = Layout(nbytes, depth, self.tuning.chunk, self.verify)
            mailbox = Mailbox(self.context, layout, self.size)
            try:
                self.engine.open(mailbox)
            except BaseException:
                mailbox.close()
                raise
            self._offer(mailbox)
        return mailbox

    def _offer(self, mailbox: Mailbox) -> None:
        if self._warden is not None:
            epoch = self.epoch if self._frozen is None else self._frozen
            self._warden.offer(f"mailbox {mailbox.index} {epoch}", mailbox.describe())

    def reach(self, rank: int, mailbox: Mailbox) -> bool:
        """Make sure that `mailbox` can be put to on `rank`; False if it is no member (any more)."""
        self.enter()
        while True:
            with self.steady():
                if rank in mailbox.keys:
                    return True
                if rank not in self.members or self._warden is None:
                    return False
                epoch, known = self.epoch, rank in self.engine.endpoints
            worker = b"" if known else self._ask(rank, f"worker {epoch}")
            blob = self._ask(rank, f"mailbox {mailbox.index} {epoch}")
            if worker is None or blob is None:
                continue
            address, packed = parse_description(blob, mailbox.layout, rank)
            try:
                with self.steady():
                    if self.epoch == epoch and rank not in mailbox.keys:
                        self.engine.connect(rank, worker)
                        with self.engine.locked():
                            key = RemoteKey(self.engine.endpoints[rank], packed)
                            mailbox.set_peer(rank, key, address)
            except UCXError as error:
                self._doubt((rank,), epoch, error)

    def _ask(self, rank: int, name: str) -> bytes | None:
        """As `fetch_from`, remembered until the members change where endpoints are made again."""
        known = self._told.get((rank, name))
        if known is not None:
            return known
        found = self.fetch_from(rank, name)
        if self._capped and found is not None:
            self._told[rank, name] = found
        return found

    def pin(self, mailbox: Mailbox, ranks: Sequence[int]) -> None:
        """Keep the endpoints to `ranks` for `mailbox`, whose rounds are not posted here."""
        self._pinned[mailbox.index] = tuple(ranks)

    def _close_unused(self, wanted: Sequence[int | None], room: int) -> None:
        """Make room for so many endpoints below the cap; those to `wanted` ranks stay.

        The least recently used go first, and only where nothing is under way in either direction:
        this rank's puts have ended, and the other one holds no credit for a put.
        """
        most = self.tuning.endpoints - room
        if len(self.engine.endpoints) <= most:
            return
        busy = {rank for rank in wanted if rank is not None}
        busy.update(rank for ranks in self._pinned.values() for rank in ranks)
        for mailbox in self.engine.mailboxes:
            active = self.engine.active(mailbox)
            if active:
                busy.add(self.engine.target_of(mailbox))
            first = mailbox.round - active
            busy.update(rank for number, rank in mailbox.credited.items() if number >= first)
        for rank in sorted(self.engine.endpoints, key=lambda rank: self._used.get(rank, 0)):
            if len(self.engine.endpoints) <= most:
                return
            if rank not in busy:
                self.engine.disconnect(rank)

    # --- members -------------------------------------------------------------------------------

    @contextmanager
    def steady(self) -> Iterator[None]:
        """Hold the lock while no change of members is under way; waits for the end of one."""
        with self._lock:
            self._check_usable()
            start = time.monotonic()
            while self._frozen is not None:
                waited = time.monotonic() - start
                if waited > self.timeout:
                    leader = self.members[0]
                    what = "to end a change of the members"
                    self._fail(
                        ExchangeTimeoutError(
                            f"rank {self.rank} waited {waited:.1f} s for rank {leader} (or whoever "
                            f"leads in its place) {what}. Is it alive?",
                            leader,
                            what,
                            waited,
                        )
                    )
                self._steady_again.wait(min(_SLICE, self.timeout))
                self._check_usable()
            yield

    def _freeze(self, epoch: int) -> Facts:
        """Break off what is under way, for `epoch`. In the warden's thread."""
        with self._lock:
            if self._frozen != epoch and not self._closed and self._failure is None:
                if self._frozen is None:
                    self._froze = time.monotonic()
                self._frozen = epoch
                self.engine.renew(epoch, elsewhere=self.context.transport != "tcp")
                assert self._warden is not None
                self._warden.offer(f"worker {epoch}", self.engine.worker.address)
                for mailbox in self.engine.mailboxes:
                    self._offer(mailbox)
            return Facts(
                tuple(mailbox.round for mailbox in self.engine.mailboxes),
                *((0, "") if self._warden is None else self._warden.passed),
                tuple((self.rank, box, count()) for box, count in self._taken.items()),
                () if self.guest else tuple(clock() for clock in self._clocks),
            )

    def _install(self, view: View) -> None:
        """Go on with the members of `view`. In the warden's thread."""
        with self._lock:
            before, usable, entered = self.members, self._frozen is not None, self.guest
            stall = time.monotonic() - self._froze
            self.members, self.epoch, self._view_facts = view.members, view.epoch, view.facts
            for mailbox, number in zip(self.engine.mailboxes, view.facts.rounds, strict=False):
                mailbox.base = number
                if entered:
                    mailbox.round = number
            self._livings.clear()
            self._told.clear()
            now = time.time()
            lost = [rank for rank in before if rank not in view.members]
            came = [rank for rank in view.members if rank not in before]
            self.losses += [Change(rank, view.epoch, now) for rank in lost]
            self.arrivals += [Change(rank, view.epoch, now) for rank in came if rank != self.rank]
            self._frozen = None
            self.guest = False
            self._steady_again.notify_all()
        if not usable:  # it failed or was closed before: nothing goes on here
            return
        if entered:
            log.warning("rank %d is in: %s (epoch %d)", self.rank, list(view.members), view.epoch)
            return
        for what, ranks in (("lost", lost), ("came", came)):
            if ranks:
                log.warning(
                    "rank %d: rank%s %s %s; %d of %d go on (epoch %d, rounds stood still for "
                    "%.2f s)",
                    self.rank,
                    "s" if len(ranks) > 1 else "",
                    ", ".join(map(str, ranks)),
                    what,
                    len(view.members),
                    self.size,
                    view.epoch,
                    stall,
                )

    def _expel(self, reason: str) -> None:
        self._end(ExpelledError(reason))

    def _on_abort(self, rank: int, reason: str) -> None:
        self._end(PeerError(f"rank {rank} left the job: {reason}", rank))

    def _end(self, failure: GossipError) -> None:
        """Let every call fail with `failure` from now on. In the warden's thread."""
        with self._lock:
            if self._failure is None and not self._closed:
                self._failure = failure
                self._steady_again.notify_all()
        self.engine.stop()

    def _doubt(self, ranks: Sequence[int], epoch: int, error: GossipError) -> None:
        """`error` may be the death of one of `ranks`: returns when the members have changed.

        If they all live, it is an error.
        """
        if self._warden is None:
            self._fail(error)
        alive = self._warden.doubt([r for r in ranks if r >= 0], epoch, self._patience)
        self._check_usable()
        if alive:
            self._fail(error)

    def _await_change(self, epoch: int) -> None:
        """Return when `epoch` is over, or (`ExchangeTimeoutError`) not within the timeout."""
        deadline = time.monotonic() + self.timeout
        with self._lock:
            while self.epoch == epoch:
                self._check_usable()
                left = deadline - time.monotonic()
                if left <= 0:
                    what = "to change the members after a broken round"
                    self._fail(
                        ExchangeTimeoutError(
                            f"rank {self.rank} waited {self.timeout:.1f} s for rank "
                            f"{self.members[0]} {what}. Is it alive?",
                            self.members[0],
                            what,
                            self.timeout,
                        )
                    )
                self._steady_again.wait(min(left, _SLICE))

    def living(self, schedule: Schedule) -> Living:
        """`schedule` over the members."""
        known = self._livings.get(id(schedule))
        if known is None:
            known = self._livings[id(schedule)] = (schedule, Living(schedule, self.members))
        return known[1]

    def count_taken(self, mailbox: Mailbox, taken: Callable[[], int]) -> None:
        """`taken` says how many messages of this channel were read (see `left_behind`)."""
        self._taken[mailbox.index] = taken

    def left_behind(self, mailbox: Mailbox, rank: int) -> int | None:
        """How many messages of `mailbox` member `rank` had read when the members last changed."""
        found = self._view_facts.taken
        return next((n for r, box, n in found if (r, box) == (rank, mailbox.index)), None)

    # --- the end -------------------------------------------------------------------------------

    def _part(self, deadline: float) -> None:
        """Meet all members to leave, or go alone when the time is up."""
        assert self._warden is not None
        while self._failure is None:
            epoch, left = self.epoch, max(0.0, deadline - time.monotonic())
            try:
                if self._frozen is None and self._warden.meet(epoch, "leave", b"", _nothing, left):
                    break
            except GossipError as error:
                log.warning("rank %d leaves alone: %s", self.rank, error)
                break
            if left == 0:
                break
            with self._lock:
                self._steady_again.wait_for(
                    lambda: self._frozen is None or self._failure is not None, left
                )
        self._warden.leave()

    def _check_usable(self) -> None:
        if self._closed:
            raise forks.gone("the group", self._forked)
        if self._failure is None:
            return
        if not self._failure_told:
            self._failure_told = True
            raise self._failure
        raise ExchangeError(f"the group failed before: {self._failure}") from self._failure

    def _fail(self, error: GossipError) -> NoReturn:
        """Remember that rounds are broken off, tell the others, raise.

        If another rank left with an error, that is the cause, and is raised in its place.
        """
        with self._lock:
            first = self._failure is None
            cause = self._failure if self._failure is not None else error
            self._failure, self._failure_told = cause, True
            self._steady_again.notify_all()
        self.engine.stop()
        if first:
            self._tell(str(error))
        raise cause

    def _tell(self, reason: str) -> None:
        """Tell the others that this rank ends the job; a guest does not."""
        if self.guest:
            return
        if self._warden is not None:
            self._warden.abort(reason)
        if self._store_is_there() and not self._came_late:
            self._quietly(lambda: self._meeting.abort(reason))

    @staticmethod
    def _quietly(action: Callable[[], object]) -> None:
        try:
            action()
        except Exception:  # the store may have gone with rank 0; the first error is the one to see
            return

    @property
    def failed(self) -> bool:
        """Whether a round or another rank failed; no round moves after that."""
        return self._failure is not None

    def abort(self, reason: str) -> None:
        """Break off all rounds; the others get a `PeerError` at their next wait."""
        if self._closed:
            return
        with self._lock:
            self._failure = self._failure or ExchangeError(reason)
            self._failure_told = True
            self._steady_again.notify_all()
        self._tell(reason)
        self.engine.stop()
