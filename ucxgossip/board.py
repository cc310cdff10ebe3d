"""A job's board: signed notes on its store, waits with a deadline, and farewells.

A note is what one rank writes for others to read. It is signed together with its key and its
writer's rank, so that it stands for nothing else. The rank stands before the signature in the
clear, for the error that names whose note does not open; it counts only once the note is open.

Marks that only have to be there (how many have come, who has left) are not signed: who can write
to the store can end a job anyway, but not make a rank believe its bytes.
"""

from __future__ import annotations

import json
import os
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn

from ucxgossip.errors import (
    GossipError,
    MismatchError,
    PeerError,
    RankMissingError,
    RendezvousError,
    SignatureError,
)
from ucxgossip.store import Bounded, NoAnswer, Solitary, Store
from ucxgossip.trust import ADVICE, Seal

PATIENCE = 30.0
"""Seconds after which a store that does not answer is given up."""

_RANK = struct.Struct("<I")
_LEFT = "left"
_ERRORS: dict[str, type[RendezvousError]] = {
    "mismatch": MismatchError,
    "token": SignatureError,
    "unreached": RendezvousError,
}


class Board:
    """What `rank` of `size` reads and writes of one job in `store`.

    seal: of the token alone; it signs greetings and farewells. timeout: seconds that any wait may
    take. Each board of a rank on one store is another job's.
    """

    def __init__(self, store: Store, rank: int, size: int, timeout: float, seal: Seal) -> None:
        self.rank, self.size, self.timeout, self.seal = rank, size, timeout, seal
        alone = isinstance(store, Solitary)
        self.store: Store = store if alone else Bounded(store, min(max(timeout, 1.0), PATIENCE))
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        with self.at("joining"):
            joins = self.store.add(f"ucxgossip/{restart}/joins/{rank}", 1)
        self._prefix = f"ucxgossip/{restart}/{joins}"

    def key(self, *parts: object) -> str:
        """The store's key of something of this job."""
        return "/".join([self._prefix, *map(str, parts)])

    @contextmanager
    def at(self, what: str) -> Iterator[Store]:
        """The store; its failures are told as what they mean."""
        try:
            yield self.store
        except GossipError:
            raise
        except Exception as error:
            raise RendezvousError(
                f"rank {self.rank} lost the store {what}: {error}. Rank 0 (or torchrun's "
                "agent) holds it: did it end, or is it stopped?"
            ) from error

    # --- notes ---------------------------------------------------------------------------------

    def write(self, seal: Seal, key: str, blob: bytes) -> None:
        """Write `blob` as this rank's note at `key`."""
        self.store.set(key, _RANK.pack(self.rank) + seal.seal(f"{key} of {self.rank}", blob))

    def read(self, seal: Seal, key: str) -> tuple[int, bytes]:
        """Who wrote the note at `key`, and what; `SignatureError` unless it was signed so."""
        return self.open(seal, key, bytes(self.store.get(key)))

    def open(self, seal: Seal, key: str, note: bytes) -> tuple[int, bytes]:
        """As `read`, for a note that was fetched already."""
        writer = "nobody"
        if len(note) >= _RANK.size:
            (number,) = _RANK.unpack_from(note)
            writer = f"rank {number}"
            try:
                return number, seal.open(f"{key} of {number}", note[_RANK.size :])
            except SignatureError:
                pass
        if seal is self.seal:  # told alike, whatever each rank has read first
            raise SignatureError(
                f"{writer} has another token than this rank, or somebody else writes to the store "
                f"that they meet at. {ADVICE}"
            )
        raise SignatureError(
            f"rank {self.rank} cannot open what {writer} wrote as {key!r}: it was not signed with "
            "the token of this job, or not in this job. Does somebody else write to its store?"
        )

    # --- waiting -------------------------------------------------------------------------------

    def wait(
        self,
        key: str,
        missing: Callable[[], tuple[int, ...]],
        what: str,
        look: Callable[[], bool] | None = None,
    ) -> None:
        """Wait for `key`, looking out once a second for ranks that left with an error.

        look: asked then too; true ends the wait. `RankMissingError` at the deadline names the
        `missing` ranks, and `what` they were to do.
        """
        start = time.monotonic()
        slice_ = timedelta(seconds=min(1.0, self.timeout))
        while True:
            with self.at(what):
                if self.reached(key, slice_) or self._answered(key):
                    return
                if look is not None and look():
                    return
                waited = time.monotonic() - start
                if waited >= self.timeout:
                    ranks = missing()
                    raise RankMissingError(
                        f"rank {self.rank} waited {waited:.1f} s for rank"
                        f"{'s' if len(ranks) != 1 else ''} {', '.join(map(str, ranks))} {what}. "
                        "Did every rank start, with the same MASTER_ADDR, MASTER_PORT and "
                        "WORLD_SIZE?",
                        ranks,
                    )

    def _answered(self, key: str) -> bool:
        """Whether `key` is there although another rank left with an error, which is raised else.

        Who left may have left because of the answer that this rank waits for.
        """
        try:
            self.raise_if_aborted()
        except (PeerError, MismatchError):
            if self.store.check([key]):
                return True
            raise
        return False

    def reached(self, key: str, timeout: timedelta) -> bool:
        """Whether `key` is there, at the latest after `timeout`."""
        try:
            self.store.wait([key], timeout)
        except Exception as error:
            if not _is_timeout(error):
                raise
            return False
        return True

    # --- farewells -----------------------------------------------------------------------------

    def abort(self, reason: str) -> None:
        """Tell the others that this rank leaves with an error; the first to say so is heard."""
        self._say_farewell(_LEFT, reason)

    def declare(self, error: RendezvousError) -> NoReturn:
        """Leave the job with an error that all ranks are to raise alike; the first one counts."""
        kind = next(name for name, each in _ERRORS.items() if isinstance(error, each))
        if not self._say_farewell(kind, str(error)):
            self.reached(self.key("aborted"), timedelta(seconds=1))  # it is being written
        self.raise_if_aborted()
        raise error

    def _say_farewell(self, kind: str, reason: str) -> bool:
        """Whether this rank was the first."""
        if self.store.add(self.key("aborts"), 1) != 1:
            return False
        self.write(self.seal, self.key("aborted"), json.dumps([kind, reason]).encode())
        return True

    def raise_if_aborted(self) -> None:
        """Raise what another rank left with: `PeerError`, or the error that all are to raise.

        `SignatureError` where its farewell is not signed with this rank's token.
        """
        key = self.key("aborted")
        with self.at("looking for errors of others") as store:
            if not store.check([key]):
                return
            rank, blob = self.read(self.seal, key)
        kind, reason = parsed(blob, rank, str, str)
        if rank != self.rank:
            if kind in _ERRORS:
                raise _ERRORS[kind](reason)
            raise PeerError(f"rank {rank} left the job: {reason}", rank)


def parsed(blob: bytes, rank: int, *kinds: type) -> list[Any]:
    """The JSON array in what `rank` signed; `RendezvousError` unless it holds values of `kinds`."""
    try:
        values = json.loads(blob)
    except (ValueError, RecursionError):
        values = None
    if isinstance(values, list) and [type(value) for value in values] == list(kinds):
        return values
    raise not_understood(rank)


def not_understood(rank: int) -> RendezvousError:
    """The error of a note that is signed, but not as this release writes it."""
    return RendezvousError(
        f"rank {rank} wrote what this rank does not understand; do all have the same ucxgossip?"
    )


def _is_timeout(error: Exception) -> bool:
    if isinstance(error, GossipError | NoAnswer):
        return False
    text = str(error).lower()
    return isinstance(error, TimeoutError) or "timeout" in text or "timed out" in text
