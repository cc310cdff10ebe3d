"""Ranks killed and started again by torchrun: who comes back, how long that takes, who stalls.

    python -m ucxgossip.bench.rejoins --transport tcp,shm --ranks 4 --cycles 20

One job of LeNet on digits. Each rank has a torchrun of its own (``--nnodes RANKS --node-rank K
--nproc-per-node 1 --max-restarts CYCLES``): an agent restarts all of its workers when one dies, so
one agent for all would start a new job instead. A rank drawn at random gets SIGKILL at a random
moment, its agent starts it again, and once it trains with the others it is the next one's turn.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from statistics import mean, median
from typing import Any

import torch.distributed

from ucxgossip.bench.arguments import file_to_write
from ucxgossip.bench.environment import environment
from ucxgossip.bench.kills import train
from ucxgossip.bench.spawn import ended, free_port, lines
from ucxgossip.bench.table import Column, Table, write_json
from ucxgossip.errors import ArgumentError, BenchError
from ucxgossip.trust import TOKEN, new_token
from ucxgossip.ucp import lib

COLUMNS = (
    Column("transport", "transport", "", "", 10),
    Column("ranks", "ranks", "", "d", 6),
    Column("cycles", "cycles", "", "d", 7),
    Column("rejoined", "rejoined", "", "d", 9),
    Column("steps", "steps", "", "d", 7),
    Column("back_s", "back", "s", ".1f", 7),
    Column("stall_s", "longest", "s", ".2f", 8),
    Column("stall_median_s", "median", "s", ".2f", 8),
    Column("accuracy", "accuracy", "%", ".2f", 9),
    Column("undisturbed", "undist.", "%", ".2f", 9),
)
STOP = "ucxgossip/bench/stop"
MOST_STEPS = 1_000_000
DEADLINE_S = 900.0
_BEYOND = 500
"""Steps from the last one heard of to the one at which all stop."""


@dataclass
class Job:
    """One job under torchrun, and what its ranks have said."""

    transport: str
    ranks: int
    cycles: int
    seed: int
    port: int = field(default_factory=free_port)
    agents: list[subprocess.Popen[bytes]] = field(default_factory=list)
    pids: dict[int, int] = field(default_factory=dict)
    steps: dict[int, int] = field(default_factory=dict)
    ends: dict[int, dict[str, Any]] = field(default_factory=dict)
    tail: list[str] = field(default_factory=list)
    victim: int = -1
    back: list[float] = field(default_factory=list)
    stalls: list[float] = field(default_factory=list)

    def start(self) -> None:
        """Start an agent for each rank."""
        token = os.environ.get(TOKEN) or new_token()
        for rank in range(self.ranks):
            options = {
                "nnodes": self.ranks,
                "node-rank": rank,
                "nproc-per-node": 1,
                "max-restarts": self.cycles,
                "monitor-interval": 0.1,
                "master-addr": "127.0.0.1",
                "master-port": self.port,
            }
            arguments = [f"--{name}={value}" for name, value in options.items()]
            script = ["-m", "ucxgossip.bench.kills_rank", self.transport, str(MOST_STEPS)]
            self.agents.append(
                subprocess.Popen(
                    [sys.executable, "-m", "torch.distributed.run", *arguments, *script]
                    + [str(self.seed), "both", STOP],
                    env={**os.environ, TOKEN: token, "OMP_NUM_THREADS": "1"},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                )
            )

    def run(self) -> None:
        """Kill and wait for the return, `cycles` times; then let all end."""
        chance, deadline = random.Random(self.seed), time.monotonic() + DEADLINE_S
        streams = {
            rank: agent.stdout.fileno()
            for rank, agent in enumerate(self.agents)
            if agent.stdout is not None
        }
        goal, away, killed, stopped = 50, -1, 0.0, False
        waiting: threading.Timer | None = None
        for rank, line in lines(streams, deadline):
            self._hear(rank, line)
            together = len(self.pids) == self.ranks and len(self.steps) == self.ranks
            if waiting is not None and not waiting.is_alive() and away < 0:
                away, waiting, killed = self.victim, None, time.monotonic()
                self.steps.pop(away, None)
                self.pids.pop(away)
            elif away >= 0 and away in self.steps:
                self.back.append(time.monotonic() - killed)
                print(f"# {self.transport}: {len(self.back)} of {self.cycles} back", flush=True)
                goal, away = max(self.steps.values()) + 30, -1
            elif away < 0 and together and waiting is None and min(self.steps.values()) >= goal:
                if len(self.back) < self.cycles:
                    self.victim = chance.randrange(self.ranks)
                    waiting = threading.Timer(chance.uniform(0, 0.2), self._kill)
                    waiting.start()
                elif not stopped:
                    stopped = True
                    make: Any = vars(torch.distributed)["TCPStore"]
                    store = make("127.0.0.1", self.port, timeout=timedelta(seconds=30))
                    store.set(STOP, str(max(self.steps.values()) + _BEYOND))

    def _kill(self) -> None:
        os.kill(self.pids[self.victim], signal.SIGKILL)

    def _hear(self, rank: int, line: str | None) -> None:
        if line is None:
            return
        words = line.split()
        if line.startswith("pid "):
            self.pids[rank] = int(words[1])
        elif line.startswith("step ") and rank in self.pids:
            self.steps[rank] = int(words[1])
        elif line.startswith("{"):
            self.ends[rank] = json.loads(line)
        else:
            self.tail = [*self.tail[-30:], f"rank {rank}: {line}"]


def run(
    transport: str, ranks: int, cycles: int, seed: int, undisturbed: bool = True
) -> dict[str, Any]:
    """One job of `cycles` kills and returns, and one that is left `undisturbed`; the row."""
    job = Job(transport, ranks, cycles, seed)
    with ended(job.agents):
        job.start()
        try:
            job.run()
        except TimeoutError:
            job.tail.append(f"not ended after {DEADLINE_S:g} s")
    whole = len(job.ends) == ranks and all(
        len(end["members"]) == ranks for end in job.ends.values()
    )
    if not whole:
        print("\n".join(job.tail), flush=True)
    stalls = sorted(end["longest_s"] for end in job.ends.values())
    steps = max((end["steps"] for end in job.ends.values()), default=0)
    calm = train(transport, ranks, min(steps, 2000), seed, 0) if undisturbed and steps else None
    if calm is not None and not calm.survived:
        raise BenchError(f"bench rejoins: an undisturbed job failed: {calm.failures}")
    return {
        "bench": "rejoins",
        "transport": transport,
        "ranks": ranks,
        "cycles": cycles,
        "rejoined": len(job.back) if whole else max(0, len(job.back) - 1),
        "steps": steps,
        "back_s": median(job.back) if job.back else None,
        "stall_s": max(stalls, default=None),
        "stall_median_s": median(stalls) if stalls else None,
        "accuracy": mean(e["accuracy"] for e in job.ends.values()) if job.ends else None,
        "undisturbed": mean(e["accuracy"] for e in calm.ends.values()) if calm else None,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print; 0 only if every rank that was killed came back."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--transport", default="tcp,shm", help="comma-separated: tcp, shm, auto")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--cycles", type=int, default=20, help="for each transport")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="write the rows to this file")
    options = parser.parse_args(arguments)
    if options.ranks < 2 or options.cycles < 1:
        raise ArgumentError("bench rejoins: at least two ranks and one cycle")
    if options.json:
        file_to_write(options.json)
    library = lib.load()
    facts = environment(".".join(map(str, library.version)), str(library.path))
    rows = [
        run(transport, options.ranks, options.cycles, options.seed)
        for transport in options.transport.split(",")
    ]
    table = Table(COLUMNS)
    table.header("ucxgossip bench rejoins, kills and restarts under torchrun", facts)
    for row in rows:
        table.row(row)
    if options.json:
        write_json(options.json, facts, rows)
    return 0 if all(row["rejoined"] == row["cycles"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
