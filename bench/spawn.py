"""The child processes of a benchmark: starting them, hearing them, and always ending them.

torchrun would start the ranks too, but not end them within a deadline of ours, nor say which rank
failed and why. Nothing here sleeps to let something happen: all waiting is for output, for the end
of output or for a deadline. Children are ended by their process id, however the block that
started them ends: result, error, deadline, Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import errno
import os
import random
import selectors
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

from ucxgossip.errors import ArgumentError, BenchError
from ucxgossip.trust import TOKEN, new_token

TAIL_LINES = 20
_GRACE_S = 2.0

Key = TypeVar("Key")


def run_ranks(
    arguments: Sequence[str],
    ranks: int,
    *,
    on_line: Callable[[str], object],
    deadline_s: float,
    variables: Callable[[int], Mapping[str, str]] | None = None,
    through: Callable[[int], Sequence[str]] | None = None,
) -> None:
    """Run `python ARGUMENTS` as `ranks` processes of one job and return when all have ended well.

    Each gets the variables torchrun would set, and those of `variables(rank)`; `through(rank)` is a
    command that turns into the one after it, such as ``ip netns exec NAME``. What rank 0 prints
    goes to `on_line` line by line. A rank that fails, or a job that outlasts `deadline_s` seconds,
    is a BenchError with the last lines of that rank's standard error.
    """
    if ranks < 1:
        raise ArgumentError(f"cannot start {ranks} ranks: at least one is needed")
    deadline = time.monotonic() + deadline_s
    job = f"python {shlex.join(arguments)}"
    port, token = free_port(), os.environ.get(TOKEN) or new_token()
    processes: list[subprocess.Popen[bytes]] = []
    tails: list[deque[str]] = [deque(maxlen=TAIL_LINES) for _ in range(ranks)]
    with ended(processes):
        for rank in range(ranks):
            environment = rank_environment(rank, ranks, port, token)
            environment.update(variables(rank) if variables else {})
            before = through(rank) if through else ()
            processes.append(start_rank(arguments, rank, environment, before))
        streams = pipes(processes)
        open_streams = set(streams)
        try:
            for (rank, name), line in lines(streams, deadline):
                if line is None:
                    open_streams.discard((rank, name))
                    if not any(owner == rank for owner, _ in open_streams):
                        check_exit(processes[rank], f"{job}: rank {rank} of {ranks}", tails[rank])
                elif (rank, name) == (0, "stdout"):
                    on_line(line)
                else:
                    tails[rank].append(line)
        except TimeoutError:
            late = sorted({rank for rank, _ in open_streams})
            said = "\n".join(f"  rank {rank} said last:\n{indented(tails[rank])}" for rank in late)
            raise BenchError(
                f"{job}: after {deadline_s:g} s these of its {ranks} ranks had not ended:\n{said}"
            ) from None


@contextmanager
def ended(processes: list[subprocess.Popen[bytes]]) -> Iterator[None]:
    """End the processes in the list, which the block fills, by their ids when the block ends."""
    try:
        with sigterm_as_exit():
            yield
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()
        deadline = time.monotonic() + _GRACE_S
        for process in processes:
            try:
                process.wait(timeout=max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            for pipe in (process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()


def lines(streams: Mapping[Key, int], deadline: float) -> Iterator[tuple[Key, str | None]]:
    """Yield (key, line) from file descriptors as lines come, and (key, None) when one ends.

    Returns when all have ended; TimeoutError when `time.monotonic()` has passed `deadline`.
    """
    pending = dict.fromkeys(streams.values(), b"")
    with selectors.DefaultSelector() as selector:
        for key, descriptor in streams.items():
            selector.register(descriptor, selectors.EVENT_READ, key)
        while selector.get_map():
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise TimeoutError("the children were still running at the deadline")
            for ready, _ in selector.select(remaining):
                data = _read(ready.fd)
                *complete, rest = (pending[ready.fd] + data).split(b"\n")
                if not data and rest:
                    complete, rest = [rest], b""
                pending[ready.fd] = rest
                for line in complete:
                    yield ready.data, line.decode(errors="replace").rstrip("\r")
                if not data:
                    selector.unregister(ready.fd)
                    yield ready.data, None


def free_port() -> int:
    """Return a TCP port that nothing is bound to.

    Taken from below the range the kernel gives to outgoing connections: a port from bind(0) may be
    handed to one of those in the second that a child takes to start and listen on it.
    """
    for port in random.sample(range(20000, 30000), 100):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise BenchError("no free TCP port among 100 tried between 20000 and 30000")


def rank_environment(rank: int, ranks: int, port: int, token: str) -> dict[str, str]:
    """This process's variables, those that torchrun sets, and the job's token."""
    return {
        **os.environ,
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        TOKEN: token,
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
    }


def start_rank(
    arguments: Sequence[str],
    rank: int,
    environment: Mapping[str, str],
    through: Sequence[str] = (),
) -> subprocess.Popen[bytes]:
    """A rank's process; what another rank than 0 prints comes with its errors."""
    return subprocess.Popen(
        [*through, sys.executable, *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE if rank == 0 else subprocess.STDOUT,
    )


def pipes(processes: Sequence[subprocess.Popen[bytes]]) -> dict[tuple[int, str], int]:
    """The pipes of the processes, by rank and name, for `lines`."""
    return {
        (rank, name): pipe.fileno()
        for rank, process in enumerate(processes)
        for name, pipe in (("stdout", process.stdout), ("stderr", process.stderr))
        if pipe is not None
    }


def check_exit(process: subprocess.Popen[bytes], who: str, tail: Sequence[str]) -> None:
    """`BenchError` unless the process, whose output has ended, ends well; tail: its last lines."""
    try:
        status = process.wait(timeout=_GRACE_S)
    except subprocess.TimeoutExpired:
        raise BenchError(f"{who} closed its output but did not end") from None
    if status != 0:
        how = f"with status {status}" if status > 0 else f"on {signal.Signals(-status).name}"
        raise BenchError(f"{who} ended {how}; its last lines:\n{indented(tail)}")


def indented(tail: Sequence[str]) -> str:
    """Lines as they stand in a message."""
    return "\n".join(f"    {line}" for line in tail) or "    (it printed nothing)"


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except OSError as error:
        # A pseudo-terminal whose other side is closed reads as EIO, not as its end.
        if error.errno == errno.EIO:
            return b""
        raise


@contextmanager
def sigterm_as_exit() -> Iterator[None]:
    """Let SIGTERM unwind the stack as Ctrl-C does: by default it ends Python on the spot."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
