"""Channels: one-way edges on which either side may pass over a round.

A round of a mailbox waits for both of its partners. A channel is one sender's and one receiver's:
the sender puts when a slot is free and otherwise goes on, the receiver looks what has come when it
likes. Rejected: rounds with a skip message (a slow sender would hold the slots that faster ones
could use); slots handed out on request (two more latencies a round).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

from ucxgossip import jit
from ucxgossip.buffer import Buffer
from ucxgossip.engine import Post, channel
from ucxgossip.engine import words as w
from ucxgossip.errors import ArgumentError, ExchangeTimeoutError
from ucxgossip.group import Group


class Channel:
    """This rank's puts to `to` and what `sender` puts here; either may be None. Collective.

    nbytes: size of each message. depth: messages that may wait for the receiver.
    """

    def __init__(
        self, group: Group, nbytes: int, to: int | None, sender: int | None, depth: int = 2
    ) -> None:
        for name, rank in (("to", to), ("sender", sender)):
            if rank is not None and (rank == group.rank or not 0 <= rank < group.size):
                raise ArgumentError(
                    f"channel: {name} is {rank!r}; must be None or one of the other "
                    f"{group.size - 1} ranks"
                )
        self.group, self.to, self.sender = group, to, sender
        channel.prepare()
        self.mailbox = group.mailbox(nbytes, depth)
        self.taken = 0
        self._verified = 0
        group.count_taken(self.mailbox, lambda: self.taken)
        self._open()
        if to is not None:
            self._wait(lambda: self._credited(depth - 1), to, "to open its slots", group.timeout)

    def _open(self) -> None:
        """Make the endpoints and hand out the credits of the first messages."""
        ranks = [rank for rank in (self.to, self.sender) if rank is not None]
        self.group.pin(self.mailbox, ranks)
        if self.to is not None:
            self.group.reach(self.to, self.mailbox)
        if self.sender is not None and self.group.reach(self.sender, self.mailbox):
            self._grant()

    def follow(self, to: int | None, sender: int | None) -> None:
        """Begin anew after a change of members: what was not read is lost (`Group.left_behind`)."""
        with self.group.lock:
            self.group.await_steady()
            self.to, self.sender = to, sender
            self.mailbox.round = self.taken = self._verified = self.mailbox.base
            self.mailbox.drop_retired()
        self._open()

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
        return self._credited(self.mailbox.round)

    def _credited(self, number: int) -> bool:
        return self.to is not None and self.mailbox.opened(self.to, number)

    def put(self, source: Buffer) -> None:
        """Put one message; call it only when `free`, and leave the source alone while `busy`."""
        if self.to is None:
            raise ArgumentError("this rank puts nothing into this channel; it has no `to`")
        what = Post(
            source=source.address,
            target=source.address,
            nbytes=source.nbytes,
            to=self.to,
            sender=-1,
            operation=w.COPY,
            source_param=source.param,
        )
        self.group.engine.post(self.mailbox, what)
        self.mailbox.in_flight = (source.owner,)

    @property
    def arrived(self) -> bool:
        """Whether a whole message waits to be read; `IntegrityError` if it is corrupt."""
        if self.sender is None:
            return False
        what = (self.group.engine.words, self.mailbox.index, self.taken, self.mailbox.layout.nbytes)
        if not channel.complete(*what):
            return False
        if self.group.verify and self._verified <= self.taken:
            chunk = int(channel.first_corrupt(*what))
            if chunk >= 0:
                self.group.fail_corrupt(self.mailbox, self.sender, self.taken, chunk)
            self._verified = self.taken + 1
        return True

    def view(self, dtype: Any, count: int, offset: int = 0) -> NDArray[Any]:
        """The oldest message that waits, from byte `offset` on; valid until `release`."""
        layout = self.mailbox.layout
        start = layout.slots + (self.taken % layout.depth) * layout.stride + offset
        return self.mailbox.region.view(dtype, count, start)

    def release(self) -> None:
        """Give the slot of the oldest message back to the sender."""
        if self.sender is None:
            raise ArgumentError("nobody puts into this channel here; it has no `sender`")
        self.taken += 1
        self._grant()

    def _grant(self) -> None:
        """Tell the sender how far it may go."""
        assert self.sender is not None
        self.group.grant(self.mailbox, self.sender, self.taken + self.mailbox.layout.depth)

    def wait_sent(self) -> None:
        """Wait until the last put has left its source, or was broken off."""
        if self.sent:
            self.group.wait(self.mailbox)

    def wait_arrived(self, timeout: float) -> bool:
        """Wait for a message; False if the members change before it comes.

        `ExchangeTimeoutError` after `timeout` seconds, errors of others.
        """
        sender = -1 if self.sender is None else self.sender
        return self._wait(lambda: self.arrived, sender, f"to put message {self.taken}", timeout)

    def _wait(self, condition: Callable[[], bool], rank: int, what: str, timeout: float) -> bool:
        start, epoch = time.monotonic(), self.group.epoch
        while not condition():
            jit.yield_cpu()
            self.group.look_around()
            if self.group.epoch != epoch:
                return False
            waited = time.monotonic() - start
            if waited > timeout:
                raise ExchangeTimeoutError(
                    f"rank {self.group.rank} waited {waited:.1f} s for rank {rank} {what} of "
                    f"mailbox {self.mailbox.index}. Is it alive?",
                    rank,
                    what,
                    waited,
                )
        return True
