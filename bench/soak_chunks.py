"""`soak chunks`: chunk exchanges under random delays, every element of which is checked.

Two ways. In *one thread* the engines of two to four ranks are stepped at random, at times only in
part, and left alone for random times: delays fall between all steps of the protocol that the
engine takes apart, over real sockets and real shared memory. As *processes* each rank runs the same
loop beside its engine thread: stores, fences and wake-ups meet another core's.

An exchange of a chunk is one that was put by one rank, and mixed or copied by another.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ucxgossip.bench import soak_loops as loops
from ucxgossip.bench.engines import Engines
from ucxgossip.bench.spawn import ended, run_ranks
from ucxgossip.bench.table import Column, Table
from ucxgossip.engine import Constants, Engine
from ucxgossip.errors import BenchError
from ucxgossip.group import Group, join
from ucxgossip.mailbox import Layout, Mailbox
from ucxgossip.tuning import Tuning
from ucxgossip.ucp import MemoryRegion
from ucxgossip.ucp.lib import status_name

COLUMNS = (
    Column("transport", "transport", "", "", 9),
    Column("way", "way", "", "", 10),
    Column("ranks", "ranks", "", "d", 5),
    Column("depth", "depth", "", "d", 5),
    Column("chunk", "chunk", "B", "d", 6),
    Column("rounds", "rounds", "", "d", 9),
    Column("chunks", "chunks", "", "d", 10),
    Column("torn", "torn", "chunks", "d", 7),
    Column("doubled", "doubled", "chunks", "d", 8),
    Column("lost", "lost", "rounds", "d", 7),
    Column("canaries", "canaries", "dead", "d", 8),
    Column("seconds", "time", "s", ".1f", 7),
)
FAULTS = ("torn", "doubled", "lost", "canaries")
WAYS = ("thread", "processes", "stops")

_PARTS = 8  # chunks of the largest round
_CHUNKS = (64, 512, 4096)  # bytes; UCX copies small puts, and reads large ones in place
_PATIENCE_S = 30.0

# A pidfd, not a number, so that no other process can ever be meant. Ended only between stops: a
# parent that it left stopped would stay so.
_STOPPER = """
import os, random, signal, sys, time
going = [True]
signal.signal(signal.SIGTERM, lambda *_: going.clear())
signal.signal(signal.SIGINT, signal.SIG_IGN)
parent, choose = os.pidfd_open(int(sys.argv[1])), random.Random(int(sys.argv[2]))
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
try:
    while going:
        time.sleep(10 ** choose.uniform(-4, -2))
        signal.pidfd_send_signal(parent, signal.SIGSTOP)
        time.sleep(10 ** choose.uniform(-4.3, -1.7))
        signal.pidfd_send_signal(parent, signal.SIGCONT)
except ProcessLookupError:
    pass
"""


@dataclass(frozen=True)
class Case:
    """One setting, and how many rounds each rank does in it.

    chunk: bytes. ring: depth chunks. messages: over TCP chunks are messages, and not put.
    """

    transport: str
    way: str
    ranks: int
    depth: int
    chunk: int
    window: int
    rounds: int
    seed: int
    patience_s: float = _PATIENCE_S
    ring: bool = False
    messages: bool = False

    @property
    def capacity(self) -> int:
        """Bytes of the largest round."""
        return _PARTS * self.chunk

    @property
    def tuning(self) -> Constants:
        """Small rounds go as one message and chunks are put, or chunks are messages, answered."""
        if self.messages:
            return Constants(self.chunk, chunk=self.chunk, window=self.window, answers=True)
        return Constants(eager=64, chunk=self.chunk, window=self.window)

    def plan(self) -> NDArray[np.int64]:
        """What the compiled loop is told."""
        plan = np.zeros(loops.PLAN, np.int64)
        layout = Layout(self.capacity, self.depth, self.chunk, ring=self.ring)
        plan[loops.SEED], plan[loops.RANKS], plan[loops.AHEAD] = self.seed, self.ranks, layout.ahead
        plan[loops.CHUNK], plan[loops.CAPACITY] = self.chunk, self.capacity
        plan[loops.ROUNDS] = self.rounds
        plan[loops.SHARED] = self.way != "thread"
        plan[loops.PATIENCE] = int(self.patience_s * 1e9)
        return plan


def cases(transport: str, way: str, chunks: int, seed: int) -> Iterator[Case]:
    """Settings that share at least `chunks` exchanges: two to four ranks, one to three slots, each
    as large as a round or (a ring) as a chunk.
    """
    kinds = [(1, False), (2, False), (3, False), (1, True), (2, True), (3, True)]
    settings = [(ranks, *kind) for ranks in (2, 3, 4) for kind in kinds]
    if way != "thread":
        settings = [(2, 1, False), (2, 2, False), (3, 3, False), (2, 1, True), (3, 2, True)]
    for index, (ranks, depth, ring) in enumerate(settings):
        chunk = _CHUNKS[(index + index // 3) % len(_CHUNKS)]
        window = 1 + (index + seed) % 4
        case = Case(transport, way, ranks, depth, chunk, window, 1, seed + 1000 * index, ring=ring)
        share = -(-chunks // (len(settings) * ranks))
        case = replace(case, messages=index % 2 == 1)
        yield replace(case, rounds=int(loops.rounds_for(case.plan(), share)))


def row_of(rank: int, engine: Engine, box: Mailbox, memory: Sequence[MemoryRegion]) -> list[int]:
    """One rank as the compiled loop knows it; memory: of its source and its target."""
    row = [0] * loops.FIELDS
    row[loops.RANK], row[loops.ENGINE], row[loops.BOX] = rank, engine.words.ctypes.data, box.index
    row[loops.SOURCE], row[loops.TARGET] = (each.address + loops.CANARY for each in memory)
    row[loops.PARAM] = memory[0].param_address
    return row


def _compile(case: Case) -> None:
    """Compile the loop, so that neither its patience nor a time in a table counts that.

    libucp must be loaded: compiled code is linked to it.
    """
    tally = np.zeros(loops.TALLY, np.int64)
    loops.soak(np.zeros((0, loops.FIELDS), np.int64), case.plan(), tally, 0)


def _report(
    case: Case, tally: NDArray[np.int64], ranks: int, guards: bool, seconds: float
) -> dict[str, Any]:
    """The row of a case that ended or gave up; ranks: those in `tally`."""
    if tally[loops.FAILED]:
        status = int(tally[loops.FAILED])
        raise BenchError(f"soak chunks: a round failed with {status_name(status)} in {case}")
    return {
        "soak": "chunks",
        **{name: getattr(case, name) for name in ("transport", "way", "ranks", "depth", "chunk")},
        "ring": case.ring,
        "window": case.window,
        "messages": case.messages,
        "seed": case.seed,
        "rounds": int(tally[loops.ENDED]),
        "chunks": int(tally[loops.CHUNKS]),
        "bytes": int(tally[loops.BYTES]),
        "torn": int(tally[loops.TORN]),
        "doubled": int(tally[loops.DOUBLED]),
        "lost": ranks * case.rounds - int(tally[loops.ENDED]),
        "canaries": int(tally[loops.CANARIES]) + (not guards),
        "seconds": seconds,
    }


def in_one_thread(case: Case) -> dict[str, Any]:
    """All ranks of `case` here, stepped at random; one row."""
    sizes = (case.capacity, case.depth, case.tuning)
    with Engines(case.transport, case.ranks, *sizes, ring=case.ring) as all_ranks:
        _compile(case)
        nbytes = case.capacity + 2 * loops.CANARY
        rows, memories = [], []
        for rank, engine in enumerate(all_ranks.engines):
            memories.append([MemoryRegion(engine.context, nbytes=nbytes) for _ in range(2)])
            rows.append(row_of(rank, engine, all_ranks.boxes[rank], memories[rank]))
        tally = np.zeros(loops.TALLY, np.int64)
        begun = time.monotonic()
        loops.soak(np.array(rows, np.int64), case.plan(), tally, case.seed)
        seconds = time.monotonic() - begun
        return _report(case, tally, case.ranks, all_ranks.intact(), seconds)


@contextmanager
def stopped_at_random(seed: int) -> Iterator[None]:
    """While the block runs, a child stops this process for 0.05 to 20 ms, every 0.1 to 10 ms."""
    processes: list[subprocess.Popen[bytes]] = []
    with ended(processes):
        arguments = [sys.executable, "-c", _STOPPER, str(os.getpid()), str(seed)]
        processes.append(subprocess.Popen(arguments))
        yield


def as_rank(case: Case, group: Group) -> dict[str, Any]:
    """This process's rank of `case`; the row of all ranks together."""
    box = group.mailbox(case.capacity, case.depth, case.ring)
    for other in range(group.size):
        if other != group.rank:
            group.reach(other, box)
    memory = [group.allocate(case.capacity + 2 * loops.CANARY) for _ in range(2)]
    rows = np.array([row_of(group.rank, group.engine, box, memory)], np.int64)
    tally = np.zeros(loops.TALLY, np.int64)
    _compile(case)
    group.agree("soak", {"plan": case.plan().tolist()})
    seed = case.seed + group.rank
    begun = time.monotonic()
    with stopped_at_random(seed) if case.way == "stops" else nullcontext():
        loops.soak(rows, case.plan(), tally, seed)
    seconds = time.monotonic() - begun
    tally[loops.CANARIES] += not box.intact()
    merged = group.share("tally", tally.tobytes(), _sum)
    return _report(case, np.frombuffer(merged, np.int64), group.size, True, seconds)


def _sum(blobs: list[bytes]) -> bytes:
    return sum(np.frombuffer(blob, np.int64) for blob in blobs).tobytes()  # type: ignore[union-attr]


def in_processes(case: Case, deadline_s: float) -> dict[str, Any]:
    """Each rank of `case` a process; one row."""
    said: list[str] = []
    run_ranks(
        ["-m", "ucxgossip.bench.soak_chunks", json.dumps(asdict(case))],
        case.ranks,
        on_line=said.append,
        deadline_s=deadline_s,
    )
    rows = [json.loads(line) for line in said if line.startswith("{")]
    if len(rows) != 1:
        raise BenchError(f"soak chunks: {len(rows)} rows where one was due, of {case}")
    return rows[0]  # type: ignore[no-any-return]


def run(
    transports: Sequence[str],
    ways: Sequence[str],
    chunks: int,
    seed: int,
    facts: dict[str, object],
    deadline_s: float = 3600.0,
) -> list[dict[str, Any]]:
    """`chunks` exchanges in each way over each transport; print the table and return its rows."""
    table = Table(COLUMNS)
    table.header("ucxgossip soak chunks: every element checked, delays at random", facts)
    rows = []
    for transport in transports:
        for way in ways:
            for case in cases(transport, way, chunks, seed):
                row = in_one_thread(case) if way == "thread" else in_processes(case, deadline_s)
                table.row(row)
                rows.append(row)
    return rows


def main() -> None:
    """One rank, started by `in_processes`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("case")
    case = Case(**json.loads(parser.parse_args().case))
    with join(transport=case.transport, tuning=Tuning(**asdict(case.tuning))) as group:
        row = as_rank(case, group)
        if group.rank == 0:
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
