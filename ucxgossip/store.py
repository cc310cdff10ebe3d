"""The key-value store that the ranks of a job meet at, and this process's place in the job.

torch's TCPStore by default (torchrun starts one anyway, and it is the only thing taken from torch
below the hook), or anything with the five methods of `Store`.

The timeouts of torch's client end only waits for keys: when the process that serves the store is
stopped, or its host is, every call of the client waits for an answer for ever (2.13, tried with
SIGSTOP). So each call is made in a thread of its own, which is left behind when it does not return
(`Bounded`). Calls are rare; a thread costs them about 50 us. And where the store does not listen
yet when the client connects, it sleeps for half a second or more: so the listener is waited for
before.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol, TypeVar

from ucxgossip.errors import ArgumentError, PortInUseError, RendezvousError

_CONNECT_GRACE = 5.0
"""Seconds beyond its own timeout that torch's store may take to connect."""

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.005, 0.1
"""Between two looks whether the store is there."""

LOOPBACK = ("127.0.0.1", "localhost", "::1")

T = TypeVar("T")


class Store(Protocol):
    """What is used of ``torch.distributed.Store``."""

    def set(self, key: str, value: Any, /) -> None:
        """Write a value."""

    def get(self, key: str, /) -> bytes:
        """Read a value; waits for it."""

    def add(self, key: str, amount: int, /) -> int:
        """Add to a counter; the new value."""

    def check(self, keys: list[str], /) -> bool:
        """Whether all keys exist."""

    def wait(self, keys: list[str], timeout: timedelta, /) -> None:
        """Wait for keys; raises when the time is up."""


@dataclass(frozen=True)
class Place:
    """This process's place in the job, as torchrun's environment gives it."""

    rank: int
    size: int
    host: str
    port: int
    local_size: int

    @classmethod
    def from_environment(cls, rank: int | None = None, size: int | None = None) -> Place:
        """RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT, LOCAL_WORLD_SIZE; arguments go first."""
        if rank is None and size is None and not {"RANK", "WORLD_SIZE"} & set(os.environ):
            _refuse_other_launchers()
        rank = _whole("RANK", 0) if rank is None else rank
        size = _whole("WORLD_SIZE", 1) if size is None else size
        for name, value in (("rank", rank), ("world size", size)):
            if type(value) is not int:
                raise ArgumentError(f"{name} is {value!r}; must be a whole number")
        if size < 1:
            raise ArgumentError(f"world size is {size}; must be at least 1")
        if not 0 <= rank < size:
            raise ArgumentError(f"rank {rank} does not fit world size {size}")
        host = os.environ.get("MASTER_ADDR", "")
        local = _whole("LOCAL_WORLD_SIZE", 1)
        if host in LOOPBACK:  # which no rank of another host would reach, however it was started
            local = size
        return cls(rank, size, host or "127.0.0.1", _whole("MASTER_PORT", 29500), local)

    @property
    def one_host(self) -> bool:
        """Whether all ranks are on this host."""
        return self.local_size == self.size

    def founders(self, min_size: int | None) -> int:
        """How many ranks begin the job: `min_size`, else UCXGOSSIP_MIN_SIZE, else all."""
        chosen = _whole("UCXGOSSIP_MIN_SIZE", self.size) if min_size is None else min_size
        if type(chosen) is not int or not 1 <= chosen <= self.size:
            raise ArgumentError(
                f"min_size is {chosen!r}; must be a whole number from 1 to {self.size}"
            )
        return chosen

    def own_host(self) -> str:
        """The address at which the other ranks reach this host; UCXGOSSIP_HOST goes first.

        On one host the loopback address; else the one from which packets go to MASTER_ADDR.
        """
        chosen = os.environ.get("UCXGOSSIP_HOST")
        if chosen:
            return chosen
        if self.host in LOOPBACK or self.one_host:
            return "127.0.0.1"
        found = _source_address(self.host)
        # A host's own name often stands for a loopback address in its hosts file.
        return found if not found.startswith("127.") else _source_address("192.0.2.1")


def _source_address(towards: str) -> str:
    """The address that this host would send from; connecting a datagram socket sends nothing."""
    try:
        family, _, _, _, target = socket.getaddrinfo(towards, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)
            return str(probe.getsockname()[0])
    except OSError as error:
        raise RendezvousError(
            f"this host does not know from which address it reaches {towards}: {error.strerror}. "
            "Correct MASTER_ADDR, or set UCXGOSSIP_HOST to the address at which the others reach it"
        ) from error


_LAUNCHERS = {
    "SLURM_STEP_NUM_TASKS": "SLURM_PROCID",
    "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK",
    "PMI_SIZE": "PMI_RANK",
}
"""Where srun, Open MPI's mpirun and MPICH's say how many tasks they started, and which this is."""


def _refuse_other_launchers() -> None:
    """`ArgumentError` in one of several tasks that would each be a job of its own."""
    for size, rank in _LAUNCHERS.items():
        if _whole(size, 1) > 1:
            raise ArgumentError(
                f"this is one of {os.environ[size]} tasks ({size}), but neither RANK nor "
                "WORLD_SIZE is set, so that each would train alone. Export "
                f"RANK=${rank} WORLD_SIZE=${size} MASTER_ADDR=<host of rank 0> in each task, "
                "start torchrun on each host instead, or pass rank= and size= to join()"
            )


def _whole(name: str, default: int) -> int:
    text = os.environ.get(name)
    if text is None:
        return default
    try:
        return int(text)
    except ValueError:
        raise ArgumentError(f"environment variable {name} is {text!r}; not a number") from None


def launcher_serves() -> bool:
    """Whether torchrun's agent holds the store, and not rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def open_store(place: Place, timeout: float) -> Store:
    """torch's TCPStore of this job: torchrun's where it offers one, else rank 0 opens it.

    Raises `PortInUseError` on rank 0 when the port is taken, `RendezvousError` when no store
    answers within `timeout` seconds.
    """
    import torch.distributed as dist

    tcp_store: Any = vars(dist)["TCPStore"]  # which torch.distributed does not export by name

    serves = place.rank == 0 and not launcher_serves()

    def connect() -> Store:
        listener = _listen(place) if serves else None
        if not serves:
            _await_listener(place, timeout)
        store: Store = tcp_store(
            place.host,
            place.port,
            is_master=serves,
            timeout=timedelta(seconds=timeout),
            wait_for_workers=False,
            multi_tenant=True,
            master_listen_fd=None if listener is None else listener.detach(),
        )
        return store

    try:
        return within(timeout + _CONNECT_GRACE, connect)
    except NoAnswer as error:
        raise RendezvousError(
            f"rank {place.rank} waited {error.seconds:.0f} s for the store at "
            f"{place.host}:{place.port}, where something listens that does not answer. Is rank 0 "
            "stopped, or does another program have that port?"
        ) from None
    except (dist.DistNetworkError, dist.DistStoreError, RuntimeError, OSError) as error:
        if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
            raise PortInUseError(
                f"rank 0 cannot open {place.host}:{place.port}: another program listens there. "
                "Set MASTER_PORT (torchrun: --master-port) to a free port."
            ) from error
        raise RendezvousError(
            f"rank {place.rank} found no store at {place.host}:{place.port} within "
            f"{timeout:.0f} s: {str(error).splitlines()[0]}. Is rank 0 running, and are "
            "MASTER_ADDR and MASTER_PORT the same on all ranks?"
        ) from error


def _listen(place: Place) -> socket.socket | None:
    """A socket that listens on MASTER_ADDR alone; torch's own would on every interface.

    None where that cannot be: the name is none of this host's own addresses (behind NAT, say), or
    the port is taken, perhaps by a store of this process, which torch then uses again.
    """
    for family, kind, _, _, address in _addresses(place):
        listener = socket.socket(family, kind)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(socket.SOMAXCONN)
        except OSError:
            listener.close()
        else:
            return listener
    return None


def _await_listener(place: Place, timeout: float) -> None:
    """Return as soon as somebody listens where the store is to be; `OSError` at the deadline.

    torch's client tries again too, but after half a second at least, and then after more.
    """
    deadline, pause = time.monotonic() + timeout, _FIRST_PAUSE_S
    while True:
        left = deadline - time.monotonic()
        try:
            with socket.create_connection((place.host, place.port), max(left, pause)) as found:
                # A port that nobody has may be given to the very socket that connects to it.
                if found.getsockname() != found.getpeername():
                    return
        except OSError:
            if left <= pause:
                raise
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_S)


def _addresses(place: Place) -> list[Any]:
    try:
        return socket.getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM)
    except OSError:
        return []


class NoAnswer(Exception):
    """A call did not return. Attribute: `seconds` that it was given.

    Whoever calls tells it as a named error of ours, with what was asked and for what.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        super().__init__(f"no answer within {seconds:.1f} s")


def within(seconds: float, call: Callable[[], T]) -> T:
    """What `call` returns or raises; `NoAnswer` when it has done neither within `seconds`.

    It goes on in a thread of its own then, which nobody waits for.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def body() -> None:
        try:
            results.append(call())
        except BaseException as error:  # raised again in the thread that waits
            errors.append(error)

    thread = threading.Thread(target=body, name="ucxgossip-store", daemon=True)
    thread.start()
    thread.join(seconds)
    for error in errors:
        raise error
    if not results:
        raise NoAnswer(seconds)
    return results[0]


class Bounded:
    """`store`, each call of which ends: `patience` seconds after it should have, by `NoAnswer`.

    Nothing is asked of it after that: torch's client answers calls one after the other.
    """

    def __init__(self, store: Store, patience: float) -> None:
        self._store, self._patience = store, patience
        self._lost = 0.0

    def _call(self, call: Callable[[], T], seconds: float = 0.0) -> T:
        if self._lost:
            raise NoAnswer(self._lost)
        try:
            return within(seconds + self._patience, call)
        except NoAnswer as error:
            self._lost = error.seconds
            raise

    def set(self, key: str, value: Any) -> None:
        self._call(lambda: self._store.set(key, value))

    def get(self, key: str) -> bytes:
        return self._call(lambda: self._store.get(key))

    def add(self, key: str, amount: int) -> int:
        return self._call(lambda: self._store.add(key, amount))

    def check(self, keys: list[str]) -> bool:
        return self._call(lambda: self._store.check(keys))

    def wait(self, keys: list[str], timeout: timedelta) -> None:
        self._call(lambda: self._store.wait(keys, timeout), timeout.total_seconds())


class Solitary:
    """The store of a job of one rank: a dictionary."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}

    def set(self, key: str, value: Any) -> None:
        self._values[key] = value.encode() if isinstance(value, str) else value

    def get(self, key: str) -> bytes:
        return self._values[key]

    def add(self, key: str, amount: int) -> int:
        value = int(self._values.get(key, b"0")) + amount
        self._values[key] = str(value).encode()
        return value

    def check(self, keys: list[str]) -> bool:
        return all(key in self._values for key in keys)

    def wait(self, keys: list[str], timeout: object) -> None:
        if not self.check(keys):
            raise TimeoutError(f"timeout: {keys}")
