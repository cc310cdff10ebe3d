"""The ranks of a job: joining, endpoints made when first needed, and rounds by schedule.

>>> import numpy as np, ucxgossip as ug
>>> with ug.join() as group:                      # one process a rank, started by torchrun
...     x = np.full(1000, float(group.rank), np.float32)
...     group.exchange(x)                         # x is now the mean of mine and a partner's
"""

from __future__ import annotations

import math
import mmap
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from types import TracebackType
from typing import Any, NoReturn, Self

import numpy as np
from numpy.typing import NDArray

from ucxgossip.buffer import Buffer
from ucxgossip.engine import Engine, Post, Tuning, rounds
from ucxgossip.engine import words as w
from ucxgossip.errors import (
    ArgumentError,
    ArrayError,
    ClosedError,
    ExchangeError,
    GossipError,
    MismatchError,
    PeerError,
    RendezvousError,
    ScheduleError,
    UCXError,
)
from ucxgossip.mailbox import Layout, Mailbox, parse_description
from ucxgossip.rendezvous import Rendezvous
from ucxgossip.schedule import Dissemination, Rotated, Round, Schedule
from ucxgossip.store import Place, Solitary, Store, open_store
from ucxgossip.ucp import ops
from ucxgossip.ucp.context import TRANSPORTS, Context
from ucxgossip.ucp.lib import status_name
from ucxgossip.ucp.memory import MemoryRegion, RemoteKey

PROTOCOL = 1
"""Raised whenever ranks of different releases could not work together."""

DEFAULT_TIMEOUT = 300.0
_SLICE = 1.0

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
) -> Group:
    """Join the job: returns when every rank is here. Collective.

    rank, size, store: from torchrun's environment by default (RANK, WORLD_SIZE, MASTER_ADDR,
    MASTER_PORT; without them, a job of one rank). `store` is anything with the methods of
    ``torch.distributed.Store`` that `store.Store` lists. transport: ``"auto"``, ``"tcp"`` or
    ``"shm"``. timeout: seconds that any wait of this group may take. settings: UCX settings by
    name. tuning: constants of the engine.

    Raises `RankMissingError`, `MismatchError`, `PortInUseError`, `LibraryNotFoundError` or
    `ArgumentError`; nothing is left behind then.
    """
    if transport not in TRANSPORTS:
        known = ", ".join(repr(name) for name in TRANSPORTS)
        raise ArgumentError(f"unknown transport {transport!r}; choose one of {known}")
    if not 0 < timeout < math.inf:
        raise ArgumentError(f"timeout is {timeout}; must be a positive number of seconds")
    place = Place.from_environment(rank, size)
    if store is None:
        store = Solitary() if place.size == 1 else open_store(place, timeout)
    meeting = Rendezvous(store, place.rank, place.size, timeout)
    chosen = dict(settings or {})
    if place.local_size == place.size:
        chosen.setdefault("NET_DEVICES", "lo")
    context = None
    try:
        context = Context(transport, chosen, estimated_peers=place.size)
        return Group(context, meeting, tuning or TUNING[transport])
    except BaseException as error:
        if context is not None:
            context.close()
        if not isinstance(error, MismatchError | PeerError):
            with suppress(Exception):  # the error at hand is the one to see
                meeting.abort(f"{type(error).__name__}: {error}")
        raise


class Group:
    """The ranks of a job and what goes between them. Made by `join`."""

    def __init__(self, context: Context, meeting: Rendezvous, tuning: Tuning) -> None:
        self.context, self.tuning = context, tuning
        self.rank, self.size, self.timeout = meeting.rank, meeting.size, meeting.timeout
        self._meeting = meeting
        self._closed = False
        self._looked = time.monotonic()
        self._failure: GossipError | None = None
        self._exchange_box: Mailbox | None = None
        self._exchange_dtype: np.dtype[Any] | None = None
        self._last_buffer: Buffer | None = None
        self._default_schedule = Rotated(Dissemination(self.size), seed=0)
        self._checked_schedule: Schedule = self._default_schedule
        self.engine = Engine(context, self.rank, self.size, tuning, ring=context.transport != "tcp")
        try:
            meeting.publish("worker", self.engine.worker.address)
            meeting.agree(
                "join",
                {
                    "world size": self.size,
                    "protocol": PROTOCOL,
                    "transport": context.transport,
                    "chunk": tuning.chunk,
                },
            )
        except BaseException:
            self.engine.close()
            raise
        self.engine.start()

    # --- mailboxes and partners ----------------------------------------------------------------

    def agree(self, name: str, facts: Mapping[str, object]) -> None:
        """Meet all ranks and check that they bring the same facts (`MismatchError`). Collective."""
        self._check_usable()
        self._meeting.agree(name, facts)

    def share(self, name: str, blob: bytes, merge: Callable[[list[bytes]], bytes]) -> bytes:
        """What rank 0's `merge` makes of the blobs of all ranks, in order. Collective.

        It goes through the store: for what is rare and small. A `name` serves one call.
        """
        self._check_usable()
        self._meeting.publish(name, blob)
        if self.rank == 0:
            blobs = [self._meeting.collect(name, rank) for rank in range(self.size)]
            self._meeting.publish(f"{name} merged", merge(blobs))
        return self._meeting.collect(f"{name} merged", 0)

    def mailbox(self, nbytes: int, depth: int = 2) -> Mailbox:
        """A stream of rounds of at most `nbytes` each, `depth` of which may wait. Collective."""
        self._check_usable()
        if isinstance(nbytes, bool) or not isinstance(nbytes, int) or nbytes < 1:
            raise ArgumentError(f"mailbox of {nbytes!r} bytes; must be a positive whole number")
        layout = Layout(nbytes, depth, self.tuning.chunk)
        mailbox = Mailbox(self.context, layout, self.size)
        try:
            self.engine.open(mailbox)
        except BaseException:
            mailbox.close()
            raise
        name = f"mailbox {mailbox.index}"
        self._meeting.publish(name, mailbox.describe())
        self._meeting.agree(name, {"bytes": nbytes, "depth": depth})
        return mailbox

    def reach(self, rank: int, mailbox: Mailbox) -> None:
        """Make sure that `mailbox` can be put to on `rank`: endpoint and remote key."""
        if rank in mailbox.keys:
            return
        known = rank in self.engine.endpoints
        worker = b"" if known else self._meeting.collect("worker", rank)
        blob = self._meeting.collect(f"mailbox {mailbox.index}", rank)
        address, packed = parse_description(blob, mailbox.layout, rank)
        try:
            if not known:
                self.engine.connect(rank, worker)
            with self.engine.locked():
                key = RemoteKey(self.engine.endpoints[rank], packed)
                mailbox.set_peer(rank, key, address)
        except UCXError as error:
            self._fail(error)

    def allocate(self, nbytes: int) -> MemoryRegion:
        """Zeroed registered memory for payloads, page-aligned.

        It is registered until the group closes, and belongs to NumPy: views outlive the group.
        """
        self._check_usable()
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
    ) -> None:
        """Start the next round of `mailbox` and return.

        source goes to ``this.to``; what ``this.sender`` puts is taken into target: ``"mix"``, or
        ``"copy"``, or ``"delta"`` (target becomes what mixing would add to it). ahead: the
        mailbox's round `depth` later, if it is known: its sender gets its credit as soon as the
        slot is free, and may then put before this rank posts. Without it the credit goes out when
        that round is posted. All rounds of one mailbox are of one kind.
        """
        self._check_usable()
        for rank in (this.to, this.sender, ahead.sender if ahead else None):
            if rank is not None:
                self.reach(rank, mailbox)
        early = ahead is not None
        in_flight = (source.owner, target.owner)
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
                need_credit=int(not early or mailbox.round >= mailbox.base + mailbox.layout.depth),
                grant_now=-1 if early or this.sender is None else this.sender,
                grant_next=-1 if ahead is None or ahead.sender is None else ahead.sender,
            ),
            kick,
        )
        mailbox.in_flight = in_flight

    def wait(self, mailbox: Mailbox, timeout: float | None = None) -> None:
        """Block until the mailbox's round has ended; drives the engine meanwhile.

        Raises `ExchangeTimeoutError` after `timeout` seconds (the group's by default), `PeerError`
        when another rank left with an error, `UCXError` when a put failed.
        """
        self._check_usable()
        limit = self.timeout if timeout is None else timeout
        start = time.monotonic()
        while not self.engine.wait(mailbox, min(_SLICE, limit)):
            waited = time.monotonic() - start
            self._look_for_errors_of_others()
            if waited >= limit:
                self._fail(self.engine.describe_wait(mailbox, waited))
        if self.engine.table.item(mailbox.index, w.STATE) == w.FAILED:
            row = self.engine.table[mailbox.index]
            status = int(row[w.FAILURE])
            where = (
                f"round {int(row[w.ROUND])} of rank {self.rank}, with ranks {int(row[w.TO])} (to) "
                f"and {int(row[w.FROM])} (from)"
            )
            self._fail(UCXError(ops.PUT, status, status_name(status), where))

    def run(
        self,
        mailbox: Mailbox,
        buffer: Buffer,
        schedule: Schedule,
        mix: bool = True,
    ) -> None:
        """All rounds of a finite `schedule` on `buffer`, in place, one after the other. Collective.

        For `Broadcast` and `GlobalAverage`. The mailbox serves such runs only.
        """
        for step in range(schedule.period):
            this = schedule.round(self.rank, step)
            copy = not mix or this.weight == 1.0
            if this.to is None and this.sender is None:
                mailbox.round += 1
                continue
            self.post(mailbox, buffer, buffer, this, how="copy" if copy else "mix", kick=False)
            self.wait(mailbox)

    def exchange(
        self,
        array: NDArray[Any],
        mix: bool = True,
        schedule: Schedule | None = None,
        mailbox: Mailbox | None = None,
    ) -> NDArray[Any]:
        """One blocking round: put `array` to this step's partner, take another's. Collective.

        array: 1-D, contiguous, writeable; float32 or float64 where mix=True, and of the same size
        and dtype in each call (`ArrayError` else). With mix=True the array becomes the mean of
        itself and what came in, and is returned; with mix=False it stays, and what came in is
        returned as a new array. schedule: `Rotated(Dissemination(size))` by default; the same in
        each call. mailbox: one of `mailbox(array.nbytes)`, to exchange arrays of several sizes.
        """
        self._check_usable()
        buffer = self._buffer_of(array)
        if mix and buffer.dtype not in _OPERATIONS["mix"]:
            raise ArrayError(f"the array is {buffer.dtype}; float32 and float64 can be mixed")
        chosen = self.check_schedule(schedule or self._default_schedule)
        box = self._mailbox_of_exchange(buffer, chosen) if mailbox is None else mailbox
        if self.engine.mailboxes[box.index : box.index + 1] != [box]:
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
        self.post_scheduled(box, buffer, target, chosen, box.round, how=how, kick=False)
        self.wait(box)
        return array if mix else target.owner  # type: ignore[return-value]

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
    ) -> None:
        """`post` the round of `step` on a mailbox that serves every `stride`-th step of `schedule`.

        weight: factor on the schedule's weights.
        """
        this = mailbox.ahead.pop(step, None) or schedule.round(self.rank, step)
        later = step + stride * mailbox.layout.depth
        ahead = mailbox.ahead[later] = schedule.round(self.rank, later)
        if weight != 1.0:
            this = replace(this, weight=weight * this.weight)
        self.post(mailbox, source, target, this, ahead, how, held, kick)

    def restart(self, mailbox: Mailbox) -> None:
        """Begin anew with all slots free, so that the next round may follow any step.

        Collective in effect: between this and the last round all ranks have met (`agree`).
        """
        mailbox.round += mailbox.layout.depth  # beyond the rounds whose credits are given out
        mailbox.base = mailbox.round
        mailbox.ahead.clear()

    def grant(self, mailbox: Mailbox, rank: int, number: int) -> None:
        """Tell `rank` that the slot of round `number` of `mailbox` is free."""
        with self.engine.locked():
            status = rounds.grant(self.engine.words, self.engine.table[mailbox.index], rank, number)
        if status < 0:
            self._fail(UCXError(ops.SEND, int(status), status_name(int(status)), "a credit"))

    def look_around(self) -> None:
        """`PeerError` if another rank left with an error; asks at most once a second.

        For whoever waits for nobody, and would not notice.
        """
        self._check_usable()
        now = time.monotonic()
        if now - self._looked > _SLICE:
            self._looked = now
            self._look_for_errors_of_others()

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
            raise ClosedError("the group is closed")
        if self._failure is not None:
            raise ExchangeError(f"the group failed before: {self._failure}") from self._failure

    def _look_for_errors_of_others(self) -> None:
        try:
            self._meeting.raise_if_aborted()
        except (PeerError, RendezvousError) as error:
            self._failure = error
            self.engine.stop()
            raise

    def _fail(self, error: GossipError) -> NoReturn:
        """Remember that rounds are broken off, tell the others, raise.

        If another rank left with an error, that is the cause, and is raised in its place.
        """
        self._look_for_errors_of_others()
        self._failure = error
        self.engine.stop()
        self._quietly(lambda: self._meeting.abort(str(error)))
        raise error

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
        self._failure = self._failure or ExchangeError(reason)
        self._quietly(lambda: self._meeting.abort(reason))
        self.engine.stop()

    def close(self) -> None:
        """Leave the job once all ranks are here to leave, or the group's timeout has passed.

        Collective. Further calls do nothing.
        """
        if self._closed:
            return
        try:
            if self._failure is not None:
                self._quietly(lambda: self._meeting.leave(self.timeout))
            else:
                # While everybody still drives, so that nobody's last put meets a closed door. A
                # partner that is gone already has nothing to lose by it.
                with suppress(UCXError):
                    self.engine.flush(self.timeout)
                self._meeting.leave(self.timeout)
        finally:
            self._closed = True
            self.engine.close()
            self.context.close()

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
