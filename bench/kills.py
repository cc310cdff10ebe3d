"""Ranks killed at random moments of a training: who survives, how long it stalls, what it learns.

    python -m ucxgossip.bench.kills --transport tcp,shm --ranks 8 --kills 100

Jobs of LeNet on digits; in each, `per_job` ranks get SIGKILL, each at a step and a moment within it
drawn at random, rank 0 with its store among them. Every third job runs undisturbed, for its
accuracy. A kill is survived if every rank that was not killed ends well, with all that died and
nobody else missing.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import mean, stdev
from typing import Any

from ucxgossip.bench.arguments import file_to_write
from ucxgossip.bench.environment import environment
from ucxgossip.bench.kills_rank import SAY
from ucxgossip.bench.spawn import ended, free_port, lines, pipes, rank_environment, start_rank
from ucxgossip.bench.table import Column, Table, write_json
from ucxgossip.errors import ArgumentError, BenchError
from ucxgossip.trust import new_token
from ucxgossip.ucp import lib

COLUMNS = (
    Column("transport", "transport", "", "", 10),
    Column("ranks", "ranks", "", "d", 6),
    Column("jobs", "jobs", "", "d", 5),
    Column("kills", "kills", "", "d", 6),
    Column("survived", "survived", "", "d", 9),
    Column("stall_s", "longest", "s", ".2f", 8),
    Column("stall_median_s", "median", "s", ".2f", 8),
    Column("accuracy", "accuracy", "%", ".2f", 9),
    Column("accuracy_std", "std", "%", ".2f", 6),
    Column("undisturbed", "undist.", "%", ".2f", 9),
    Column("undisturbed_std", "std", "%", ".2f", 6),
)
DEADLINE_S = 240.0
_WITHIN_S = 0.15


@dataclass
class Job:
    """What came of one training. ends: by rank, what it said at its end."""

    killed: list[int] = field(default_factory=list)
    ends: dict[int, dict[str, Any]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    @property
    def survived(self) -> bool:
        """Whether all who were not killed ended well and agree on who is left."""
        return not self.failures


def train(transport: str, ranks: int, steps: int, seed: int, kills: int, mix: str = "both") -> Job:
    """One job in which `kills` ranks are killed."""
    chance = random.Random(seed)
    moments = sorted(
        chance.randrange(4 * SAY, max(4 * SAY + 1, 3 * steps // 4)) for _ in range(kills)
    )
    victims = chance.sample(range(ranks), kills)
    job = Job()
    arguments = ["-m", "ucxgossip.bench.kills_rank", transport, str(steps), str(seed), mix]
    port, token = free_port(), new_token()
    processes: list[subprocess.Popen[bytes]] = []
    timers: list[threading.Timer] = []
    tails: dict[int, list[str]] = {rank: [] for rank in range(ranks)}
    with ended(processes):
        for rank in range(ranks):
            variables = rank_environment(rank, ranks, port, token)
            processes.append(start_rank(arguments, rank, variables))

        def kill(victim: int) -> None:
            processes[victim].send_signal(signal.SIGKILL)

        try:
            for (rank, _), line in lines(pipes(processes), time.monotonic() + DEADLINE_S):
                if line is None:
                    continue
                if line.startswith("step "):
                    while moments and int(line.split()[1]) >= moments[0]:
                        moments.pop(0)
                        victim = victims[len(job.killed)]
                        job.killed.append(victim)
                        timers.append(threading.Timer(chance.uniform(0, _WITHIN_S), kill, [victim]))
                        timers[-1].start()
                elif line.startswith("{"):
                    job.ends[rank] = json.loads(line)
                else:
                    tails[rank] = [*tails[rank][-12:], line]
        except TimeoutError:
            job.failures.append(f"not ended after {DEADLINE_S:g} s")
        for timer in timers:
            timer.join()
        for process in processes:
            try:
                process.wait(timeout=5.0)
            except subprocess.TimeoutExpired:
                continue
    _judge(job, ranks, [process.returncode for process in processes], tails)
    return job


def _judge(job: Job, ranks: int, codes: Sequence[int], tails: dict[int, list[str]]) -> None:
    """Write down what went wrong. A victim may have ended well before its moment came."""
    dead = {rank for rank in job.killed if codes[rank] == -signal.SIGKILL}
    for rank in range(ranks):
        if rank in dead:
            continue
        if codes[rank] != 0 or rank not in job.ends:
            said = "\n    ".join(tails[rank])
            job.failures.append(f"rank {rank} ended with {codes[rank]}; it said:\n    {said}")
        elif not set(job.ends[rank]["lost"]) <= dead:
            job.failures.append(f"rank {rank} lost {job.ends[rank]['lost']}, killed: {dead}")


def run(
    transport: str, ranks: int, kills: int, per_job: int, steps: int, seed: int, mix: str
) -> dict[str, Any]:
    """`kills` kills over one transport; the row."""
    disturbed: list[Job] = []
    quiet: list[Job] = []
    survived = done = 0
    while done < kills:
        count = min(per_job, kills - done)
        job = train(transport, ranks, steps, seed + len(disturbed), count, mix)
        disturbed.append(job)
        done += count
        survived += count if job.survived else 0
        for failure in job.failures:
            print(f"# {transport}, job {len(disturbed)}: {failure}", flush=True)
        if len(disturbed) % 3 == 1:
            calm = train(transport, ranks, steps, seed + len(disturbed) - 1, 0, mix)
            if not calm.survived:
                raise BenchError(f"bench kills: an undisturbed job failed: {calm.failures}")
            quiet.append(calm)
        print(f"# {transport}: {done} of {kills} kills, {survived} survived", flush=True)
    stalls = [max(end["longest_s"] for end in job.ends.values()) for job in disturbed if job.ends]
    accuracies = [_accuracy(job) for job in disturbed if job.ends]
    calm_ones = [_accuracy(job) for job in quiet]
    return {
        "bench": "kills",
        "transport": transport,
        "ranks": ranks,
        "mix": mix,
        "jobs": len(disturbed),
        "steps": steps,
        "kills": done,
        "survived": survived,
        "stall_s": max(stalls, default=None),
        "stall_median_s": sorted(stalls)[len(stalls) // 2] if stalls else None,
        "accuracy": mean(accuracies) if accuracies else None,
        "accuracy_std": stdev(accuracies) if len(accuracies) > 1 else None,
        "undisturbed": mean(calm_ones),
        "undisturbed_std": stdev(calm_ones) if len(calm_ones) > 1 else None,
    }


def _accuracy(job: Job) -> float:
    """The mean accuracy of the replicas that are left."""
    return float(mean(end["accuracy"] for end in job.ends.values()))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print; 0 only if every kill was survived."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--transport", default="tcp,shm", help="comma-separated: tcp, shm, auto")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--kills", type=int, default=100, help="in all, for each transport")
    parser.add_argument("--per-job", type=int, default=3, help="ranks killed in one training")
    parser.add_argument("--steps", type=int, default=400, help="of each training")
    parser.add_argument("--mix", default="both", help="as in attach()")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="write the rows to this file")
    options = parser.parse_args(arguments)
    if not 0 < options.per_job < options.ranks or options.kills < 1:
        raise ArgumentError("bench kills: at least one kill, and one rank that survives each job")
    if options.json:
        file_to_write(options.json)
    library = lib.load()
    facts = environment(".".join(map(str, library.version)), str(library.path))
    rows = [
        run(
            transport,
            options.ranks,
            options.kills,
            options.per_job,
            options.steps,
            options.seed,
            options.mix,
        )
        for transport in options.transport.split(",")
    ]
    table = Table(COLUMNS)
    table.header(f"ucxgossip bench kills, {options.per_job} kills a training", facts)
    for row in rows:
        table.row(row)
    if options.json:
        write_json(options.json, facts, rows)
    return 0 if all(row["survived"] == row["kills"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
