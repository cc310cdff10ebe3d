"""The ranks of a job: joining, endpoints made when first needed, and rounds by schedule.

>>> import numpy as np, ucxgossip as ug
>>> with ug.join() as group:                      # one process a rank, started by torchrun
...     x = np.full(1000, float(group.rank), np.float32)
...     group.exchange(x)                         # x is now the mean of mine and a partner's
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib import metadata
from types import TracebackType
from typing import Self

from ucxgossip import forks, running
from ucxgossip.blocking import Blocking
from ucxgossip.engine import Constants, Engine
from ucxgossip.errors import (
    ArgumentError,
    ClosedError,
    ExpelledError,
    MismatchError,
    PeerError,
    RankMissingError,
    UCXError,
)
from ucxgossip.meetings import JobGoneError
from ucxgossip.membership import Setup
from ucxgossip.posting import OPERATIONS
from ucxgossip.rendezvous import Rendezvous
from ucxgossip.store import Place, Solitary, Store, open_store
from ucxgossip.trust import find_token, new_token
from ucxgossip.tuning import Tuning
from ucxgossip.ucp.context import TRANSPORTS, Context

PROTOCOL = 12
"""Raised whenever ranks of different releases could not work together."""

DEFAULT_TIMEOUT = 300.0
DEAD_AFTER = 3.0
_SLICE = 1.0
_LOOK_S = 0.2
_GOODBYE = 3.0

log = logging.getLogger("ucxgossip")


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
    ``torch.distributed.Store`` that `store.Store` lists. transport: ``"auto"``, ``"tcp"``,
    ``"shm"`` or ``"verbs"`` (RDMA alone; untested on hardware). timeout: seconds that any wait of
    this group may take. settings: UCX settings by name. tuning: constants of the engine, where they
    are not to be the usual ones. dead_after: seconds of silence after which a rank is taken for
    dead (a process that ends is noticed at once). token: the secret that the job's ranks share; by
    default that of `trust.find_token`, which needs no setting on one host or with a shared home.
    verify: a checksum (XXH64) travels with every chunk and is checked before the chunk is used
    (`IntegrityError`): to prove a network or a driver, not for each day (docs/performance.md has
    its cost). min_size: so many ranks, the lowest, begin the job (UCXGOSSIP_MIN_SIZE by default, or
    all); the others come to it later.

    Raises `RendezvousError` (no store answers, or ranks cannot connect to each other;
    `RankMissingError`, `MismatchError`, `SignatureError`, `PortInUseError` are such),
    `LibraryNotFoundError`, `UCXError`, `ArgumentError` (`TokenError`), or `ForkError` in a process
    forked after its parent joined; nothing is left behind then.
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
    constants = (tuning or Tuning()).over(transport, place.one_host)
    min_size = place.founders(min_size)
    secret = find_token(token)  # before a store is opened
    store = open_store(place, timeout) if store is None else store
    meeting = Rendezvous(store, place.rank, min_size, timeout, secret)
    note = running.next_key()
    chosen = dict(settings or {})
    if place.one_host and transport != "verbs":
        chosen.setdefault("NET_DEVICES", "lo")
    context, found = None, None
    try:
        context = Context(transport, chosen, estimated_peers=place.size)
        common = (
            context,
            meeting,
            constants,
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


def _facts(context: Context, tuning: Constants) -> dict[str, object]:
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
        "device_chunk": tuning.device_chunk,
        "payload types": [dtype.str for dtype in OPERATIONS["mix"]],
    }


class Group(Blocking):
    """The ranks of a job and what goes between them. Made by `join`.

    For users: `rank` and `size`; `members`, the ranks that live, and `epoch`, which counts the
    changes of them; `losses` and `arrivals`, the ranks that left and came, with epoch and time;
    `timeout` in seconds, which may be set; `exchange`, `allocate` and `mailbox` for arrays without
    torch, and `nonfinite`, what of them was left out; `close` and `closed`. The other methods are
    for the floors above (CONTRIBUTING.md, "Finding your way").

    found: a running job, to come to as a guest; else this rank founds one. note: the key by which
    the store tells of it.
    """

    def __init__(
        self,
        context: Context,
        meeting: Rendezvous,
        tuning: Constants,
        place: Place,
        dead_after: float = DEAD_AFTER,
        verify: bool = False,
        note: str = "",
        found: running.Running | None = None,
    ) -> None:
        engine = Engine(context, place.rank, place.size, tuning, ring=context.transport != "tcp")
        super().__init__(Setup(context, engine, meeting, place.size, dead_after, tuning, verify))
        self._closing = threading.RLock()
        forks.watch(self)
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

    # --- the end -------------------------------------------------------------------------------

    def close(self) -> None:
        """Leave the job once all ranks are here to leave, or the group's timeout has passed.

        Collective. Further calls do nothing, in any thread; nor does any in a forked child. Leaving
        a ``with`` block raises what ended the job, if no call has raised it before; this does not.
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
        met = False
        try:
            if self._failure is None:
                met = self._leave()
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
                    self.engine.close(met)
                finally:
                    self.context.close()

    def _leave(self) -> bool:
        """Wait until all members are here to leave; whether they came."""
        if self._warden is None:
            self._meeting.leave(self.timeout)
            return True
        if self.guest:
            return False
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
        with suppress(ClosedError):
            left = max(0.0, deadline - time.monotonic())
            if not self.engine.leave_ways(min(_GOODBYE, left)):
                log.warning(
                    "rank %d leaves alone: what it copies to other ranks' devices is under way",
                    self.rank,
                )
                self._warden.leave()  # or the others would free the slots
                return False
        return self._part(deadline)

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
        self.tell_failure()
