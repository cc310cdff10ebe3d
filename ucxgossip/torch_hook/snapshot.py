"""The state of an attached model, for a rank that comes to a running job.

The guest asks a member; its training thread makes the snapshot between two steps, when the round
just posted has ended, and a thread puts it into the guest's memory (`ucxgossip.landing`). What
travels in the clear over UCX is checked against a digest that came over the wardens' sealed
connection.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import threading
from collections.abc import Callable

from ucxgossip import landing
from ucxgossip.errors import ExchangeError, GossipError, RankMissingError
from ucxgossip.group import Group, log

_MOST = 4
"""Snapshots that are kept until they are fetched."""


class Snapshots:
    """What `make` gives, for guests that ask for the state of `label`."""

    def __init__(self, group: Group, label: str, make: Callable[[], bytes]) -> None:
        self.group, self._make = group, make
        self._kind = "snapshot-" + label.replace(" ", "-")
        self._wanted: set[str] = set()
        self._made: dict[str, tuple[bytes, str]] = {}
        self._ends: dict[str, bytes] = {}
        self._closed = self._fetched = False

    # --- the member's side ---------------------------------------------------------------------

    def offer(self) -> None:
        """Answer guests from now on."""
        self.group.answer(self._kind, self._asked)

    def _asked(self, name: str) -> bytes | None:
        """In the warden's thread: ``KIND size NONCE`` or ``KIND put NONCE WHERE``."""
        _, verb, nonce, *where = name.split(" ")
        if self._closed:
            return b"closed"
        if verb == "size":
            made = self._made.get(nonce)
            if made is None:
                self._wanted.add(nonce)
                return None
            data, digest = made
            return json.dumps({"bytes": len(data), "sha256": digest}).encode()
        made = self._made.pop(nonce, None)
        if made is not None:
            name = "ucxgossip-snapshot"
            arguments = (nonce, where[0], made[0])
            threading.Thread(target=self._put, args=arguments, name=name, daemon=True).start()
        return self._ends.pop(nonce, None)

    def _put(self, nonce: str, where: str, data: bytes) -> None:
        context = self.group.context
        try:
            landing.put(where, data, context.transport, context.settings, self.group.timeout)
            self._ends[nonce] = b"done"
        except GossipError as error:  # the guest may be gone again
            log.warning("rank %d could not give its state to a guest: %s", self.group.rank, error)
            self._ends[nonce] = f"failed: {error}".encode()

    def between_steps(self) -> None:
        """Make what guests wait for."""
        while self._wanted:
            data = self._make()
            while len(self._made) >= _MOST:  # of guests that never came for theirs
                self._made.pop(next(iter(self._made)), None)
            self._made[self._wanted.pop()] = data, hashlib.sha256(data).hexdigest()

    def close(self) -> None:
        """There will be no more steps."""
        self._closed = True
        self._made.clear()
        self._make = bytes  # the model goes with whoever made this

    # --- the guest's side ----------------------------------------------------------------------

    def fetch(self) -> bytes | None:
        """The state of the next member that has one. Raises errors of `Group.fetch_from`.

        None, after the first time, if this rank has become a member meanwhile: the others wait for
        it then, and make no more snapshots. `RankMissingError` if the job ends before,
        `ExchangeError` if it is not what was sent.
        """
        group = self.group
        while True:
            if self._fetched and not group.guest:
                return None
            others = group.others
            if not others:
                raise RankMissingError(f"nobody is left to tell rank {group.rank} its state", ())
            found = self._fetch(min([rank for rank in others if rank > group.rank] or others))
            if found is not None:
                self._fetched = True
                return found

    def _fetch(self, rank: int) -> bytes | None:
        nonce, context = secrets.token_hex(8), self.group.context
        answer = self.group.fetch_from(rank, f"{self._kind} size {nonce}")
        if answer is None:
            return None
        if answer == b"closed":
            raise RankMissingError(
                f"the training ended before rank {self.group.rank} could come in", (rank,)
            )
        facts = json.loads(answer)
        with landing.Landing(context.transport, context.settings, int(facts["bytes"])) as ground:
            end = self.group.fetch_from(rank, f"{self._kind} put {nonce} {ground.where}")
            if end is None:
                return None
            if end != b"done":
                raise ExchangeError(f"rank {rank} could not give its state: {end.decode()}")
            data = ground.take().tobytes()
        if hashlib.sha256(data).hexdigest() != facts["sha256"]:
            raise ExchangeError(f"what rank {rank} put is not the state that it told of")
        return data
