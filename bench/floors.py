"""The floors under `bench exchange`: how fast the machine does a round at all, in the same run.

A figure beside its peers says who is faster, and nothing of what is left. `sockets` sends the bytes
over plain TCP connections of the loopback, both directions at once, and `copy` copies them into
memory that the ranks share; both average a chunk while it is hot in the cache, and synchronise
only with the two partners. There is no membership, no schedule, no deadline per partner, no
order to keep but that of one stream.

Rejected: a floor in Python (the interpreter would be what an 8-byte round measures); memory shared
by name, which ranks that are killed leave in /dev/shm (a memory file has no name to leave); an
inbox of the array's size (a ring that stays in the cache is faster, so it is the floor).
"""

from __future__ import annotations

import mmap
import os
import socket

import numpy as np
from numpy.typing import NDArray

from ucxgossip import jit
from ucxgossip.bench import floor_loops as loops
from ucxgossip.bench.floor_loops import FLAGS, RING, Word
from ucxgossip.bench.peer import Arrays, Gossip
from ucxgossip.errors import BenchError

_EDGE = FLAGS + RING
_DEADLINE_S = 60.0
_RANK_BYTES = 4


def _check(status: int, what: str) -> None:
    if status == loops.TIMED_OUT:
        raise BenchError(f"{what}: the partners did not answer within {_DEADLINE_S:g} s")
    if status == loops.GONE:
        raise BenchError(f"{what}: a partner closed its connection")


def _compile() -> None:
    with jit.warm_up(loops.swap):
        jit.compile_ahead(loops.swap, loops.SIGNATURE)
        jit.compile_ahead(loops.copy, loops.SIGNATURE)


def _words(data: Arrays, outward: int, inward: int, box: int) -> list[NDArray[np.int64]]:
    """The words of a loop for each array."""
    found = []
    for array in data.arrays:
        words = np.zeros(len(Word), np.int64)
        words[Word.SOURCE], words[Word.NBYTES] = array.ctypes.data, array.nbytes
        words[Word.OUT], words[Word.IN], words[Word.BOX] = outward, inward, box
        found.append(words)
    return found


class Sockets(Gossip):
    """Plain TCP connections to the partners, non-blocking, both directions at once."""

    name = "sockets"

    def __init__(self, data: Arrays) -> None:
        """Collective. Connect to the partners of all rounds."""
        super().__init__(data)
        _compile()
        self._data, self._ring = data, np.zeros(RING, np.uint8)
        self._connections: dict[int, socket.socket] = {}
        try:
            self._connect()
        except OSError as error:
            self.close()
            raise BenchError(f"sockets: rank {data.rank} cannot connect: {error}") from error
        links = {rank: link.fileno() for rank, link in self._connections.items()}
        box = self._ring.ctypes.data
        self._rounds = [_words(data, links[to], links[s], box) for to, s in self.partners]

    def _connect(self) -> None:
        import torch.distributed as dist

        rank, partners = self._data.rank, {each for pair in self.partners for each in pair}
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.settimeout(_DEADLINE_S)
            ports: list[int] = [0] * self._data.size
            dist.all_gather_object(ports, server.getsockname()[1])
            for partner in sorted(each for each in partners if each < rank):
                link = socket.create_connection(("127.0.0.1", ports[partner]), _DEADLINE_S)
                self._connections[partner] = link
                link.sendall(rank.to_bytes(_RANK_BYTES, "little"))
            for _ in range(sum(each > rank for each in partners)):
                link, _ = server.accept()
                link.settimeout(_DEADLINE_S)
                hello = link.recv(_RANK_BYTES, socket.MSG_WAITALL)
                self._connections[int.from_bytes(hello, "little")] = link
        if set(self._connections) != partners:
            raise OSError(f"came: {sorted(self._connections)}; due: {sorted(partners)}")
        for link in self._connections.values():
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            link.setblocking(False)

    def once(self) -> None:
        """Collective. Do one whole round."""
        for words in self._rounds[self.turn()]:
            status = loops.swap(words)
            if status:
                _check(status, self.name)

    def close(self) -> None:
        """Close the connections."""
        for link in self._connections.values():
            link.close()
        self._connections.clear()


class Copy(Gossip):
    """Memory that all ranks share: each copies into its partner's ring, and averages from its own.

    An edge of the schedule has one writer and one reader: two counters and a ring.
    """

    name = "copy"

    def __init__(self, data: Arrays) -> None:
        """Collective. Map the memory that rank 0 makes."""
        super().__init__(data)
        _compile()
        period = len(self.partners)
        self._memory = np.frombuffer(_shared(data.rank, data.size * period * _EDGE), np.uint8)
        self._counts = np.zeros((period, 2), np.int64)
        self._rounds = [
            _words(
                data,
                self._memory[(to * period + step) * _EDGE :].ctypes.data,
                self._memory[(data.rank * period + step) * _EDGE :].ctypes.data,
                self._counts[step:].ctypes.data,
            )
            for step, (to, _) in enumerate(self.partners)
        ]

    def once(self) -> None:
        """Collective. Do one whole round."""
        for words in self._rounds[self.turn()]:
            status = loops.copy(words)
            if status:
                _check(status, self.name)

    def close(self) -> None:
        """Unmap the memory."""
        self._rounds.clear()
        self._memory = np.empty(0, np.uint8)


def _shared(rank: int, nbytes: int) -> mmap.mmap:
    """Collective. Memory that all ranks map, made by rank 0 and freed with the last of them."""
    import torch.distributed as dist

    told: list[tuple[int, int]] = [(0, 0)]
    if rank == 0:
        file = os.memfd_create("ucxgossip-bench", os.MFD_CLOEXEC)
        os.ftruncate(file, nbytes)
        told = [(os.getpid(), file)]
    dist.broadcast_object_list(told, src=0)
    if rank != 0:
        process, number = told[0]
        file = os.open(f"/proc/{process}/fd/{number}", os.O_RDWR | os.O_CLOEXEC)
    try:
        return mmap.mmap(file, nbytes)
    finally:
        dist.barrier()
        os.close(file)
