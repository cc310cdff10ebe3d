"""Processes of a test as forks of one that has imported torch, which is most of a short one's time.

The process that forks has modules and nothing else: no group, no UCX context, no thread. But forks
have one layout of memory and one seed of hashes, and end by ``os._exit``; so some tests start
interpreters of their own (test_spawn's `verified`, torchrun, `bench.spawn`, start-up).
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any
from unittest import mock

import torch

from ucxgossip.bench.spawn import start_rank as _start_rank

_context = multiprocessing.get_context("forkserver")
# pytest is what each fork takes for its main module; optimizers import torch._dynamo.
_PRELOADED = ["pytest", "forked", "torch.distributed", "torch._dynamo", "ucxgossip.mixing"]


@lru_cache(maxsize=1)
def _start_server() -> None:
    """Start the process that forks; it finds this module, and torch has one thread there."""
    _context.set_forkserver_preload(_PRELOADED)
    folders = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    with mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1", "PYTHONPATH": folders}):
        forkserver.ensure_running()


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
            _start_server()
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
            with suppress(ProcessLookupError):  # it has ended since, and somebody else reaped it
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
