"""The mailboxes that the rounds of one stream take in turn: step n goes by number ``n % count``.

A mailbox has one round at a time. Where a round ends late, the next one goes by another mailbox, so
that posting it waits for none: `Stale`'s rounds end when they can, and on a device the mixes of a
held round end behind a whole backward.

Rejected: two rounds at a time in one mailbox (each of its words would be there twice, and every
reader would have to know of which round it asks); a queue of posts that the engine takes up when a
round ends (the books of the ended one must be kept aside until somebody has read them).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ucxgossip.group import Group
from ucxgossip.mailbox import Mailbox


class Lanes:
    """`mailboxes` of `group`, in the order in which steps take them. what: they carry."""

    def __init__(self, group: Group, mailboxes: Sequence[Mailbox], what: str = "") -> None:
        self.group, self.mailboxes = group, list(mailboxes)
        for mailbox in mailboxes:
            mailbox.what = what

    @classmethod
    def sharing(cls, group: Group, nbytes: int, count: int, what: str = "") -> Lanes:
        """`count` new mailboxes for payloads of `nbytes`, with the slots of one among them."""
        if count == 1:
            return cls(group, [group.mailbox(nbytes)], what)
        depth = max(1, group.usual_depth(nbytes) // count)
        return cls(group, [group.mailbox(nbytes, depth) for _ in range(count)], what)

    def __len__(self) -> int:
        return len(self.mailboxes)

    def at(self, step: int) -> Mailbox:
        """The mailbox of `step`."""
        return self.mailboxes[step % len(self)]

    def oldest_first(self, step: int) -> list[Mailbox]:
        """All of them: that of `step`, which was used `len` steps before it, comes first."""
        return [self.at(step + later) for later in range(len(self))]

    def restart(self) -> None:
        """As `Group.restart`, for each."""
        for mailbox in self.mailboxes:
            self.group.restart(mailbox)

    def place(self, step: int) -> dict[str, Any]:
        """Where a stream is whose next round is that of `step`, for `enter` on other ranks."""
        return {"position": step, "rounds": [mailbox.round for mailbox in self.mailboxes]}

    def enter(self, place: dict[str, Any], step: int) -> None:
        """Go on from `step` with others, who were at `place` before."""
        then, now = (self._firsts(each) for each in (int(place["position"]), step))
        for mailbox, old, new, number in zip(
            self.mailboxes, then, now, place["rounds"], strict=True
        ):
            mailbox.round = int(number) + (new - old) // len(self)

    def _firsts(self, step: int) -> list[int]:
        """By mailbox, the first of its steps from `step` on."""
        return [step + (index - step) % len(self) for index in range(len(self))]

    def give_back(self) -> None:
        """As `Group.give_back`, for each."""
        for mailbox in self.mailboxes:
            self.group.give_back(mailbox)
