"""Who is in the group: its members and their epochs, and when it is over for this rank.

`Group` stands on this, by way of `Guests`, `Meetings` and `Partners`. Three things change who is
in: a rank dies, a guest comes in, a rank ends the job with an error. The first two make a new
epoch, on which all members agree (`ucxgossip.members`, docs/members.md): rounds stand still
meanwhile (`steady`), and those under way are broken off.

Rejected: a membership that groups hold and ask (every public method would be there twice).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, NoReturn

from ucxgossip import forks
from ucxgossip.engine import Constants, Engine
from ucxgossip.errors import (
    ExchangeError,
    ExchangeTimeoutError,
    ExpelledError,
    GossipError,
    PeerError,
    RankMissingError,
    UCXError,
)
from ucxgossip.mailbox import Mailbox
from ucxgossip.members import Facts, View, Warden
from ucxgossip.rendezvous import Rendezvous
from ucxgossip.schedule import Living, Schedule
from ucxgossip.store import Place, launcher_serves
from ucxgossip.trust import Seal
from ucxgossip.ucp.context import Context

_SLICE = 1.0

log = logging.getLogger("ucxgossip")


class Change(NamedTuple):
    """A rank that was lost or came: since which epoch, and when (seconds since 1970)."""

    rank: int
    epoch: int
    when: float


def nothing(blobs: list[bytes], ranks: Sequence[int]) -> bytes:
    """Merge blobs that say no more than that all are here."""
    return b"together"


@dataclass(frozen=True)
class Setup:
    """What a group is made of.

    size: ranks of the job. dead_after: seconds of silence after which a rank is taken for dead.
    verify: a checksum travels with every chunk. The group closes engine and context.
    """

    context: Context
    engine: Engine
    meeting: Rendezvous
    size: int
    dead_after: float
    tuning: Constants
    verify: bool


class Membership:
    """The ranks of a job that live, as far as this one knows.

    size: how many ranks there may be. members: those in the group now, ascending. epoch: counts
    the changes of members. losses, arrivals: who left and who came, and when. guest: this rank is
    not in yet.
    """

    def __init__(self, setup: Setup) -> None:
        meeting = setup.meeting
        self.context, self.engine = setup.context, setup.engine
        self.rank, self.size, self.timeout = meeting.rank, setup.size, meeting.timeout
        self._meeting = meeting
        self._dead_after, self._patience = setup.dead_after, 2.0 * setup.dead_after + 2.0
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
        self._clocks: list[Callable[[], int]] = []
        self._view_facts = Facts()
        self._warden: Warden | None = None

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
            found = self._warden.fetch(rank, name, self.timeout)
        except ExchangeTimeoutError as error:
            self._fail(error)
        if found is None and self.guest and self._warden.over:
            self._check_usable()
            self._fail(
                RankMissingError(f"the job ended before rank {self.rank} could come in", (rank,))
            )
        return found

    def answer(self, kind: str, answerer: Callable[[str], bytes | None]) -> None:
        """Answer what other ranks fetch by names that begin with `kind`; None: ask again soon."""
        if self._warden is not None:
            self._warden.answer(kind, answerer)

    def _offer(self, mailbox: Mailbox) -> None:
        if self._warden is not None:
            epoch = self.epoch if self._frozen is None else self._frozen
            self._warden.offer(f"mailbox {mailbox.index} {epoch}", mailbox.describe(), epoch)

    # --- epochs -----------------------------------------------------------------------------------

    @property
    def lock(self) -> threading.RLock:
        """What keeps the members from changing: ``with group.lock: group.await_steady(); ...``.

        A context manager of ours that took it would keep it, for ever, where Ctrl-C comes between
        its taking it and the block: only a lock's own ``with`` is one step.
        """
        return self._lock

    def await_steady(self) -> None:
        """Wait until no change of members is under way, for a caller who holds the lock."""
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

    def _freeze(self, epoch: int) -> Facts:
        """Break off what is under way, for `epoch`. In the warden's thread."""
        with self._lock:
            if self._frozen != epoch and not self._closed and self._failure is None:
                if self._frozen is None:
                    self._froze = time.monotonic()
                self._frozen = epoch
                self._renew(epoch)
            return Facts(
                tuple(mailbox.round for mailbox in self.engine.mailboxes),
                *((0, "") if self._warden is None else self._warden.passed),
                tuple((self.rank, box, count()) for box, count in self._taken.items()),
                () if self.guest else tuple(clock() for clock in self._clocks),
            )

    def _renew(self, epoch: int) -> None:
        """A new worker, and where it and the mailboxes are in `epoch`, for others to ask."""
        assert self._warden is not None
        try:
            self.engine.renew(epoch, elsewhere=self.context.transport != "tcp")
        except UCXError as error:
            said = f"rank {self.rank} can connect to nobody any more: {error}. Is its network down?"
            self._end(ExpelledError(said))
            return
        self._warden.offer(f"worker {epoch}", self.engine.worker.address, epoch)
        for mailbox in self.engine.mailboxes:
            self._offer(mailbox)

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
        with self._lock:  # members change in the warden's thread
            known = self._livings.get(id(schedule))
            if known is None:
                known = self._livings[id(schedule)] = (schedule, Living(schedule, self.members))
            return known[1]

    def count_taken(self, mailbox: Mailbox, taken: Callable[[], int]) -> None:
        """`taken` says how many messages of this channel were read (see `left_behind`)."""
        with self._lock:
            self._taken[mailbox.index] = taken

    def left_behind(self, mailbox: Mailbox, rank: int) -> int | None:
        """How many messages of `mailbox` member `rank` had read when the members last changed."""
        found = self._view_facts.taken
        return next((n for r, box, n in found if (r, box) == (rank, mailbox.index)), None)

    # --- the end ----------------------------------------------------------------------------------

    def _part(self, deadline: float) -> bool:
        """Meet all members to leave, or go alone (False) when the time is up."""
        assert self._warden is not None
        met = False
        while self._failure is None:
            epoch, left = self.epoch, max(0.0, deadline - time.monotonic())
            try:
                if self._frozen is None and self._warden.meet(epoch, "leave", b"", nothing, left):
                    met = True
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
        return met

    @property
    def _advice(self) -> str:
        """What to do after `close`."""
        return ""

    def _check_usable(self) -> None:
        if self._closed:
            raise forks.gone("the group", self._forked, self._advice)
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

    def _store_is_there(self) -> bool:
        """Whether the store did not go with rank 0."""
        return launcher_serves() or 0 not in [loss.rank for loss in self.losses]

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

    def tell_failure(self) -> None:
        """Raise what ended the job, if no call has raised it yet."""
        with self._lock:
            if self._failure is None or self._failure_told:
                return
            self._failure_told = True
        raise self._failure

    def not_told(self) -> None:
        """What ended the job was raised where nobody heard it: the next call raises it again."""
        self._failure_told = False

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
