"""Connections between wardens: what is sealed arrives, and nothing else does."""

import json
import selectors
import socket
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from ucxgossip.members import links
from ucxgossip.members.links import MAX_FRAME, NONCE_BYTES, Incoming, Outgoing, listen
from ucxgossip.members.pulse import ALIVE, GOODBYE, Pulse
from ucxgossip.trust import Seal

SEAL = Seal(b"0123456789abcdef", b"job")
DEADLINE_S = 20.0


def until(condition: Callable[[], object], *steps: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        for step in steps:
            step()
        assert time.monotonic() < deadline, "deadline"


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with listen("127.0.0.1") as made:
        yield made


def accept(listener: socket.socket, rank: int = 1) -> Incoming:
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        assert selector.select(DEADLINE_S)
    return Incoming(SEAL, rank, listener.accept()[0])


@pytest.fixture
def pair(listener: socket.socket) -> Iterator[tuple[Outgoing, Incoming]]:
    """A connection from rank 0 to rank 1."""
    outgoing = Outgoing(SEAL, 0, 1, listener.getsockname())
    incoming = accept(listener)
    yield outgoing, incoming
    outgoing.close()
    incoming.close()


def test_messages_arrive_in_order(pair: tuple[Outgoing, Incoming]) -> None:
    outgoing, incoming = pair
    sent = [{"kind": "n", "number": n, "text": "x" * (n * 5000)} for n in range(60)]
    for message in sent[:30]:
        outgoing.send(message)  # before it is open
    came: list[object] = []
    until(lambda: len(came) > 30, outgoing.step, lambda: came.extend(incoming.step()))
    for message in sent[30:]:
        outgoing.send(message)
    until(lambda: len(came) > 60, outgoing.step, lambda: came.extend(incoming.step()))
    assert came[1:] == sent
    assert came[0] == {"kind": "hello", "rank": 0, "pulse": False}
    assert incoming.sender == 0 and not incoming.lost


def test_a_port_where_nobody_listens_refuses() -> None:
    with listen("127.0.0.1") as listener:
        address = listener.getsockname()
    link = Outgoing(SEAL, 0, 1, address)
    until(lambda: link.lost, link.step)
    assert link.refused
    link.close()


def test_an_end_is_no_refusal_and_goodbye_is_heard(pair: tuple[Outgoing, Incoming]) -> None:
    outgoing, incoming = pair
    until(lambda: outgoing.open, outgoing.step)
    incoming.goodbye()
    until(lambda: outgoing.goodbye, outgoing.step)
    incoming.close()
    until(lambda: outgoing.lost, outgoing.step)
    assert not outgoing.refused


def test_goodbye_is_heard_before_the_reset_behind_it(pair: tuple[Outgoing, Incoming]) -> None:
    outgoing, incoming = pair
    until(lambda: outgoing.open, outgoing.step)
    outgoing.socket.send(b"a pulse that nobody reads")  # so that close() resets the connection
    incoming.goodbye()
    incoming.close()
    until(lambda: outgoing.lost, outgoing.step)
    assert outgoing.goodbye and not outgoing.refused


def test_goodbye_is_heard_that_comes_with_the_nonce(pair: tuple[Outgoing, Incoming]) -> None:
    outgoing, incoming = pair
    incoming.goodbye()
    incoming.close()
    until(lambda: outgoing.lost, outgoing.step)
    assert outgoing.open and outgoing.goodbye


def test_pulses(listener: socket.socket) -> None:
    outgoing = Outgoing(SEAL, 0, 1, listener.getsockname(), pulse=True)
    incoming = accept(listener)
    until(lambda: incoming.sender == 0, outgoing.step, incoming.step)
    pulse = Pulse()
    pulse.add(outgoing.socket.fileno())
    pulse.start()
    until(lambda: incoming.beat == ALIVE, incoming.step)
    pulse.close()
    pulse.close()
    until(lambda: incoming.beat == GOODBYE, incoming.step)
    outgoing.close()
    until(lambda: incoming.lost, incoming.step)
    assert not incoming.forged
    incoming.close()


# --- what is not sealed --------------------------------------------------------------------------


class Stranger:
    """Somebody who connects to rank 1's warden without the token, or with things overheard."""

    def __init__(self, listener: socket.socket) -> None:
        self.socket = socket.create_connection(listener.getsockname(), DEADLINE_S)
        self.incoming = accept(listener)
        self.nonce = b""
        while len(self.nonce) < NONCE_BYTES:
            self.nonce += self.socket.recv(NONCE_BYTES)

    def frame(
        self, message: object, number: int, seal: Seal = SEAL, sender: int = 0, nonce: bytes = b""
    ) -> bytes:
        name = links._name(nonce or self.nonce, sender, 1, number)
        sealed = seal.seal(name, json.dumps(message).encode())
        return struct.pack(">I", len(sealed)) + sealed

    def refused(self, *frames: bytes) -> list[object]:
        for frame in frames:
            self.socket.sendall(frame)
        came: list[object] = []
        until(lambda: self.incoming.lost, lambda: came.extend(self.incoming.step()))
        assert self.incoming.forged
        self.socket.close()
        self.incoming.close()
        return came


HELLO = {"kind": "hello", "rank": 0, "pulse": False}


@pytest.mark.parametrize(
    "junk",
    [
        struct.pack(">I", 0),
        struct.pack(">I", MAX_FRAME + 1),
        struct.pack(">I", 2000) + bytes(2000),
        struct.pack(">I", 40) + bytes(40),
        struct.pack(">I", 34) + bytes(32) + b"{}",
        struct.pack(">I", 34) + bytes(32) + b"[]",
        struct.pack(">I", 33) + bytes(32) + b"\xff",
        struct.pack(">I", 44) + bytes(32) + b'{"rank": {}}',
        b"GET / HTTP/1.1\r\nHost: here\r\n\r\n",
        b"\xff" * 5000,
    ],
    ids=lambda junk: repr(junk[:12]),
)
def test_junk(listener: socket.socket, junk: bytes) -> None:
    assert Stranger(listener).refused(junk) == []


NOT_RANKS = [
    "Infinity",
    "-Infinity",
    "NaN",
    "1e999",
    "0.0",
    "true",
    "null",
    '"0"',
    "-1",
    "[0]",
    '{"rank": 0}',
    "9" * 900,
]


def greeting(text: bytes, tag: bytes = bytes(Seal.BYTES)) -> bytes:
    return struct.pack(">I", len(tag + text)) + tag + text


@pytest.mark.parametrize("value", NOT_RANKS, ids=lambda value: value[:12])
def test_greeting_of_no_rank(listener: socket.socket, value: str) -> None:
    assert Stranger(listener).refused(greeting(f'{{"rank": {value}}}'.encode())) == []


@pytest.mark.parametrize(
    "text",
    [b"[" * 992, b'{"rank":' * 124, b"\xff\xfe[\x00", b"7", b'"rank"', b"null", b'["rank"]', b""],
    ids=lambda text: repr(text[:12]),
)
def test_greeting_that_is_none(listener: socket.socket, text: bytes) -> None:
    assert Stranger(listener).refused(greeting(text)) == []


@pytest.mark.parametrize("value", [True, "0", 0.0, -1])
def test_signed_greeting_of_no_rank(listener: socket.socket, value: Any) -> None:
    stranger = Stranger(listener)
    frame = stranger.frame({**HELLO, "rank": value}, 0, sender=int(value))
    assert stranger.refused(frame) == []


def test_another_token(listener: socket.socket) -> None:
    stranger = Stranger(listener)
    other = Seal(b"another token 16", b"job")
    assert stranger.refused(stranger.frame(HELLO, 0, other)) == []


def test_another_job_of_the_same_token(listener: socket.socket) -> None:
    stranger = Stranger(listener)
    assert stranger.refused(stranger.frame(HELLO, 0, SEAL.of_job(b"yesterday"))) == []


def test_a_frame_of_another_connection(listener: socket.socket) -> None:
    stranger = Stranger(listener)
    assert stranger.refused(stranger.frame(HELLO, 0, nonce=bytes(NONCE_BYTES))) == []


def test_a_frame_said_twice_or_out_of_turn(listener: socket.socket) -> None:
    stranger = Stranger(listener)
    once = stranger.frame({"kind": "n"}, 1)
    assert stranger.refused(stranger.frame(HELLO, 0), once, once) == [HELLO, {"kind": "n"}]
    stranger = Stranger(listener)
    assert stranger.refused(stranger.frame(HELLO, 0), stranger.frame({"kind": "n"}, 2)) == [HELLO]


def test_a_member_that_speaks_for_another(listener: socket.socket) -> None:
    stranger = Stranger(listener)
    assert stranger.refused(stranger.frame({**HELLO, "rank": 2}, 0, sender=0)) == []
    stranger = Stranger(listener)
    says = stranger.frame({"kind": "n"}, 1, sender=2)
    assert stranger.refused(stranger.frame(HELLO, 0), says) == [HELLO]
