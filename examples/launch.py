"""One torchrun job: its events as they come, a deadline, and never a process left behind.

torchrun gives every worker a session of its own, so that no signal to one process group reaches
them all, and a killed torchrun leaves its workers running. Every process of a job therefore
inherits a mark in its environment, by which `stop` finds whatever is left.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

MARK = "UCXGOSSIP_DEMO_JOB"
GRACE_S = 5.0
EVENT_PREFIX = "@"


class JobFailed(Exception):
    """A job that did not end well: the reason, and what its processes wrote."""

    def __init__(self, reason: str, output: str) -> None:
        super().__init__(reason)
        self.output = output


class Job:
    """`ranks` processes of `script` under torchrun, for the length of a `with` block."""

    def __init__(
        self, script: Path, arguments: Sequence[str], *, ranks: int, deadline_s: float
    ) -> None:
        self.command = [
            *(sys.executable, "-m", "ucxgossip", "run", "--standalone"),
            *("--nproc-per-node", str(ranks), str(script), *arguments),
        ]
        self.deadline_s = deadline_s
        self._mark = f"{MARK}={uuid.uuid4().hex}"
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._said: list[str] = []

    def __enter__(self) -> Job:
        name, _, value = self._mark.partition("=")
        self._ends_at = time.monotonic() + self.deadline_s
        self._errors: IO[str] = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self._torchrun = subprocess.Popen(
            self.command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C is ours to handle
            env=quiet_environment() | {name: value},
        )
        threading.Thread(target=self._read, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
        self._errors.close()

    def events(self) -> Iterator[dict[str, Any]]:
        """What rank 0 reports, until the job has ended; JobFailed when it failed or is late."""
        while (line := self._next_line()) is not None:
            if line.startswith(EVENT_PREFIX):
                yield json.loads(line[len(EVENT_PREFIX) :])
            else:
                self._said.append(line)
        try:
            status = self._torchrun.wait(self._left())
        except subprocess.TimeoutExpired:
            raise self._failed(f"did not end within {self.deadline_s:g} s") from None
        if status != 0:
            raise self._failed(f"torchrun ended with status {status}")

    def stop(self) -> None:
        """End every process of the job, politely first. Idempotent."""
        if self._torchrun.poll() is None:
            self._torchrun.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._torchrun.wait(GRACE_S)
        for pid in processes_marked(self._mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._torchrun.wait()

    def _read(self) -> None:
        assert self._torchrun.stdout is not None
        for line in self._torchrun.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def _next_line(self) -> str | None:
        try:
            return self._lines.get(timeout=self._left())
        except queue.Empty:
            raise self._failed(f"did not end within {self.deadline_s:g} s") from None

    def _left(self) -> float:
        return max(0.0, self._ends_at - time.monotonic())

    def _failed(self, reason: str) -> JobFailed:
        self.stop()
        self._errors.seek(0)
        return JobFailed(reason, "".join(self._said) + self._errors.read())


def quiet_environment() -> dict[str, str]:
    """Ours, with one compute thread a rank and gloo on the loopback, where gossip's TCP runs."""
    return {"GLOO_SOCKET_IFNAME": "lo"} | os.environ | {"OMP_NUM_THREADS": "1"}


def processes_marked(mark: str) -> list[int]:
    """The processes with `mark` (NAME=value) in their environment."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark.encode() in entry.read_bytes().split(b"\0"):
                found.append(int(entry.parent.name))
    return found
