"""What the rounds of an attached model cost, counted where they end."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from ucxgossip.engine import words as w
from ucxgossip.errors import ExchangeTimeoutError
from ucxgossip.group import Group
from ucxgossip.mailbox import Mailbox
from ucxgossip.quarantine import Quarantine


@dataclass
class Meter:
    """Sums over all rounds of one attached model; seconds, bytes and numbers of rounds.

    quarantine: what happens to values that are not finite.
    """

    rounds: int = 0
    nbytes: int = 0
    waits: int = 0
    wait_s: float = 0.0
    exchange_s: float = 0.0
    skipped: int = 0
    broken: int = 0
    lateness: dict[int, list[int]] = field(default_factory=dict)
    quarantine: Quarantine = field(default_factory=Quarantine)

    def posted(self, group: Group, mailbox: Mailbox) -> None:
        """A round of `mailbox` was posted."""
        item, index = group.engine.table.item, mailbox.index
        self.rounds += 1
        if item(index, w.TO) >= 0:
            self.nbytes += item(index, w.NBYTES)

    def wait(
        self,
        group: Group,
        mailbox: Mailbox,
        what: str,
        steps_late: int = 0,
        step: int | None = None,
    ) -> float | None:
        """Wait for the round of `mailbox`; the squared distance of what was mixed.

        None where a change of members broke the round off, or left it out. what: the kind of
        payload. step: in which it was posted, if that is not this one. `NonFiniteError` with the
        policy ``"raise"``.
        """
        if not self._wait(group, mailbox, blocked=group.engine.active(mailbox)):
            self.broken += 1
            return None
        item, index = group.engine.table.item, mailbox.index
        self.exchange_s += (item(index, w.DONE_NS) - item(index, w.POSTED_NS)) * 1e-9
        self.mixed(item(index, w.FROM), steps_late)
        found = group.left_out(mailbox)
        if found:
            self.quarantine.left_out(group.rank, found, what, step)
        return float(group.engine.floats.item(index, w.DISTANCE))

    def launched(self, group: Group, mailbox: Mailbox) -> bool:
        """Wait until all of the round of `mailbox` is enqueued on its device.

        False where a change of members broke the round off, or left it out; `wait` counts that.
        """
        blocked = not group.engine.launched(mailbox)
        return self._wait(group, mailbox, blocked, launched=True)

    def _wait(self, group: Group, mailbox: Mailbox, blocked: bool, launched: bool = False) -> bool:
        start = time.perf_counter()
        try:
            whole = group.wait(mailbox, launched=launched)
        except ExchangeTimeoutError as error:
            error.add_note(f"This rank has taken {self.quarantine.step} optimizer steps.")
            raise
        if blocked:
            self.waits += 1
            self.wait_s += time.perf_counter() - start
        return whole

    def mixed(self, sender: int, steps_late: int) -> None:
        """What `sender` put was mixed, `steps_late` own steps after it was due."""
        if sender >= 0:
            entry = self.lateness.setdefault(sender, [0, 0])
            entry[0] += 1
            entry[1] += steps_late

    def staleness(self) -> dict[int, float]:
        """Mean steps late, by rank received from."""
        return {sender: late / count for sender, (count, late) in sorted(self.lateness.items())}
