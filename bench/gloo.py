"""The peers of `bench exchange` over gloo, the backend people use on machines without a GPU.

Both do what one of our rounds does to a float32 array: bring in what others have, leave the mean
in place. Gloo is bound to one interface, loopback unless told otherwise; left alone it takes the
one of the host's name.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

# Unused, but needed before init_process_group: its functions keep the process group of the time
# of their import, and with it gloo's threads past destroy_process_group; the process then aborts.
import torch.distributed.nn

from ucxgossip.errors import ArgumentError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store  # which torch.distributed does not export by name

_ITEM = 4  # bytes of a float32


@contextmanager
def gloo_job(
    deadline_s: float = 60.0, store: Store | None = None, interface: str = "lo"
) -> Iterator[None]:
    """Collective. Be in a gloo process group: RANK, WORLD_SIZE, MASTER_* as torchrun sets them.

    `store` is one that the ranks share already; without it rank 0 opens one on MASTER_PORT. No
    round waits longer than `deadline_s` seconds. interface: the network device to use.
    """
    os.environ["GLOO_SOCKET_IFNAME"] = interface
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=store,
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=timedelta(seconds=deadline_s),
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


class GlooAllreduce:
    """The global mean: `all_reduce`, then a division by the number of ranks.

    Written as a product with 1/p, which torch does in half the time while the tensor is in cache.
    """

    name = "gloo_allreduce"

    def __init__(self, nbytes: int) -> None:
        """Prepare a tensor of `nbytes` bytes that holds this rank's number."""
        self.tensor = _tensor(nbytes)
        self._share = 1 / dist.get_world_size()

    def once(self) -> None:
        """Collective. Do one whole round."""
        dist.all_reduce(self.tensor)
        self.tensor.mul_(self._share)


class GlooGossip:
    """The mean with one partner: `isend` and `irecv` on the dissemination schedule."""

    name = "gloo_gossip"

    def __init__(self, nbytes: int) -> None:
        """Prepare a tensor of `nbytes` bytes that holds this rank's number, and one to receive."""
        self.tensor = _tensor(nbytes)
        self._received = torch.empty_like(self.tensor)
        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        if self._size == 1:
            raise ArgumentError("gossip needs at least 2 ranks")
        self._period = (self._size - 1).bit_length()
        self._step = 0

    def once(self) -> None:
        """Collective. Do one whole round."""
        distance = 1 << (self._step % self._period)
        self._step += 1
        receiving = dist.irecv(self._received, (self._rank - distance) % self._size)
        sending = dist.isend(self.tensor, (self._rank + distance) % self._size)
        for work in (receiving, sending):
            if work is not None:  # which it is only for a rank outside the group
                work.wait()
        self.tensor.lerp_(self._received, 0.5)


def _tensor(nbytes: int) -> torch.Tensor:
    if nbytes < _ITEM or nbytes % _ITEM:
        raise ArgumentError(f"{nbytes} bytes are not a whole number of float32 ({_ITEM} bytes)")
    return torch.full((nbytes // _ITEM,), float(dist.get_rank()))
