"""Two processes that put to each other, for `bench put` and `doctor`.

The caller is one of them; the other is a child that does what it is told, a JSON line at a time.
Between measurements both are idle, so that a peer's own benchmark can run in between.
"""

from __future__ import annotations

import hashlib
import json
import select
import subprocess
import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ucxgossip import jit, ucp
from ucxgossip.bench import loops, pair_device
from ucxgossip.bench.spawn import ended
from ucxgossip.errors import ArgumentError, BenchError
from ucxgossip.ucp import lib, ops

_FLAG_ROOM = 64
WINDOW = 32
DEADLINE_S = 60.0


class Side:
    """One process of the pair: worker, memory of `nbytes` and the way to the other side.

    memory: on a device, for what is put; flags stay in host memory.
    """

    def __init__(
        self,
        transport: str,
        nbytes: int,
        settings: Mapping[str, str],
        memory: pair_device.PairMemory | None = None,
    ) -> None:
        self.memory = memory
        self.nbytes = nbytes if memory is None else 0
        self.context = ucp.Context(transport, settings)
        self.worker = ucp.Worker(self.context)
        self.inbox = ucp.MemoryRegion(self.context, nbytes=self.nbytes + _FLAG_ROOM)
        self.source = ucp.MemoryRegion(self.context, nbytes=self.nbytes + _FLAG_ROOM)
        self.data, self.data_inbox = self.source, self.inbox
        if memory is not None:
            self.data = ucp.MemoryRegion(self.context, array=memory.source)
            self.data_inbox = ucp.MemoryRegion(self.context, array=memory.inbox)

    def describe(self) -> dict[str, Any]:
        """What the other side needs to connect."""
        return {
            "worker": self.worker.address.hex(),
            "address": self.inbox.address,
            "key": self.inbox.pack().hex(),
            "data_address": self.data_inbox.address,
            "data_key": self.data_inbox.pack().hex(),
        }

    def connect(self, other: Mapping[str, Any]) -> None:
        """Make the endpoint and the remote key."""
        self.endpoint = ucp.Endpoint(self.worker, bytes.fromhex(other["worker"]))
        self.key = ucp.RemoteKey(self.endpoint, bytes.fromhex(other["key"]))
        self.remote = int(other["address"])
        self.data_key = ucp.RemoteKey(self.endpoint, bytes.fromhex(other["data_key"]))
        self.data_remote = int(other["data_address"])

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
            self.data.address,
            nbytes,
            self.data_remote,
            self.data_key.handle,
            self.data.param_address,
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


def check_device(device: str) -> None:
    """`ArgumentError` for a device that puts are not measured on."""
    if device not in pair_device.DEVICES:
        known = ", ".join(pair_device.DEVICES)
        raise ArgumentError(f"device is {device!r}; choose one of {known}")


def _digest(values: NDArray[np.uint8]) -> str:
    return hashlib.sha256(values.tobytes()).hexdigest()


class Pair:
    """This process and a child, over `transport`. Use as a context manager.

    device: "cuda" puts between the memories of CUDA devices (untested on hardware).
    """

    def __init__(
        self,
        transport: str,
        nbytes: int,
        settings: Mapping[str, str] | None = None,
        device: str = "cpu",
    ) -> None:
        check_device(device)
        self.device = device
        memory = pair_device.PairMemory(nbytes, 0) if device == "cuda" else None
        chosen = dict(settings or {})
        if memory is not None:
            chosen = {**pair_device.SETTINGS[transport], **chosen}
        if transport != "verbs":
            chosen.setdefault("NET_DEVICES", "lo")
        self._processes: list[subprocess.Popen[bytes]] = []
        self._ended = ended(self._processes)
        self._ended.__enter__()
        try:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "ucxgossip.bench.pair", transport, str(nbytes)]
                + [json.dumps(chosen), device],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            self._processes.append(self._child)
            self.side = Side(transport, nbytes, chosen, memory)
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
        """One-way microseconds of each sample; on a device, those of a put until it is flushed."""
        if self.device != "cpu":
            return self._flushed(nbytes, samples)
        self._tell({"do": "ping", "nbytes": nbytes, "samples": samples, "batch": batch})
        times = self.side.ping_pong(nbytes, samples, batch, starts=True)
        self._hear()
        return [each / 2e3 for each in times]

    def _flushed(self, nbytes: int, samples: int) -> list[float]:
        """The CPU cannot see a put arrive on a device, nor answer it."""
        self._flag = self._flag % 255 + 1
        self._tell({"do": "serve", "value": self._flag})
        times = [self.side.stream(nbytes, 1) / 1e3 for _ in range(samples)]
        self.side.raise_flag(self._flag)
        self._hear()
        return times

    def verify(self, nbytes: int) -> bool:
        """Whether a put of `nbytes` bytes on a device is there, byte for byte."""
        memory = self.side.memory
        assert memory is not None
        values = np.random.default_rng(nbytes).integers(0, 256, nbytes, np.uint8)
        memory.fill(values)
        self.bandwidth(nbytes, 1)
        self._tell({"do": "digest", "nbytes": nbytes})
        return bool(self._hear()["digest"] == _digest(values))

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
            side.data.address,
            nbytes,
            side.data_remote,
            side.data_key.handle,
            side.data.param_address,
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
    memory = pair_device.PairMemory(nbytes, 1) if sys.argv[4] == "cuda" else None
    side = Side(transport, nbytes, settings, memory)
    side.connect(json.loads(sys.stdin.readline()))
    print(json.dumps(side.describe()), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        if order["do"] == "stop":
            break
        if order["do"] == "digest":
            assert memory is not None
            print(json.dumps({"digest": _digest(memory.came()[: order["nbytes"]])}), flush=True)
            continue
        if order["do"] == "ping":
            side.ping_pong(order["nbytes"], order["samples"], order["batch"], starts=False)
        else:
            side.serve(order["value"])
        print(json.dumps({"done": order["do"]}), flush=True)
    side.close()


if __name__ == "__main__":
    main()
