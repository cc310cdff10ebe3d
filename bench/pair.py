"""Two processes that put to each other, for `bench put` and `doctor`.

The caller is one of them; the other is a child that does what it is told, a JSON line at a time.
Between measurements both are idle, so that a peer's own benchmark can run in between.
"""

from __future__ import annotations

import json
import select
import subprocess
import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import numpy as np

from ucxgossip import jit, ucp
from ucxgossip.bench import loops
from ucxgossip.bench.spawn import ended
from ucxgossip.errors import BenchError
from ucxgossip.ucp import lib, ops

_FLAG_ROOM = 64
WINDOW = 32
DEADLINE_S = 60.0


class Side:
    """One process of the pair: worker, memory of `nbytes` and the way to the other side."""

    def __init__(self, transport: str, nbytes: int, settings: Mapping[str, str]) -> None:
        self.nbytes = nbytes
        self.context = ucp.Context(transport, settings)
        self.worker = ucp.Worker(self.context)
        self.inbox = ucp.MemoryRegion(self.context, nbytes=nbytes + _FLAG_ROOM)
        self.source = ucp.MemoryRegion(self.context, nbytes=nbytes + _FLAG_ROOM)

    def describe(self) -> dict[str, Any]:
        """What the other side needs to connect."""
        return {
            "worker": self.worker.address.hex(),
            "address": self.inbox.address,
            "key": self.inbox.pack().hex(),
        }

    def connect(self, other: Mapping[str, Any]) -> None:
        """Make the endpoint and the remote key."""
        self.endpoint = ucp.Endpoint(self.worker, bytes.fromhex(other["worker"]))
        self.key = ucp.RemoteKey(self.endpoint, bytes.fromhex(other["key"]))
        self.remote = int(other["address"])

    def ping_pong(self, nbytes: int, samples: int, batch: int, starts: bool) -> list[int]:
        """Nanoseconds of each sampled round trip (mean of `batch`)."""
        times = np.zeros(samples, np.int64)
        status = loops.ping_pong(
            self.worker.handle,
            self.endpoint.handle,
            self.source.address,
            self.inbox.address,
            nbytes,
            self.remote,
            self.key.handle,
            self.source.param_address,
            starts,
            times,
            batch,
            _deadline(),
        )
        _check(status, "ping-pong")
        # Cleared at the end, when the other side puts no more; at the start it may have begun.
        self.inbox.bytes[nbytes - 1] = self.source.bytes[nbytes - 1] = 0
        return [int(each) for each in times]

    def stream(self, nbytes: int, puts: int) -> int:
        """Nanoseconds of `puts` puts, `WINDOW` in flight, until all are in place."""
        window = np.zeros(WINDOW, np.int64)
        elapsed = loops.stream(
            self.worker.handle,
            self.endpoint.handle,
            self.source.address,
            nbytes,
            self.remote,
            self.key.handle,
            self.source.param_address,
            puts,
            window,
            _deadline(),
        )
        _check(elapsed, "stream")
        return int(elapsed)

    def serve(self, value: int) -> None:
        """Progress until the other side raises this side's flag to `value`."""
        flag = self.inbox.address + self.nbytes
        _check(loops.serve(self.worker.handle, flag, value, _deadline()), "serve")

    def raise_flag(self, value: int) -> None:
        """Put `value` into the other side's flag."""
        self.source.bytes[self.nbytes] = value
        param = self.source.param_address
        put = ops.put(
            self.endpoint.handle,
            self.source.address + self.nbytes,
            1,
            self.remote + self.nbytes,
            self.key.handle,
            param,
        )
        self.endpoint.wait(put, ops.PUT, DEADLINE_S)

    def close(self) -> None:
        """Release everything; the other side may be gone."""
        if hasattr(self, "endpoint"):
            self.endpoint.abandon()
        self.context.close()


def _deadline() -> int:
    return jit.now_ns() + int(DEADLINE_S * 1e9)


def _check(status: int, what: str) -> None:
    if status == loops.TIMED_OUT:
        raise BenchError(f"{what}: the other process did not answer within {DEADLINE_S:g} s")
    lib.check(min(status, 0), ops.PUT, what)


class Pair:
    """This process and a child, over `transport`. Use as a context manager."""

    def __init__(
        self, transport: str, nbytes: int, settings: Mapping[str, str] | None = None
    ) -> None:
        chosen = dict(settings or {})
        chosen.setdefault("NET_DEVICES", "lo")
        self._processes: list[subprocess.Popen[bytes]] = []
        self._ended = ended(self._processes)
        self._ended.__enter__()
        try:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "ucxgossip.bench.pair", transport, str(nbytes)]
                + [json.dumps(chosen)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            self._processes.append(self._child)
            self.side = Side(transport, nbytes, chosen)
            self._tell(self.side.describe())
            self.side.connect(self._hear())
            self._flag = 0
        except BaseException:
            self._ended.__exit__(*sys.exc_info())
            raise

    def _tell(self, message: Mapping[str, Any]) -> None:
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps(message).encode() + b"\n")
        self._child.stdin.flush()

    def _hear(self) -> dict[str, Any]:
        assert self._child.stdout is not None
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            ready, _, _ = select.select([self._child.stdout], [], [], 1.0)
            if ready:
                line = self._child.stdout.readline()
                if not line:
                    raise BenchError("the other process of the pair ended; see its message above")
                if line.startswith(b"{"):
                    answer: dict[str, Any] = json.loads(line)
                    return answer
        raise BenchError(f"the other process of the pair said nothing for {DEADLINE_S:g} s")

    def latency(self, nbytes: int, samples: int, batch: int) -> list[float]:
        """One-way microseconds of each sample."""
        self._tell({"do": "ping", "nbytes": nbytes, "samples": samples, "batch": batch})
        times = self.side.ping_pong(nbytes, samples, batch, starts=True)
        self._hear()
        return [each / 2e3 for each in times]

    def bandwidth(self, nbytes: int, puts: int) -> float:
        """10**6 bytes a second of `puts` puts in a row."""
        self._flag = self._flag % 255 + 1
        self._tell({"do": "serve", "value": self._flag})
        elapsed = self.side.stream(nbytes, puts)
        self.side.raise_flag(self._flag)
        self._hear()
        return nbytes * puts / elapsed * 1e3

    def completes_alone(self, nbytes: int, seconds: float = 0.3) -> bool:
        """Whether a put becomes visible while the target calls no progress."""
        side = self.side
        put = ops.put(
            side.endpoint.handle,
            side.source.address,
            nbytes,
            side.remote,
            side.key.handle,
            side.source.param_address,
        )
        if put > 0:
            ops.free(put)
        lib.check(min(put, 0), ops.PUT)
        flush = ops.flush(side.endpoint.handle, side.source.param_address)
        deadline = time.monotonic() + seconds
        alone = flush == 0
        while not alone and time.monotonic() < deadline:
            side.worker.progress()
            alone = ops.check(flush) != 1
        self._flag = self._flag % 255 + 1
        self._tell({"do": "serve", "value": self._flag})
        if flush > 0:
            side.endpoint.wait(flush, ops.FLUSH, DEADLINE_S)
        side.raise_flag(self._flag)
        self._hear()
        return alone

    def close(self) -> None:
        """End the child and release everything."""
        try:
            self._tell({"do": "stop"})
            self._child.wait(timeout=5.0)
        except (OSError, subprocess.TimeoutExpired):
            pass  # ended below by its id
        finally:
            self.side.close()
            self._ended.__exit__(None, None, None)
            if self._child.stdin is not None:
                self._child.stdin.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def main() -> None:
    """The child: connect, then do what each line says until told to stop."""
    transport, nbytes, settings = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
    side = Side(transport, nbytes, settings)
    side.connect(json.loads(sys.stdin.readline()))
    print(json.dumps(side.describe()), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        if order["do"] == "stop":
            break
        if order["do"] == "ping":
            side.ping_pong(order["nbytes"], order["samples"], order["batch"], starts=False)
        else:
            side.serve(order["value"])
        print(json.dumps({"done": order["do"]}), flush=True)
    side.close()


if __name__ == "__main__":
    main()
