"""Ranks that were killed and start again, and ranks that come later: the others go on."""

import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import TCPStore

from forked import Forked
from ucxgossip.bench import rejoins
from ucxgossip.bench.spawn import ended, free_port, lines, rank_environment
from ucxgossip.trust import new_token
from ucxgossip.tuning import CONSTANTS

pytestmark = pytest.mark.spawn
SCRIPT = str(Path(__file__).with_name("came.py"))
DEADLINE_S = 120.0
BEYOND = 500
"""Steps from the last one seen to the one at which all stop."""


class Ranks:
    """Processes of one job, started and killed as a test likes; this process holds their store."""

    def __init__(self, size: int, transport: str, modes: dict[str, Any], **variables: str) -> None:
        self.size, self.arguments = size, [SCRIPT, transport, json.dumps(modes)]
        self.port, self.token, self.variables = free_port(), new_token(), variables
        self.store = TCPStore(
            "127.0.0.1", self.port, is_master=True, timeout=timedelta(seconds=DEADLINE_S)
        )
        self.all: list[Forked] = []
        self.now: dict[int, Forked] = {}
        self.said: list[str] = []
        self.steps: dict[int, int] = {}
        self.marks: dict[int, int] = {}
        self._read, self._write = os.pipe()
        self._lines = lines({"all": self._read}, time.monotonic() + DEADLINE_S)

    def start(self, *ranks: int) -> None:
        """Start these ranks' processes (anew)."""
        for rank in ranks:
            self.marks[rank] = len(self.said)
            environment = {
                **rank_environment(rank, self.size, self.port, self.token),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                **self.variables,
            }
            self.now[rank] = Forked(self.arguments, environment, self._write)
            self.all.append(self.now[rank])

    def kill(self, *ranks: int) -> None:
        for rank in ranks:
            self.now[rank].send_signal(signal.SIGKILL)
        for rank in ranks:
            self.now.pop(rank).wait(timeout=10)

    def until(self, done: Callable[[str], bool], rank: int | None = None) -> str:
        """Read on until something is said, or was said since `rank` was started."""
        for line in self.said[self.marks[rank] :] if rank is not None else []:
            if done(line):
                return line
        while True:
            _, line = next(self._lines)
            assert line is not None
            self.said.append(line)
            at = re.match(r"rank (\d+) at (\d+)", line)
            if at:
                self.steps[int(at[1])] = int(at[2])
            if done(line):
                return line

    def start_of(self, rank: int) -> int:
        """The step at which `rank`, started before, begins."""
        line = self.until(lambda line: line.startswith(f"rank {rank} starts"), rank)
        return int(line.split()[-1])

    def go_on(self, steps: int = 40) -> None:
        """Until every rank that runs has made some more steps."""
        goal = max(self.steps.values(), default=0) + steps
        self.until(lambda _: all(self.steps.get(rank, 0) >= goal for rank in self.now))

    def ends(self) -> dict[int, dict[str, Any]]:
        """Tell all to stop; what each said at its end."""
        self.store.set("stop", str(max(self.steps.values()) + BEYOND))
        found: dict[int, dict[str, Any]] = {}
        while set(found) != set(self.now):
            line = self.until(lambda line: re.match(r"rank \d+ ends", line) is not None)
            _, rank, _, end = line.split(" ", 3)
            found[int(rank)] = json.loads(end)
        for rank, process in self.now.items():
            assert process.wait(timeout=30) == 0, f"rank {rank}"
        return found

    def tell_where_all_are(self) -> None:
        """Have the processes that still run print their stacks."""
        for process in self.now.values():
            if process.poll() is None:
                process.send_signal(signal.SIGUSR1)
        with suppress(TimeoutError):
            for _, line in lines({"all": self._read}, time.monotonic() + 1.0):
                self.said.append(str(line))


@contextmanager
def running(
    size: int, transport: str = "tcp", modes: dict[str, Any] | None = None, **variables: str
) -> Iterator[Ranks]:
    job = Ranks(size, transport, modes or {}, **variables)
    try:
        with ended(job.all):
            try:
                yield job
            except (AssertionError, TimeoutError):
                job.tell_where_all_are()
                print("\n".join(x for x in job.said[-600:] if not re.match(r"rank \d+ at", x)))
                raise
    finally:
        os.close(job._read)
        os.close(job._write)


def check(ends: dict[int, dict[str, Any]], members: list[int], steps: bool = True) -> None:
    assert sorted(ends) == members
    for end in ends.values():
        assert end["members"] == members
        assert end["finite"]
        assert end["consensus"] < 0.5, end
    if steps:
        assert len({end["steps"] for end in ends.values()}) == 1, ends


MODES: dict[str, dict[str, Any]] = {
    "both": {},
    "awc": {"combine": "awc"},
    "stale": {"mix": "weights", "staleness": 2},
    "outer": {"mix": "weights", "outer": {}},
    "adam and buffers": {"optimizer": "adam", "optimizer_state": True, "buffers": True},
    "noise": {"optimizer": "adam", "noise_correction": True},
    "push_sum": {"mix": "push_sum"},
    "averages": {"local_steps": 3, "global_average_every": 10},
    "many buckets": {"bucket_bytes": 256},
    "exact means in the loop": {"looks": 3},
    "two models": {"models": 2},
    "a device on one rank": {"device": 1},
    "a device, awc": {"device": 1, "combine": "awc", "optimizer_state": True},
    "a device on the rank that is killed": {"device": 2, "combine": "awc"},
}


@pytest.mark.parametrize(
    ("name", "transport"),
    [(name, "tcp") for name in MODES]
    + [(name, "shm") for name in ("both", "adam and buffers", "push_sum", "a device on one rank")],
)
def test_a_rank_that_was_killed_comes_back(name: str, transport: str) -> None:
    """With the others' weights, step and optimizer state; rank 0 too, which leads."""
    victim = 0 if transport == "shm" else 2
    with running(3, transport, dict(MODES[name])) as job:
        job.start(0, 1, 2)
        job.go_on()
        job.kill(victim)
        job.start(victim)
        assert job.start_of(victim) >= 40
        job.go_on()
        ends = job.ends()
        others = [rank for rank in range(3) if rank != victim]
    check(ends, [0, 1, 2], steps=name != "push_sum")
    for rank in others:
        assert [each["rank"] for each in ends[rank]["lost"]] == [victim]
        assert [each["rank"] for each in ends[rank]["came"]] == [victim]
    usual = CONSTANTS[transport]
    chunk = usual.device_chunk if "device" in MODES[name] else usual.chunk
    assert [end["chunks"] for end in ends.values()] == [[chunk]] * 3
    assert ends[victim]["lost"] == ends[victim]["came"] == []


def test_all_but_one_come_back() -> None:
    with running(3, "auto") as job:
        job.start(0, 1, 2)
        job.go_on()
        job.kill(0, 2)
        job.start(0, 2)
        job.go_on()
        job.kill(1)
        job.start(1)
        job.go_on()
        ends = job.ends()
    check(ends, [0, 1, 2])


def test_ranks_beyond_the_least_number_come_later() -> None:
    """Elastic: two begin, the third is added, one goes, and comes back."""
    with running(3, UCXGOSSIP_MIN_SIZE="2") as job:
        job.start(2, 0, 1)
        assert min(job.start_of(0), job.start_of(1)) == 0
        job.go_on()
        job.until(lambda line: line.startswith("log rank 0: rank 2 came"), 0)
        job.kill(1)
        job.go_on()
        job.start(1)
        assert job.start_of(1) > 0
        job.go_on()
        ends = job.ends()
    check(ends, [0, 1, 2])


def test_a_guest_that_dies_while_it_comes_is_no_loss() -> None:
    with running(3) as job:
        job.start(0, 1, 2)
        job.go_on()
        job.kill(1)
        job.start(1)
        job.until(lambda line: line.startswith("log rank 1: found a job"))
        job.kill(1)
        job.go_on()
        job.start(1)
        job.go_on()
        ends = job.ends()
    check(ends, [0, 1, 2])


def test_under_shuffled_guests_come_between_epochs() -> None:
    with running(3, modes={"shuffles": True}) as job:
        job.start(0, 1, 2)
        job.go_on()
        job.kill(2)
        job.start(2)
        job.go_on()
        ends = job.ends()
    check(ends, [0, 1, 2])
    assert all(end["seen"] == [0, 1, 2] for end in ends.values()), ends


def test_another_model_is_refused_before_anything_changes() -> None:
    with running(2) as job:
        job.start(0, 1)
        job.go_on()
        job.kill(1)
        job.arguments[2] = json.dumps({"mix": "weights"})
        job.start(1)
        job.until(lambda line: "MismatchError: attach: mix: rank 0 has 'both'" in line)
        job.now.pop(1).wait(timeout=30)
        job.go_on()
        ends = job.ends()
    check(ends, [0])


def test_a_note_of_a_job_that_is_gone_counts_for_nothing() -> None:
    """All are killed, and start a new job in the same store."""
    with running(2) as job:
        job.start(0, 1)
        job.go_on()
        job.kill(0, 1)
        job.steps.clear()
        job.variables["TORCHELASTIC_RESTART_COUNT"] = "1"
        job.start(0, 1)
        assert job.start_of(0) == 0
        job.go_on()
        ends = job.ends()
    check(ends, [0, 1])


def test_torchrun_starts_a_killed_worker_again() -> None:
    """The short form of `bench rejoins`."""
    row = rejoins.run("tcp", ranks=3, cycles=1, seed=0, undisturbed=False)
    assert row["rejoined"] == 1, row
    assert row["accuracy"] > 50.0
