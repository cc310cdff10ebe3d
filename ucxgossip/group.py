"""The ranks of a job: joining, endpoints made when first needed, and rounds by schedule.

>>> import numpy as np, ucxgossip as ug
>>> with ug.join() as group:                      # one process a rank, started by torchrun
...     x = np.full(1000, float(group.rank), np.float32)
...     group.exchange(x)                         # x is now the mean of mine and a partner's
"""

from __future__ import annotations

import logging
import math
import mmap
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from importlib import metadata
from types import TracebackType
from typing import Any, NoReturn, Self

import numpy as np
from numpy.typing import NDArray

from ucxgossip import forks, running
from ucxgossip.buffer import Buffer
from ucxgossip.engine import Engine, Post, Tuning, itinerary, rounds
from ucxgossip.engine import words as w
from ucxgossip.engine.itinerary import Itinerary
from ucxgossip.errors import (
    ArgumentError,
    ArrayError,
    ClosedError,
    ExpelledError,
    IntegrityError,
    MismatchError,
    PeerError,
    RankMissingError,
    ScheduleError,
    UCXError,
)
from ucxgossip.mailbox import Mailbox
from ucxgossip.meetings import JobGoneError
from ucxgossip.partners import Partners
from ucxgossip.quarantine import Quarantine, check_policy
from ucxgossip.rendezvous import Rendezvous
from ucxgossip.schedule import ALONE, Dissemination, Rotated, Round, Schedule, many
from ucxgossip.store import Place, Solitary, Store, open_store
from ucxgossip.trust import find_token, new_token
from ucxgossip.ucp import lib, ops
from ucxgossip.ucp.context import TRANSPORTS, Context
from ucxgossip.ucp.lib import status_name
from ucxgossip.ucp.memory import MemoryRegion

PROTOCOL = 4
"""Raised whenever ranks of different releases could not work together."""

DEFAULT_TIMEOUT = 300.0
DEAD_AFTER = 3.0
_SLICE = 1.0
_LOOK_S = 0.2
_SLICE_NS = 250_000_000
_FORESEEN = 256
_GOODBYE = 3.0

log = logging.getLogger("ucxgossip")

TUNING: dict[str, Tuning] = {
    "tcp": Tuning(chunk=1 << 20, window=4, eager=1 << 16),
    "shm": Tuning(chunk=1 << 18, window=16, ring=4),
    "auto": Tuning(chunk=1 << 18, window=16, eager=1 << 16),
}
"""Constants by transport. eager: over TCP one message costs half of a put, its signal, its
acknowledgement and a credit. ring: over shared memory 1 MiB, as large as a core's L2 cache; over a
network what is under way must fit in (docs/performance.md)."""


def usual_tuning(transport: str) -> Tuning:
    """`TUNING`, with small messages only where an RDMA device may carry them (not measured)."""
    found = TUNING[transport]
    return replace(found, eager=4096) if transport == "auto" and lib.rdma_devices() else found


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
    min_size: int | None = None,
) -> Group:
    """Join the job: returns when every rank is here. Collective.

    If the job runs already, this rank comes to it as a guest, and becomes a member as soon as it
    has something to exchange: `attach` fetches weights, optimizer state and step before
    (docs/members.md).

    rank, size, store: from torchrun's environment by default (RANK, WORLD_SIZE, MASTER_ADDR,
    MASTER_PORT; without them, a job of one rank). `store` is anything with the methods of
    ``torch.distributed.Store`` that `store.Store` lists. transport: ``"auto"``, ``"tcp"`` or
    ``"shm"``. timeout: seconds that any wait of this group may take. settings: UCX settings by
    name. tuning: constants of the engine. dead_after: seconds of silence after which a rank is
    taken for dead (a process that ends is noticed at once). token: the secret that the job's ranks
    share; by default that of `trust.find_token`, which needs no setting on one host or with a
    shared home. verify: a checksum (XXH64) travels with every chunk and is checked before the chunk
    is used (`IntegrityError`): to prove a network or a driver, not for each day
    (docs/performance.md has its cost). min_size: so many ranks, the lowest, begin the job
    (UCXGOSSIP_MIN_SIZE by default, or all); the others come to it later.

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
    min_size = place.founders(min_size)
    secret = find_token(token)  # before a store is opened
    store = open_store(place, timeout) if store is None else store
    meeting = Rendezvous(store, place.rank, min_size, timeout, secret)
    note = running.next_key()
    chosen = dict(settings or {})
    if place.local_size == place.size:
        chosen.setdefault("NET_DEVICES", "lo")
    context, found = None, None
    try:
        context = Context(transport, chosen, estimated_peers=place.size)
        common = (
            context,
            meeting,
            tuning or usual_tuning(transport),
            place,
            dead_after,
            verify,
            note,
        )
        for found in _running_jobs(meeting, place, note):
            with suppress(JobGoneError):
                return Group(*common, found)
        found = None
        return Group(*common)
    except BaseException as error:
        if context is not None:
            context.close()
        if found is None:
            if not isinstance(error, MismatchError | PeerError):
                with suppress(Exception):  # the error at hand is the one to see
                    meeting.abort(f"{type(error).__name__}: {error}")
            meeting.give_up()
        raise


def _running_jobs(meeting: Rendezvous, place: Place, note: str) -> Iterator[running.Running]:
    """The job that runs already, if any is noted; for a founder once, for others until one is."""
    if place.size == 1:
        return
    deadline = time.monotonic() + meeting.timeout
    while True:
        found = running.read(meeting.board, note)
        if found is not None:
            yield found
        if place.rank < meeting.size:
            return
        if time.monotonic() > deadline:
            raise RankMissingError(
                f"rank {place.rank} waited {meeting.timeout:.1f} s for ranks 0 to "
                f"{meeting.size - 1} to start the job. Did they?",
                tuple(range(meeting.size)),
            )
        if found is None:
            running.wait(meeting.board, note, _LOOK_S)
        else:  # a note of a job that is gone
            time.sleep(_LOOK_S)


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


class Group(Partners):
    """The ranks of a job and what goes between them. Made by `join`.

    found: a running job, to come to as a guest; else this rank founds one. note: the key by which
    the store tells of it.
    """

    def __init__(
        self,
        context: Context,
        meeting: Rendezvous,
        tuning: Tuning,
        place: Place,
        dead_after: float = DEAD_AFTER,
        verify: bool = False,
        note: str = "",
        found: running.Running | None = None,
    ) -> None:
        engine = Engine(context, place.rank, place.size, tuning, ring=context.transport != "tcp")
        super().__init__(context, engine, meeting, place.size, dead_after, tuning, verify)
        self._quarantine = Quarantine()
        self._doubtful: list[tuple[int, int, UCXError]] = []
        self._closing = threading.RLock()
        forks.watch(self)
        self._exchange_box: Mailbox | None = None
        self._exchange_dtype: np.dtype[Any] | None = None
        self._last_buffer: Buffer | None = None
        self._default_schedule = Rotated(Dissemination(self.size), seed=0)
        self._checked_schedule: Schedule = self._default_schedule
        facts = {**_facts(context, tuning), "ranks": self.size, "verify": verify}
        try:
            if found is None:
                self._found(place, facts, note)
            else:
                self._visit(place, facts, note, found)
        except BaseException:
            engine.close()
            raise
        engine.start()

    # --- memory --------------------------------------------------------------------------------

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
        mailbox's round `Layout.ahead` later, if it is known: its sender gets its credit as soon as
        the slot is free, and may then put before this rank posts. Without it the credit goes out
        when that round is posted, if none has gone out before. All rounds of one mailbox are of
        one kind. whole: chunks that hold a NaN or an infinity are left out: their part of target
        stays, or as a ``"delta"`` becomes zeros, and `left_out` counts them.

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
        if self.guest:
            self.enter()
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
                    if self._capped:
                        self._note_use(mailbox, this, ahead)
                    self._post_reached(mailbox, source, target, this, ahead, how, held, kick, whole)
                    return this
                if self._capped:
                    new = [rank for rank in missing if rank not in self.engine.endpoints]
                    self._close_unused(ranks, len(new))
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
        what = Post(
            source=source.address,
            target=target.address,
            nbytes=source.nbytes,
            to=-1 if this.to is None else this.to,
            sender=-1 if this.sender is None else this.sender,
            operation=w.COPY if how == "copy" else _OPERATIONS[how][target.dtype],
            alpha=this.weight,
            source_param=source.param,
            held=int(held),
            next_writer=-1 if ahead is None or ahead.sender is None else ahead.sender,
            whole=int(whole),
        )
        self.engine.post(mailbox, what, kick)
        mailbox.in_flight = (source.owner, target.owner)

    def _look_ahead(
        self,
        mailbox: Mailbox,
        source: Buffer,
        target: Buffer,
        schedule: Schedule,
        asked: tuple[object, ...],
        stride: int = 1,
        weight: float = 1.0,
        how: str = "mix",
        held: bool = False,
        whole: bool = False,
        offset: int = 0,
        kept: tuple[object, ...] = (),
    ) -> None:
        """Lay out the next rounds of `mailbox` in which no rank takes part that is new to it.

        From the second time on that the same is asked for, and not in every round while there are
        new ranks. Round n is that of step ``stride * n + offset``; the rest is as in `post`.
        """
        before, mailbox.itinerary, mailbox.asked = mailbox.asked, None, asked
        if before != asked or mailbox.round < mailbox.look_again or self._capped:
            return
        with self.steady():
            first, ahead = mailbox.round, mailbox.layout.ahead
            steps = offset + stride * np.arange(first, first + _FORESEEN + ahead)
            found = many(self.living(schedule), np.full(len(steps), self.rank), steps)
            known = np.array([-1, *mailbox.keys])
            new = ~(np.isin(found[0], known) & np.isin(found[1], known))
            count = int(new.argmax()) if new.any() else len(steps)
            if count < len(steps):
                mailbox.look_again = first + _FORESEEN // 16
            if count <= ahead:
                return
            what = Post(
                source=source.address,
                target=target.address,
                nbytes=source.nbytes,
                to=-1,
                sender=-1,
                operation=_OPERATIONS[how][target.dtype],
                source_param=source.param,
                held=int(held),
                whole=int(whole),
            )
            parts = (found[0][:count], found[1][:count], weight * found[2][:count])
            kept = (source, target, schedule, *kept)
            mailbox.ahead.clear()
            mailbox.itinerary = Itinerary(asked, first, self.epoch, parts, ahead, what, kept)

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
            state, epoch = self.engine.table.item(mailbox.index, w.STATE), self.epoch
        if state == w.FAILED:
            row = self.engine.table[mailbox.index]
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
        return bool(state == w.DONE)

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
        self.enter()
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
        each call. mailbox: one of `mailbox(array.nbytes, ring=True)`, to exchange arrays of several
        sizes.
        nonfinite: what mixing does with a chunk in which this rank or the other has a NaN or an
        infinity: ``"skip"`` leaves this rank's values as they are, counts (`nonfinite`) and warns;
        ``"raise"`` does so and raises `NonFiniteError` after the round; ``"allow"`` mixes.
        """
        box = self._exchange_box if mailbox is None else mailbox
        plan: Itinerary | None = getattr(box, "itinerary", None)
        said = itinerary.LEAVE
        if (
            plan is not None
            and mix is True
            and plan.asked == (id(array), id(schedule), nonfinite, id(self))
            and not self._closed
            and self._failure is None
        ):
            assert box is not None
            said = itinerary.exchange(self.engine.address, box.index, plan.address, _SLICE_NS)
            if said == itinerary.ENDED:
                return array
        return self._exchange(array, mix, schedule, mailbox, nonfinite, said != itinerary.LEAVE)

    def _exchange(
        self,
        array: NDArray[Any],
        mix: bool,
        schedule: Schedule | None,
        mailbox: Mailbox | None,
        nonfinite: str,
        posted: bool,
    ) -> NDArray[Any]:
        """A round of `exchange` that is not foreseen, or what is left to do of one that was."""
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
                "group.mailbox(nbytes, ring=True) each and pass it as mailbox="
            )
        if self.size == 1:
            return array if mix else array.copy()
        # A copy, not empty memory: a schedule may give this rank nobody to receive from.
        target = buffer if mix else Buffer.of(array.copy())
        how = "mix" if mix else "copy"
        number, looks = box.round - posted, mix and nonfinite != "allow"
        if not posted:
            self.post_scheduled(
                box, buffer, target, chosen, number, how=how, kick=False, whole=looks
            )
            if mix:
                asked, kept = (id(array), id(schedule), nonfinite, id(self)), (array, schedule)
                self._look_ahead(box, buffer, buffer, chosen, asked, whole=looks, kept=kept)
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
                later = step + stride * mailbox.layout.ahead
                ahead = mailbox.ahead[later] = living.round(self.rank, later)
            return (this if weight == 1.0 else replace(this, weight=weight * this.weight)), ahead

        return self._post(mailbox, source, target, parts, how, held, kick, whole)

    def post_step(
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
        whole: bool = False,
    ) -> bool:
        """As `post_scheduled`, for a stream that posts the same each time; False for None.

        The rounds to come are laid out ahead, and cost one call each.
        """
        offset = step - stride * mailbox.round
        same = (id(source), id(target), id(schedule), stride, weight, how, held, whole, offset)
        plan: Itinerary | None = mailbox.itinerary
        if plan is not None and plan.asked == same:
            with self._lock:
                steady = self._frozen is None and plan.epoch == self.epoch
                if steady and self._failure is None and not self._closed:
                    address, index = self.engine.address, mailbox.index
                    if itinerary.post(address, index, plan.address) == itinerary.POSTED:
                        return True
        posted = self.post_scheduled(
            mailbox, source, target, schedule, step, stride, weight, how, held, whole=whole
        )
        if posted is not None:
            self._look_ahead(
                mailbox,
                source,
                target,
                schedule,
                same,
                stride,
                weight,
                how,
                held,
                whole,
                offset,
            )
        return posted is not None

    def restart(self, mailbox: Mailbox) -> None:
        """Begin anew with all slots free, so that the next round may follow any step.

        Collective in effect: between this and the last round all ranks have met (`agree`).
        """
        with self.steady():
            # Beyond the rounds whose credits are given out.
            mailbox.round = max(mailbox.round, mailbox.base) + mailbox.layout.reach
            mailbox.base = mailbox.round
            mailbox.ahead.clear()

    def grant(self, mailbox: Mailbox, rank: int, number: int) -> None:
        """Tell `rank` that it may put all rounds of `mailbox` below `number` here.

        Where that fails, `rank` may be dead: the next `look_around` finds out.
        """
        with self.engine.locked():
            credit = number * mailbox.layout.chunks
            status = rounds.grant(self.engine.words, self.engine.table[mailbox.index], rank, credit)
        if status < 0:
            error = UCXError(ops.SEND, int(status), status_name(int(status)), "a credit")
            self._doubtful.append((rank, self.epoch, error))

    def look_around(self) -> None:
        """`PeerError` if another rank left with an error: for whoever waits for nobody.

        `UCXError` where a credit could not be sent to a rank that lives.
        """
        self._check_usable()
        while self._doubtful:
            rank, epoch, error = self._doubtful.pop()
            if epoch == self.epoch:
                self._doubt((rank,), epoch, error)

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
                once="exchange",
            )
            with self.naming("exchange"):
                self._exchange_box = self.mailbox(buffer.nbytes, ring=True)
            self._exchange_dtype = buffer.dtype
        elif self._exchange_dtype != buffer.dtype:
            raise ArrayError(
                f"exchange: the array is {buffer.dtype}, the first one was {self._exchange_dtype}; "
                "dtypes may not change between rounds"
            )
        return self._exchange_box

    # --- the end -------------------------------------------------------------------------------

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
            elif not isinstance(self._failure, ExpelledError) and not self._came_late:
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
        if self.guest:
            return
        self._erase_note()
        self._warden.no_more_steps()
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
        self._part(deadline)

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
