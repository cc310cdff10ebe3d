"""Where the ranks of a job meet: opaque blobs, agreement and a deadline, over a key-value store.

Used at join, when a mailbox is made and at close; never in a step. The store is torch's TCPStore
by default (torchrun starts one anyway), or anything with its five methods. Agreement costs each
rank a handful of requests: everyone compares with rank 0 and counts itself in, the last one
declares the result, and the first difference found is declared to all, so that every rank fails
with the same message.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

from ucxgossip.errors import (
    ClosedError,
    MismatchError,
    PeerError,
    RankMissingError,
    RendezvousError,
)
from ucxgossip.store import Store

_GOODBYE = 3.0
"""Seconds that rank 0 keeps its store open after an error, for the others to read it."""


class Rendezvous:
    """One job's meeting place. `timeout`: seconds that any meeting may take."""

    def __init__(self, store: Store, rank: int, size: int, timeout: float) -> None:
        self.store, self.rank, self.size, self.timeout = store, rank, size, timeout
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        joins = store.add(f"ucxgossip/{restart}/joins/{rank}", 1)
        self._prefix = f"ucxgossip/{restart}/{joins}"
        self._meetings: dict[str, int] = {}
        self._closed = False

    @contextmanager
    def _store_at(self, what: str) -> Iterator[Store]:
        """The store; its failures, other than a time-out, are told as what they mean."""
        try:
            yield self.store
        except (RendezvousError, PeerError):
            raise
        except Exception as error:
            if _is_timeout(error):
                raise
            raise RendezvousError(
                f"rank {self.rank} lost the store {what}: {error}. Rank 0 (or torchrun's "
                "agent) holds it: did it end?"
            ) from error

    def _key(self, *parts: object) -> str:
        return "/".join([self._prefix, *map(str, parts)])

    def publish(self, name: str, blob: bytes) -> None:
        """Make `blob` known to the others as this rank's `name`."""
        self._check_open()
        with self._store_at(f"publishing {name!r}") as store:
            store.set(self._key(name, self.rank), blob)

    def collect(self, name: str, rank: int) -> bytes:
        """The blob that `rank` published as `name`, once it has."""
        self._check_open()
        key = self._key(name, rank)
        self._wait(key, lambda: (rank,), f"to publish {name!r}")
        with self._store_at(f"collecting {name!r}") as store:
            return bytes(store.get(key))

    def agree(self, name: str, facts: Mapping[str, object]) -> None:
        """Meet, and check that all ranks bring the same `facts` (JSON values).

        Every rank raises the same `MismatchError`, naming the first difference, where they do
        not; `RankMissingError` says who did not come in time.
        """
        self._check_open()
        meeting = f"{name}#{self._meetings.setdefault(name, 0)}"
        self._meetings[name] += 1
        with self._store_at(f"at {name!r}"):
            message = self._agree(name, meeting, json.dumps(facts))
        if message:
            raise MismatchError(message)
        self.raise_if_aborted()  # all are counted, but one may have given up waiting

    def _agree(self, name: str, meeting: str, mine: str) -> str:
        """The first difference that any rank found, in words; empty if all agree."""
        store = self.store
        store.set(self._key(meeting, "facts", self.rank), mine)
        result, verdicts = self._key(meeting, "result"), self._key(meeting, "verdicts")
        if self.rank != 0:
            first = self._key(meeting, "facts", 0)
            self._wait(first, lambda: (0,), f"at {name!r}", stop=result)
            if store.check([first]):
                theirs = json.loads(store.get(first))
                difference = first_difference(theirs, json.loads(mine), self.rank)
                if difference and store.add(verdicts, 1) == 1:
                    store.set(result, f"{name}: {difference}")
        everyone = store.add(self._key(meeting, "count"), 1) == self.size
        if everyone and store.add(verdicts, 1) == 1:
            store.set(result, "")
        self._wait(result, lambda: self._absent(meeting), f"at {name!r}")
        return store.get(result).decode()

    def _absent(self, meeting: str) -> tuple[int, ...]:
        return tuple(
            rank
            for rank in range(self.size)
            if not self.store.check([self._key(meeting, "facts", rank)])
        )

    def _wait(
        self, key: str, missing: Callable[[], tuple[int, ...]], what: str, stop: str = ""
    ) -> None:
        """Wait for `key` (or `stop`), looking out for ranks that left with an error."""
        start = time.monotonic()
        slice_ = timedelta(seconds=min(1.0, self.timeout))
        while True:
            try:
                with self._store_at(what) as store:
                    store.wait([key], slice_)
                return
            except Exception as error:
                if not _is_timeout(error):
                    raise
            try:
                self.raise_if_aborted()
            except PeerError:
                # Who left may have left because of the answer that this rank waits for.
                if self.store.check([key]):
                    return
                raise
            if stop and self.store.check([stop]):
                return
            waited = time.monotonic() - start
            if waited >= self.timeout:
                ranks = missing()
                raise RankMissingError(
                    f"rank {self.rank} waited {waited:.1f} s for rank"
                    f"{'s' if len(ranks) != 1 else ''} {', '.join(map(str, ranks))} {what}. "
                    "Did every rank start, with the same MASTER_ADDR, MASTER_PORT and WORLD_SIZE?",
                    ranks,
                )

    def abort(self, reason: str) -> None:
        """Tell the others that this rank leaves with an error; the first to say so is heard."""
        if not self._closed and self.store.add(self._key("aborts"), 1) == 1:
            self.store.set(self._key("aborted"), json.dumps([self.rank, reason]))

    def raise_if_aborted(self) -> None:
        """Raise `PeerError` if another rank has left with an error."""
        key = self._key("aborted")
        with self._store_at("looking for errors of others") as store:
            if not store.check([key]):
                return
            rank, reason = json.loads(store.get(key))
            if rank != self.rank:
                raise PeerError(f"rank {rank} left the job: {reason}", rank)

    def leave(self, timeout: float) -> bool:
        """Wait until all ranks are here to leave; the store's host goes last. Whether all came.

        A rank that is gone, or does not come within `timeout` seconds, is no error.
        """
        self._closed = True
        together = False
        try:
            together = self._all_reach("leaving", timeout)
            # Only then may rank 0 take its store away: the others have read their last answer.
            if self.store.add(self._key("left"), 1) == self.size:
                self.store.set(self._key("left", "all"), "")
            if self.rank == 0:
                patience = timeout if together else min(timeout, _GOODBYE)
                self.store.wait([self._key("left", "all")], timedelta(seconds=patience))
        except Exception as error:
            if self.rank == 0 and not _is_timeout(error):
                raise RendezvousError(f"rank 0 could not leave: {error}") from error
        return together

    def _all_reach(self, name: str, timeout: float) -> bool:
        """Count this rank in and wait for the others, unless one has left with an error."""
        gate = self._key(name, "all")
        if self.store.add(self._key(name), 1) == self.size:
            self.store.set(gate, "")
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline and not self.store.check([self._key("aborted")]):
            try:
                self.store.wait([gate], timedelta(seconds=min(1.0, timeout)))
                return True
            except Exception as error:
                if not _is_timeout(error):
                    raise
        return False

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the rendezvous is closed")


def _is_timeout(error: Exception) -> bool:
    text = str(error).lower()
    return isinstance(error, TimeoutError) or "timeout" in text or "timed out" in text


def first_difference(theirs: object, mine: object, rank: int, path: str = "") -> str:
    """The first place where rank 0's facts and this rank's differ, in words; empty if none."""
    where = path or "facts"
    if isinstance(theirs, dict) and isinstance(mine, dict):
        for key in [*theirs, *(key for key in mine if key not in theirs)]:
            inner = f"{path}.{key}" if path else str(key)
            if key not in mine or key not in theirs:
                has, lacks = (0, rank) if key not in mine else (rank, 0)
                return f"{inner}: rank {has} has it, rank {lacks} does not"
            difference = first_difference(theirs[key], mine[key], rank, inner)
            if difference:
                return difference
        return ""
    if isinstance(theirs, list) and isinstance(mine, list):
        for index, (left, right) in enumerate(zip(theirs, mine, strict=False)):
            difference = first_difference(left, right, rank, f"{path}[{index}]")
            if difference:
                return difference
        if len(theirs) != len(mine):
            return f"{where}: rank 0 has {len(theirs)} entries, rank {rank} has {len(mine)}"
        return ""
    return "" if theirs == mine else f"{where}: rank 0 has {theirs!r}, rank {rank} has {mine!r}"
