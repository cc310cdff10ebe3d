"""Two connected engines in one process, which a test drives in turns, for the test_*.py here."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from ucxgossip.engine import Constants, Engine, Post, credits, drive
from ucxgossip.engine import words as w
from ucxgossip.mailbox import Layout, Mailbox, parse_description
from ucxgossip.ucp import Context, RemoteKey

DEADLINE_S = 30.0
CANARY = 64
TUNING = Constants(eager=64, chunk=1024, window=3)
MESSAGES = Constants(eager=1024, chunk=1024, window=3)
"""Each chunk is a message; with `TUNING` it is a put."""
ANSWERED = replace(MESSAGES, answers=True)


@dataclass
class Pair:
    """Rank 0 and rank 1, connected both ways by one mailbox each."""

    engines: list[Engine]
    boxes: list[Mailbox]

    def post(self, rank: int, array: np.ndarray, **changes: object) -> None:
        """Start a round of `array`, in place, with the other rank."""
        other = 1 - rank
        what = {
            "source": array.ctypes.data,
            "target": array.ctypes.data,
            "nbytes": array.nbytes,
            "to": other,
            "sender": other,
            "operation": w.MIX_FLOAT64 if array.dtype == np.float64 else w.MIX_FLOAT32,
            "next_writer": other,
            "whole": 1,
        }
        self.engines[rank].post(self.boxes[rank], Post(**{**what, **changes}))  # type: ignore[arg-type]

    def open(self, rank: int, *numbers: int) -> None:
        """Let the other rank write the slots of these rounds of `rank`."""
        engine, box = self.engines[rank], self.boxes[rank]
        for number in numbers:
            credit = (number + 1) * box.layout.chunks
            assert credits.grant(engine.words, engine.table[box.index], 1 - rank, credit) == 0

    def step(self, *ranks: int) -> None:
        for rank in ranks or (0, 1):
            drive.drive_once(self.engines[rank].words)

    def until(self, condition: Callable[[], bool], *ranks: int) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            self.step(*ranks)
            assert time.monotonic() < deadline, "deadline"

    def word(self, rank: int, index: int) -> int:
        return int(self.engines[rank].table[self.boxes[rank].index, index])

    def settle(self, rank: int, passes: int = 50) -> None:
        """Give `rank` and its partner every chance to move."""
        for _ in range(passes):
            self.step(rank, 1 - rank)

    def ended(self, *ranks: int) -> bool:
        return all(self.word(rank, w.STATE) == w.DONE for rank in ranks or (0, 1))


def make_pair(
    transport: str,
    nbytes: int,
    depth: int,
    verify: bool = False,
    ring: bool = False,
    tuning: Constants = TUNING,
) -> Pair:
    contexts = [Context(transport, {"NET_DEVICES": "lo"}) for _ in range(2)]
    engines = [
        Engine(context, rank, 2, tuning, ring=transport != "tcp")
        for rank, context in enumerate(contexts)
    ]
    layout = Layout(nbytes, depth, tuning.chunk, verify, ring=ring)
    boxes = [Mailbox(context, layout) for context in contexts]
    for rank in range(2):
        engines[rank].open(boxes[rank])
    for rank, other in ((0, 1), (1, 0)):
        endpoint = engines[rank].connect(other, engines[other].worker.address)
        address, packed = parse_description(boxes[other].describe(), layout, other)
        boxes[rank].set_peer(other, RemoteKey(endpoint, packed), address)
    return Pair(engines, boxes)


def guarded(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A copy of `values` inside a larger buffer whose ends hold canaries; (view, buffer)."""
    raw = np.full(values.nbytes + 2 * CANARY, 0x5C, np.uint8)
    view = raw[CANARY:-CANARY].view(values.dtype)
    view[:] = values
    return view, raw


def canaries_alive(raw: np.ndarray) -> bool:
    return bool((raw[:CANARY] == 0x5C).all() and (raw[-CANARY:] == 0x5C).all())


def until(condition: Callable[[], bool]) -> None:
    """Wait for what other threads do."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "deadline"
        os.sched_yield()
