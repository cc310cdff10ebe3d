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

from ucxgossip.bench.peer import Arrays, Global, Gossip

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store  # which torch.distributed does not export by name


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


class GlooAllreduce(Global):
    """The global mean: `all_reduce`, then a division by the number of ranks.

    Written as a product with 1/p, which torch does in half the time while the tensor is in cache.
    """

    name = "gloo_allreduce"

    def __init__(self, data: Arrays) -> None:
        """Work on `data` in place."""
        self._tensors = [torch.from_numpy(array) for array in data.arrays]
        self._share = 1 / data.size

    def once(self) -> None:
        """Collective. Do one whole round."""
        for tensor in self._tensors:
            dist.all_reduce(tensor)
            tensor.mul_(self._share)


class GlooGossip(Gossip):
    """The mean with one partner: `isend` and `irecv` on the dissemination schedule."""

    name = "gloo_gossip"

    def __init__(self, data: Arrays) -> None:
        """Work on `data` in place."""
        super().__init__(data)
        inbox = torch.from_numpy(data.inbox)
        tensors = [torch.from_numpy(array) for array in data.arrays]
        self._pairs = [(tensor, inbox[: len(tensor)]) for tensor in tensors]

    def once(self) -> None:
        """Collective. Do one whole round."""
        to, sender = self.partners[self.turn()]
        for tensor, received in self._pairs:
            receiving = dist.irecv(received, sender)
            sending = dist.isend(tensor, to)
            for work in (receiving, sending):
                if work is not None:  # which it is only for a rank outside the group
                    work.wait()
            tensor.lerp_(received, 0.5)
