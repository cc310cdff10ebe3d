"""The ranks of a job: joining, endpoints made when first needed, and rounds by schedule.

>>> import numpy as np, ucxgossip as ug
>>> with ug.join() as group:                      # one process a rank, started by torchrun
...     x = np.full(1000, float(group.rank), np.float32)
...     group.exchange(x)                         # x is now the mean of mine and a partner's
"""

from __future__ import annotations

import json
import logging
import math
import mmap
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib import metadata
from types import TracebackType
from typing import Any, NamedTuple, NoReturn, Self

import numpy as np
from numpy.typing import NDArray

from ucxgossip import forks
from ucxgossip.buffer import Buffer
from ucxgossip.engine import Engine, Post, Tuning, rounds
from ucxgossip.engine import words as w
from ucxgossip.errors import (
    ArgumentError,
    ArrayError,
    ClosedError,
    ExchangeError,
    ExchangeTimeoutError,
    ExpelledError,
    GossipError,
    IntegrityError,
    MismatchError,
    PeerError,
    ScheduleError,
    UCXError,
)
from ucxgossip.mailbox import Layout, Mailbox, parse_description
from ucxgossip.members import Facts, View, Warden
from ucxgossip.quarantine import Quarantine, check_policy
from ucxgossip.rendezvous import Rendezvous, first_difference
from ucxgossip.schedule import ALONE, Dissemination, Living, Rotated, Round, Schedule
from ucxgossip.store import Place, Solitary, Store, open_store
from ucxgossip.trust import find_token, new_token
from ucxgossip.ucp import ops
from ucxgossip.ucp.context import TRANSPORTS, Context
from ucxgossip.ucp.lib import status_name
from ucxgossip.ucp.memory import MemoryRegion, RemoteKey

PROTOCOL = 2
"""Raised whenever ranks of different releases could not work together."""

DEFAULT_TIMEOUT = 300.0
DEAD_AFTER = 3.0
_SLICE = 1.0
_GOODBYE = 3.0

log = logging.getLogger("ucxgossip")

TUNING: dict[str, Tuning] = {
    "tcp": Tuning(chunk=1 << 20, window=4),
    "shm": Tuning(chunk=1 << 18, window=16),
    "auto": Tuning(chunk=1 << 18, window=16),
}
"""Chunk and window by transport: starting values, to be tuned by measurement."""

_FLOAT32, _FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)
_OPERATIONS: dict[str, dict[np.dtype[Any], int]] = {
    "mix": {_FLOAT32: w.MIX_FLOAT32, _FLOAT64: w.MIX_FLOAT64},
    "delta": {_FLOAT32: w.DELTA_FLOAT32, _FLOAT64: w.DELTA_FLOAT64},
}


def join(
    rank: int | None = None,
    size: int | None = None,
    store: Store | None = None,
    transport: str = "auto",
    timeout: float = DEFAULT_TIMEOUT,
    settings: Mapping[str, str] | None = None,
    tuning: Tuning | None = None,
    dead_after: float = DEAD_AFTER,
    token: str | bytes | None = None,
    verify: bool = False,
) -> Group:
    """Join the job: returns when every rank is here. Collective.

    rank, size, store: from torchrun's environment by default (RANK, WORLD_SIZE, MASTER_ADDR,
    MASTER_PORT; without them, a job of one rank). `store` is anything with the methods of
    ``torch.distributed.Store`` that `store.Store` lists. transport: ``"auto"``, ``"tcp"`` or
    ``"shm"``. timeout: seconds that any wait of this group may take. settings: UCX settings by
    name. tuning: constants of the engine. dead_after: seconds of silence after which a rank is
    taken for dead (a process that ends is noticed at once). token: the secret that the job's ranks
    share; by default that of `trust.find_token`, which needs no setting on one host or with a
    shared home. verify: a checksum (XXH64) travels with every chunk and is checked before the chunk
    is used (`IntegrityError`): to prove a network or a driver, not for each day
    (docs/performance.md has its cost).

    Raises `RankMissingError`, `MismatchError`, `SignatureError`, `PortInUseError`,
    `LibraryNotFoundError`, `ArgumentError` (`TokenError`), or `ForkError` in a process forked after
    its parent joined; nothing is left behind then.
    """
    if not isinstance(transport, str) or transport not in TRANSPORTS:
        known = ", ".join(repr(name) for name in TRANSPORTS)
        raise ArgumentError(f"unknown transport {transport!r}; choose one of {known}")
    if not isinstance(timeout, int | float) or not 0 < timeout < math.inf:
        raise ArgumentError(f"timeout is {timeout!r}; must be a positive number of seconds")
    if not isinstance(dead_after, int | float) or not 0 < dead_after < math.inf:
        raise ArgumentError(f"dead_after is {dead_after!r}; must be a positive number of seconds")
    if tuning is not None and not isinstance(tuning, Tuning):
        raise ArgumentError(f"tuning is {tuning!r}; must be ug.Tuning(...) or None")
    if settings is not None and not isinstance(settings, Mapping):
        raise ArgumentError(f"settings is {settings!r}; must be a dict of UCX settings by name")
    if not isinstance(verify, bool):
        raise ArgumentError(f"verify is {verify!r}; must be True or False")
    forks.check_usable()
    place = Place.from_environment(rank, size)
    if store is None and place.size == 1:
        store, token = Solitary(), new_token() if token is None else token
    secret = find_token(token)  # before a store is opened
    store = open_store(place, timeout) if store is None else store
    meeting = Rendezvous(store, place.rank, place.size, timeout, secret)
    chosen = dict(settings or {})
    if place.local_size == place.size:
        chosen.setdefault("NET_DEVICES", "lo")
    context = None
    try:
        context = Context(transport, chosen, estimated_peers=place.size)
        return Group(context, meeting, tuning or TUNING[transport], place, dead_after, verify)
    except BaseException as error:
        if context is not None:
            context.close()
        if not isinstance(error, MismatchError | PeerError):
            with suppress(Exception):  # the error at hand is the one to see
                meeting.abort(f"{type(error).__name__}: {error}")
        meeting.give_up()
        raise


class Loss(NamedTuple):
    """A rank that was lost: in which epoch the others went on, and when (seconds since 1970)."""

    rank: int
    epoch: int
    when: float


def _nothing(blobs: list[bytes], ranks: Sequence[int]) -> bytes:
    return b"together"


def _facts(context: Context, tuning: Tuning) -> dict[str, object]:
    """What all ranks must bring alike to join; the number of ranks is compared before.

    UCX: releases that differ in their second number select lanes and protocols differently, each
    side by itself. Its own tests of that (UCX 1.22's buildlib/pr/wire_compat.yml) send messages,
    back to 1.14; no put is among them, and ours has two releases at most.
    """
    try:
        version = metadata.version("ucxgossip")
    except metadata.PackageNotFoundError:  # run from a copy that was never installed
        version = "unknown"
    return {
        "protocol": PROTOCOL,
        "ucxgossip": version,
        "UCX": ".".join(map(str, context.library.version[:2])),
        "transport": context.transport,
        "chunk": tuning.chunk,
        "payload types": [dtype.str for dtype in _OPERATIONS["mix"]],
    }


class Group:
    """The ranks of a job and what goes between them. Made by `join`."""

    def __init__(
        self,
        context: Context,
        meeting: Rendezvous,
        tuning: Tuning,
        place: Place,
        dead_after: float = DEAD_AFTER,
        verify: bool = False,
    ) -> None:
        self.context, self.tuning, self.verify = context, tuning, verify
        self._quarantine = Quarantine()
        self.rank, self.size, self.timeout = meeting.rank, meeting.size, meeting.timeout
        self._meeting = meeting
        self._closed = False
        self._forked = False
        self._closing = threading.RLock()
        forks.watch(self)
        self._failure: GossipError | None = None
        self._failure_told = False
        self._patience = 2.0 * dead_after + 2.0
        self.members: tuple[int, ...] = tuple(range(self.size))
        self.epoch = 0
        self.losses: list[Loss] = []
        self._lock = threading.RLock()
        self._steady_again = threading.Condition(self._lock)
        self._frozen: int | None = None
        self._froze = 0.0
        self._livings: dict[int, tuple[Schedule, Living]] = {}
        self._taken: dict[int, Callable[[], int]] = {}
        self._view_facts = Facts()
        self._exchange_box: Mailbox | None = None
        self._exchange_dtype: np.dtype[Any] | None = None
        self._last_buffer: Buffer | None = None
        self._default_schedule = Rotated(Dissemination(self.size), seed=0)
        self._checked_schedule: Schedule = self._default_schedule
        self.engine = Engine(context, self.rank, self.size, tuning, ring=context.transport != "tcp")
        self._warden: Warden | None = None
        try:
            meeting.agree("join", {**_facts(context, tuning), "verify": verify})
            if self.size > 1:
                self._warden = self._meet_wardens(place, dead_after)
        except BaseException:
            self.engine.close()
            raise
        self.engine.start()

    def _meet_wardens(self, place: Place, dead_after: float) -> Warden:
        """Start this rank's warden and tell all where it listens."""
        meeting = self._meeting
        warden = Warden(
            self.rank,
            place.own_host(),
            meeting.meet(),
            dead_after,
            self._freeze,
            self._install,
            self._expel,
            self._on_abort,
        )
        try:
            meeting.publish("warden", json.dumps(warden.address).encode())
            if self.rank == 0:
                blobs = [meeting.collect("warden", rank) for rank in range(self.size)]
                meeting.publish("wardens", json.dumps([json.loads(b) for b in blobs]).encode())
            addresses = json.loads(meeting.collect("wardens", 0))
            meeting.agree("wardens", {})
            warden.offer("worker 0", self.engine.worker.address)
            warden.start({rank: (host, port) for rank, (host, port) in enumerate(addresses)})
        except BaseException:
            warden.close()
            raise
        return warden

    # --- mailboxes and partners ----------------------------------------------------------------

    def agree(self, name: str, facts: Mapping[str, object]) -> None:
        """Meet all members and check that they bring the same facts. Collective.

        `MismatchError` where they do not, with the same message on every rank.
        """

        def compare(blobs: list[bytes], ranks: Sequence[int]) -> bytes:
            first = json.loads(blobs[0])
            for blob, rank in zip(blobs, ranks, strict=True):
                difference = first_difference(first, json.loads(blob), rank, first=ranks[0])
                if difference:
                    return f"{name}: {difference}".encode()
            return b""

        message = self._meet(name, json.dumps(facts).encode(), compare)
        if message:  # whoever left may have left because of it
            raise MismatchError(message.decode())
        self._check_usable()

    def share(self, name: str, blob: bytes, merge: Callable[[list[bytes]], bytes]) -> bytes:
        """What `merge` makes of the blobs of all members, in order. Collective.

        For what is rare and small: it goes through the member with the lowest rank.
        """
        return self._meet(name, blob, lambda blobs, _: merge(blobs))

    def _meet(
        self, name: str, blob: bytes, merge: Callable[[list[bytes], Sequence[int]], bytes]
    ) -> bytes:
        while True:
            with self.steady():
                epoch = self.epoch
            if self._warden is None:
                return merge([blob], [self.rank])
            try:
                found = self._warden.meet(epoch, name, blob, merge, self.timeout)
            except MismatchError:
                raise
            except GossipError as error:
                self._fail(error)
            if found is not None:
                return found
            self._check_usable()

    def together(self, operation: Callable[[int], bool], undo: Callable[[], None]) -> int:
        """Do `operation` until all members have done it in one epoch; which. Collective.

        operation: called with the epoch, outside of which it may post nothing; whether all its
        rounds ended. undo: brings back what it changed, to do it again.
        """
        while True:
            with self.steady():
                epoch = self.epoch
            if operation(epoch) and self.confirm(epoch):
                return epoch
            undo()
            self.await_change(epoch)

    def confirm(self, epoch: int) -> bool:
        """Meet all members: whether all have come here in `epoch`. Collective."""
        if self._warden is None:
            return True
        try:
            return bool(self._warden.meet(epoch, "together", b"", _nothing, self.timeout))
        except GossipError as error:
            self._fail(error)

    def mailbox(self, nbytes: int, depth: int = 2) -> Mailbox:
        """A stream of rounds of at most `nbytes` each, `depth` of which may wait. Collective."""
        self._check_usable()
        if isinstance(nbytes, bool) or not isinstance(nbytes, int) or nbytes < 1:
            raise ArgumentError(f"mailbox of {nbytes!r} bytes; must be a positive whole number")
        layout = Layout(nbytes, depth, self.tuning.chunk, self.verify)
        with self.steady():
            mailbox = Mailbox(self.context, layout, self.size)
            try:
                self.engine.open(mailbox)
            except BaseException:
                mailbox.close()
                raise
            self._offer(mailbox)
        self.agree(f"mailbox {mailbox.index}", {"bytes": nbytes, "depth": depth})
        return mailbox

    def _offer(self, mailbox: Mailbox) -> None:
        if self._warden is not None:
            epoch = self.epoch if self._frozen is None else self._frozen
            self._warden.offer(f"mailbox {mailbox.index} {epoch}", mailbox.describe())

    def reach(self, rank: int, mailbox: Mailbox) -> bool:
        """Make sure that `mailbox` can be put to on `rank`; False if it is no member (any more)."""
        while True:
            with self.steady():
                if rank in mailbox.keys:
                    return True
                if rank not in self.members or self._warden is None:
                    return False
                epoch, known = self.epoch, rank in self.engine.endpoints
            worker = b"" if known else self._fetch(rank, f"worker {epoch}")
            blob = self._fetch(rank, f"mailbox {mailbox.index} {epoch}")
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

    def _fetch(self, rank: int, name: str) -> bytes | None:
        assert self._warden is not None
        try:
            return self._warden.fetch(rank, name, self.timeout)
        except ExchangeTimeoutError as error:
            self._fail(error)

    def allocate(self, nbytes: int) -> MemoryRegion:
        """Zeroed registered memory for payloads, page-aligned.

        It is registered until the group closes, and belongs to NumPy: views outlive the group.
        """
        self._check_usable()
        if isinstance(nbytes, bool) or not isinstance(nbytes, int) or nbytes < 1:
            raise ArgumentError(f"allocate {nbytes!r} bytes; must be a positive whole number")
        page = mmap.PAGESIZE
        raw = np.zeros(nbytes + page, np.uint8)
        start = -raw.ctypes.data % page
        with self.engine.locked():
            return MemoryRegion(self.context, array=raw[start : start + nbytes])

    # --- rounds --------------------------------------------------------------------------------

    def post(
        self,
        mailbox: Mailbox,
        source: Buffer,
        target: Buffer,
        this: Round,
        ahead: Round | None = None,
        how: str = "mix",
        held: bool = False,
        kick: bool = True,
        whole: bool = False,
    ) -> Round | None:
        """Start the next round of `mailbox` and return.

        source goes to ``this.to``; what ``this.sender`` puts is taken into target: ``"mix"``, or
        ``"copy"``, or ``"delta"`` (target becomes what mixing would add to it). ahead: the
        mailbox's round `depth` later, if it is known: its sender gets its credit as soon as the
        slot is free, and may then put before this rank posts. Without it the credit goes out when
        that round is posted. All rounds of one mailbox are of one kind. whole: chunks that hold a
        NaN or an infinity are left out: their part of target stays, or as a ``"delta"`` becomes
        zeros, and `left_out` counts them.

        Returns `this`; None where the members have changed and the others have passed this round
        already, so that it is left out.
        """
        return self._post(mailbox, source, target, lambda: (this, ahead), how, held, kick, whole)

    def _post(
        self,
        mailbox: Mailbox,
        source: Buffer,
        target: Buffer,
        parts: Callable[[], tuple[Round, Round | None]],
        how: str,
        held: bool,
        kick: bool,
        whole: bool,
        only: int | None = None,
    ) -> Round | None:
        while True:
            with self.steady():
                if only is not None and self.epoch != only:
                    return None
                mailbox.drop_retired()
                mailbox.alone = mailbox.round < mailbox.base
                if mailbox.alone:
                    mailbox.round += 1
                    return None
                now, later = parts()
                this, ahead = self._among_members(now) or ALONE, self._among_members(later)
                ranks = (this.to, this.sender, ahead.sender if ahead else None)
                missing = [r for r in ranks if r is not None and r not in mailbox.keys]
                if not missing:
                    self._post_reached(mailbox, source, target, this, ahead, how, held, kick, whole)
                    return this
            for rank in missing:
                self.reach(rank, mailbox)

    def _among_members(self, part: Round | None) -> Round | None:
        """`part` without partners that are no members any more."""
        if part is None or all(r is None or r in self.members for r in (part.to, part.sender)):
            return part
        for rank in (part.to, part.sender):
            if rank is not None and not 0 <= rank < self.size:
                raise ArgumentError(f"there is no rank {rank}; ranks are 0 to {self.size - 1}")
        return replace(
            part,
            to=part.to if part.to in self.members else None,
            sender=part.sender if part.sender in self.members else None,
        )

    def _post_reached(
        self,
        mailbox: Mailbox,
        source: Buffer,
        target: Buffer,
        this: Round,
        ahead: Round | None,
        how: str,
        held: bool,
        kick: bool,
        whole: bool,
    ) -> None:
        # The slots of the first rounds are free, but their writers are told so like all others:
        # whoever holds a credit knows that the grantor's endpoint to it exists (docs/protocol.md).
        early = ahead is not None and mailbox.round >= mailbox.base + mailbox.layout.depth
        self.engine.post(
            mailbox,
            Post(
                source=source.address,
                target=target.address,
                nbytes=source.nbytes,
                to=-1 if this.to is None else this.to,
                sender=-1 if this.sender is None else this.sender,
                operation=w.COPY if how == "copy" else _OPERATIONS[how][target.dtype],
                alpha=this.weight,
                source_param=source.param,
                held=int(held),
                grant_now=-1 if early or this.sender is None else this.sender,
                grant_next=-1 if ahead is None or ahead.sender is None else ahead.sender,
                whole=int(whole),
            ),
            kick,
        )
        mailbox.in_flight = (source.owner, target.owner)

    def wait(self, mailbox: Mailbox, timeout: float | None = None) -> bool:
        """Block until the mailbox's round has ended; drives the engine meanwhile.

        Whether it ended whole. False: the members have changed, and it was broken off or left out;
        of the target, whole chunks were mixed or none.
        Raises `ExchangeTimeoutError` after `timeout` seconds (the group's by default), `PeerError`
        when another rank left with an error, `UCXError` when a put failed between living ranks,
        `IntegrityError` when a chunk was not what its checksum says.
        """
        self._check_usable()
        if mailbox.alone:
            return False
        limit = self.timeout if timeout is None else timeout
        start = time.monotonic()
        while not self.engine.wait(mailbox, min(_SLICE, limit)):
            waited = time.monotonic() - start
            self._check_usable()
            if waited >= limit:
                self._fail(self.engine.describe_wait(mailbox, waited))
        self._check_usable()
        with self._lock:
            row = self.engine.table[mailbox.index]
            state, epoch = int(row[w.STATE]), self.epoch
        if state == w.FAILED:
            status = int(row[w.FAILURE])
            to, sender = int(row[w.TO]), int(row[w.FROM])
            if status == w.CORRUPT:
                self.fail_corrupt(mailbox, sender, int(row[w.ROUND]), int(row[w.MIXED]))
            where = (
                f"round {int(row[w.ROUND])} of rank {self.rank}, with ranks {to} (to) and {sender} "
                "(from)"
            )
            error = UCXError(ops.PUT, status, status_name(status), where)
            self._doubt((to, sender), epoch, error)
        return state == w.DONE

    def fail_corrupt(self, mailbox: Mailbox, sender: int, number: int, chunk: int) -> NoReturn:
        """Break off: `chunk` of round `number`, put by `sender`, is not what its checksum says."""
        self._fail(
            IntegrityError(
                f"rank {self.rank}: chunk {chunk} of round {number} of mailbox {mailbox.index}, "
                f"put by rank {sender}, is not what its checksum says. Somebody wrote to the "
                "array while it was under way, or memory, network or driver changed it",
                sender,
                mailbox.index,
                number,
                chunk,
            )
        )

    def left_out(self, mailbox: Mailbox) -> dict[int, int]:
        """How many chunks the mailbox's last round left out, by the rank whose values they were."""
        item, index = self.engine.table.item, mailbox.index
        came_in, own = item(index, w.SPOILED), item(index, w.OWN_SPOILED)
        if not came_in and not own:
            return {}
        return {item(index, w.FROM): came_in, self.rank: own}

    def run(
        self,
        mailbox: Mailbox,
        buffer: Buffer,
        schedule: Schedule,
        mix: bool = True,
        epoch: int | None = None,
    ) -> bool:
        """All rounds of a finite `schedule` on `buffer`, in place, one after the other. Collective.

        For `Broadcast` and `GlobalAverage`, over the members. The mailbox serves such runs only.
        Whether all ended whole; if not, the members have changed, and the buffer holds anything:
        see `together`. epoch: nothing is posted in another one.
        """
        with self.steady():
            if epoch is None:
                epoch = self.epoch
            if epoch != self.epoch:
                return False
            mailbox.round = max(mailbox.round, mailbox.base)
            living = self.living(schedule)
        for step in range(living.period):

            def part(step: int = step) -> tuple[Round, None]:
                return living.round(self.rank, step), None

            this = living.round(self.rank, step)
            copy = not mix or this.weight == 1.0
            if this.to is None and this.sender is None:
                with self.steady():
                    if self.epoch != epoch:
                        return False
                    mailbox.round += 1
                continue
            how = "copy" if copy else "mix"
            posted = self._post(mailbox, buffer, buffer, part, how, False, False, False, only=epoch)
            if posted is None or not self.wait(mailbox):
                return False
        return self.epoch == epoch

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
            )

    def _install(self, view: View) -> None:
        """Go on with the members of `view`. In the warden's thread."""
        with self._lock:
            lost = [rank for rank in self.members if rank not in view.members]
            usable = self._frozen is not None
            stall = time.monotonic() - self._froze
            self.members, self.epoch, self._view_facts = view.members, view.epoch, view.facts
            for mailbox, number in zip(self.engine.mailboxes, view.facts.rounds, strict=False):
                mailbox.base = number
            self._livings.clear()
            now = time.time()
            self.losses += [Loss(rank, view.epoch, now) for rank in lost]
            self._frozen = None
            self._steady_again.notify_all()
        if not usable:  # it failed or was closed before: nothing goes on here
            return
        log.warning(
            "rank %d: rank%s %s lost; %d of %d go on (epoch %d, rounds stood still for %.2f s)",
            self.rank,
            "s" if len(lost) > 1 else "",
            ", ".join(map(str, lost)),
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

    def await_change(self, epoch: int) -> None:
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

    def exchange(
        self,
        array: NDArray[Any],
        mix: bool = True,
        schedule: Schedule | None = None,
        mailbox: Mailbox | None = None,
        nonfinite: str = "skip",
    ) -> NDArray[Any]:
        """One blocking round: put `array` to this step's partner, take another's. Collective.

        array: 1-D, contiguous, writeable; float32 or float64 where mix=True, and of the same size
        and dtype in each call (`ArrayError` else). With mix=True the array becomes the mean of
        itself and what came in, and is returned; with mix=False it stays, and what came in is
        returned as a new array. schedule: `Rotated(Dissemination(size))` by default; the same in
        each call. mailbox: one of `mailbox(array.nbytes)`, to exchange arrays of several sizes.
        nonfinite: what mixing does with a chunk in which this rank or the other has a NaN or an
        infinity: ``"skip"`` leaves this rank's values as they are, counts (`nonfinite`) and warns;
        ``"raise"`` does so and raises `NonFiniteError` after the round; ``"allow"`` mixes.
        """
        self._check_usable()
        check_policy(nonfinite)
        buffer = self._buffer_of(array)
        if mix and buffer.dtype not in _OPERATIONS["mix"]:
            raise ArrayError(f"the array is {buffer.dtype}; float32 and float64 can be mixed")
        chosen = self.check_schedule(schedule or self._default_schedule)
        box = self._mailbox_of_exchange(buffer, chosen) if mailbox is None else mailbox
        mine = isinstance(box, Mailbox)
        if not mine or self.engine.mailboxes[box.index : box.index + 1] != [box]:
            raise ArgumentError("exchange: the mailbox is not one of this group")
        if box.layout.nbytes != buffer.nbytes:
            raise ArrayError(
                f"exchange: the array has {buffer.nbytes} bytes, its mailbox {box.layout.nbytes}; "
                "sizes may not change between rounds. For several sizes make one "
                "group.mailbox(nbytes) each and pass it as mailbox="
            )
        if self.size == 1:
            return array if mix else array.copy()
        # A copy, not empty memory: a schedule may give this rank nobody to receive from.
        target = buffer if mix else Buffer.of(array.copy())
        how = "mix" if mix else "copy"
        number, looks = box.round, mix and nonfinite != "allow"
        self.post_scheduled(box, buffer, target, chosen, number, how=how, kick=False, whole=looks)
        whole = self.wait(box)
        if whole and looks:
            found = self.left_out(box)
            self._quarantine.left_out(self.rank, found, "array", number, nonfinite)
        if mix:
            return array
        return target.owner if whole else array.copy()  # type: ignore[return-value]

    @property
    def nonfinite(self) -> dict[int, int]:
        """Chunks that `exchange` left out, by the rank whose values were not finite."""
        return dict(sorted(self._quarantine.counts.items()))

    def _buffer_of(self, array: NDArray[Any]) -> Buffer:
        """`Buffer.of`, remembered (with its array) for the next call."""
        if self._last_buffer is None or self._last_buffer.owner is not array:
            self._last_buffer = Buffer.of(array)
        return self._last_buffer

    def post_scheduled(
        self,
        mailbox: Mailbox,
        source: Buffer,
        target: Buffer,
        schedule: Schedule,
        step: int,
        stride: int = 1,
        weight: float = 1.0,
        how: str = "mix",
        held: bool = False,
        kick: bool = True,
        foresee: bool = True,
        whole: bool = False,
    ) -> Round | None:
        """`post` the round of `step` on a mailbox that serves every `stride`-th step of `schedule`.

        The schedule is laid over the members. weight: factor on its weights. foresee: steps follow
        each other, so that credits can go out ahead.
        """

        def parts() -> tuple[Round, Round | None]:
            living = self.living(schedule)
            this = mailbox.ahead.pop(step, None) or living.round(self.rank, step)
            ahead = None
            if foresee:
                later = step + stride * mailbox.layout.depth
                ahead = mailbox.ahead[later] = living.round(self.rank, later)
            return (this if weight == 1.0 else replace(this, weight=weight * this.weight)), ahead

        return self._post(mailbox, source, target, parts, how, held, kick, whole)

    def count_taken(self, mailbox: Mailbox, taken: Callable[[], int]) -> None:
        """`taken` says how many messages of this channel were read (see `left_behind`)."""
        self._taken[mailbox.index] = taken

    def left_behind(self, mailbox: Mailbox, rank: int) -> int | None:
        """How many messages of `mailbox` member `rank` had read when the members last changed."""
        found = self._view_facts.taken
        return next((n for r, box, n in found if (r, box) == (rank, mailbox.index)), None)

    def restart(self, mailbox: Mailbox) -> None:
        """Begin anew with all slots free, so that the next round may follow any step.

        Collective in effect: between this and the last round all ranks have met (`agree`).
        """
        with self.steady():
            # Beyond the rounds whose credits are given out.
            mailbox.round = max(mailbox.round, mailbox.base) + mailbox.layout.depth
            mailbox.base = mailbox.round
            mailbox.ahead.clear()

    def grant(self, mailbox: Mailbox, rank: int, number: int) -> None:
        """Tell `rank` that the slot of round `number` of `mailbox` is free."""
        with self.engine.locked():
            status = rounds.grant(self.engine.words, self.engine.table[mailbox.index], rank, number)
        if status < 0:
            self._fail(UCXError(ops.SEND, int(status), status_name(int(status)), "a credit"))

    def look_around(self) -> None:
        """`PeerError` if another rank left with an error: for whoever waits for nobody."""
        self._check_usable()

    def check_schedule(self, schedule: Schedule) -> Schedule:
        """`schedule` if it fits this group; `ScheduleError` else."""
        if schedule is self._checked_schedule:
            return schedule
        if not isinstance(schedule, Schedule):
            raise ScheduleError(
                f"{schedule!r} is not a schedule; pass one such as "
                f"ug.Rotated(ug.Dissemination({self.size}))"
            )
        if schedule.size != self.size:
            raise ScheduleError(
                f"{schedule.describe()} is for {schedule.size} ranks; this group has {self.size}"
            )
        self._checked_schedule = schedule
        return schedule

    def _mailbox_of_exchange(self, buffer: Buffer, schedule: Schedule) -> Mailbox:
        if buffer.nbytes == 0:
            raise ArrayError("the array is empty")
        if self._exchange_box is None:
            self.agree(
                "exchange",
                {
                    "bytes": buffer.nbytes,
                    "dtype": str(buffer.dtype),
                    "schedule": schedule.describe(),
                },
            )
            self._exchange_box = self.mailbox(buffer.nbytes)
            self._exchange_dtype = buffer.dtype
        elif self._exchange_dtype != buffer.dtype:
            raise ArrayError(
                f"exchange: the array is {buffer.dtype}, the first one was {self._exchange_dtype}; "
                "dtypes may not change between rounds"
            )
        return self._exchange_box

    # --- the end -------------------------------------------------------------------------------

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
        """Tell the others that this rank ends the job."""
        if self._warden is not None:
            self._warden.abort(reason)
        if 0 in self.members:  # else the store may have gone with rank 0
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

    def close(self) -> None:
        """Leave the job once all ranks are here to leave, or the group's timeout has passed.

        Collective. Further calls do nothing, in any thread; nor does any in a forked child.
        """
        with self._closing:
            if not self._closed:
                self._close()

    def disown(self) -> None:
        """Count as closed, in a forked child: the job is the parent's."""
        self._closed = self._forked = True
        self._closing = threading.RLock()  # another thread of the parent may have held it

    @property
    def closed(self) -> bool:
        """Whether `close()` has been through, or this is a forked child's copy."""
        return self._closed

    def _close(self) -> None:
        try:
            if self._failure is None:
                self._leave()
            elif not isinstance(self._failure, ExpelledError):
                self._quietly(lambda: self._meeting.leave(min(self.timeout, _GOODBYE)))
        finally:
            with self._lock:
                self._closed = True
            try:
                if self._warden is not None:
                    self._warden.close()
            finally:
                try:
                    self.engine.close()
                finally:
                    self.context.close()

    def _leave(self) -> None:
        """Wait until all members are here to leave."""
        if self._warden is None:
            self._meeting.leave(self.timeout)
            return
        # While everybody still drives, so that nobody's last put meets a closed door.
        deadline = time.monotonic() + self.timeout
        while self._failure is None and time.monotonic() < deadline:
            try:
                self.engine.flush(_SLICE)
                break
            except ClosedError:  # its context was closed first
                break
            except UCXError:  # a partner that is gone has nothing to lose by it
                continue
        while self._failure is None:
            epoch = self.epoch
            left = max(0.0, deadline - time.monotonic())
            try:
                if self._frozen is None and self._warden.meet(epoch, "leave", b"", _nothing, left):
                    break
            except GossipError as error:
                log.warning("rank %d leaves alone: %s", self.rank, error)
                break
            if left == 0:
                break
            with suppress(GossipError):
                self._await_thaw(left)
        self._warden.leave()

    def _await_thaw(self, timeout: float) -> None:
        with self._lock:
            self._steady_again.wait_for(
                lambda: self._frozen is None or self._failure is not None, timeout
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None:
            self.abort(f"{type(error).__name__}: {error}")
        self.close()
