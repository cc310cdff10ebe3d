"""Hostile bytes against all that reads what others wrote: at the store, at wardens' ports, by UCX.

Each input is random, or something valid with a part of it changed. Whatever comes must be taken
for what it is or refused by a named error, and change nothing beside its own place: the messages'
memory lies between guard bytes, and what the handlers counted is compared with what NumPy finds.
A crash ends the process, which says so by its exit status; the seed makes it happen again.

No UCX takes part: libucp reads nothing that was not signed (docs/security.md), and what it would
do with hostile bytes is not ours to test.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import random
import struct
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ucxgossip import greeting, jit
from ucxgossip.bench.arguments import file_to_write
from ucxgossip.bench.environment import environment
from ucxgossip.bench.table import Column, Table, write_json
from ucxgossip.board import Board
from ucxgossip.engine import arrival, handlers
from ucxgossip.engine import words as w
from ucxgossip.errors import ArgumentError, BenchError, GossipError
from ucxgossip.mailbox import MAX_POSITION, Layout, parse_description
from ucxgossip.members.links import Incoming, frame
from ucxgossip.rendezvous import Rendezvous
from ucxgossip.store import Solitary
from ucxgossip.trust import Seal

COLUMNS = (
    Column("target", "target", width=12),
    Column("inputs", "inputs", "", "d"),
    Column("taken", "taken", "", "d"),
    Column("refused", "refused", "", "d"),
    Column("faults", "faults", "", "d"),
    Column("seconds", "time", "s", ".1f"),
)
_TOKEN = "the token of the fuzzed job"
_GUARD = 4096
_GUARD_BYTE = 0xA5
_EPOCH = 3
_RANKS = 5
_LAYOUTS = (
    Layout(200, 3, 64),
    Layout(64, 1, 64),
    Layout(5000, 2, 1024),
    Layout(5000, 2, 1024, ring=True),
)
_BATCH = 20_000

Count = tuple[int, int, int]
"""Inputs taken, refused, and those that did neither properly."""


def mutate(valid: bytes, draw: random.Random) -> bytes:
    """`valid` with something changed, or (one in eight) bytes that have nothing to do with it."""
    changed = bytearray(valid)
    kind = draw.randrange(8)
    place = draw.randrange(len(valid) + 1)
    if kind == 0:
        return draw.randbytes(draw.choice((0, 1, 3, 4, 31, 32, 35, 36, 37, 100, 4096)))
    if kind == 1:
        return valid[:place]
    if kind == 2:
        return valid + draw.randbytes(draw.randrange(1, 64))
    if kind == 3:
        return valid[:place] + draw.randbytes(draw.randrange(1, 9)) + valid[place:]
    if kind == 4:
        return valid[place:] + valid[:place]
    if kind == 5 and len(valid) >= 8:
        start = draw.randrange(len(valid) - 7)
        extreme = draw.choice((0, 1, 0xFF, 1 << 31, (1 << 63) - 1, 1 << 63, (1 << 64) - 1))
        changed[start : start + 8] = extreme.to_bytes(8, "little")
        return bytes(changed)
    for _ in range(draw.choice((1, 1, 1, 2, 8))):
        if changed:
            changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _tried(call: Callable[[], object], told: Callable[[str], None]) -> int:
    """0 where `call` took its input, 1 where it refused it by name, 2 for anything else."""
    try:
        call()
    except GossipError:
        return 1
    except Exception as error:
        told(f"{type(error).__name__}: {error}")
        return 2
    return 0


# --- what is read from the store ---------------------------------------------------------------


def seals(inputs: int, draw: random.Random, told: Callable[[str], None]) -> Count:
    """`Seal.open`: takes a changed blob only if it was not changed."""
    seal = Seal(_TOKEN.encode(), b"job")
    ends = [0, 0, 0]
    for _ in range(inputs):
        sealed = seal.seal("name", draw.randbytes(draw.randrange(80)))
        given = mutate(sealed, draw)
        end = _tried(lambda given=given: seal.open("name", given), told)  # type: ignore[misc]
        if end == 0 and given != sealed:
            told("a changed blob was taken")
            end = 2
        ends[end] += 1
    return ends[0], ends[1], ends[2]


class _Notes:
    """A job of two as rank `rank` finds it, whose other rank wrote all that it should, but one."""

    def __init__(self, rank: int) -> None:
        self.store = Solitary()
        self.meeting = Rendezvous(self.store, rank, 2, 0.01, _TOKEN)
        self.other = Board(self.store, 1 - rank, 2, 0.01, Seal(_TOKEN.encode()))
        self.board = self.meeting.board
        self.job = self.board.seal.of_job(bytes(16))
        self.challenge = bytes(range(16))

    def check(self, name: str, spoil: Callable[[bytes], bytes], signed: bool) -> None:
        """Read the note of `name` after `spoil` has had it: before (signed) or after its seal."""
        key, seal, blob, read = self._cases()[name]
        if signed:
            self.other.write(seal, key, spoil(blob))
        else:
            self.other.write(seal, key, blob)
            self.store.set(key, spoil(self.store.get(key)))
        read()

    def _cases(self) -> dict[str, tuple[str, Seal, bytes, Callable[[], object]]]:
        board, meeting = self.board, self.meeting
        meeting._seal = self.job
        greeted = json.dumps([2, self.challenge.hex()]).encode()
        answer = bytes(16) + self.challenge * 2
        return {
            "arrival": (
                board.key("arrival", 1),
                board.seal,
                greeted,
                lambda: greeting._read(board, 1),
            ),
            "job": (
                board.key("job"),
                board.seal,
                answer,
                lambda: greeting._guest(board, 1, self.challenge),
            ),
            "aborted": (
                board.key("aborted"),
                board.seal,
                b'["left", "reason"]',
                board.raise_if_aborted,
            ),
            "worker": (
                board.key("worker", 1 - board.rank),
                self.job,
                b"address",
                lambda: meeting.collect("worker", 1 - board.rank),
            ),
            "facts": (
                board.key("join#0", "facts", 0),
                self.job,
                b'[{"protocol": 2, "parameters": {"weight": [[3, 4], "f4"]}}]',
                lambda: self._agree(b'[""]', "result"),
            ),
            "result": (
                board.key("join#0", "result"),
                self.job,
                b'[""]',
                lambda: self._agree(b"[{}]", "facts", 0),
            ),
        }

    def _agree(self, blob: bytes, *rest: object) -> None:
        """Agree, where the note at `rest` of the meeting is as it should be."""
        self.other.write(self.job, self.board.key("join#0", *rest), blob)
        self.meeting.agree("join", {})


def notes(inputs: int, draw: random.Random, told: Callable[[str], None]) -> Count:
    """Greetings, answers, farewells, blobs, facts and verdicts, as `Rendezvous` reads them."""
    ends = [0, 0, 0]
    names = ("arrival", "job", "aborted", "worker", "facts", "result")
    for _ in range(inputs):
        name = draw.choice(names)
        case = _Notes(0 if name == "arrival" else 1)
        signed = draw.random() < 0.3  # by a rank of another release, say
        call = lambda: case.check(name, lambda note: mutate(note, draw), signed)  # noqa: B023, E731
        ends[_tried(call, lambda said: told(f"{name}: {said}"))] += 1  # noqa: B023
    return ends[0], ends[1], ends[2]


def mailboxes(inputs: int, draw: random.Random, told: Callable[[str], None]) -> Count:
    """`parse_description`: what another rank says of its mailbox, were it signed."""
    ends = [0, 0, 0]
    for _ in range(inputs):
        layout = draw.choice(_LAYOUTS)
        address = draw.randrange(1 << 12, 1 << 47)
        valid = address.to_bytes(8, "little") + layout.total.to_bytes(8, "little") + bytes(40)
        given = mutate(valid, draw)

        def call(given: bytes = given, layout: Layout = layout) -> None:
            found, key = parse_description(given, layout, 1)
            if not (found > 0 and found + layout.total < 1 << 63 and key):
                raise ValueError("taken, and out of bounds")

        ends[_tried(call, told)] += 1
    return ends[0], ends[1], ends[2]


# --- what wardens hear -------------------------------------------------------------------------


class _Wire:
    """In place of an accepted socket: gives `pieces`, one a call, and takes what is sent."""

    def __init__(self) -> None:
        self.pieces = deque[bytes]()
        self.sent = b""

    def setblocking(self, _: bool) -> None: ...

    def setsockopt(self, *_: int) -> None: ...

    def close(self) -> None: ...

    def send(self, data: bytes) -> int:
        self.sent += data
        return len(data)

    def recv(self, _: int) -> bytes:
        return self.pieces.popleft() if self.pieces else b""


_RANKLESS = (
    b'Infinity -Infinity NaN 1e999 -1 0.5 -0 true null 99999999999999999999 {} [] [[ "0" 0'
).split()


def _greeting(draw: random.Random) -> bytes:
    """JSON, more or less, as only somebody without the token would greet."""
    kind = draw.randrange(4)
    if kind == 0:
        return b"".join(draw.choices((b"[", b'{"rank":', b"{"), k=draw.randrange(1, 120)))
    if kind == 1:
        longest = 1024 - Seal.BYTES
        return draw.choice((b"[", b"9", b'"', b"\xff")) * draw.choice((draw.randrange(99), longest))
    text = b'{"rank":%b,"pulse":%b}' % tuple(draw.choices(_RANKLESS, k=2))
    return text if kind == 2 else text.decode().encode(draw.choice(("utf-16", "utf-32")))


def wardens(inputs: int, draw: random.Random, told: Callable[[str], None]) -> Count:
    """`Incoming`, as whoever reaches a warden's port may feed it: nothing unsealed gets through.

    Counted as taken: connections of which every message came through.
    """
    ends, seal = [0, 0, 0], Seal(_TOKEN.encode(), b"job")
    for _ in range(inputs):
        wire = _Wire()
        link = Incoming(seal, 1, wire)  # type: ignore[arg-type]
        pulse = draw.random() < 0.3
        sent: list[dict[str, Any]] = [{"kind": "hello", "rank": 0, "pulse": pulse}]
        if not pulse:
            sent += [{"kind": "n", "n": n} for n in range(draw.randrange(4))]
        given = b"".join(
            frame(seal, wire.sent, 0, 1, number, json.dumps(each).encode())
            for number, each in enumerate(sent)
        )
        if draw.random() < 0.3:
            forged = draw.randbytes(Seal.BYTES) + _greeting(draw)
            given = struct.pack(">I", len(forged)) + forged + given
        else:
            given = mutate(given + bytes(8 * pulse * draw.randrange(4)), draw)
        while given:
            cut = draw.randrange(1, len(given) + 1)
            wire.pieces.append(given[:cut])
            given = given[cut:]
        found: list[dict[str, Any]] = []

        def hear(link: Incoming = link, found: list[dict[str, Any]] = found) -> None:
            while not link.lost:
                found.extend(link.step())

        end = _tried(hear, told)
        if end == 0 and found != sent[: len(found)]:
            told(f"{found} came of {sent}")
            end = 2
        ends[end or len(found) < len(sent)] += 1
    return ends[0], ends[1], ends[2]


# --- what the wire brings ----------------------------------------------------------------------


class Arena:
    """The memory that handlers touch, between guard bytes: no engine, and no UCX."""

    def __init__(self) -> None:
        self.raw = np.full(1 << 20, _GUARD_BYTE, np.uint8)
        self._used = np.zeros(len(self.raw), bool)
        self._next = _GUARD - self.raw.ctypes.data % 64
        self.words = self._carve(8 * w.ENGINE_WORDS).view(np.int64)
        self.table = self._carve(8 * w.MAILBOX_WORDS * len(_LAYOUTS)).view(np.int64)
        self.table = self.table.reshape(len(_LAYOUTS), w.MAILBOX_WORDS)
        self.credits, self.signals, self.slots = [], [], []
        for row, layout in zip(self.table, _LAYOUTS, strict=True):
            credits = self._carve(8 * _RANKS).view(np.int64)
            signals = self._carve(8 * layout.places).view(np.int64)
            slots = [self._carve(layout.slot_bytes) for _ in range(layout.depth)]
            stride = slots[-1].ctypes.data - slots[-2].ctypes.data if layout.depth > 1 else 0
            row[w.SLOTS], row[w.STRIDE] = slots[0].ctypes.data, stride
            row[w.SIGNALS], row[w.CREDITS] = signals.ctypes.data, credits.ctypes.data
            row[w.PLACES], row[w.PER_SLOT] = layout.places, layout.per_slot
            row[w.CHUNK] = layout.chunk
            row[w.CHUNKS], row[w.CAPACITY] = layout.chunks, layout.nbytes
            row[w.TO], row[w.UNANSWERED] = -1, 1  # nobody was asked for the answers that come
            self.credits.append(credits)
            self.signals.append(signals)
            self.slots.append(slots)
        self.words[w.TABLE] = self.table.ctypes.data
        self.words[w.MAILBOXES] = len(_LAYOUTS)
        self.words[w.ENDPOINTS] = self._carve(8 * _RANKS).ctypes.data  # to nobody: no answer goes
        self.words[w.EPOCH], self.words[w.RANKS] = _EPOCH, _RANKS
        self._fixed = self._unchanging()

    def _carve(self, nbytes: int) -> NDArray[np.uint8]:
        start, self._next = self._next, self._next + -(-nbytes // 64) * 64 + _GUARD
        self._used[start : start + nbytes] = True
        self.raw[start : start + nbytes] = 0
        return self.raw[start : start + nbytes]

    def _unchanging(self) -> bytes:
        """The table, and the engine's words that no message may change."""
        words = self.words.copy()
        words[w.MALFORMED] = words[w.ASKED] = 0
        words[w.UNSEEN : w.ENGINE_WORDS] = 0
        return self.table.tobytes() + words.tobytes()

    def fault(self) -> str:
        """What was changed that no message may change, in words; empty if nothing was."""
        if not (self.raw[~self._used] == _GUARD_BYTE).all():
            return "a guard byte was overwritten"
        if self._unchanging() != self._fixed:
            return "a word of the engine or of a mailbox was overwritten"
        if not 0 <= self.words[w.UNSEEN] <= w.UNSEEN_MAX:
            return f"{self.words[w.UNSEEN]} bells are noted"
        for credits, signals in zip(self.credits, self.signals, strict=True):
            if not ((credits >= 0) & (credits <= MAX_POSITION)).all():
                return "a credit is out of range"
            if not (signals[signals != 0] >> 48 == _EPOCH).all():
                return "a signal of another epoch was raised"
        return ""


@jit.njit
def _storm(
    engine: int, idents: Any, headers: Any, sizes: Any, header: int, payload: int, lengths: Any
) -> None:
    """Hand message after message to its handler, as UCX does; `header`, `payload`: addresses."""
    for i in range(len(idents)):
        jit.copy_memory(header, headers + w.CHECKED_HEADER_BYTES * i, sizes[i])
        if idents[i] == w.AM_DATA:
            arrival.on_data(engine, header, sizes[i], payload, lengths[i], 0)
        elif idents[i] == w.AM_CREDIT:
            handlers.on_credit(engine, header, sizes[i], payload, lengths[i], 0)
        elif idents[i] == w.AM_TAKEN:
            handlers.on_taken(engine, header, sizes[i], payload, lengths[i], 0)
        else:
            handlers.on_bell(engine, header, sizes[i], payload, lengths[i], 0)
        if i % 1000 == 0:
            handlers.all_seen(jit.view_words(engine, w.ENGINE_WORDS))


_EDGES = np.array(
    [0, 1, -1, 2, 3, 4, 5, 1 << 31, 1 << 32, MAX_POSITION - 1, MAX_POSITION, 1 << 48, 1 << 62]
    + [-(1 << 63), (1 << 63) - 1],
    np.int64,
)


def _headers(count: int, draw: np.random.Generator) -> NDArray[np.int64]:
    """Headers of seven words: valid ones, of which most have fields replaced."""
    index = draw.integers(0, len(_LAYOUTS), count)
    chunks = np.array([layout.chunks for layout in _LAYOUTS])[index]
    number = draw.integers(0, 1 << draw.integers(1, 47, count))
    fields = [index, number, draw.integers(0, chunks), np.full(count, _EPOCH)]
    rank = draw.integers(0, _RANKS, count) | (w.ASKS * draw.integers(0, 2, count))
    fields += [rank, number // 2, index]
    headers = np.stack(fields, axis=1).astype(np.int64)
    junk = draw.integers(-(1 << 63), (1 << 63) - 1, headers.shape, endpoint=True)
    edges = draw.choice(_EDGES, headers.shape)
    flips = headers ^ (1 << draw.integers(0, 63, headers.shape))
    which = draw.integers(0, 56, headers.shape)  # most fields stay
    for kind, values in enumerate((junk, edges, flips)):
        headers = np.where(which == kind, values, headers)
    return np.ascontiguousarray(headers)


def messages(inputs: int, draw: random.Random, told: Callable[[str], None]) -> Count:
    """The handlers: what fits is taken, all else counted and dropped."""
    arena, numbers = Arena(), np.random.default_rng(draw.randrange(1 << 32))
    taken = faults = 0
    longest = max(layout.nbytes for layout in _LAYOUTS) + 4096
    payload = numbers.integers(0, 256, longest, np.uint8)
    place = np.zeros(64, np.uint8)  # UCX promises no alignment of a header
    for start in range(0, inputs, _BATCH):
        count = min(_BATCH, inputs - start)
        headers = _headers(count, numbers)
        sizes = np.where(
            numbers.random(count) < 0.9,
            w.HEADER_BYTES,
            numbers.integers(0, w.CHECKED_HEADER_BYTES + 1, count),
        )
        idents = numbers.integers(0, 4, count)
        lengths = numbers.integers(0, 1 << numbers.integers(1, 14, count))
        lengths = np.minimum(lengths, longest)
        fits = _fitting(headers, sizes, idents, lengths)
        before = int(arena.words[w.MALFORMED])
        _storm(
            arena.words.ctypes.data,
            idents,
            headers.ctypes.data,
            sizes,
            place.ctypes.data + 1 + start % 7,
            payload.ctypes.data,
            lengths,
        )
        refused = int(arena.words[w.MALFORMED]) - before
        fault = arena.fault()
        if refused != count - int(fits.sum()):
            fault = fault or f"{refused} refused of {count}; {count - int(fits.sum())} do not fit"
        if fault:
            told(fault)
            return taken, start + count - taken - 1, faults + 1
        taken += count - refused
    return taken, inputs - taken - faults, faults


def _fitting(
    headers: NDArray[np.int64],
    sizes: NDArray[np.int64],
    idents: NDArray[np.int64],
    lengths: NDArray[np.int64],
) -> NDArray[np.bool_]:
    """Which messages are to be taken, by the protocol and not by the handlers' code."""
    known = (sizes == w.HEADER_BYTES) & (headers[:, 0] >= 0) & (headers[:, 0] < len(_LAYOUTS))
    index = np.where(known, headers[:, 0], 0)
    chunks = np.array([layout.chunks for layout in _LAYOUTS])[index]
    size = np.array([layout.chunk for layout in _LAYOUTS])[index]
    whole = np.array([layout.nbytes for layout in _LAYOUTS])[index]
    rank = headers[:, 4] & ~w.ASKS
    room = np.minimum(size, whole - np.clip(headers[:, 2], 0, chunks - 1) * size)
    found: NDArray[np.bool_] = (
        known
        & (headers[:, 1] >= 0)
        & (headers[:, 1] < MAX_POSITION // chunks)
        & (headers[:, 2] >= 0)
        & (headers[:, 2] < chunks)
        & (headers[:, 3] == _EPOCH)
        & (rank >= 0)
        & (rank < _RANKS)
        & (headers[:, 5] >= 0)
        & (headers[:, 5] <= MAX_POSITION)
        & ((idents != w.AM_DATA) | (lengths <= room))
    )
    return found


@jit.njit
def _arrivals(engine: Any, index: int, numbers: Any, chunks: Any, places: Any, words: Any) -> int:
    """Put each word in its chunk's place, and count the chunks taken; -1 at a wrong one."""
    mailbox = handlers.mailbox_words(engine, index)
    signals = handlers.signal_words(mailbox)
    taken = 0
    for i in range(len(words)):
        signals[places[i]] = words[i]
        expected = handlers.word_of(engine, mailbox, numbers[i], chunks[i])
        if handlers.arrived(engine, mailbox, numbers[i], chunks[i]) != (words[i] == expected):
            return -1
        taken += words[i] == expected
    return taken


def signals(inputs: int, draw: random.Random, told: Callable[[str], None]) -> Count:
    """Signal words, which any key holder can put: a chunk is taken by its one word only."""
    arena, numbers = Arena(), np.random.default_rng(draw.randrange(1 << 32))
    taken = faults = 0
    for start in range(0, inputs, _BATCH):
        count = min(_BATCH, inputs - start)
        index = int(numbers.integers(len(_LAYOUTS)))
        layout = _LAYOUTS[index]
        rounds = numbers.integers(0, (1 << numbers.integers(1, 47, count)) // layout.chunks + 1)
        chunks = numbers.integers(0, layout.chunks, count)
        positions = rounds * layout.chunks + chunks
        places = positions % layout.places
        right = (_EPOCH << 48) | (positions + 1)
        near = right + numbers.choice([-layout.places, -1, 1, layout.places, 1 << 48], count)
        flip = right ^ (1 << numbers.integers(0, 63, count))
        junk = numbers.integers(-(1 << 63), (1 << 63) - 1, count, endpoint=True)
        words = np.choose(numbers.integers(0, 4, count), [right, near, flip, junk])
        found = int(_arrivals(arena.words, index, rounds, chunks, places, words))
        arena.signals[index][:] = 0
        fault = "a chunk was taken by another word" if found < 0 else arena.fault()
        if fault:
            told(fault)
            return taken, start + count - taken - 1, faults + 1
        taken += found
    return taken, inputs - taken - faults, faults


TARGETS: dict[str, tuple[float, Callable[[int, random.Random, Callable[[str], None]], Count]]] = {
    "seals": (0.15, seals),
    "notes": (0.15, notes),
    "mailboxes": (0.10, mailboxes),
    "wardens": (0.10, wardens),
    "messages": (0.30, messages),
    "signals": (0.20, signals),
}
"""The share of the inputs that each gets, and its function."""


def run(inputs: int, seed: int) -> tuple[dict[str, object], list[dict[str, Any]]]:
    """Print and return a row a target; `BenchError` if anything was neither taken nor refused."""
    if inputs < 20:
        raise ArgumentError(f"inputs is {inputs}; must be at least 20")
    facts: dict[str, object] = {**environment(None, None), "seed": seed}
    table, rows, said = Table(COLUMNS), [], list[str]()
    table.header("fuzz: hostile bytes against all that reads what others wrote", facts)
    for name, (share, target) in TARGETS.items():
        count, start = round(share * inputs), time.monotonic()
        taken, refused, faults = target(
            count,
            random.Random(f"{seed} {name}"),
            lambda text, name=name: said.append(f"{name}: {text}"),  # type: ignore[misc]
        )
        rows.append(
            {
                "bench": "fuzz",
                "target": name,
                "inputs": count,
                "taken": taken,
                "refused": refused,
                "faults": faults,
                "seconds": time.monotonic() - start,
            }
        )
        table.row(rows[-1])
    if said:
        raise BenchError(f"seed {seed}: {len(said)} faults, the first: {said[0]}")
    return facts, rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Fuzz; 0 if every input was taken or refused as it should."""
    options = argparse.ArgumentParser(prog="python -m ucxgossip.bench.fuzz", description=__doc__)
    options.add_argument("--inputs", type=int, default=1_000_000, help="in all (default: 1000000)")
    options.add_argument("--seed", type=int, default=0, help="of every draw (default: 0)")
    options.add_argument("--json", metavar="FILE", help="write the environment and the rows here")
    chosen = options.parse_args(arguments)
    try:
        if chosen.json:
            file_to_write(chosen.json)
        facts, rows = run(chosen.inputs, chosen.seed)
        if chosen.json:
            write_json(chosen.json, facts, rows)
    except GossipError as error:
        print(f"ucxgossip: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    faulthandler.enable()
    sys.exit(main())
