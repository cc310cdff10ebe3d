"""UCX's own benchmark, `ucx_perftest`, as the peer of `bench put`.

It is run as its authors mean it to be run, and on the library that we measure:

* The wheel's binary finds no libucp of its own (its RPATH names another folder) and falls back on
  the system's, often older one. So it gets LD_LIBRARY_PATH, and what it has mapped is checked.
* Only the transport is chosen (see TRANSPORTS); the protocol for each size is UCX's choice.
* Its defaults are kept: busy polling, a window of 32 puts for bandwidth and 1 for latency, a
  warm-up of at most 0.1 s, no pinning. For 8 B over TCP on two cores, registered memory with one
  thread (`-z -M single`) and pinning (`-c`) made no difference beyond its own spread. That spread
  is wide: from one pair of processes to the next 11.2 or 14.5 us, hardly anything between. So one
  run says little; take several, interleaved with what they are compared to.

Latency is one way, half a round trip, the median of the last 2048 round trips. Bandwidth is that
of a whole run, from the first put until the target has confirmed the last; that last one is an
extra put which it does not count, so a run has at least 32. ucx_perftest's "MB/s" are 2**20 bytes
a second; here they are 10**6.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

from ucxgossip.bench.spawn import ended, free_port, lines
from ucxgossip.errors import ArgumentError, BenchError

# Shared memory is `posix` alone, as for our own puts: with `cma` beside it larger puts are slower.
TRANSPORTS: Mapping[str, Mapping[str, str]] = {
    "tcp": {"UCX_TLS": "tcp", "UCX_NET_DEVICES": "lo"},
    "shm": {"UCX_TLS": "posix"},
    "auto": {},
    "verbs": {"UCX_TLS": "ib"},
}

# Guesses of what a put costs, (seconds, bytes a second), for the first choice of iterations.
_COSTS = {
    "tcp": (12e-6, 4e9),
    "shm": (0.1e-6, 12e9),
    "auto": (12e-6, 12e9),
    "verbs": (2e-6, 12e9),
}
# A run that measured for less than this part of the time asked for is repeated with more.
_ENOUGH = 0.25

# Its CSV line: iterations, latencies (us): percentile, average, overall; bandwidths (2**20 B/s):
# average, overall; message rates: average, overall.
_CSV = re.compile(r"\d+(?:,\d+\.\d+){5}(?:,\d+){2}")
_LOG_PREFIX = re.compile(r"^\[[\d.]+\] \[[^]]*\]\s*")
_LISTENING = "Waiting for connection"


class _Test(NamedTuple):
    """A test of ucx_perftest: its name, puts in a row per iteration, and the least iterations."""

    name: str
    puts: int
    least: int


_LATENCY = _Test("ucp_put_lat", puts=2, least=10)
_BANDWIDTH = _Test("ucp_put_bw", puts=1, least=32)


@dataclass(frozen=True)
class Perftest:
    """A ucx_perftest and the libucp it shall run on; None where the system's loader decides."""

    binary: Path
    library: Path | None

    def latency(
        self, transport: str, nbytes: int, *, seconds: float = 0.5, deadline_s: float = 60.0
    ) -> float:
        """Return the one-way latency in microseconds of puts of `nbytes` bytes.

        It measures for roughly `seconds`; a run that takes more than `deadline_s` is an error.
        """
        return self._measure(_LATENCY, transport, nbytes, seconds, deadline_s)[1]

    def bandwidth(
        self, transport: str, nbytes: int, *, seconds: float = 0.5, deadline_s: float = 60.0
    ) -> float:
        """Return the bandwidth in 10**6 bytes a second of a stream of puts of `nbytes` bytes.

        It measures for roughly `seconds`; a run that takes more than `deadline_s` is an error.
        """
        return self._measure(_BANDWIDTH, transport, nbytes, seconds, deadline_s)[5] * 2**20 / 1e6

    def _measure(
        self, test: _Test, transport: str, nbytes: int, seconds: float, deadline_s: float
    ) -> list[float]:
        """Return the fields of `_CSV` from a run of roughly `seconds`."""
        guess = test.puts * _cost(transport, nbytes)
        iterations = max(test.least, round(seconds / guess))
        fields = self._run_test(test, transport, nbytes, iterations, deadline_s)
        measured = iterations * test.puts * fields[3] * 1e-6
        if measured < _ENOUGH * seconds and iterations > test.least:
            iterations = round(iterations * seconds / max(measured, 1e-6))
            fields = self._run_test(test, transport, nbytes, iterations, deadline_s)
        return fields

    def _run_test(
        self, test: _Test, transport: str, nbytes: int, iterations: int, deadline_s: float
    ) -> list[float]:
        arguments = ["-t", test.name, "-s", str(nbytes), "-n", str(iterations), "-f", "-v"]
        what = f"ucx_perftest -t {test.name} of {nbytes} B over {transport}"
        try:
            output = self._run(transport, arguments, time.monotonic() + deadline_s)
        except TimeoutError:
            raise BenchError(f"{what} had not ended after {deadline_s:g} s") from None
        results = [line for who, line in output if who == "client" and _CSV.fullmatch(line.strip())]
        if len(results) != 1:
            said = "\n".join(f"    {who}: {_LOG_PREFIX.sub('', line)}" for who, line in output)
            raise BenchError(f"{what} gave no result; it said:\n{said}")
        return [float(field) for field in results[0].split(",")]

    def _run(self, transport: str, arguments: list[str], deadline: float) -> list[tuple[str, str]]:
        """Run a server and a client; return (who, line) for all they printed.

        TimeoutError if they have not ended when `time.monotonic()` passes `deadline`.
        """
        command = [str(self.binary), "-p", str(free_port())]
        environment = self._environment(transport)
        processes: list[subprocess.Popen[bytes]] = []
        # A terminal, because into a pipe the server would say that it listens only when it ends.
        ours, theirs = os.openpty()
        with ended(processes), os.fdopen(ours, "rb", buffering=0):
            with os.fdopen(theirs, "wb", buffering=0) as terminal:
                processes.append(_start(command, environment, terminal))
            output = _await_listening(ours, deadline)
            _check_library(processes[0].pid, self.library)
            client = _start([*command, "127.0.0.1", *arguments], environment, subprocess.PIPE)
            processes.append(client)
            assert client.stdout is not None
            streams = {"server": ours, "client": client.stdout.fileno()}
            output += [(who, line) for who, line in lines(streams, deadline) if line is not None]
        return output

    def _environment(self, transport: str) -> dict[str, str]:
        environment = {**os.environ, **_transport(transport)}
        if self.library is not None:
            own = environment.get("LD_LIBRARY_PATH")
            folder = str(self.library.parent)
            environment["LD_LIBRARY_PATH"] = f"{folder}:{own}" if own else folder
        return environment


def find_perftest(library: str | Path | None = None) -> Perftest:
    """Find the ucx_perftest that belongs to the libucp at `library`, by default the wheel's.

    It is looked for beside that library (`../bin`), then on PATH.
    """
    path = _wheel_library() if library is None else Path(library)
    if path is not None and not path.is_absolute():
        path = None  # a bare name, which the system's loader finds for ucx_perftest too
    beside = path.parent.parent / "bin" / "ucx_perftest" if path else None
    if beside is not None and os.access(beside, os.X_OK):
        return Perftest(beside, path)
    on_path = shutil.which("ucx_perftest")
    if on_path is None:
        raise BenchError(
            "ucx_perftest is neither beside the UCX library in use nor on PATH: install it "
            "(pip install libucx-cu12, or the system's ucx-utils), or leave out "
            "--against ucx_perftest"
        )
    return Perftest(Path(on_path), path)


def _wheel_library() -> Path | None:
    wheel = importlib.util.find_spec("libucx")
    if wheel is None or wheel.origin is None:
        return None
    library = Path(wheel.origin).parent / "lib" / "libucp.so.0"
    return library if library.exists() else None


def _transport(name: str) -> Mapping[str, str]:
    if name not in TRANSPORTS:
        raise ArgumentError(f"transport {name!r}: choose one of {', '.join(TRANSPORTS)}")
    return TRANSPORTS[name]


def _cost(transport: str, nbytes: int) -> float:
    """Guess the seconds that one put takes."""
    _transport(transport)
    if nbytes < 1:
        raise ArgumentError(f"a put of {nbytes} bytes cannot be measured: use at least 1")
    start, rate = _COSTS[transport]
    return start + nbytes / rate


def _start(
    command: list[str], environment: Mapping[str, str], stdout: IO[bytes] | int
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.STDOUT,
    )


def _await_listening(server: int, deadline: float) -> list[tuple[str, str]]:
    said: list[tuple[str, str]] = []
    for _, line in lines({"server": server}, deadline):
        if line is None:
            break
        if line.startswith(_LISTENING):
            return said
        said.append(("server", line))
    text = "\n".join(f"    {_LOG_PREFIX.sub('', line)}" for _, line in said)
    raise BenchError(f"ucx_perftest ended before it listened; it said:\n{text}")


def _check_library(process_id: int, library: Path | None) -> None:
    """Raise unless the process has mapped the libucp that lies where `library` does, and no other.

    The same folder, not the same file: in the wheel libucp.so and libucp.so.0 are two copies.
    """
    if library is None:
        return
    folder = library.resolve().parent
    maps = Path(f"/proc/{process_id}/maps").read_text(encoding="utf-8").splitlines()
    paths = {Path(line.split(maxsplit=5)[5]) for line in maps if "/libucp" in line}
    mapped = [path for path in paths if path.name.startswith("libucp")]
    if not mapped or not all(path.parent.samefile(folder) for path in mapped):
        names = ", ".join(map(str, mapped)) or "no libucp"
        raise BenchError(
            f"ucx_perftest runs on {names}, not on {library} which we measure: the comparison "
            "would not be fair; use the ucx_perftest of the same UCX"
        )
