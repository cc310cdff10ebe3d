"""Where the ranks of a job meet: signed blobs, agreement and a deadline, over a key-value store.

Used at join and at close; what ranks say to each other between goes from warden to warden. The
store is torch's TCPStore by default (torchrun starts one anyway), or anything with its five
methods. Agreement costs each rank a handful of requests: everyone compares with rank 0 and counts
itself in, the last one declares the result, and the first difference found is declared to all, so
that every rank fails with the same message.

Nothing that is read from the store is believed before its seal is open (`board`), and what ranks
say after they have met is sealed for this job alone (`greeting`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import NoReturn

from ucxgossip import forks
from ucxgossip.board import Board, parsed
from ucxgossip.errors import MismatchError, RendezvousError
from ucxgossip.greeting import greet
from ucxgossip.store import Store
from ucxgossip.trust import Seal, find_token

_GOODBYE = 5.0
"""Seconds that rank 0 keeps its store open after an error, for the others to read it."""


class Rendezvous:
    """One job's meeting place. `timeout`: seconds that any meeting may take.

    token: as `trust.find_token` takes it. `publish`, `collect` and `agree` are collective the
    first time: they go on when all ranks have come.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        timeout: float,
        token: str | bytes | None = None,
    ) -> None:
        self.rank, self.size, self.timeout = rank, size, timeout
        self.board = Board(store, rank, size, timeout, Seal(find_token(token)))
        self._seal: Seal | None = None
        self._meetings: dict[str, int] = {}
        self._closed = False
        self._forked = False
        forks.watch(self)

    def meet(self) -> Seal:
        """The seal of this job, once all ranks have come. Collective the first time.

        Raises, on all who have come, `SignatureError` where tokens differ and `MismatchError`
        where ranks differ in the number of ranks; `RankMissingError` at the deadline.
        """
        if self._closed:
            raise forks.gone("the rendezvous", self._forked)
        if self._seal is None:
            with self.board.at("to join"):
                self._seal = self.board.seal.of_job(greet(self.board))
        return self._seal

    def publish(self, name: str, blob: bytes) -> None:
        """Make `blob` known to the others as this rank's `name`, which serves one blob."""
        seal = self.meet()
        with self.board.at(f"publishing {name!r}"):
            self.board.write(seal, self.board.key(name, self.rank), blob)

    def collect(self, name: str, rank: int) -> bytes:
        """The blob that `rank` published as `name`, once it has."""
        seal = self.meet()
        key = self.board.key(name, rank)
        self.board.wait(key, lambda: (rank,), f"to publish {name!r}")
        with self.board.at(f"collecting {name!r}"):
            return self.board.read(seal, key)[1]

    def agree(self, name: str, facts: Mapping[str, object]) -> None:
        """Meet, and check that all ranks bring the same `facts` (JSON values).

        Every rank raises the same `MismatchError`, naming the first difference, where they do
        not; `RankMissingError` says who did not come in time.
        """
        seal = self.meet()
        meeting = f"{name}#{self._meetings.setdefault(name, 0)}"
        self._meetings[name] += 1
        with self.board.at(f"at {name!r}"):
            message = self._agree(seal, name, meeting, dict(facts))
        if message:
            raise MismatchError(message)
        self.raise_if_aborted()  # all are counted, but one may have given up waiting

    def _agree(self, seal: Seal, name: str, meeting: str, mine: dict[str, object]) -> str:
        """The first difference that any rank found, in words; empty if all agree."""
        board, store = self.board, self.board.store
        facts = [board.key(meeting, "facts", rank) for rank in range(self.size)]
        result, verdicts = board.key(meeting, "result"), board.key(meeting, "verdicts")
        written = json.dumps([mine]).encode()
        board.write(seal, facts[self.rank], written)

        def declare(message: str) -> None:
            if store.add(verdicts, 1) == 1:
                board.write(seal, result, json.dumps([message]).encode())

        difference = ""
        if self.rank != 0:
            board.wait(facts[0], lambda: (0,), f"at {name!r}", lambda: store.check([result]))
            if store.check([facts[0]]):
                (theirs,) = parsed(board.read(seal, facts[0])[1], 0, dict)
                difference = first_difference(theirs, json.loads(written)[0], self.rank)
                if difference:
                    difference = f"{name}: {difference}"
                    declare(difference)
        if store.add(board.key(meeting, "count"), 1) == self.size:
            declare("")
        board.wait(
            result,
            lambda: tuple(rank for rank, key in enumerate(facts) if not store.check([key])),
            f"at {name!r}",
        )
        # Counters are not signed: a verdict that all agree does not outweigh what was seen here.
        rank, verdict = board.read(seal, result)
        return str(parsed(verdict, rank, str)[0]) or difference

    def abort(self, reason: str) -> None:
        """Tell the others that this rank leaves with an error; the first to say so is heard."""
        if not self._closed:
            self.board.abort(reason)

    def declare(self, error: RendezvousError) -> NoReturn:
        """Leave the job with an error that all ranks are to raise alike; the first one counts."""
        with self.board.at("telling the others of an error"):
            self.board.declare(error)

    def raise_if_aborted(self) -> None:
        """Raise `PeerError` if another rank has left with an error.

        Or the error that ranks left with who found that they do not belong together.
        """
        self.board.raise_if_aborted()

    def give_up(self) -> None:
        """After a join that failed: rank 0 stays until the others have read why, or 5 s.

        Those who come late too, and those whom it did not count on.
        """
        self._closed = True
        store, key = self.board.store, self.board.key
        deadline = time.monotonic() + min(_GOODBYE, self.timeout)
        try:
            store.set(key("gone", store.add(key("gone"), 1)), "")
            here, told = self.size, 0
            while self.rank == 0 and told < here:
                left = timedelta(seconds=max(0.01, deadline - time.monotonic()))
                store.wait([key("gone", number) for number in range(1, here + 1)], left)
                here, told = max(here, store.add(key("arrivals"), 0)), here
        except Exception:  # the error at hand is the one to see
            return

    def leave(self, timeout: float) -> bool:
        """Wait until all ranks are here to leave; the store's host goes last. Whether all came.

        A rank that is gone, or does not come within `timeout` seconds, is no error.
        """
        self._closed = True
        board, together = self.board, False
        everybody = board.key("left", "all")
        try:
            together = self._all_reach("leaving", timeout)
            # Only then may rank 0 take its store away: the others have read their last answer.
            if board.store.add(board.key("left"), 1) == self.size:
                board.store.set(everybody, "")
            if self.rank == 0:
                patience = timeout if together else min(timeout, _GOODBYE)
                board.reached(everybody, timedelta(seconds=patience))
        except Exception as error:
            if self.rank == 0:
                raise RendezvousError(f"rank 0 could not leave: {error}") from error
        return together

    def _all_reach(self, name: str, timeout: float) -> bool:
        """Count this rank in and wait for the others, unless one has left with an error."""
        board = self.board
        gate = board.key(name, "all")
        if board.store.add(board.key(name), 1) == self.size:
            board.store.set(gate, "")
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline and not board.store.check([board.key("aborted")]):
            if board.reached(gate, timedelta(seconds=min(1.0, timeout))):
                return True
        return False

    def disown(self) -> None:
        """Count as closed, in a forked child: the store's connection is the parent's."""
        self._closed = self._forked = True
        forks.never_freed(self.board.store)


def first_difference(
    theirs: object, mine: object, rank: int, path: str = "", first: int = 0
) -> str:
    """The first place where facts of rank `first` and of `rank` differ, in words; empty if none."""
    where = path or "facts"
    if isinstance(theirs, dict) and isinstance(mine, dict):
        for key in [*theirs, *(key for key in mine if key not in theirs)]:
            inner = f"{path}.{key}" if path else str(key)
            if key not in mine or key not in theirs:
                has, lacks = (first, rank) if key not in mine else (rank, first)
                return f"{inner}: rank {has} has it, rank {lacks} does not"
            difference = first_difference(theirs[key], mine[key], rank, inner, first)
            if difference:
                return difference
        return ""
    if isinstance(theirs, list) and isinstance(mine, list):
        for index, (left, right) in enumerate(zip(theirs, mine, strict=False)):
            difference = first_difference(left, right, rank, f"{path}[{index}]", first)
            if difference:
                return difference
        if len(theirs) != len(mine):
            return f"{where}: rank {first} has {len(theirs)} entries, rank {rank} has {len(mine)}"
        return ""
    if theirs == mine:
        return ""
    return f"{where}: rank {first} has {theirs!r}, rank {rank} has {mine!r}"
