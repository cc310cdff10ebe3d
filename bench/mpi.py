"""MPI as the peer of `bench exchange`: all-reduce, sendrecv and one-sided puts of Open MPI.

MPI is what people who have no gossip library would write one in, and its sendrecv is the peer to
beat. `mpi_put` synchronises by post, start, complete and wait, which only the two partners take
part in; a fence would make it a collective. Over shared memory its window is allocated by MPI, so
that a put is a store into it.

mpi4py is imported when a job begins: it is optional, and who loads MPI keeps it.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from ucxgossip.bench.mpirun import INSTALL, SETTINGS, SHARED
from ucxgossip.bench.peer import Arrays, Global, Gossip
from ucxgossip.errors import BenchError
from ucxgossip.kernels.cpu import mix

_HALF = np.float32(0.5)


@contextmanager
def mpi_job() -> Iterator[Any]:
    """Collective. mpi4py's MPI, initialized; a rank that fails ends the job, others would wait."""
    mpi4py: Any = importlib.import_module("mpi4py")
    mpi4py.rc.thread_level = "funneled"
    mpi4py.rc.finalize = False
    mpi: Any = importlib.import_module("mpi4py.MPI")
    try:
        due = int(os.environ["WORLD_SIZE"])
        if mpi.COMM_WORLD.size != due:
            raise BenchError(
                f"mpi4py sees {mpi.COMM_WORLD.size} ranks where mpirun started {due}: they belong "
                f"to different MPI libraries; {INSTALL}"
            )
        yield mpi
    except BaseException:
        print(f"rank {os.environ.get('RANK')}:", traceback.format_exc(), file=sys.stderr)
        sys.stderr.flush()
        mpi.COMM_WORLD.Abort(1)
    mpi.Finalize()


class MpiAllreduce(Global):
    """The global mean: `MPI_Allreduce` in place, then a product with 1/p."""

    name = "mpi_allreduce"

    def __init__(self, data: Arrays, mpi: Any, transport: str) -> None:
        """Work on `data` in place."""
        self._arrays, self._share = data.arrays, np.float32(1 / data.size)
        self._all_reduce, self._in_place = mpi.COMM_WORLD.Allreduce, mpi.IN_PLACE
        self._buffers = [(array, mpi.FLOAT) for array in data.arrays]

    def once(self) -> None:
        """Collective. Do one whole round."""
        for array, buffer in zip(self._arrays, self._buffers, strict=True):
            self._all_reduce(self._in_place, buffer)
            np.multiply(array, self._share, out=array)


class MpiGossip(Gossip):
    """The mean with one partner: `MPI_Sendrecv` on the dissemination schedule."""

    name = "mpi_gossip"

    def __init__(self, data: Arrays, mpi: Any, transport: str) -> None:
        """Work on `data` in place."""
        super().__init__(data)
        self._sendrecv = mpi.COMM_WORLD.Sendrecv
        pairs = [(array, data.inbox[: len(array)]) for array in data.arrays]
        self._parts = [(a, inbox, (a, mpi.FLOAT), (inbox, mpi.FLOAT)) for a, inbox in pairs]

    def once(self) -> None:
        """Collective. Do one whole round."""
        to, sender = self.partners[self.turn()]
        for array, inbox, outward, inward in self._parts:
            self._sendrecv(outward, to, 0, inward, sender, 0)
            mix(array, inbox, _HALF)


class MpiPut(Gossip):
    """The mean with one partner: `MPI_Put` into its window, on the dissemination schedule."""

    name = "mpi_put"

    def __init__(self, data: Arrays, mpi: Any, transport: str) -> None:
        """Collective. Make the window, of the largest array's size."""
        super().__init__(data)
        world, count = mpi.COMM_WORLD, max(map(len, data.arrays))
        if SETTINGS[transport] is SHARED:
            self._window = mpi.Win.Allocate(4 * count, 4, mpi.INFO_NULL, world)
            inbox = np.frombuffer(self._window.tomemory(), np.float32)
            inbox.fill(0)
        else:
            inbox = data.inbox
            self._window = mpi.Win.Create(inbox, 4, mpi.INFO_NULL, world)
        everyone = world.Get_group()
        self._groups = [(everyone.Incl([to]), everyone.Incl([s])) for to, s in self.partners]
        self._parts = [(array, inbox[: len(array)], (array, mpi.FLOAT)) for array in data.arrays]

    def once(self) -> None:
        """Collective. Do one whole round."""
        step, window = self.turn(), self._window
        to, (target, origin) = self.partners[step][0], self._groups[step]
        for array, inbox, outward in self._parts:
            window.Post(origin)
            window.Start(target)
            window.Put(outward, to)
            window.Complete()
            window.Wait()
            mix(array, inbox, _HALF)

    def close(self) -> None:
        """Collective. Free the window."""
        self._parts.clear()
        self._window.Free()


METHODS = (MpiAllreduce, MpiGossip, MpiPut)
