"""Processes of a test as forks of one that has imported torch, which is most of a short one's time.

What a fork inherits is modules alone: no group, no UCX context, no thread. Tests of what happens
when Python starts or ends (torchrun, `bench.spawn`, start-up) start interpreters of their own.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from typing import IO, Any
from unittest import mock

import torch

from ucxgossip.bench.spawn import start_rank as _start_rank

_context = multiprocessing.get_context("forkserver")
# With "__main__", which is pytest, or each fork would import that anew.
_PRELOADED = ["__main__", "forked", "torch.distributed", "torch._dynamo", "ucxgossip.mixing"]
_context.set_forkserver_preload(_PRELOADED)


def _run(arguments: Sequence[str], environment: Mapping[str, str], ends: list[Connection]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, end in zip((1, 2), ends, strict=True):
        os.dup2(end.fileno(), descriptor)
        end.close()
    # Line by line, as PYTHONUNBUFFERED has it.
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    kind, sys.argv = arguments[0], list(arguments)
    try:
        if kind == "-c":
            exec(arguments[1], {"__name__": "__main__"})
        elif kind == "-m":
            del sys.argv[0]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(kind, run_name="__main__")
    finally:
        atexit._run_exitfuncs()


class Forked:
    """``python ARGUMENTS`` (a script, ``-m MODULE`` or ``-c CODE``); what is used of `Popen`.

    out: the descriptor that it prints to, errors too. Without one pipes, `stdout` and, if errors
    come `apart`, `stderr`.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        out: int | None = None,
        apart: bool = False,
    ) -> None:
        self.stdout: IO[bytes] | None = None
        self.stderr: IO[bytes] | None = None
        writes = -1
        if out is None:
            reads, writes = os.pipe()
            self.stdout, out = os.fdopen(reads, "rb", 0), writes
        ends = [Connection(os.dup(out), readable=False) for _ in range(2)]
        if apart:
            reads, into = os.pipe()
            self.stderr = os.fdopen(reads, "rb", 0)
            ends[1].close()
            ends[1] = Connection(into, readable=False)
        try:
            given = (list(arguments), dict(environment), ends)
            self._process = _context.Process(target=_run, args=given, daemon=True)
            with mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1"}):
                self._process.start()
        finally:
            for end in ends:
                end.close()
            if writes >= 0:
                os.close(writes)
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            raise subprocess.TimeoutExpired("a fork", timeout or 0.0)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()


def start_rank(
    arguments: Sequence[str],
    rank: int,
    environment: Mapping[str, str],
    through: Sequence[str] = (),
) -> Any:
    """In place of `bench.spawn.start_rank`; what goes through another command is no fork."""
    if through:
        return _start_rank(arguments, rank, environment, through)
    return Forked(arguments, environment, apart=rank == 0)
