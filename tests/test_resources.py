"""What is left behind: nothing, in whatever order, from whatever thread, and however it ends."""

import gc
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ucxgossip as ug
from ucxgossip import errors
from ucxgossip.bench.spawn import ended, free_port, run_ranks
from ucxgossip.ucp.context import Context
from ucxgossip.ucp.endpoint import Endpoint
from ucxgossip.ucp.memory import MemoryRegion, RemoteKey
from ucxgossip.ucp.resource import Resource
from ucxgossip.ucp.worker import Worker

Ranks = Callable[..., list[Any]]
Python = Callable[..., subprocess.CompletedProcess[str]]
SCRIPT = str(Path(__file__).with_name("lifetimes.py"))
DEADLINE_S = 100.0
TIMES = 20
TRANSPORTS = ["tcp", "shm"]


# --- close(), from several threads and in any order ---------------------------------------------


class Slow(Resource):
    """A handle whose release waits until the test lets it."""

    def __init__(self, parent: Resource | None = None) -> None:
        super().__init__(1, parent)
        self.begun, self.go = threading.Event(), threading.Event()
        self.releases = 0

    def _release(self, handle: int) -> None:
        self.begun.set()
        assert self.go.wait(DEADLINE_S)
        self.releases += 1


@pytest.mark.parametrize("which", ["root", "child"])
def test_second_thread_returns_when_the_first_has_closed(which: str) -> None:
    root = Slow()
    child = Slow(root)
    root.go.set()
    target = {"root": root, "child": child}[which]
    first = threading.Thread(target=root.close, daemon=True)
    second = threading.Thread(target=target.close, daemon=True)
    first.start()
    assert child.begun.wait(DEADLINE_S)
    second.start()
    assert not root.closed and not child.closed
    child.go.set()
    for thread in (first, second):
        thread.join(DEADLINE_S)
        assert not thread.is_alive()
    assert (child.releases, root.releases) == (1, 1)
    assert child.closed and root.closed


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_threads_that_close_everything_at_once(transport: str) -> None:
    context = Context(transport)
    region, worker = MemoryRegion(context, nbytes=64), Worker(context)
    endpoint = Endpoint(worker, worker.address)
    handles = [context, region, worker, endpoint, RemoteKey(endpoint, region.pack())]
    barrier = threading.Barrier(2 * len(handles))

    def close(handle: Resource) -> None:
        barrier.wait(DEADLINE_S)
        handle.close()
        assert handle.closed

    failures: list[BaseException] = []

    def body(handle: Resource) -> None:
        try:
            close(handle)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=body, args=(h,), daemon=True) for h in 2 * handles]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
        assert not thread.is_alive()
    assert not failures


def test_group_closed_by_two_threads_leaves_its_job_once(as_ranks: Ranks, store: Any) -> None:
    """Counted twice, rank 0 would let itself out, and its store with it, without rank 1."""
    met, closed = threading.Barrier(2), threading.Event()

    def rank(number: int) -> None:
        group = ug.join(number, 2, store, "tcp", 30.0)
        group.exchange(np.zeros(4))
        met.wait(DEADLINE_S)
        if number == 1:
            assert not closed.wait(1.5)  # the others wait here
            group.close()
            return
        others = [threading.Thread(target=group.close, daemon=True) for _ in range(2)]
        for thread in others:
            thread.start()
        group.close()
        closed.set()
        for thread in others:
            thread.join(DEADLINE_S)
            assert not thread.is_alive()

    assert as_ranks(2, rank) == [None, None]


def attached(group: ug.Group, **modes: Any) -> tuple[torch.nn.Module, Any, ug.Gossip]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return model, optimizer, ug.attach(model, optimizer, group, **modes)


def step(model: torch.nn.Module, optimizer: Any) -> None:
    optimizer.zero_grad()
    model(torch.ones(2, 6)).square().sum().backward()
    optimizer.step()


ENDS: dict[str, Callable[[ug.Group, ug.Gossip], None]] = {
    "detach": lambda group, gossip: gossip.detach(),
    "group": lambda group, gossip: group.close(),
    "engine": lambda group, gossip: group.engine.close(),
    "context": lambda group, gossip: group.context.close(),
    "worker": lambda group, gossip: group.engine.worker.close(),
}


@pytest.mark.parametrize(
    "order", list(itertools.permutations(["detach", "group", "context"])), ids="-".join
)
@pytest.mark.parametrize("ranks", [1, 2])
def test_everything_closes_in_any_order(
    as_ranks: Ranks, store: Any, ranks: int, order: tuple[str, ...]
) -> None:
    """Also a context or worker closed under an engine whose thread is at work on it."""

    def rank(number: int) -> None:
        group = ug.join(number, ranks, store, "shm", 30.0)
        model, optimizer, gossip = attached(group)
        step(model, optimizer)
        gossip.wait()
        group.agree("stepped", {})
        for name in order:
            ENDS[name](group, gossip)
            ENDS[name](group, gossip)
        for name in ENDS:
            ENDS[name](group, gossip)
        assert all(torch.isfinite(p).all() for p in model.parameters())
        step(model, optimizer)  # a plain model again

    assert as_ranks(ranks, rank) == [None] * ranks


@pytest.mark.parametrize("first", ["engine", "worker"])
def test_engine_closed_before_its_group(store: Any, first: str) -> None:
    group = ug.join(0, 1, store)
    _, _, gossip = attached(group)
    ENDS[first](group, gossip)
    with pytest.raises(errors.ClosedError):
        group.mailbox(8)
    gossip.detach()
    group.close()
    assert group.closed and group.context.closed


def test_detach_after_the_group_closed_waits_for_nothing(as_ranks: Ranks, store: Any) -> None:
    """The round of the last step was never waited for; the model comes back all the same."""

    def rank(number: int) -> None:
        group = ug.join(number, 2, store, "tcp", 30.0)
        model, optimizer, gossip = attached(group)
        step(model, optimizer)
        group.close()
        gossip.detach()
        assert all(torch.isfinite(p).all() for p in model.parameters())
        step(model, optimizer)

    assert as_ranks(2, rank) == [None, None]


# --- nothing is left after close() --------------------------------------------------------------


def held() -> tuple[int, int]:
    """Threads and file descriptors of this process."""
    return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))


@contextmanager
def nothing_left(folder: Path) -> Iterator[list[weakref.ref[Any]]]:
    """Fail if the block leaves threads, descriptors, segments or any object it puts in the list."""
    before, objects = held(), []
    yield objects
    gc.collect()
    # Not "equal": a thread of an earlier test may have ended meanwhile.
    assert all(now <= then for now, then in zip(held(), before, strict=True)), (held(), before)
    assert list(folder.iterdir()) == []
    assert [each() for each in objects if each() is not None] == []


def whole_job(as_ranks: Ranks, store: Any, transport: str, folder: Path, break_off: bool) -> list:
    made: list[weakref.ref[Any]] = []

    def rank(number: int) -> None:
        with ug.join(number, 2, store, transport, 30.0, {"POSIX_DIR": str(folder)}) as group:
            model, optimizer, gossip = attached(group)
            made.extend(weakref.ref(each) for each in (group, group.engine, gossip))
            with gossip:
                for _ in range(2):
                    step(model, optimizer)
                if break_off:
                    step(model, optimizer)
                    raise ZeroDivisionError("on purpose")

    results = as_ranks(2, rank)
    if break_off:
        assert any(isinstance(each, ZeroDivisionError) for each in results), results
    else:
        assert results == [None, None]
    return made


@pytest.mark.parametrize("break_off", [False, True], ids=["ends well", "exception"])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_jobs_one_after_another_leave_nothing(
    as_ranks: Ranks, store: Any, tmp_path: Path, transport: str, break_off: bool
) -> None:
    whole_job(as_ranks, store, transport, tmp_path, break_off)  # libraries start threads once
    gc.collect()
    with nothing_left(tmp_path) as objects:
        for _ in range(TIMES):
            objects += whole_job(as_ranks, store, transport, tmp_path, break_off)


BAD_JOINS: dict[str, tuple[type[Exception], dict[str, Any]]] = {
    "a rank is missing": (errors.RankMissingError, {"size": 2, "timeout": 0.05}),
    "unknown setting": (errors.ArgumentError, {"settings": {"NO_SUCH": "1"}}),
    "no such transport layer": (errors.UCXError, {"settings": {"TLS": "no_such"}}),
}


@pytest.mark.parametrize("why", BAD_JOINS)
@pytest.mark.filterwarnings("ignore")
def test_join_that_fails_leaves_nothing(store: Any, tmp_path: Path, why: str) -> None:
    error, arguments = BAD_JOINS[why]
    call = {"rank": 0, "size": 1, "store": store, "transport": "shm"} | arguments
    call["settings"] = {"POSIX_DIR": str(tmp_path)} | call.get("settings", {})

    def refused() -> None:
        with pytest.raises(error):
            ug.join(**call)

    refused()
    with nothing_left(tmp_path):
        for _ in range(TIMES):
            refused()


# --- the end of a process -----------------------------------------------------------------------


class Job:
    """Ranks as processes, each of whose standard output and error is read to its end."""

    def __init__(self, name: str, ranks: int, transport: str, folder: Path) -> None:
        port = free_port()
        self.processes: list[subprocess.Popen[bytes]] = []
        for rank in range(ranks):
            variables = {
                "RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
            }
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, "-uX", "faulthandler", SCRIPT, name, transport, str(folder)],
                    env=os.environ | variables,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                )
            )

    def line(self, rank: int) -> str:
        """The next line that a rank prints; the suite's own deadline ends a hang."""
        out = self.processes[rank].stdout
        assert out is not None
        return out.readline().decode().strip()

    def end(self, rank: int) -> tuple[int, str, str]:
        """Status, the rest of standard output, and standard error of a rank.

        One that hangs is aborted, so that it says where all of its threads are.
        """
        process = self.processes[rank]
        try:
            out, err = process.communicate(timeout=DEADLINE_S)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGABRT)
            out, err = process.communicate(timeout=DEADLINE_S)
            raise AssertionError(f"rank {rank} hung: {out.decode()}{err.decode()}") from None
        return process.returncode, out.decode(), err.decode()


@contextmanager
def running(name: str, ranks: int, transport: str, folder: Path) -> Iterator[Job]:
    """A job that is ended, by its process ids, with the block."""
    processes: list[subprocess.Popen[bytes]] = []
    with ended(processes):
        job = Job(name, ranks, transport, folder)
        processes += job.processes
        try:
            yield job
        finally:
            for process in processes:
                if process.stdin is not None:
                    process.stdin.close()


@pytest.mark.spawn
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_exit_without_close(transport: str, tmp_path: Path) -> None:
    with running("forgets", 2, transport, tmp_path) as job:
        for rank in (1, 0):  # which reads its input to the end, and holds the store
            status, said, errors = job.end(rank)
            assert (status, said) == (0, "exchanged\n")
            # Who ends without close() is lost to those who go on for a moment longer. On a machine
            # that stands still for a second, torch's store says so.
            ours = [line for line in errors.splitlines() if "[c10d]" not in line]
            assert all("1 of 2 go on" in line for line in ours if line), errors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.spawn
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_interrupt_in_a_wait(transport: str, tmp_path: Path) -> None:
    """Ctrl-C is heard while UCX is driven; the block ends, and the other rank is told."""
    with running("waits", 2, transport, tmp_path) as job:
        assert [job.line(rank) for rank in range(2)] == ["waiting", "elsewhere"]
        job.processes[0].send_signal(signal.SIGINT)
        status, out, _ = job.end(0)
        assert (status, out) == (0, "KeyboardInterrupt\n")
        status, out, _ = job.end(1)
        assert status == 0 and out.startswith("PeerError: rank 0 left the job: KeyboardInterrupt")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.spawn
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda each: each.name)
def test_killed_in_a_wait_leaves_no_segment(
    transport: str, number: signal.Signals, tmp_path: Path
) -> None:
    """UCX unlinks a segment as soon as it is made; its memory goes with the last process."""
    with running("waits", 2, transport, tmp_path) as job:
        assert [job.line(rank) for rank in range(2)] == ["waiting", "elsewhere"]
        job.processes[0].send_signal(number)
        assert job.processes[0].wait(DEADLINE_S) == -number
        assert job.end(1)[0] == 0  # not ended from outside while it makes segments for itself
    assert list(tmp_path.iterdir()) == []


@pytest.mark.spawn
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_sigterm_turned_into_an_exit(transport: str, tmp_path: Path) -> None:
    """What docs/training.md advises for schedulers that send SIGTERM."""
    with running("terminated", 2, transport, tmp_path) as job:
        assert [job.line(rank) for rank in range(2)] == ["waiting", "elsewhere"]
        job.processes[0].send_signal(signal.SIGTERM)
        assert job.end(0)[0] == 143
        status, out, _ = job.end(1)
        assert status == 0 and out.startswith("PeerError: rank 0 left the job: SystemExit")


# --- fork ---------------------------------------------------------------------------------------


@pytest.mark.spawn
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("name", ["child_uses", "child_exits", "loader", "before_and_after"])
def test_fork(name: str, transport: str, tmp_path: Path) -> None:
    lines: list[str] = []
    run_ranks(
        [SCRIPT, name, transport, str(tmp_path)], 2, on_line=lines.append, deadline_s=DEADLINE_S
    )
    assert lines[-1:] == ["well"], lines
    assert list(tmp_path.iterdir()) == []


# --- segments of killed processes ---------------------------------------------------------------

KILLED_IN_CREATION = """
import sys
from ucxgossip.ucp.context import Context
from ucxgossip.ucp.memory import MemoryRegion

context = Context("shm", {"POSIX_DIR": sys.argv[1]})
print("ready", flush=True)
while True:
    MemoryRegion(context, nbytes=1 << 28).close()
"""


@pytest.mark.spawn
def test_segment_of_a_process_killed_as_it_made_it(tmp_path: Path) -> None:
    """It stays; it is listed when nobody holds it, and removed when asked for."""
    from ucxgossip import segments

    maker = subprocess.Popen(
        [sys.executable, "-c", KILLED_IN_CREATION, str(tmp_path)], stdout=subprocess.PIPE
    )
    with ended([maker]):
        assert maker.stdout is not None and maker.stdout.readline() == b"ready\n"
        deadline = time.monotonic() + DEADLINE_S
        names: list[Path] = []
        while not names:  # stopped between creating a segment and unlinking it
            assert time.monotonic() < deadline
            maker.send_signal(signal.SIGCONT)
            while not any(tmp_path.iterdir()):
                assert time.monotonic() < deadline
            maker.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, maker.pid, os.WSTOPPED)
            names = list(tmp_path.iterdir())
        assert segments.stale(tmp_path, 0.0) == []  # its maker lives
        maker.kill()
        maker.wait()
    (tmp_path / "ucx_shm_posix_mine").touch()
    (left,) = segments.stale(tmp_path, 0.0)
    assert (left.path, left.nbytes) == (names[0], names[0].stat().st_size)
    assert segments.stale(tmp_path) == []  # not a minute old
    segments.remove([left, left])
    assert [path.name for path in tmp_path.iterdir()] == ["ucx_shm_posix_mine"]


@pytest.mark.parametrize("how", ["open", "mapped"])
def test_segment_in_use_is_not_stale(tmp_path: Path, how: str) -> None:
    import mmap

    from ucxgossip import segments

    path = tmp_path / "ucx_shm_posix_12ab"
    path.write_bytes(bytes(4096))
    with path.open("r+b") as file:
        memory = mmap.mmap(file.fileno(), 4096)
        if how == "open":
            memory.close()
            assert segments.stale(tmp_path, 0.0) == []
    if how == "mapped":
        assert segments.stale(tmp_path, 0.0) == []
        memory.close()
    assert [each.path for each in segments.stale(tmp_path, 0.0)] == [path]


def test_doctor_reports_and_removes_what_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from ucxgossip import segments
    from ucxgossip.doctor import _report

    path = tmp_path / "ucx_shm_posix_12ab"
    path.write_bytes(bytes(100))
    _report([], remove=True)
    assert capsys.readouterr().out == ""
    _report(segments.stale(tmp_path, 0.0), remove=False)
    assert "processes left: 1 files, 100 bytes" in capsys.readouterr().out and path.exists()
    _report(segments.stale(tmp_path, 0.0), remove=True)
    assert not path.exists()
