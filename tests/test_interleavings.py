"""Two real engines under every order of their steps, up to a length; a promise checked after each.

The model (test_protocol_model.py) tries every order of the protocol's steps; here it is the engine
itself that is driven, over real sockets and real shared memory. A word such as "0010..." says who
makes a pass next. Finer letters take a pass apart: only what arrives is handled, or only the round
moves, with or without a put. From each word on both are driven until their rounds have ended.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
import pytest

from ucxgossip.bench.engines import Engines
from ucxgossip.engine import Constants, Post, drive, rounds
from ucxgossip.engine import words as w
from ucxgossip.engine.handlers import arrived, place_of, place_offset
from ucxgossip.ucp import ops

DEADLINE_S = 30.0
CANARY = 64
CHUNK = 128
TUNING = Constants(eager=64, chunk=CHUNK, window=2)
MESSAGES = Constants(eager=CHUNK, chunk=CHUNK, window=2, answers=True)

PASS, HANDLE, MOVE, MOVE_AND_PUT = range(4)


@dataclass
class Duel:
    """Ranks 0 and 1 with a round each of `nbytes`, in place, float64, of changing values."""

    made: Engines
    nbytes: int
    posted: list[int] = field(default_factory=lambda: [0, 0])  # rounds, by rank
    buffers: list[np.ndarray] = field(default_factory=list)
    gone: int = -1

    def __post_init__(self) -> None:
        self.buffers = [np.full(self.nbytes + 2 * CANARY, 0x5C, np.uint8) for _ in range(2)]

    def payload(self, rank: int) -> np.ndarray:
        return self.buffers[rank][CANARY:-CANARY].view(np.float64)

    def own(self, rank: int, number: int) -> np.ndarray:
        """What `rank` puts in a round: each element names rank, round and place."""
        return np.arange(self.nbytes // 8) + 1000.0 * rank + 4096.0 * number

    def post(self, rank: int) -> None:
        number, other = self.posted[rank], 1 - rank
        array = self.payload(rank)
        array[:] = self.own(rank, number)
        box = self.made.boxes[rank]
        address = array.ctypes.data
        what = Post(address, address, self.nbytes, other, other, w.MIX_FLOAT64)
        what = what._replace(next_writer=other)
        self.made.engines[rank].post(box, what, kick=False)
        self.posted[rank] += 1

    def bury(self, rank: int) -> None:
        """Close everything of `rank`, as the system does with a process that was killed."""
        self.made.engines[rank].close()
        self.made.engines[rank].context.close()
        self.gone = rank

    def row(self, rank: int) -> np.ndarray:
        return self.made.engines[rank].table[0]

    def ended(self, rank: int) -> bool:
        return self.posted[rank] > 0 and self.row(rank)[w.STATE] == w.DONE

    def step(self, rank: int, how: int = PASS) -> None:
        """One pass of `rank`, or a part of one, and a look at both."""
        engine = self.made.engines[rank]
        row = self.row(rank)
        if how == PASS:
            drive.drive_once(engine.words)
        elif how == HANDLE:
            ops.progress(int(engine.words[w.WORKER]))
        elif row[w.STATE] == w.ACTIVE:
            turn = how == MOVE_AND_PUT and rounds.may_put(engine.words, row)
            rounds.advance(engine.words, row, bool(turn))
        for each in (0, 1):
            if each != self.gone:
                self.check(each)

    def check(self, rank: int) -> None:
        """The promises of docs/protocol.md that can be seen from outside."""
        row, box, other = self.row(rank), self.made.boxes[rank], 1 - rank
        assert row[w.STATE] != w.FAILED or self.gone == 1 - rank
        assert box.intact(), "a guard byte of a mailbox was overwritten"
        raw = self.buffers[rank]
        assert (raw[:CANARY] == 0x5C).all() and (raw[-CANARY:] == 0x5C).all()
        if not self.posted[rank]:
            return
        number = int(row[w.ROUND])
        put, sent, mixed, parts = (int(row[i]) for i in (w.PUT, w.SENT, w.MIXED, w.PARTS))
        assert mixed <= sent <= put <= parts
        if put:
            opened = self.freed(other) + box.layout.places if self.posted[other] else 0
            assert number * box.layout.chunks + put <= opened, "put without credit"
        own, due = self.own(rank, number), self.own(other, number)
        edge = min(mixed * CHUNK, self.nbytes) // 8
        values = self.payload(rank)
        np.testing.assert_array_equal(values[:edge], ((own + due) / 2)[:edge])
        np.testing.assert_array_equal(values[edge:], own[edge:])
        if row[w.STATE] != w.ACTIVE:
            return
        # What is signalled and not mixed yet stands in its slot, whole.
        for chunk in range(mixed, parts):
            if arrived(self.made.engines[rank].words, row, number, chunk):
                part = slice(chunk * CHUNK // 8, (chunk + 1) * CHUNK // 8)
                start = box.layout.slots + place_offset(row, place_of(row, number, chunk))
                came = box.region.view(np.float64, len(due[part]), start)
                np.testing.assert_array_equal(came, due[part])

    def finished(self, rank: int) -> int:
        """Rounds that have ended."""
        return self.posted[rank] - (not self.ended(rank))

    def freed(self, rank: int) -> int:
        """Chunks that have been mixed, of all rounds."""
        mixed = 0 if self.ended(rank) else int(self.row(rank)[w.MIXED])
        return self.finished(rank) * self.made.boxes[rank].layout.chunks + mixed

    def settle(self) -> None:
        """Drive both in turn until both have ended the same round."""
        deadline = time.monotonic() + DEADLINE_S
        behind = int(self.posted[1] < self.posted[0])
        while self.posted[0] != self.posted[1]:
            if self.posted[behind] == 0 or self.ended(behind):
                self.post(behind)
            self.step(0)
            self.step(1)
            assert time.monotonic() < deadline, "a round was lost"
        while not (self.ended(0) and self.ended(1)):
            self.step(0)
            self.step(1)
            assert time.monotonic() < deadline, "a round was lost"


@pytest.fixture(params=["tcp", "shm"])
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


KINDS = {
    "message": (64, 1, False, TUNING),
    "chunks": (320, 1, False, TUNING),
    "two-slots": (320, 2, False, TUNING),
    "ring-of-one": (320, 1, True, TUNING),
    "ring-of-two": (320, 2, True, TUNING),
    "messages": (320, 2, False, MESSAGES),
    "ring-of-two-messages": (320, 2, True, MESSAGES),
}
"""Bytes, slots, whether they are a ring's, and whether chunks are put or are messages."""


@pytest.fixture(params=KINDS.values(), ids=list(KINDS))
def duel(transport: str, request: pytest.FixtureRequest) -> Iterator[Duel]:
    """A message, and three chunks, the last of which is half a one."""
    nbytes, depth, ring, tuning = request.param
    if tuning is MESSAGES and transport == "shm":
        pytest.skip("chunks are stored, as with the other tuning")
    with Engines(transport, 2, nbytes, depth, tuning, ring=ring) as made:
        yield Duel(made, nbytes)
        assert all(engine.words[w.MALFORMED] == 0 for engine in made.engines)


def words_of(letters: Sequence[Any], length: int) -> Iterator[tuple[Any, ...]]:
    return product(letters, repeat=length)


def test_both_have_posted(duel: Duel) -> None:
    for word in words_of((0, 1), 8):
        duel.post(0)
        duel.post(1)
        for rank in word:
            duel.step(rank)
        duel.settle()


@pytest.mark.parametrize("late_by", [3, 6])
def test_one_posts_late(duel: Duel, late_by: int) -> None:
    for word in words_of((0, 1), 8):
        duel.post(0)
        for place, rank in enumerate(word):
            if place == late_by:
                duel.post(1)
            duel.step(rank)
        duel.settle()


def test_each_posts_its_next_round_at_once(duel: Duel) -> None:
    """So that one is ahead of the other by as much as the slots allow."""
    ahead = 0
    for word in words_of((0, 1), 9):
        for rank in (0, 1):
            duel.post(rank)
        for rank in word:
            if duel.ended(rank):
                duel.post(rank)
            duel.step(rank)
            ahead = max(ahead, abs(duel.posted[0] - duel.posted[1]))
        duel.settle()
    # Further than that nobody gets without the other's payload; nor does it end, in a ring of one
    # place, within so few passes.
    assert ahead == (0 if duel.made.boxes[0].layout.places == 1 < duel.row(0)[w.PARTS] else 1)


LETTERS = [(rank, how) for rank in (0, 1) for how in (HANDLE, MOVE, MOVE_AND_PUT)]


def test_passes_taken_apart(duel: Duel) -> None:
    for word in words_of(LETTERS, 4):
        duel.post(0)
        duel.post(1)
        for rank, how in word:
            duel.step(rank, how)
        duel.settle()


@pytest.mark.slow
def test_both_have_posted_long(duel: Duel) -> None:
    for word in words_of((0, 1), 10):
        duel.post(0)
        duel.post(1)
        for rank in word:
            duel.step(rank)
        duel.settle()


@pytest.mark.parametrize("end", ["stopped", "killed"])
@pytest.mark.parametrize("kind", ["message", "two-slots", "ring-of-two", "messages"])
def test_one_goes_at_any_step(transport: str, kind: str, end: str) -> None:
    """The other mixes what is whole, nothing else, and what it then waits for is the one gone.

    stopped: it makes no pass any more. killed: its worker and memory are gone, too.
    """
    nbytes, depth, ring, tuning = KINDS[kind]
    words = [word for length in range(4) for word in words_of((0, 1), length)]
    words += [(0, 1, 0, 1, *word) for word in words]
    outcomes = set()
    for word in words:
        with Engines(transport, 2, nbytes, depth, tuning, ring=ring) as made:
            duel = Duel(made, nbytes)
            duel.post(0)
            duel.post(1)
            for rank in word:
                duel.step(rank)
            if end == "killed":
                duel.bury(1)
            for _ in range(20):
                duel.step(0)
            if duel.ended(0):
                duel.post(0)
                for _ in range(20):
                    duel.step(0)
            assert not duel.ended(0)
            error = made.engines[0].describe_wait(made.boxes[0], 0.0)
            assert error.rank == 1
            outcomes.add((int(duel.row(0)[w.ROUND]), int(duel.row(0)[w.STATE]), error.what))
    assert len(outcomes) > 1, outcomes


@pytest.mark.parametrize("rule", ["credit", "signal"])
def test_a_broken_promise_is_noticed(transport: str, rule: str) -> None:
    """Credits for all rounds from the start, or a signal without its data."""
    with Engines(transport, 2, 320, 1, TUNING) as made:
        duel = Duel(made, 320)
        duel.post(0)
        if rule == "credit":
            made.boxes[0].credits[:] = 1 << 40
            complaint = "put without credit"
        else:
            signals = made.boxes[0].layout.signals
            made.boxes[0].region.view(np.int64, 1, signals)[0] = 1
            complaint = "Arrays are not equal"
        with pytest.raises(AssertionError, match=complaint):
            for _ in range(10):
                duel.step(0)
