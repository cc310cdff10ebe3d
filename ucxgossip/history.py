"""What the ranks of a job have agreed on once and for all, for ranks that come in later.

A rank that joins a running job runs the same script from its start. What the others settled long
ago, each once in the life of the group (the model they train, the mailboxes, the names in the
optimizer's state), it takes over by name instead of meeting them for it. Rejected: repeating the
calls in the order of the members (a rank joins in the middle, and its own order may differ).
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ucxgossip.errors import RendezvousError

SPARE = ""
"""The name of a mailbox that was given back."""


@dataclass
class History:
    """agreed: facts by name, None for what is over. shared: what was merged, by name.

    mailboxes: (name, bytes, depth, ring, chunk), by index. door: when guests come in
    (`ucxgossip.members.Door`).
    """

    agreed: dict[str, Any] = field(default_factory=dict)
    shared: dict[str, bytes] = field(default_factory=dict)
    mailboxes: list[tuple[str, int, int, bool, int]] = field(default_factory=list)
    door: str = ""

    def dump(self) -> bytes:
        """As one blob."""
        shared = {name: base64.b64encode(blob).decode() for name, blob in self.shared.items()}
        return json.dumps([self.agreed, shared, self.mailboxes, self.door]).encode()

    @classmethod
    def parse(cls, blob: bytes, rank: int) -> History:
        """Out of what `rank` sent; `RendezvousError` for anything else."""
        try:
            agreed, shared, mailboxes, door = json.loads(blob)
            return cls(
                dict(agreed),
                {str(name): base64.b64decode(text) for name, text in shared.items()},
                [(str(name), int(n), int(d), bool(r), int(c)) for name, n, d, r, c in mailboxes],
                str(door),
            )
        except (ValueError, TypeError, AttributeError) as error:
            raise RendezvousError(
                f"rank {rank} told a history that this rank does not understand ({error}); do all "
                "have the same ucxgossip?"
            ) from None

    def news(self, known: History) -> set[str]:
        """Names of agreements and merges that `known` does not have."""
        return {*self.agreed, *self.shared} - {*known.agreed, *known.shared}


def plain(facts: Mapping[str, object]) -> Any:
    """Facts as JSON gives them back."""
    return json.loads(json.dumps(facts))
