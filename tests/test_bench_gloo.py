"""ucxgossip.bench.gloo: each peer leaves the mean that it says, over loopback."""

from __future__ import annotations

import pytest

from ucxgossip.bench.spawn import run_ranks

pytestmark = [pytest.mark.spawn, pytest.mark.usefixtures("forked_ranks")]

pytest.importorskip("torch")

RANK = """
import numpy as np
import torch.distributed as dist
from ucxgossip.bench.exchange_rank import check
from ucxgossip.bench.gloo import GlooAllreduce, GlooGossip, gloo_job
from ucxgossip.bench.peer import Arrays

with gloo_job(deadline_s=30):
    rank, size = dist.get_rank(), dist.get_world_size()
    data = Arrays(rank, size, [np.empty(1000, np.float32), np.empty(3, np.float32)])
    for _ in range(2):
        check("all", GlooAllreduce(data), data, dist.barrier)
        check("one", GlooGossip(data), data, dist.barrier)
    # Loopback: no connection of this process has another local address.
    inodes = set()
    import os
    for fd in os.listdir("/proc/self/fd"):
        try:
            inodes.add(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError:
            pass
    rows = [line.split() for line in open("/proc/net/tcp")][1:]
    local = {row[1].split(":")[0] for row in rows if f"socket:[{row[9]}]" in inodes}
    assert local and local <= {"0100007F", "00000000"}, local
    print("well")
"""


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_means_over_loopback(ranks: int) -> None:
    printed: list[str] = []
    run_ranks(["-c", RANK], ranks, on_line=printed.append, deadline_s=60)
    assert printed == ["well"]
