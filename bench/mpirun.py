"""mpirun: whether MPI is here, and the ranks of a bench started by it, heard, and always ended.

Everything else of the bench runs in the processes that mpirun starts, so that a figure and the one
beside it come from the same processes. MPI is needed by nothing but this bench: where it is
absent, `why_absent` says what to install.

The transport is that of ours, `tcp` over the loopback alone or shared memory; all else is Open
MPI's choice, so are its algorithms and how it waits.

Rejected: leaving the transport to Open MPI too (with UCX in it, it would be measured on another
than the one named); starting the ranks ourselves (without mpirun's daemon they do not find each
other).
"""

from __future__ import annotations

import importlib.util
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path

from ucxgossip.bench.spawn import (
    TAIL_LINES,
    check_exit,
    ended,
    free_port,
    indented,
    lines,
    pipes,
    rank_environment,
)
from ucxgossip.errors import BenchError
from ucxgossip.trust import TOKEN, new_token

INSTALL = "install Open MPI (apt-get install openmpi-bin) and mpi4py (pip install mpi4py)"

SHARED = {"pml": "ob1", "btl": "self,vader", "osc": "sm"}
SETTINGS: dict[str, dict[str, str]] = {
    "tcp": {"pml": "ob1", "btl": "self,tcp", "btl_tcp_if_include": "lo", "osc": "pt2pt"},
    "shm": SHARED,
    "auto": SHARED,
    "verbs": {"pml": "ucx", "osc": "ucx"},
}
"""Open MPI's parameters by transport. On one host, `auto` is shared memory to MPI. verbs: its UCX,
which chooses for itself (untested on hardware)."""

_KILL_S = 2.0
_ASK_S = 60.0
_ASK = "import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; "
_ASK += "print(mpi4py.__version__, MPI.Get_library_version())"


# --- whether it is here -------------------------------------------------------------------------


@cache
def why_absent() -> str | None:
    """Why MPI cannot be measured here, and what to install; None where it can."""
    if shutil.which("mpirun") is None:
        return f"mpirun is not on PATH; {INSTALL}"
    if importlib.util.find_spec("mpi4py") is None:
        return f"mpi4py is not installed; {INSTALL}"
    try:
        version()
    except BenchError as error:
        return str(error)
    return None


@cache
def version() -> str:
    """The library that mpi4py runs on, and mpi4py's own version; `BenchError` if it is not usable.

    Asked in a process of its own: whoever loads MPI keeps it.
    """
    try:
        asked = subprocess.run(
            [sys.executable, "-c", _ASK],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_ASK_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise BenchError(f"mpi4py did not load within {_ASK_S:g} s; {INSTALL}") from None
    if asked.returncode != 0:
        said = (asked.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise BenchError(f"mpi4py does not find its MPI library ({said}); {INSTALL}")
    own, _, library = asked.stdout.strip().partition(" ")
    found = re.match(r"(Open MPI) v?(\d[\w.]*)", library)
    if found is None:
        name = library.splitlines()[0] if library else "nothing"
        raise BenchError(f"mpi4py runs on {name}, and Open MPI is the peer; {INSTALL}")
    return f"{found[1]} {found[2]}, mpi4py {own}"


# --- starting -----------------------------------------------------------------------------------


def run_ranks(
    arguments: Sequence[str],
    ranks: int,
    *,
    transport: str,
    on_line: Callable[[str], object],
    deadline_s: float,
) -> None:
    """`spawn.run_ranks` by mpirun: the ranks call `adopt_rank`, and rank 0 alone prints.

    Whatever happens, mpirun and its ranks have ended when this returns, and left no file behind.
    """
    deadline = time.monotonic() + deadline_s
    job = f"mpirun -n {ranks} python {shlex.join(arguments)}"
    environment = rank_environment(0, ranks, free_port(), os.environ.get(TOKEN) or new_token())
    for name in ("RANK", "LOCAL_RANK"):
        del environment[name]
    processes: list[subprocess.Popen[bytes]] = []
    tail: deque[str] = deque(maxlen=2 * TAIL_LINES)  # of all ranks, and of mpirun
    with ExitStack() as stack:
        command = _mpirun(ranks, transport, _scratch(stack, None), _scratch(stack, "/dev/shm"))
        stack.enter_context(_sessions_ended(processes))
        stack.enter_context(ended(processes))
        process = subprocess.Popen(
            [*command, sys.executable, *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        processes.append(process)
        try:
            for (_, name), line in lines(pipes(processes), deadline):
                if line is not None:
                    (on_line if name == "stdout" else tail.append)(line)
        except TimeoutError:
            raise BenchError(
                f"{job}: had not ended after {deadline_s:g} s; its last lines:\n{indented(tail)}"
            ) from None
        check_exit(process, job, tail)


def in_force(transport: str) -> str:
    """Open MPI's parameters: those of `SETTINGS`, and the user's, which mpirun passes on."""
    prefix = "OMPI_MCA_"
    own = {n.removeprefix(prefix): v for n, v in os.environ.items() if n.startswith(prefix)}
    return " ".join(f"{name}={value}" for name, value in (own | SETTINGS[transport]).items())


def _mpirun(ranks: int, transport: str, session: str, memory: str) -> list[str]:
    """The command in front of python. session, memory: where it may make files."""
    parameters = {
        **SETTINGS[transport],
        "plm": "isolated",  # this host alone: no ssh is looked for
        "oob_tcp_if_include": "lo",
        "orte_tmpdir_base": session,
        "btl_vader_backing_directory": memory,
        "osc_sm_backing_directory": memory,
    }
    command = ["mpirun", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none"]
    for name, value in parameters.items():
        command += ["--mca", name, value]
    return [*command, "-n", str(ranks)]


def _scratch(stack: ExitStack, parent: str | None) -> str:
    """A new folder, removed at the end with what killed processes left in it."""
    if parent is not None and not os.access(parent, os.W_OK):
        parent = None
    made = tempfile.TemporaryDirectory(
        prefix="ucxgossip-mpi-", dir=parent, ignore_cleanup_errors=True
    )
    return stack.enter_context(made)


@contextmanager
def _sessions_ended(processes: list[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Kill what is left of the sessions that the processes led; these themselves have ended.

    mpirun puts each rank into a process group of its own, and if it had to be killed, nobody ends
    them. The session they keep, and its number is not used again while one of them is there.
    """
    try:
        yield
    finally:
        for process in processes:
            for member in _members(process.pid):
                with suppress(ProcessLookupError):
                    _kill(member)


def _kill(process_id: int) -> None:
    """Kill, and wait a little until it has ended: it is no child of ours."""
    descriptor = os.pidfd_open(process_id)
    try:
        os.kill(process_id, signal.SIGKILL)
        select.select([descriptor], [], [], _KILL_S)
    finally:
        os.close(descriptor)


def _members(session: int) -> Iterator[int]:
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            fields = path.read_text(errors="replace").rpartition(")")[2].split()
            if int(fields[3]) == session:
                yield int(path.parent.name)


# --- in a rank ----------------------------------------------------------------------------------


def adopt_rank() -> None:
    """Set RANK and LOCAL_RANK, as torchrun would, from what mpirun says."""
    for name in ("RANK", "LOCAL_RANK"):
        value = os.environ.get(f"OMPI_COMM_WORLD_{name}")
        if value is None:
            raise BenchError("this process was not started by Open MPI's mpirun")
        os.environ[name] = value
