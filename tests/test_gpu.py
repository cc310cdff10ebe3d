"""Buckets on a CUDA device: several ranks, each a process, on one GPU or on as many as there are.

``pytest -m gpu`` where there is a GPU, the extra cu12 or cu13, and torch for CUDA. Without one the
jobs run on the fake device instead, under names of their own: that shows that the jobs are right,
and nothing of CUDA.
"""

import json
import signal
import subprocess
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import test_lost_ranks as lost
from ucxgossip.bench.spawn import run_ranks

SCRIPT = str(Path(__file__).with_name("gpu_ranks.py"))
DEADLINE_S = 280.0
RIGHT: dict[str, Any] = {
    "rounds": {"wrong": 0},
    "attach": {"same": True},
    "poison": {"right": True},
    "queued": {"right": True, "ahead": True},
}


def run(job: str, device: str, transport: str, ranks: int) -> dict[str, Any]:
    lines: list[str] = []
    arguments = [SCRIPT, job, device, transport]
    run_ranks(arguments, ranks, on_line=lines.append, deadline_s=DEADLINE_S)
    found: dict[str, Any] = json.loads(lines[-1])
    return found


@pytest.fixture
def gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


# --- on a device -------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.spawn
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("transport", ["tcp", "shm", "auto"])
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("job", RIGHT)
def test_on_cuda(job: str, ranks: int, transport: str) -> None:
    assert run(job, "cuda", transport, ranks) == RIGHT[job]


@pytest.mark.gpu
@pytest.mark.spawn
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("transport", ["tcp", "shm"])
def test_ways_between_processes(transport: str) -> None:
    """On one device, and between devices that the driver can connect; else none."""
    connected = torch.cuda.device_count() == 1 or torch.cuda.can_device_access_peer(0, 1)
    assert run("ways", "cuda", transport, 2) == {"ways": int(connected)}


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_what_the_driver_says_of_allocators() -> None:
    """Plain memory is admitted; that of cudaMallocAsync is not."""
    import cupy

    from ucxgossip.device import driver
    from ucxgossip.device.admission import check_memory
    from ucxgossip.errors import ArrayError

    pools = cupy.cuda.MemoryPool(), cupy.cuda.MemoryAsyncPool()
    plain, asynchronous = (pool.malloc(1 << 20) for pool in pools)
    check_memory(driver.load(), plain.ptr)
    with pytest.raises(ArrayError, match="legacy CUDA IPC"):
        check_memory(driver.load(), asynchronous.ptr)


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("expandable", [False, True])
def test_what_the_driver_says_of_torchs_memory(
    expandable: bool, python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """In a process of its own: torch reads the setting once."""
    code = """
        import torch
        from ucxgossip.device import driver
        from ucxgossip.device.admission import check_memory
        from ucxgossip.errors import ArrayError
        kept = torch.ones(1 << 20, device="cuda")
        try:
            check_memory(driver.load(), kept.data_ptr())
            print("admitted")
        except ArrayError as error:
            print(error)
    """
    setting = {"PYTORCH_CUDA_ALLOC_CONF": f"expandable_segments:{expandable}"}
    done = python(textwrap.dedent(code), setting)
    assert done.returncode == 0, done.stderr
    assert ("expandable_segments:False" if expandable else "admitted") in done.stdout


@pytest.mark.gpu
@pytest.mark.spawn
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("transport", ["tcp", "shm"])
def test_the_others_go_on_on_cuda(transport: str, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on(transport, "cuda", monkeypatch)


@pytest.mark.gpu
@pytest.mark.spawn
@pytest.mark.usefixtures("gpu")
def test_a_killed_rank_leaves_no_stream_hanging(monkeypatch: pytest.MonkeyPatch) -> None:
    survivors_end("cuda", monkeypatch)


def survivors_end(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three ranks one is killed: the others end by themselves, and well."""
    monkeypatch.setattr(lost, "SCRIPT", SCRIPT)
    with lost.started(3, "killed", device, "tcp") as job:
        job.signal(1, signal.SIGKILL)
        ends = job.ends([0, 2])
    assert all(end == {"rank": rank, "ended": "went on"} for rank, end in ends.items()), ends


def go_on(transport: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four ranks one is killed, and one more: what the others have stays whole."""
    monkeypatch.setattr(lost, "SCRIPT", str(Path(__file__).with_name("lost_device.py")))
    monkeypatch.setenv("GOSSIP_TEST_DEVICE", device)
    with lost.started(4, transport, 2) as job:
        job.signal(0, signal.SIGKILL)
        job.signal(2, signal.SIGKILL)
        ends = job.ends([1, 3])
    lost.check(ends, [1, 3], [0, 2])


# --- the jobs themselves -----------------------------------------------------------------------


@pytest.mark.spawn
@pytest.mark.slow
@pytest.mark.parametrize("job", RIGHT)
def test_the_job_is_right_on_a_fake(job: str) -> None:
    assert run(job, "fake", "shm", 2) == RIGHT[job]


@pytest.mark.spawn
@pytest.mark.slow
def test_a_killed_rank_leaves_no_fake_stream_hanging(monkeypatch: pytest.MonkeyPatch) -> None:
    survivors_end("fake", monkeypatch)


@pytest.mark.spawn
@pytest.mark.slow
def test_no_ways_between_fakes_of_two_processes() -> None:
    assert run("ways", "fake", "shm", 2) == {"ways": 0}


@pytest.mark.spawn
@pytest.mark.slow
@pytest.mark.parametrize("transport", ["tcp", "shm"])
def test_the_others_go_on_on_a_fake(transport: str, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on(transport, "fake", monkeypatch)
