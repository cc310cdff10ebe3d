"""What all members do together: agree on facts, merge blobs, make mailboxes, repeat until whole.

All of it is collective: every member makes the same calls in the same order. What is settled once
in the life of the group is written into its history, for those who come later.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ucxgossip import running
from ucxgossip.errors import (
    ArgumentError,
    ExchangeError,
    GossipError,
    MismatchError,
    RankMissingError,
    RendezvousError,
)
from ucxgossip.guests import Guests
from ucxgossip.history import SPARE, plain
from ucxgossip.mailbox import Layout, Mailbox, usual_depth
from ucxgossip.members import Warden
from ucxgossip.membership import Setup, log, nothing
from ucxgossip.rendezvous import first_difference
from ucxgossip.store import Place

_SLICE = 1.0

NOT_YET = b"null"
"""What a merge gives that is to be made again later; no history keeps it."""


class JobGoneError(Exception):
    """The job that a note tells of has ended; never leaves `join`."""


class Meetings(Guests):
    """A membership whose members meet."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.exact_credits = False
        self._naming = "mailbox"
        self._names: dict[str, int] = {}
        self._chunks: dict[str, int] = {}

    # --- the first meeting ------------------------------------------------------------------------

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

    def _meet_wardens(self, warden: Warden) -> None:
        """Start this rank's warden and tell all founders where it listens."""
        meeting = self._meeting
        try:
            meeting.publish("warden", json.dumps(warden.address).encode())
            if self.rank == 0:
                blobs = [meeting.collect("warden", rank) for rank in self.members]
                meeting.publish("wardens", json.dumps([json.loads(b) for b in blobs]).encode())
            addresses = json.loads(meeting.collect("wardens", 0))
            warden.offer("worker 0", self.engine.worker.address, 0)
            warden.answer("history", self._tell_history)
            contacts = {rank: (host, port) for rank, (host, port) in enumerate(addresses)}
            warden.start(contacts, trial=True)
            self._prove(warden)
            meeting.agree("wardens", {})
            warden.trust()
        except BaseException as error:
            reason = f"{type(error).__name__}: {error}"
            self._quietly(lambda: meeting.abort(reason))  # before others find the warden gone
            warden.close()
            raise

    def _prove(self, warden: Warden) -> None:
        """Return once those that this rank is to hear have reached its warden."""
        start, waited = time.monotonic(), 0.0
        while True:
            try:
                missing = warden.unproved(min(_SLICE, self.timeout - waited))
            except RendezvousError as error:
                self._meeting.declare(error)
            if not missing:
                return
            self._meeting.raise_if_aborted()
            self._check_usable()
            waited = time.monotonic() - start
            if waited >= self.timeout:
                host, port = warden.address
                raise RankMissingError(
                    f"rank {self.rank} waited {waited:.1f} s for rank"
                    f"{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))} to connect "
                    f"to it at {host}:{port}. Do the others know its host by that address "
                    "(UCXGOSSIP_HOST sets it), and does a firewall admit them?",
                    missing,
                )

    # --- agreement --------------------------------------------------------------------------------

    def agree(self, name: str, facts: Mapping[str, object], once: str = "") -> bool:
        """Meet all members and check that they bring the same facts. Collective.

        `MismatchError` where they do not, with the same message on every rank. once: a key, under
        which it is done once in the life of the group; who comes later compares with what was
        agreed, and need not meet. Returns whether that was so.
        """
        mine = plain(facts)
        if self._takes_over(once):
            first, agreed = self.members[0], self._history.agreed[once]
            if agreed is None:
                raise ExchangeError(
                    f"{name}: the others have ended what rank {self.rank} begins ({once}); it "
                    "comes too late for that"
                )
            difference = first_difference(agreed, mine, self.rank, first=first)
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

    def _meet(
        self,
        name: str,
        blob: bytes,
        merge: Callable[[list[bytes], Sequence[int]], bytes],
        record: Callable[[bytes], None] = lambda _: None,
    ) -> bytes:
        while True:
            with self._lock:
                self.await_steady()
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
            with self._lock:
                self.await_steady()
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
            found = self._warden.meet(epoch, "together", b"", nothing, self.timeout)
        except GossipError as error:
            self._fail(error)
        if found is None:
            return False
        self._settle(lambda _: None, found)
        return True

    # --- mailboxes --------------------------------------------------------------------------------

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

    def suit_devices(self, name: str, here: bool) -> bool:
        """Mailboxes of `name` get chunks as devices want them, if any member has one. Collective.

        here: whether this rank does. Once in the life of the group. Returns whether any does.
        """
        key = f"{name}, devices"
        found = bool(self.share(key, b"x" if here else b"", b"".join, once=key))
        if found:
            self._chunks[name] = self.tuning.device_chunk
        return found

    def mailbox(self, nbytes: int, depth: int | None = None, ring: bool = False) -> Mailbox:
        """A stream of rounds of at most `nbytes` each, `depth` of which may wait. Collective.

        depth: `usual_depth` by default, 2 for all but small payloads. ring: each round is
        waited for as soon as it is posted (as `exchange` does), so that large payloads may go
        through a ring of `depth` chunks (`Tuning.ring` by default) instead of whole slots: half
        the time over shared memory (docs/performance.md), and little memory.
        """
        self._check_usable()
        if isinstance(nbytes, bool) or not isinstance(nbytes, int) or nbytes < 1:
            raise ArgumentError(f"mailbox of {nbytes!r} bytes; must be a positive whole number")
        if not isinstance(ring, bool):
            raise ArgumentError(f"mailbox: ring is {ring!r}; must be True or False")
        layout = self._layout_of(nbytes, depth, ring)
        name = self.label(self._naming)
        if self._look_up(lambda: name in self._unclaimed):
            mailbox = self._claim(name, layout, may_be_ring=ring, usual=depth is None)
        else:
            mailbox = self._make(name, layout)
        mailbox.owner = self._naming
        return mailbox

    def _make(self, name: str, layout: Layout) -> Mailbox:
        """A new mailbox, or one that was given back. Collective."""
        spare = self._take_spare(layout)
        mailbox = self._open(layout) if spare is None else spare

        def record() -> None:
            known = self._history.mailboxes
            row = (name, layout.nbytes, layout.depth, layout.ring, layout.chunk)
            known[mailbox.index : mailbox.index + 1] = [row]

        facts = {
            "bytes": layout.nbytes,
            "depth": layout.depth,
            "ring": layout.ring,
            "chunk": layout.chunk,
        }
        self._compare(f"mailbox {mailbox.index}", facts, record)
        if spare is not None:
            self.restart(mailbox)
        return mailbox

    def usual_depth(self, nbytes: int) -> int:
        """Slots of a mailbox for payloads of `nbytes`, where nothing is said of them."""
        return 2 if self.exact_credits else usual_depth(nbytes)

    def _layout_of(self, nbytes: int, depth: int | None, ring: bool) -> Layout:
        """The layout of a new mailbox, as `mailbox` says."""
        chunk = self._chunks.get(self._naming, self.tuning.chunk)
        if depth is None:
            ring = ring and nbytes > self.tuning.ring * chunk > 0
            depth = self.tuning.ring if ring else self.usual_depth(nbytes)
        return self._layout(nbytes, depth, ring, chunk)

    def _claim(self, name: str, wanted: Layout, may_be_ring: bool, usual: bool) -> Mailbox:
        """The mailbox of the others that a guest asks for by `name`.

        usual: their slots may be others than `wanted`, since what is usual hangs on whether the
        hosts are one, which another launcher may not say. `MismatchError` where more differs.
        """
        mailbox = self._unclaimed.pop(name)
        known = mailbox.layout
        same = (known.nbytes, known.chunk) == (wanted.nbytes, wanted.chunk)
        if known != wanted and not (usual and same and may_be_ring >= known.ring):
            raise MismatchError(
                f"{name}: rank {self.members[0]} has {known.nbytes} bytes in {known.depth} slots "
                f"and chunks of {known.chunk}, rank {self.rank} has {wanted.nbytes} in "
                f"{wanted.depth} and {wanted.chunk}"
            )
        return mailbox

    def give_back(self, mailbox: Mailbox) -> None:
        """No more rounds of `mailbox`, all of which have ended: the next of its layout is this one.

        Collective in effect: all ranks give back the same ones before they make the next. It stays
        registered: signals and credits of its last rounds may still be on their way to it.
        `ArgumentError` for one of another group, one that was given back before, or one with a
        round under way.
        """
        with self._lock:
            mine = self.engine.mailboxes[mailbox.index : mailbox.index + 1] == [mailbox]
            if not mine or mailbox.index in self._spare:
                raise ArgumentError("give_back: the mailbox is not one of this group")
            if self.engine.active(mailbox):
                raise ArgumentError("give_back: a round of the mailbox is under way")
            mailbox.in_flight, mailbox.itinerary, mailbox.asked = (), None, ()
            known = self._history.mailboxes
            known[mailbox.index] = (SPARE, *known[mailbox.index][1:])
            self._spare[mailbox.index] = mailbox

    def restart(self, mailbox: Mailbox) -> None:
        """Begin anew with all slots free, so that the next round may follow any step.

        Collective in effect: between this and the last round all ranks have met (`agree`).
        """
        with self._lock:
            self.await_steady()
            # Beyond the rounds whose credits are given out. Whoever loses a member here begins as
            # late as those who were through: their round is the base of the new members then.
            mailbox.round += mailbox.layout.reach
            mailbox.base = max(mailbox.base, mailbox.round)
            mailbox.ahead.clear()
