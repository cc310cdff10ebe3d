"""Buckets on a CUDA device: several ranks, each a process, on one GPU or on as many as there are.

``pytest -m gpu`` where there is a GPU, the extra cu12 or cu13, and torch for CUDA. Without one the
jobs run on the fake device instead, under names of their own: that shows that the jobs are right,
and nothing of CUDA.
"""

import importlib.util
import json
import signal
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from ucxgossip.bench.spawn import run_ranks
from ucxgossip.errors import BenchError


def load(name: str) -> ModuleType:
    """Test modules are not importable by name (``--import-mode=importlib``)."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


lost = load("test_lost_ranks")
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
    """On one device, and between devices that the driver can connect."""
    assert run("ways", "cuda", transport, 2) == {"ways": 1}


@pytest.mark.gpu
@pytest.mark.spawn
@pytest.mark.usefixtures("gpu")
def test_a_killed_rank_leaves_no_stream_hanging() -> None:
    with pytest.raises(BenchError, match="rank 1 of 3 ended on SIGKILL"):
        run("killed", "cuda", "tcp", 3)


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_what_the_driver_says_of_allocators() -> None:
    """Plain memory is admitted; torch's expandable segments and cudaMallocAsync are not."""
    import cupy

    from ucxgossip.device import driver
    from ucxgossip.device.admission import check_memory
    from ucxgossip.errors import ArrayError

    check_memory(driver.load(), cupy.cuda.MemoryPool().malloc(1 << 20).ptr)
    asynchronous = cupy.cuda.MemoryAsyncPool().malloc(1 << 20)
    with pytest.raises(ArrayError, match="legacy CUDA IPC"):
        check_memory(driver.load(), asynchronous.ptr)


@pytest.mark.gpu
@pytest.mark.spawn
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("transport", ["tcp", "shm"])
def test_the_others_go_on_on_cuda(transport: str, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on(transport, "cuda", monkeypatch)


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
def test_no_ways_between_fakes_of_two_processes() -> None:
    assert run("ways", "fake", "shm", 2) == {"ways": 0}


@pytest.mark.spawn
@pytest.mark.slow
@pytest.mark.parametrize("transport", ["tcp", "shm"])
def test_the_others_go_on_on_a_fake(transport: str, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on(transport, "fake", monkeypatch)
