"""Whether wardens can be reached at all, proved before the job begins.

Later, a host that refuses a connection proves that a process is gone (`watch`). That holds only
for an address that took connections before: behind a firewall that rejects, or where a rank told
an address that means another host elsewhere, each rank would prove the others dead and go on
alone. So wardens begin on trial. They judge nobody until each has felt the pulse of all whom it is
to hear, and all have told each other so at the store. A warden listens before its address is known
and the kernel takes connections for a process that is slow, so one that is refused, or not taken
for CONNECT_S seconds, ends the trial.

Rejected: connecting to all (a connection for each pair of ranks); believing a connection that
somebody answered (at a wrong address it may be another job's warden; a pulse is sealed).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

from ucxgossip.errors import RendezvousError
from ucxgossip.members.links import Address
from ucxgossip.members.watch import Setup, Watch

CONNECT_S = 10.0


class Trial(Watch):
    """A watch that can begin on trial, in which it judges nobody."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._on_trial = False
        self._reached_by: set[int] = set()
        self._put_off: dict[int, bool] = {}

    # --- what the group calls, in its own threads ----------------------------------------------

    def start(
        self, contacts: Mapping[int, Address], guest: bool = False, trial: bool = False
    ) -> None:
        """As `Watch.start`. trial: judge nobody until `trust`."""
        self._on_trial = trial
        super().start(contacts, guest)

    def unproved(self, seconds: float) -> tuple[int, ...]:
        """Those whose pulse this rank is to hear, and has not felt within `seconds`.

        `RendezvousError` as soon as this rank finds another one that it cannot reach.
        """
        before = self._neighbours(-1)
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self._put_off or self._reached_by.issuperset(before) or self._over or self._stop
                ),
                seconds,
            )
            if self._put_off:
                rank, refused = next(iter(self._put_off.items()))
                host, port = self._contacts[rank]
                how = "was refused" if refused else "came to nothing"
                raise RendezvousError(
                    f"rank {self.rank} could not reach rank {rank} at {host}:{port}: the "
                    f"connection {how}. Has its process ended, does a firewall reject or drop what "
                    f"goes to its host, or does that address mean another host here? Set "
                    f"UCXGOSSIP_HOST for rank {rank} to the address that the others know"
                )
            return tuple(rank for rank in before if rank not in self._reached_by)

    def trust(self) -> None:
        """The trial is over: who cannot be reached from now on is dead."""
        self._do(self._begin_to_judge)

    def _begin_to_judge(self) -> None:
        self._on_trial = False
        self._held_up(time.monotonic())
        for rank in self._put_off:
            self._probe(rank)
        self._put_off.clear()

    # --- what the watch brings about -----------------------------------------------------------

    def _patience(self) -> float:
        return math.inf if self._on_trial else super()._patience()

    def _look(self, now: float) -> None:
        super()._look(now)
        if self._on_trial:
            for link in self._every_link():
                if now - link.since > CONNECT_S and not link.connected:
                    self._suspect(link.to, proven=False)

    def _felt(self, rank: int) -> None:
        super()._felt(rank)
        if self._on_trial and rank not in self._reached_by:
            self._reached_by.add(rank)
            self._notify()

    def _suspect(self, rank: int, proven: bool) -> None:
        if not self._on_trial:
            super()._suspect(rank, proven)
            return
        with self._changed:
            self._put_off[rank] = proven
            self._changed.notify_all()
