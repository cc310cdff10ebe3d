"""What the rounds of an attached model cost, counted where they end."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from ucxgossip.engine import words as w
from ucxgossip.group import Group
from ucxgossip.mailbox import Mailbox


@dataclass
class Meter:
    """Sums over all rounds of one attached model; seconds, bytes and numbers of rounds."""

    rounds: int = 0
    nbytes: int = 0
    waits: int = 0
    wait_s: float = 0.0
    exchange_s: float = 0.0
    skipped: int = 0
    lateness: dict[int, list[int]] = field(default_factory=dict)

    def posted(self, group: Group, mailbox: Mailbox) -> None:
        """A round of `mailbox` was posted."""
        row = group.engine.table[mailbox.index]
        self.rounds += 1
        if row[w.TO] >= 0:
            self.nbytes += int(row[w.NBYTES])

    def wait(self, group: Group, mailbox: Mailbox, steps_late: int = 0) -> float:
        """Wait for the round of `mailbox`; the squared distance of what was mixed."""
        start = time.perf_counter()
        blocked = group.engine.active(mailbox)
        group.wait(mailbox)
        if blocked:
            self.waits += 1
            self.wait_s += time.perf_counter() - start
        row = group.engine.table[mailbox.index]
        self.exchange_s += (int(row[w.DONE_NS]) - int(row[w.POSTED_NS])) * 1e-9
        self.mixed(int(row[w.FROM]), steps_late)
        return float(group.engine.floats[mailbox.index, w.DISTANCE])

    def mixed(self, sender: int, steps_late: int) -> None:
        """What `sender` put was mixed, `steps_late` own steps after it was due."""
        if sender >= 0:
            entry = self.lateness.setdefault(sender, [0, 0])
            entry[0] += 1
            entry[1] += steps_late

    def staleness(self) -> dict[int, float]:
        """Mean steps late, by rank received from."""
        return {sender: late / count for sender, (count, late) in sorted(self.lateness.items())}
