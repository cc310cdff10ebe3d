"""The key-value store that the ranks of a job meet at, and this process's place in the job.

torch's TCPStore by default (torchrun starts one anyway, and it is the only thing taken from torch
below the hook), or anything with the five methods of `Store`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

from ucxgossip.errors import ArgumentError, PortInUseError, RendezvousError


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
        local = _whole("LOCAL_WORLD_SIZE", size if host in ("127.0.0.1", "localhost") else 1)
        return cls(rank, size, host or "127.0.0.1", _whole("MASTER_PORT", 29500), local)


def _whole(name: str, default: int) -> int:
    text = os.environ.get(name)
    if text is None:
        return default
    try:
        return int(text)
    except ValueError:
        raise ArgumentError(f"environment variable {name} is {text!r}; not a number") from None


def open_store(place: Place, timeout: float) -> Store:
    """torch's TCPStore of this job: torchrun's where it offers one, else rank 0 opens it.

    Raises `PortInUseError` on rank 0 when the port is taken, `RendezvousError` when no store
    answers within `timeout` seconds.
    """
    import torch.distributed as dist

    tcp_store: Any = vars(dist)["TCPStore"]  # which torch.distributed does not export by name

    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store: Store = tcp_store(
            place.host,
            place.port,
            is_master=place.rank == 0 and not agent,
            timeout=timedelta(seconds=timeout),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except (dist.DistNetworkError, dist.DistStoreError, RuntimeError) as error:
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
    return store


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
