"""ucxgossip.bench.mpi, mpirun: the peers leave the mean they say, and mpirun's ranks always end."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ucxgossip.bench import mpi, mpirun
from ucxgossip.bench.exchange import MPI_PEERS
from ucxgossip.bench.mpirun import run_ranks
from ucxgossip.errors import BenchError

pytestmark = pytest.mark.spawn

RANK = """
import numpy as np
import torch.distributed as dist
from ucxgossip.bench import mpi, mpirun
from ucxgossip.bench.exchange_rank import check
from ucxgossip.bench.gloo import gloo_job
from ucxgossip.bench.peer import Arrays

mpirun.adopt_rank()
with mpi.mpi_job() as api, gloo_job(deadline_s=60):
    rank, size = dist.get_rank(), dist.get_world_size()
    assert (api.COMM_WORLD.rank, api.COMM_WORLD.size) == (rank, size)
    for counts in ([2], [300_000, 3, 70_000]):
        data = Arrays(rank, size, [np.empty(count, np.float32) for count in counts])
        for make in mpi.METHODS:
            method = make(data, api, TRANSPORT)
            for _ in range(2):
                check(method.name, method, data, dist.barrier)
            dist.barrier()
            method.close()
    if rank == 0:
        print("well")
"""
PROLOGUE = """
import os, pathlib, signal, sys
from ucxgossip.bench import mpi, mpirun
mpirun.adopt_rank()
rank = int(os.environ["RANK"])
pathlib.Path(os.environ["FOLDER"], str(rank)).write_text(str(os.getpid()))
"""
FOREVER = "\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: signal.pause()\n"


@pytest.fixture
def here() -> None:
    """Skip where there is no MPI."""
    why = mpirun.why_absent()
    if why is not None:
        pytest.skip(why)


@pytest.fixture
def folder(here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where ranks write their process ids; afterwards none of them is left, nor a file."""
    monkeypatch.setenv("FOLDER", str(tmp_path))
    before = left()
    yield tmp_path
    assert not [path.name for path in tmp_path.iterdir() if runs(int(path.read_text()))]
    assert left() <= before


def runs(process_id: int) -> bool:
    """Whether it has not ended; one that nobody has waited for yet has."""
    try:
        stat = Path(f"/proc/{process_id}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def left() -> set[Path]:
    return {path for place in ("/tmp", "/dev/shm") for path in Path(place).glob("ucxgossip-mpi-*")}


def run(code: str, ranks: int, transport: str = "shm", deadline_s: float = 120) -> list[str]:
    printed: list[str] = []
    run_ranks(
        ["-c", code], ranks, transport=transport, on_line=printed.append, deadline_s=deadline_s
    )
    return printed


@pytest.mark.parametrize(("transport", "ranks"), [("tcp", 2), ("shm", 2), ("shm", 3)])
def test_means(here: None, transport: str, ranks: int) -> None:
    pytest.importorskip("torch")
    assert run(RANK.replace("TRANSPORT", repr(transport)), ranks, transport) == ["well"]


def test_failing_rank_ends_the_job_and_is_named(folder: Path) -> None:
    code = PROLOGUE + (
        "with mpi.mpi_job() as api:\n"
        "    api.COMM_WORLD.Barrier()\n"
        "    if rank == 1: raise MemoryError('no memory left')\n"
        "    api.COMM_WORLD.Barrier()\n"
    )
    with pytest.raises(BenchError, match=r"ended with status 1(.|\n)*rank 1:(.|\n)*no memory left"):
        run(code, 2)
    assert len(list(folder.iterdir())) == 2


def test_deadline_ends_ranks_that_ignore_sigterm(folder: Path) -> None:
    code = PROLOGUE + "print('still here', file=sys.stderr, flush=True)" + FOREVER
    with pytest.raises(BenchError, match=r"had not ended after 6 s(.|\n)*still here"):
        run(code, 2, deadline_s=6)
    assert len(list(folder.iterdir())) == 2


def test_ranks_of_an_mpirun_that_was_killed_are_ended(folder: Path) -> None:
    # Rank 0 kills its parent, mpirun, once both ranks have said who they are.
    code = PROLOGUE + (
        "import time\n"
        "while rank == 0 and len(os.listdir(os.environ['FOLDER'])) < 2: os.sched_yield()\n"
        "if rank == 0: os.kill(os.getppid(), signal.SIGKILL)\n"
    )
    with pytest.raises(BenchError, match="ended on SIGKILL"):
        run(code + FOREVER, 2)
    assert len(list(folder.iterdir())) == 2


def test_ranks_of_another_library_are_refused(here: None) -> None:
    code = "import os\nfrom ucxgossip.bench import mpi, mpirun\nos.environ['WORLD_SIZE'] = '3'\n"
    with pytest.raises(BenchError, match="different MPI libraries"):
        run(code + "mpirun.adopt_rank()\nwith mpi.mpi_job(): pass\n", 1)


def test_process_without_mpirun_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMPI_COMM_WORLD_RANK", raising=False)
    with pytest.raises(BenchError, match="not started by Open MPI's mpirun"):
        mpirun.adopt_rank()


def test_absence_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    why = mpirun.why_absent.__wrapped__()
    assert why is not None
    assert "mpirun" in why and "openmpi-bin" in why and "pip install mpi4py" in why


@pytest.mark.parametrize(
    ("said", "status", "word"),
    [
        ("4.1.2 MPICH Version: 4.2", 0, "runs on MPICH Version: 4.2"),
        ("", 1, "does not find its MPI library"),
    ],
)
def test_other_libraries_are_not_the_peer(
    said: str, status: int, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = subprocess.CompletedProcess([], status, said, "RuntimeError: cannot load MPI library")
    monkeypatch.setattr(mpirun.subprocess, "run", lambda *_, **__: answer)
    with pytest.raises(BenchError, match=word):
        mpirun.version.__wrapped__()


def test_version_names_both(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "4.1.2 Open MPI v4.1.4, package: Debian OpenMPI, ident: 4.1.4, repo rev: v4.1.4"
    answer = subprocess.CompletedProcess([], 0, said + "\n", "")
    monkeypatch.setattr(mpirun.subprocess, "run", lambda *_, **__: answer)
    assert mpirun.version.__wrapped__() == "Open MPI 4.1.4, mpi4py 4.1.2"


def test_settings_of_the_user_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMPI_MCA_mpi_yield_when_idle", "1")
    told = mpirun.in_force("tcp").split()
    assert {"mpi_yield_when_idle=1", "btl=self,tcp", "btl_tcp_if_include=lo"} <= set(told)


def test_methods_are_those_of_the_bench() -> None:
    assert tuple(each.name for each in mpi.METHODS) == MPI_PEERS
