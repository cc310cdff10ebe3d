"""The way to other ranks: endpoints made when first needed, and closed beyond a cap."""

from __future__ import annotations

from collections.abc import Sequence

from ucxgossip.engine import words as w
from ucxgossip.errors import (
    UCXError,
)
from ucxgossip.mailbox import Mailbox, parse_description
from ucxgossip.meetings import Meetings
from ucxgossip.members import View
from ucxgossip.membership import Setup
from ucxgossip.schedule import Round


class Partners(Meetings):
    """A membership whose members put into each other's mailboxes."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._capped = self.size - 1 > self.tuning.endpoints
        self.exact_credits = self._capped  # so that `_close_unused` knows who may put
        self.engine.words[w.EXACT] = self._capped
        self._uses, self._used = 0, dict[int, int]()
        self._pinned: dict[int, tuple[int, ...]] = {}
        self._told: dict[tuple[int, str], bytes] = {}

    def _install(self, view: View) -> None:
        self._told.clear()
        super()._install(view)

    def reach(self, rank: int, mailbox: Mailbox) -> bool:
        """Make sure that `mailbox` can be put to on `rank`; False if it is no member (any more)."""
        self.enter()
        while True:
            with self._lock:
                self.await_steady()
                if rank in mailbox.keys:
                    return True
                if rank not in self.members or self._warden is None:
                    return False
                epoch, known = self.epoch, rank in self.engine.endpoints
            worker = b"" if known else self._ask(rank, f"worker {epoch}")
            blob = self._ask(rank, f"mailbox {mailbox.index} {epoch}")
            if worker is None or blob is None:
                continue
            address, packed = parse_description(blob, mailbox.layout, rank)
            try:
                with self._lock:
                    self.await_steady()
                    if self.epoch == epoch and rank not in mailbox.keys:
                        self.engine.connect(rank, worker)
                        self.engine.introduce(mailbox, rank, packed, address)
            except UCXError as error:
                self._doubt((rank,), epoch, error)

    def _ask(self, rank: int, name: str) -> bytes | None:
        """As `fetch_from`, remembered until the members change where endpoints are made again."""
        known = self._told.get((rank, name))
        if known is not None:
            return known
        found = self.fetch_from(rank, name)
        if self._capped and found is not None:
            self._told[rank, name] = found
        return found

    def pin(self, mailbox: Mailbox, ranks: Sequence[int]) -> None:
        """Keep the endpoints to `ranks` for `mailbox`, whose rounds are not posted here."""
        self._pinned[mailbox.index] = tuple(ranks)

    def _close_unused(self, wanted: Sequence[int | None], room: int) -> None:
        """Make room for so many endpoints below the cap; those to `wanted` ranks stay.

        The least recently used go first, and only where nothing is under way in either direction:
        this rank's puts have ended, and the other one holds no credit for a put.
        """
        most = self.tuning.endpoints - room
        if len(self.engine.endpoints) <= most:
            return
        busy = {rank for rank in wanted if rank is not None}
        busy.update(rank for ranks in self._pinned.values() for rank in ranks)
        for mailbox in self.engine.mailboxes:
            active = self.engine.active(mailbox)
            if active:
                busy.add(self.engine.target_of(mailbox))
            first = mailbox.round - active
            busy.update(rank for number, rank in mailbox.credited.items() if number >= first)
        for rank in sorted(self.engine.endpoints, key=lambda rank: self._used.get(rank, 0)):
            if len(self.engine.endpoints) <= most:
                return
            if rank not in busy:
                self.engine.disconnect(rank)

    def _note_use(self, mailbox: Mailbox, this: Round, ahead: Round | None) -> None:
        """Remember whom the next round of `mailbox` uses, and who may put since then."""
        number = mailbox.round
        for old in [each for each in mailbox.credited if each < number]:
            del mailbox.credited[old]
        if this.sender is not None:
            mailbox.credited[number] = this.sender
        if ahead is not None and ahead.sender is not None:
            mailbox.credited[number + mailbox.layout.ahead] = ahead.sender
        self._uses += 1
        for rank in (this.to, this.sender, None if ahead is None else ahead.sender):
            if rank is not None:
                self._used[rank] = self._uses
