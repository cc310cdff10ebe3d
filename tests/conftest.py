"""What several test files share: a store in memory, ranks as threads, Python in a subprocess."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import lru_cache
from typing import Any

import pytest
from hypothesis import settings

import forked
import ucxgossip as ug
from device_pair import DevicePair
from engine_pair import Pair, make_pair
from ucxgossip import trust
from ucxgossip.bench import kills, spawn
from ucxgossip.engine import staging
from ucxgossip.engine import words as w

DEADLINE = 60.0

settings.register_profile("house", deadline=None)  # a time slice that is stolen is no slow test
settings.load_profile("house")

# Before any test and for every process that one starts: the tests leave this user's home alone.
os.environ[trust.TOKEN] = trust.new_token()


class MemoryStore:
    """The methods of ``torch.distributed.Store`` that rendezvous uses, for ranks as threads."""

    def __init__(self, get_timeout: float = DEADLINE) -> None:
        self.values: dict[str, bytes] = {}
        self._changed = threading.Condition()
        self._get_timeout = timedelta(seconds=get_timeout)
        self.calls: list[tuple[str, str]] = []

    def set(self, key: str, value: str | bytes) -> None:
        with self._changed:
            self.calls.append(("set", key))
            self.values[key] = value.encode() if isinstance(value, str) else bytes(value)
            self._changed.notify_all()

    def get(self, key: str) -> bytes:
        self.wait([key], self._get_timeout)
        return self.values[key]

    def add(self, key: str, amount: int) -> int:
        with self._changed:
            self.calls.append(("add", key))
            value = int(self.values.get(key, b"0")) + amount
            self.values[key] = str(value).encode()
            self._changed.notify_all()
            return value

    def check(self, keys: list[str]) -> bool:
        with self._changed:
            return all(key in self.values for key in keys)

    def wait(self, keys: list[str], timeout: timedelta) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: self.check(keys), timeout.total_seconds()):
                raise TimeoutError(f"wait timeout after {timeout}, keys: {', '.join(keys)}")


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def as_ranks() -> Callable[..., list[Any]]:
    """Run ``function(rank)`` in a thread a rank; what each returned, or the exception it raised."""

    def run(size: int, function: Callable[[int], Any], deadline: float = DEADLINE) -> list[Any]:
        ends: list[Any] = [None] * size

        def body(rank: int) -> None:
            try:
                ends[rank] = function(rank)
            except Exception as error:
                ends[rank] = error

        threads = [threading.Thread(target=body, args=(r,), daemon=True) for r in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(deadline)
        hung = [rank for rank, thread in enumerate(threads) if thread.is_alive()]
        assert not hung, f"ranks {hung} did not end within {deadline} s"
        return ends

    return run


@lru_cache(maxsize=1)
def compiled() -> None:
    """Compile what is not in the cache, which may take longer than a test's deadline."""
    with ug.join(0, 1) as group:
        group.engine.compile_for_devices()


@pytest.fixture
def job(as_ranks: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """Run ``body(group)`` on `size` ranks that join over a store in memory; what each returned.

    raw: exceptions among it; else the first that is no consequence of another rank's is raised.
    """

    def run(
        size: int,
        body: Callable[[ug.Group], Any],
        transport: str = "shm",
        timeout: float = 30.0,
        raw: bool = False,
        tuning: ug.Tuning | None = None,
        verify: bool = False,
    ) -> list[Any]:
        compiled()
        store = MemoryStore()  # a test may run several jobs

        def rank(number: int) -> Any:
            chosen = {"tuning": tuning, "verify": verify}
            with ug.join(number, size, store, transport, timeout, **chosen) as group:
                return body(group)

        ends = as_ranks(size, rank, max(DEADLINE, timeout))
        failures = [end for end in ends if isinstance(end, BaseException)]
        if failures and not raw:
            raise next((f for f in failures if not isinstance(f, ug.errors.PeerError)), failures[0])
        return ends

    return run


@pytest.fixture
def python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `code` in a fresh interpreter; no UCX variable of this process reaches it.

    variables: added to the environment. The process is killed at the deadline.
    """

    def run(
        code: str, variables: dict[str, str] | None = None, deadline: float = DEADLINE
    ) -> subprocess.CompletedProcess[str]:
        kept = {
            name: value
            for name, value in os.environ.items()
            if name == trust.TOKEN or not name.startswith("UCX")
        }
        return subprocess.run(
            [sys.executable, "-c", code],
            env=kept | (variables or {}),
            timeout=deadline,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


@pytest.fixture
def forked_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that `bench.spawn` starts are forks of a process that has imported torch."""
    for module in (spawn, kills):
        monkeypatch.setattr(module, "start_rank", forked.start_rank)


@pytest.fixture(params=["tcp", "shm"])
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def pair(transport: str, request: pytest.FixtureRequest) -> Iterator[Pair]:
    made = make_pair(transport, *getattr(request, "param", (4096, 2)))
    yield made
    for box in made.boxes:
        assert box.intact(), "a guard byte of a mailbox was overwritten"
    for engine in made.engines:
        assert engine.words[w.MALFORMED] == 0
        engine.close()
        engine.context.close()


@pytest.fixture
def make(transport: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., DevicePair]]:
    """Two engines whose rounds are of memory on a fake device (`device_pair`).

    As few staging places as with large chunks, so that rounds must wait for them.
    """
    monkeypatch.setattr(staging, "STAGED", 0)
    made: list[DevicePair] = []

    def build(
        nbytes: int, depth: int = 2, on: tuple[int, ...] = (0, 1), pace: int = 1, **more: Any
    ) -> DevicePair:
        seed, direct = more.pop("seed", 0), more.pop("direct", False)
        pair = make_pair(transport, nbytes, depth, **more)
        made.append(DevicePair(pair, on, pace, seed, direct))
        return made[-1]

    yield build
    for each in made:
        each.device.check()
        for box in each.pair.boxes:
            assert box.intact(), "a guard byte of a mailbox was overwritten"
        for engine in each.pair.engines:
            engine.close()
            engine.context.close()
        assert each.device.idle()
        assert not each.device.pinned and not each.device.live and not each.device.mapped
