"""The thread behind a warden: its sockets, messages to and from other ranks, and who waits for it.

All that wardens do, they do in one thread, which sleeps until a socket is ready, a caller has a
command for it, or a tick is over. Callers in other threads wait until it tells them that something
has changed. `Watch`, `Trial`, `Porter` and `Warden` stand on this, with messages of their own
(`_handlers`); methods under "what layers above bring" are theirs to override or extend.

Rejected: a thread for each connection (all that wardens know would need locks); asyncio (callers
in other threads would have to cross into its loop all the same); layers that hold each other in
place of inheriting (most of their methods would only pass calls on).
"""

from __future__ import annotations

import logging
import os
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from ucxgossip.errors import ExchangeTimeoutError
from ucxgossip.members.agreement import Message
from ucxgossip.members.links import Address, Incoming, Outgoing, listen
from ucxgossip.members.pulse import GOODBYE, Pulse
from ucxgossip.trust import Seal

LINKS = 64
"""Connections for messages that are kept, beside those of pulses."""
TICK = 0.05
_STALL_S = 0.5
_UNUSED_S = 1.0
_SAY_S = 3.0
"""How long a rank that closes goes on trying to say what it has to, where nobody listens."""

log = logging.getLogger("ucxgossip")


class Switchboard:
    """This rank's connections to the others, and the thread that serves them.

    seal: signs all that goes between wardens. expelled: called in the thread, with the reason, when
    this rank is out of the job.
    """

    def __init__(self, rank: int, host: str, seal: Seal, expelled: Callable[[str], None]) -> None:
        self.rank = rank
        self._seal, self._expel_group = seal, expelled
        self._listener = listen(host)
        self.address: Address = self._listener.getsockname()[:2]
        self._contacts: dict[int, Any] = {}
        self._pulse = Pulse()
        self._selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = socket.socketpair()
        for each in (self._wake_read, self._wake_write):
            each.setblocking(False)
        self._commands: deque[Callable[[], None]] = deque()
        self._handlers: dict[str, Callable[[int, Message], None]] = {"hello": lambda *_: None}
        self._links: dict[int, Outgoing] = {}
        self._changed = threading.Condition()
        self._stop = False
        self._over = False
        self._thread = threading.Thread(target=self._run, name="ucxgossip-warden", daemon=True)

    # --- what layers above bring ---------------------------------------------------------------

    def _look(self, now: float) -> None:
        """Each turn of the thread, after what has come was dealt with."""

    def _held_up(self, now: float) -> None:
        """The thread could not run for a while; what it missed is not the others' fault."""

    def _judge(self, rank: int, refused: bool) -> None:
        """A connection to `rank` was lost. refused: its host says that nobody listens there."""

    def _felt(self, rank: int) -> None:
        """A pulse of `rank` came in."""

    def _felt_last(self, rank: int, goodbye: bool) -> None:
        """There will be no more of them on this connection. goodbye: `rank` said so."""

    def _on_other(self, sender: int, message: Message) -> None:
        """A message of a kind that is not in `_handlers`."""

    # --- what the group calls, in its own threads ----------------------------------------------

    @property
    def over(self) -> bool:
        """Whether the job has ended for this rank."""
        return self._over

    def _do(self, command: Callable[[], None]) -> None:
        """Have the thread run `command`."""
        self._commands.append(command)
        with suppress(OSError):
            self._wake_write.send(b"x")

    def _wait(
        self,
        found: Callable[[], Any],
        given_up: Callable[[], bool],
        timeout: float,
        rank: int,
        what: str,
    ) -> Any:
        """What `found` gives once it is not None; None once `given_up`."""
        start = time.monotonic()
        with self._changed:
            while True:
                value = found()
                if value is not None:
                    return value
                if given_up() or self._stop or self._over:
                    return None
                left = start + timeout - time.monotonic()
                if left <= 0:
                    waited = time.monotonic() - start
                    raise ExchangeTimeoutError(
                        f"rank {self.rank} waited {waited:.1f} s for rank {rank} {what}. Is it "
                        "alive?",
                        rank,
                        what,
                        waited,
                    )
                self._changed.wait(min(left, 1.0))

    def close(self) -> None:
        """Say goodbye and end the thread. Further calls do nothing."""
        if self._stop:
            return
        if self._thread.ident is not None:
            self._do(self._on_stop)
            if self._thread is not threading.current_thread():
                self._thread.join()
        self._stop = True
        self._pulse.close()
        for link in self._every_link():
            link.close()
        for key in list(self._selector.get_map().values()):
            if isinstance(key.data, Incoming):
                key.data.goodbye()
                key.data.close()
        self._selector.close()
        for each in (self._listener, self._wake_read, self._wake_write):
            each.close()

    def _on_stop(self) -> None:
        self._stop = True
        self._notify()
        deadline = time.monotonic() + _SAY_S  # what is still to be said, an abort for one
        while not all(link.idle for link in self._links.values()):
            self._poll(TICK)
            if time.monotonic() > deadline:
                break

    def _every_link(self) -> list[Outgoing]:
        return [*self._links.values()]

    def disown(self) -> None:
        """In a forked child: keep no connection open, which would tell others that this rank lives.

        The parent's are not touched by it.
        """
        self._stop = True
        descriptors = [link.socket.fileno() for link in self._every_link()]
        with suppress(Exception):
            descriptors += [key.fd for key in self._selector.get_map().values()]
        for descriptor in {fd for fd in descriptors if fd >= 0}:
            with suppress(OSError):
                os.close(descriptor)

    # --- the thread ----------------------------------------------------------------------------

    def _begin(self) -> None:
        """From now on others can connect, and commands find the thread once it runs."""
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._selector.register(self._wake_read, selectors.EVENT_READ, self._woken)

    def _run(self) -> None:
        try:
            self._keep_watch()
        except BaseException as error:  # nobody may wait for a thread that is gone
            self._expel(f"rank {self.rank} can watch over the others no longer: {error!r}")
            raise

    def _keep_watch(self) -> None:
        before = time.monotonic()
        while not self._stop:
            self._poll(TICK)
            now = time.monotonic()
            if now - before > _STALL_S:  # it was this process that was held up
                self._held_up(now)
            before = now
            while self._commands:
                self._commands.popleft()()
            self._look(now)
            if len(self._links) > LINKS:
                self._close_unused(now)

    def _poll(self, timeout: float) -> None:
        for key, _ in self._selector.select(timeout):
            self._dispatch(key.data)

    def _dispatch(self, ready: Incoming | Outgoing | Callable[[], None]) -> None:
        if isinstance(ready, Incoming):
            self._read(ready)
        elif not isinstance(ready, Outgoing):
            ready()
        elif not ready.lost:  # what was ready before it may have led to its end
            self._step(ready)

    def _woken(self) -> None:
        with suppress(BlockingIOError):
            self._wake_read.recv(4096)

    def _accept(self) -> None:
        with suppress(OSError):
            accepted, _ = self._listener.accept()
            link = Incoming(self._seal, self.rank, accepted)
            self._selector.register(accepted, selectors.EVENT_READ, link)

    def _read(self, link: Incoming) -> None:
        for message in link.step():
            self._receive(link.sender, message)
        if link.pulse and not link.lost:
            self._felt(link.sender)
        if link.lost:
            self._selector.unregister(link.socket)
            link.close()
            if link.forged:
                log.warning("rank %d refused a connection without the job's token", self.rank)
            elif link.pulse:
                self._felt_last(link.sender, goodbye=link.beat == GOODBYE)

    def _receive(self, sender: int, message: Message) -> None:
        self._handlers.get(str(message["kind"]), self._on_other)(sender, message)

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _expel(self, reason: str) -> None:
        self._expel_group(reason)
        self._end()

    def _end(self) -> None:
        """The job is over for this rank: nobody waits any longer."""
        with self._changed:
            self._over = True
            self._changed.notify_all()

    # --- connections to others -----------------------------------------------------------------

    def _connect(
        self, rank: int, pulse: bool = False, address: Sequence[Any] | None = None
    ) -> Outgoing:
        host, port = self._contacts[rank] if address is None else address
        link = Outgoing(self._seal, self.rank, rank, (host, port), pulse)
        if not link.lost:
            events = selectors.EVENT_READ | selectors.EVENT_WRITE
            self._selector.register(link.socket, events, link)
        return link

    def _drop(self, link: Outgoing) -> None:
        with suppress(KeyError, ValueError):
            self._selector.unregister(link.socket)
        self._pulse.remove(link.socket.fileno())
        link.close()

    def _step(self, link: Outgoing) -> None:
        was_open = link.open
        link.step()
        if link.lost:
            self._lost(link)
            return
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if link.wants_write else 0)
        self._selector.modify(link.socket, events, link)
        if link.pulse and link.open and not was_open:
            self._pulse.add(link.socket.fileno())

    def _lost(self, link: Outgoing) -> None:
        """`link` is of no more use. Whoever keeps links of its own looks for it there as well."""
        self._drop(link)
        if self._links.get(link.to) is link:
            del self._links[link.to]
            if not link.goodbye:
                self._judge(link.to, link.refused)

    def _send(self, rank: int, message: Message) -> None:
        link = self._links.get(rank)
        if link is None:
            if rank not in self._contacts:
                return
            link = self._links[rank] = self._connect(rank)
        link.send(message)
        if link.lost:
            self._lost(link)
        elif link.wants_write:
            events = selectors.EVENT_READ | selectors.EVENT_WRITE
            self._selector.modify(link.socket, events, link)

    def _close_unused(self, now: float) -> None:
        """Close links beyond LINKS, the least recently used first; they are made again at need."""
        for link in sorted(self._links.values(), key=lambda link: link.used):
            if len(self._links) > LINKS and link.idle and now - link.used > _UNUSED_S:
                del self._links[link.to]
                self._drop(link)
