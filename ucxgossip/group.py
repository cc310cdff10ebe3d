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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib import metadata
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from ucxgossip import forks, running
from ucxgossip.buffer import Buffer
from ucxgossip.engine import Engine, Tuning, itinerary
from ucxgossip.engine.itinerary import Itinerary
from ucxgossip.errors import (
    ArgumentError,
    ArrayError,
    ClosedError,
    ExpelledError,
    MismatchError,
    PeerError,
    RankMissingError,
    ScheduleError,
    UCXError,
)
from ucxgossip.mailbox import Mailbox
from ucxgossip.meetings import JobGoneError
from ucxgossip.membership import Setup
from ucxgossip.posting import OPERATIONS, Posting
from ucxgossip.quarantine import Quarantine, check_policy
from ucxgossip.rendezvous import Rendezvous
from ucxgossip.schedule import Dissemination, Rotated, Schedule
from ucxgossip.store import Place, Solitary, Store, open_store
from ucxgossip.trust import find_token, new_token
from ucxgossip.ucp import lib
from ucxgossip.ucp.context import TRANSPORTS, Context
from ucxgossip.ucp.memory import MemoryRegion

PROTOCOL = 4
"""Raised whenever ranks of different releases could not work together."""

_Payload = TypeVar("_Payload", NDArray[Any], Sequence[NDArray[Any]])

DEFAULT_TIMEOUT = 300.0
DEAD_AFTER = 3.0
_SLICE = 1.0
_LOOK_S = 0.2
_PAST_PAGE = 64
_SLICE_NS = 250_000_000
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
    `LibraryNotFoundError`, `ArgumentError` (`TokenError`), `RendezvousError` where ranks cannot
    connect to each other, or `ForkError` in a process forked after its parent joined; nothing is
    left behind then.
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
        "payload types": [dtype.str for dtype in OPERATIONS["mix"]],
    }


def _identity(payload: object) -> object:
    """What tells whether the same arrays are passed again, as long as they live."""
    if type(payload) is np.ndarray or not isinstance(payload, list | tuple):  # the plain case first
        return id(payload)
    return tuple(map(id, payload))


class Group(Posting):
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
        super().__init__(Setup(context, engine, meeting, place.size, dead_after, tuning, verify))
        self._quarantine = Quarantine()
        self._closing = threading.RLock()
        forks.watch(self)
        self._exchange_box: Mailbox | None = None
        self._exchange_dtype: np.dtype[Any] | None = None
        self._last_buffer: tuple[object, Buffer] | None = None
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
        """Zeroed registered memory for payloads, 64 bytes past the start of a page.

        Not at its start: what travels behind a header of up to 15 bytes would be copied at a third
        of the speed there (docs/performance.md, "64 KiB over TCP"). It is registered until the
        group closes, and belongs to NumPy: views outlive the group.
        """
        self._check_usable()
        if isinstance(nbytes, bool) or not isinstance(nbytes, int) or nbytes < 1:
            raise ArgumentError(f"allocate {nbytes!r} bytes; must be a positive whole number")
        page = mmap.PAGESIZE
        raw = np.zeros(nbytes + page, np.uint8)
        start = (_PAST_PAGE - raw.ctypes.data) % page
        with self.engine.locked():
            return MemoryRegion(self.context, array=raw[start : start + nbytes])

    # --- rounds --------------------------------------------------------------------------------

    def exchange(
        self,
        array: _Payload,
        mix: bool = True,
        schedule: Schedule | None = None,
        mailbox: Mailbox | None = None,
        nonfinite: str = "skip",
    ) -> _Payload:
        """One blocking round: put `array` to this step's partner, take another's. Collective.

        array: 1-D, contiguous, writeable; float32 or float64 where mix=True, and of the same size
        and dtype in each call (`ArrayError` else). Or a list or tuple of such arrays, all of one
        dtype: they travel in one round, as if they stood one behind the other. With mix=True the
        array becomes the mean of itself and what came in, and is returned; with mix=False it stays,
        and what came in is returned as a new array, or a list of them. schedule:
        `Rotated(Dissemination(size))` by default; the same in each call. mailbox: one of
        `mailbox(nbytes, ring=True)`, to exchange payloads of several sizes.
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
            and plan.asked == (_identity(array), id(schedule), nonfinite, id(self))
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
        array: _Payload,
        mix: bool,
        schedule: Schedule | None,
        mailbox: Mailbox | None,
        nonfinite: str,
        posted: bool,
    ) -> _Payload:
        """A round of `exchange` that is not foreseen, or what is left to do of one that was."""
        self._check_usable()
        check_policy(nonfinite)
        buffer = self._buffer_of(array)
        if mix and buffer.dtype not in OPERATIONS["mix"]:
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
            return array if mix else buffer.copy().contents
        # A copy, not empty memory: a schedule may give this rank nobody to receive from.
        target = buffer if mix else buffer.copy()
        how = "mix" if mix else "copy"
        number, looks = box.round - posted, mix and nonfinite != "allow"
        if not posted:
            self.post_scheduled(
                box, buffer, target, chosen, number, how=how, kick=False, whole=looks
            )
            if mix:
                asked = (_identity(array), id(schedule), nonfinite, id(self))
                self._look_ahead(box, buffer, buffer, chosen, asked, whole=looks)
        whole = self.wait(box)
        if whole and looks:
            found = self.left_out(box)
            self._quarantine.left_out(self.rank, found, "array", number, nonfinite)
        if mix:
            return array
        return (target if whole else buffer.copy()).contents  # type: ignore[no-any-return]

    @property
    def nonfinite(self) -> dict[int, int]:
        """Chunks that `exchange` left out, by the rank whose values were not finite."""
        return dict(sorted(self._quarantine.counts.items()))

    def _buffer_of(self, array: _Payload) -> Buffer:
        """`Buffer.of` or `of_all`, remembered (with its arrays) for the next call."""
        same = _identity(array)
        if self._last_buffer is None or self._last_buffer[0] != same:
            several = isinstance(array, list | tuple)
            made = Buffer.of_all(array) if several else Buffer.of(array)  # type: ignore[arg-type]
            self._last_buffer = (same, made)
        return self._last_buffer[1]

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
