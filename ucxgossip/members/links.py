"""Messages between wardens: one TCP connection a direction, sealed frames, nothing that blocks.

Who accepts a connection sends a nonce; every frame that the other side sends is sealed
(`ucxgossip.trust`) under that nonce, both ranks and a running number, so that a frame cannot be
forged, replayed or moved to another connection. The first frame says who connects, and whether the
connection then carries bare pulses in place of frames.

Rejected: UCX's active messages (they are what breaks when a rank dies, and nothing says a process
is gone as plainly as the kernel refusing or resetting a connection); datagrams (no such word).
"""

from __future__ import annotations

import errno
import json
import secrets
import socket
import struct
import sys
import time
from contextlib import suppress
from typing import Any

from ucxgossip.errors import RendezvousError, SignatureError
from ucxgossip.trust import Seal

NONCE_BYTES = 16
MAX_FRAME = 1 << 26
_MAX_GREETING = 1024
_LENGTH = struct.Struct(">I")

Address = tuple[str, int]


def listen(host: str) -> socket.socket:
    """A listening socket on `host`, any port; `RendezvousError` if that is not this host."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.bind((host, 0))
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise RendezvousError(
            f"cannot listen at {host}, where the other ranks were to reach this one: "
            f"{error.strerror}. Set UCXGOSSIP_HOST to an address of this host that they know"
        ) from error
    listener.setblocking(False)
    return listener


def _name(nonce: bytes, sender: int, receiver: int, number: int) -> str:
    return f"link {nonce.hex()} {sender}>{receiver} #{number}"


def _encode(message: dict[str, Any]) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode()


def frame(seal: Seal, nonce: bytes, sender: int, receiver: int, number: int, blob: bytes) -> bytes:
    """The `number`-th message of a connection, as it travels."""
    sealed = seal.seal(_name(nonce, sender, receiver, number), blob)
    return _LENGTH.pack(len(sealed)) + sealed


class Outgoing:
    """A connection that this rank opened to `rank`. Poll `step` when its socket is ready.

    refused: the other host says that nobody listens there. lost: the connection is of no more use.
    goodbye: the other side said that it leaves. pulse: after the first frame it carries pulses.
    """

    def __init__(
        self, seal: Seal, rank: int, to: int, address: Address, pulse: bool = False
    ) -> None:
        self.rank, self.to, self.pulse = rank, to, pulse
        self.refused = self.lost = self.open = self.goodbye = False
        self.since = self.used = time.monotonic()
        self._seal = seal
        self._nonce, self._number = b"", 0
        self._waiting: list[bytes] = [_encode({"kind": "hello", "rank": rank, "pulse": pulse})]
        self._bytes = b""
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.socket = socket.socket(family, socket.SOCK_STREAM)
        self.socket.setblocking(False)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        status = self.socket.connect_ex(address)
        if status not in (0, errno.EINPROGRESS):
            self._fail(status)

    def _fail(self, status: int) -> None:
        self.lost = True
        self.refused = status == errno.ECONNREFUSED and not self.open

    def send(self, message: dict[str, Any]) -> None:
        """Queue a message; it goes out as the connection lets it."""
        self.used = time.monotonic()
        self._waiting.append(_encode(message))
        self._flush()

    @property
    def idle(self) -> bool:
        """Whether the kernel has all that was to be sent."""
        return self.open and not self._bytes and not self._waiting

    @property
    def connected(self) -> bool:
        """Whether the other host has taken the connection, be its process ready for it or not."""
        try:
            self.socket.getpeername()
        except OSError:
            return False
        return True

    @property
    def wants_write(self) -> bool:
        """Whether there is something that the socket did not take yet."""
        return bool(self._bytes) and not self.lost

    def step(self) -> None:
        """Take what has come (the nonce; afterwards only the end), and send what waits.

        A goodbye may come with a reset right behind it: it is read before the error is.
        """
        try:
            found = self.socket.recv(4096)
        except (BlockingIOError, InterruptedError):
            pass
        except OSError as error:
            self._fail(error.errno or errno.EIO)
            return
        else:
            if not found:
                self._fail(errno.ECONNRESET)
                return
            missing = NONCE_BYTES - len(self._nonce)
            self._nonce += found[:missing]
            self.open = len(self._nonce) == NONCE_BYTES
            self.goodbye = self.goodbye or len(found) > missing
        self._flush()

    def _flush(self) -> None:
        if not self.open or self.lost:
            return
        while self._waiting:
            blob = self._waiting.pop(0)
            self._bytes += frame(self._seal, self._nonce, self.rank, self.to, self._number, blob)
            self._number += 1
        try:
            while self._bytes:
                self._bytes = self._bytes[self.socket.send(self._bytes) :]
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._fail(error.errno or errno.EIO)

    def close(self) -> None:
        """Close the socket."""
        self.lost = True
        self.socket.close()


class Incoming:
    """A connection that another rank opened. Poll `step` when its socket is readable.

    sender: who it is, -1 until it has said so. beats: the last pulse word. lost: the connection
    ended, or what came over it was not signed with this job's token (`forged`).
    """

    def __init__(self, seal: Seal, rank: int, accepted: socket.socket) -> None:
        self.rank, self.socket = rank, accepted
        self.sender, self.pulse, self.beat = -1, False, 0
        self.lost = self.forged = False
        self.since = time.monotonic()
        self._seal, self._nonce, self._number = seal, secrets.token_bytes(NONCE_BYTES), 0
        self._bytes = b""
        accepted.setblocking(False)
        accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            accepted.send(self._nonce)
        except OSError:
            self.lost = True

    def step(self) -> list[dict[str, Any]]:
        """What came in: messages; for a pulse connection none, but `beat` is the last word."""
        try:
            found = self.socket.recv(1 << 16)
        except (BlockingIOError, InterruptedError):
            return []
        except OSError:
            self.lost = True
            return []
        if not found:
            self.lost = True
            return []
        self._bytes += found
        messages: list[dict[str, Any]] = []
        while not self.pulse and not self.lost:
            message = self._next()
            if message is None:
                break
            messages.append(message)
        if self.pulse and len(self._bytes) >= 8:
            whole = len(self._bytes) // 8 * 8
            self.beat = int.from_bytes(self._bytes[whole - 8 : whole], sys.byteorder)
            self._bytes = self._bytes[whole:]
        return messages

    def _next(self) -> dict[str, Any] | None:
        if len(self._bytes) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._bytes)
        if not 0 < length <= (MAX_FRAME if self.sender >= 0 else _MAX_GREETING):
            self.lost = self.forged = True
            return None
        end = _LENGTH.size + length
        if len(self._bytes) < end:
            return None
        sealed, self._bytes = self._bytes[_LENGTH.size : end], self._bytes[end:]
        if self.sender < 0:
            return self._greet(sealed)
        name = _name(self._nonce, self.sender, self.rank, self._number)
        return self._open(name, sealed)

    def _greet(self, sealed: bytes) -> dict[str, Any] | None:
        """The first frame names its sender; the seal under that name proves it."""
        try:
            claimed = json.loads(sealed[Seal.BYTES :])["rank"]
        except (ValueError, TypeError, KeyError, RecursionError):
            claimed = None
        if type(claimed) is not int or claimed < 0:
            self.lost = self.forged = True
            return None
        message = self._open(_name(self._nonce, claimed, self.rank, 0), sealed)
        if message is not None:
            self.sender, self.pulse = claimed, bool(message["pulse"])
        return message

    def _open(self, name: str, sealed: bytes) -> dict[str, Any] | None:
        try:
            message: dict[str, Any] = json.loads(self._seal.open(name, sealed))
        except SignatureError:
            self.lost = self.forged = True
            return None
        self._number += 1
        return message

    def goodbye(self) -> None:
        """Tell the other side that this one leaves in peace."""
        with suppress(OSError):
            self.socket.send(b"bye")

    def close(self) -> None:
        """Close the socket."""
        self.lost = True
        self.socket.close()
