"""Ranks as processes, over TCP and shared memory, also with more ranks than cores."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from ucxgossip.bench.spawn import run_ranks
from ucxgossip.errors import BenchError

pytestmark = pytest.mark.spawn
forks = pytest.mark.usefixtures("forked_ranks")
SCRIPT = str(Path(__file__).with_name("ranks.py"))
DEADLINE_S = 100.0


def run(job: str, transport: str, ranks: int) -> dict[str, Any]:
    lines: list[str] = []
    run_ranks([SCRIPT, job, transport], ranks, on_line=lines.append, deadline_s=DEADLINE_S)
    found: dict[str, Any] = json.loads(lines[-1])
    return found


@forks
@pytest.mark.parametrize(
    ("transport", "ranks"),
    [("tcp", 2), ("shm", 2), ("auto", 2), ("tcp", 3), ("shm", 3), ("tcp", 8), ("shm", 8)],
)
def test_rounds_are_exact(transport: str, ranks: int) -> None:
    assert run("rounds", transport, ranks) == {"wrong": 0}


@pytest.mark.parametrize(("transport", "ranks"), [("tcp", 3), ("shm", 3)])
def test_verified_rounds_are_exact(transport: str, ranks: int) -> None:
    assert run("verified", transport, ranks) == {"wrong": 0}


@forks
def test_more_ranks_than_cores() -> None:
    assert run("many", "tcp", 8)["spread"] < 1e-3


@forks
@pytest.mark.parametrize("transport", ["tcp", "shm"])
def test_engine_thread_serves_an_absent_caller(transport: str) -> None:
    assert run("idle", transport, 2) == {"ended": True, "value": 0.5}


@forks
@pytest.mark.parametrize(("transport", "ranks"), [("tcp", 3), ("shm", 3), ("tcp", 8)])
def test_push_sum_of_ranks_at_their_own_pace(transport: str, ranks: int) -> None:
    assert run("push_sum", transport, ranks) == {"mass": 1.0, "right": True, "intact": True}


@forks
@pytest.mark.parametrize("transport", ["tcp", "shm"])
def test_killed_rank_is_an_error_within_the_deadline(transport: str) -> None:
    with pytest.raises(BenchError, match="rank 1 of 3 ended on SIGKILL"):
        run("killed", transport, 3)


def test_torchrun_job(tmp_path: Path) -> None:
    """The store of torchrun's agent, and no port of our own."""
    import subprocess

    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        + [SCRIPT, "many", "tcp"],
        capture_output=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    assert json.loads(done.stdout.splitlines()[-1])["spread"] < 1e-3
