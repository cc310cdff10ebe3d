"""Ranks that are killed, stopped or end: the others go on, and who comes back is told so."""

import json
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from forked import start_rank
from ucxgossip.bench import kills
from ucxgossip.bench.network import Network
from ucxgossip.bench.spawn import ended, free_port, lines, pipes, rank_environment
from ucxgossip.errors import BenchError
from ucxgossip.trust import new_token

pytestmark = pytest.mark.spawn
SCRIPT = str(Path(__file__).with_name("lost.py"))
DEADLINE_S = 120.0


class Ranks:
    """The processes of one job, and what they say."""

    def __init__(self, processes: list[Any]) -> None:
        self.processes = processes
        self.said: dict[int, list[str]] = {rank: [] for rank in range(len(processes))}
        self._lines = lines(pipes(processes), time.monotonic() + DEADLINE_S)

    def until(self, rank: int, start: str) -> str:
        """Read on until `rank` says a line that begins like this."""
        return self.until_all([rank], start)[rank]

    def until_all(self, ranks: list[int], start: str) -> dict[int, str]:
        found: dict[int, str] = {}
        for rank in ranks:
            found.update((rank, line) for line in self.said[rank] if line.startswith(start))
        while set(found) < set(ranks):
            (rank, _), line = next(self._lines)
            if line is None:
                continue
            self.said[rank].append(line)
            if rank in ranks and line.startswith(start):
                found[rank] = line
        return found

    def signal(self, rank: int, number: signal.Signals) -> None:
        self.processes[rank].send_signal(number)

    def ends(self, ranks: list[int]) -> dict[int, dict[str, Any]]:
        """What each of `ranks` said at its end, and that it ended well."""
        told = self.until_all(ranks, "{")
        for rank in ranks:
            assert self.processes[rank].wait(timeout=30) == 0, self.said[rank]
        return {rank: json.loads(line) for rank, line in told.items()}


@contextmanager
def started(ranks: int, *arguments: object, network: Network | None = None) -> Iterator[Ranks]:
    """`SCRIPT` with these arguments, all of whose ranks have said that they are going."""
    port, token = free_port(), new_token()
    processes: list[Any] = []
    with ended(processes):
        for rank in range(ranks):
            variables, through = rank_environment(rank, ranks, port, token), []
            if network is not None:
                variables |= network.variables(rank)
                through = network.command(rank)
            script = [SCRIPT, *map(str, arguments)]
            processes.append(start_rank(script, rank, variables, through))
        job = Ranks(processes)
        job.until_all(list(range(ranks)), "going")
        yield job


def check(ends: dict[int, dict[str, Any]], members: list[int], lost: list[int]) -> None:
    for rank, end in ends.items():
        assert end["members"] == members, end
        assert sorted(end["lost"]) == lost, end
        assert end["mean"] == pytest.approx(sum(members) / len(members))
        assert end["within"] and end["flat"] and end["intact"], (rank, end)


@pytest.mark.parametrize("transport", ["tcp", "shm", "auto"])
@pytest.mark.parametrize("victims", [[2], [0], [0, 1]], ids=str)
def test_the_others_go_on_when_ranks_are_killed(transport: str, victims: list[int]) -> None:
    """Rank 0 holds the job's store, and leads."""
    others = [rank for rank in range(4) if rank not in victims]
    with started(4, transport, len(victims)) as job:
        for victim in victims:
            job.signal(victim, signal.SIGKILL)
        ends = job.ends(others)
        assert any("lost" in line for line in job.said[others[0]] if line.startswith("log"))
    check(ends, others, victims)


@pytest.mark.parametrize("transport", ["tcp", "shm"])
def test_one_rank_is_left(transport: str) -> None:
    with started(2, transport, 1) as job:
        job.signal(0, signal.SIGKILL)
        ends = job.ends([1])
    check(ends, [1], [0])


@pytest.mark.parametrize("transport", ["tcp", "shm"])
def test_a_rank_that_was_stopped_is_left_out_and_told_so(
    transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It wakes with rounds under way, into slots that are others' by now, and ends; they do not."""
    monkeypatch.setenv("GOSSIP_TEST_AFTER", "400")  # so that they are there when it wakes
    with started(4, transport, 1) as job:
        job.signal(1, signal.SIGSTOP)
        job.until_all([0, 2, 3], "lost [1]")
        job.signal(1, signal.SIGCONT)
        ends = job.ends([0, 2, 3])
        told = job.ends([1])[1]
    check(ends, [0, 2, 3], [1])
    assert told["error"].startswith("ExpelledError: ")


@pytest.fixture
def network() -> Iterator[Network]:
    """Four hosts, for who may make network namespaces."""
    with ExitStack() as stack:
        try:
            made = stack.enter_context(Network(4))
        except BenchError as error:
            pytest.skip(str(error))
        yield made


@pytest.mark.parametrize("victim", [0, 3])
def test_a_rank_whose_link_is_cut_is_left_out_and_stops(victim: int, network: Network) -> None:
    """Nothing breaks and nobody refuses: there is only silence. Rank 0 leads, rank 3 is led."""
    others = [rank for rank in range(4) if rank != victim]
    with started(4, "tcp", 1, network=network) as job:
        network.cut(victim)
        ends = job.ends(others)
        check(ends, others, [victim])
        told = job.ends([victim])[victim]
    assert told["error"].startswith("ExpelledError: ")


@pytest.mark.parametrize("transport", ["tcp", "shm"])
@pytest.mark.parametrize("mix", ["both", "push_sum"])
@pytest.mark.usefixtures("forked_ranks")
def test_training_goes_on(transport: str, mix: str) -> None:
    """The short form of `bench kills`: two of four, each at a random moment."""
    job = kills.train(transport, 4, steps=120, seed=1, kills=2, mix=mix)
    assert job.survived, "\n".join(job.failures)
    assert len(job.killed) == 2
    (members,) = {tuple(end["members"]) for end in job.ends.values()}
    assert set(members) - set(job.killed) <= set(job.ends)  # one may be killed as it ends


def test_what_the_bench_judges() -> None:
    job = kills.Job(killed=[1], ends={0: {"lost": [1]}, 2: {"lost": [1, 3]}})
    said: dict[int, list[str]] = {rank: ["last words"] for rank in range(4)}
    kills._judge(job, 4, [0, -signal.SIGKILL, 0, 1], said)
    assert [failure[:6] for failure in job.failures] == ["rank 2", "rank 3"]
    assert not job.survived
