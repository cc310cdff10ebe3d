"""Channels: one-way edges on which either side may pass over a round.

A round of a mailbox waits for both of its partners. A channel is one sender's and one receiver's:
the sender puts when a slot is free and otherwise goes on, the receiver looks what has come when it
likes. Rejected: rounds with a skip message (a slow sender would hold the slots that faster ones
could use); slots handed out on request (two more latencies a round).
"""

from __future__ import annotations

import time
from typing import Any

from numpy.typing import NDArray

from ucxgossip import jit
from ucxgossip.buffer import Buffer
from ucxgossip.engine import Post, channel
from ucxgossip.engine import words as w
from ucxgossip.errors import ArgumentError, ExchangeTimeoutError
from ucxgossip.group import Group
from ucxgossip.mailbox import CREDIT_WINDOW


class Channel:
    """This rank's puts to `to` and what `sender` puts here; either may be None. Collective.

    nbytes: size of each message. depth: messages that may wait for the receiver.
    """

    def __init__(
        self, group: Group, nbytes: int, to: int | None, sender: int | None, depth: int = 2
    ) -> None:
        self.group, self.to, self.sender = group, to, sender
        channel.prepare()
        self.mailbox = group.mailbox(nbytes, depth)
        self.taken = 0

    @property
    def sent(self) -> int:
        """Messages put so far."""
        return self.mailbox.round

    @property
    def busy(self) -> bool:
        """Whether the last put may still read its source; `UCXError` if it failed."""
        state = int(self.group.engine.table[self.mailbox.index, w.STATE])
        if state == w.FAILED:
            self.group.wait(self.mailbox)  # which raises what went wrong
        return state == w.ACTIVE

    @property
    def free(self) -> bool:
        """Whether a put would find its slot free now."""
        if self.to is None or self.busy:
            return False
        number, depth = self.mailbox.round, self.mailbox.layout.depth
        credit = int(self.mailbox.credits[number & (CREDIT_WINDOW - 1)])
        return number < depth or credit == number + 1

    def put(self, source: Buffer) -> None:
        """Put one message; call it only when `free`, and leave the source alone while `busy`."""
        if self.to is None:
            raise ArgumentError("this rank puts nothing into this channel; it has no `to`")
        self.group.reach(self.to, self.mailbox)
        what = Post(
            source=source.address,
            target=source.address,
            nbytes=source.nbytes,
            to=self.to,
            sender=-1,
            operation=w.COPY,
            source_param=source.param,
            need_credit=int(self.sent >= self.mailbox.layout.depth),
        )
        self.group.engine.post(self.mailbox, what)
        self.mailbox.in_flight = (source.owner,)

    @property
    def arrived(self) -> bool:
        """Whether a whole message waits to be read."""
        if self.sender is None:
            return False
        nbytes = self.mailbox.layout.nbytes
        return bool(
            channel.complete(self.group.engine.words, self.mailbox.index, self.taken, nbytes)
        )

    def view(self, dtype: Any, count: int, offset: int = 0) -> NDArray[Any]:
        """The oldest message that waits, from byte `offset` on; valid until `release`."""
        layout = self.mailbox.layout
        start = layout.slots + (self.taken % layout.depth) * layout.stride + offset
        return self.mailbox.region.view(dtype, count, start)

    def release(self) -> None:
        """Give the slot of the oldest message back to the sender."""
        if self.sender is None:
            raise ArgumentError("nobody puts into this channel here; it has no `sender`")
        self.group.reach(self.sender, self.mailbox)
        following = self.taken + self.mailbox.layout.depth
        self.taken += 1
        self.group.grant(self.mailbox, self.sender, following)

    def wait_sent(self) -> None:
        """Wait until the last put has left its source."""
        if self.sent:
            self.group.wait(self.mailbox)

    def wait_arrived(self, timeout: float) -> None:
        """Wait for a message; `ExchangeTimeoutError` after `timeout` seconds, errors of others."""
        start = time.monotonic()
        while not self.arrived:
            jit.yield_cpu()
            self.group.look_around()
            now = time.monotonic()
            if now - start > timeout:
                raise ExchangeTimeoutError(
                    f"rank {self.group.rank} waited {now - start:.1f} s for rank {self.sender} to "
                    f"put message {self.taken} of mailbox {self.mailbox.index}. Is it alive?",
                    -1 if self.sender is None else self.sender,
                    f"to put message {self.taken}",
                    now - start,
                )
