"""ucxgossip.bench.gloo: each peer leaves the mean that it says, over loopback."""

from __future__ import annotations

import pytest

from ucxgossip.bench.spawn import run_ranks

pytestmark = pytest.mark.spawn

pytest.importorskip("torch")

RANK = """
import torch
import torch.distributed as dist
from ucxgossip.bench.gloo import GlooAllreduce, GlooGossip, gloo_job
from ucxgossip.errors import ArgumentError

with gloo_job(deadline_s=30):
    rank, size = dist.get_rank(), dist.get_world_size()
    everyone = GlooAllreduce(4000)
    for _ in range(3):
        everyone.once()
        assert torch.allclose(everyone.tensor, torch.full((1000,), (size - 1) / 2))
    partner = GlooGossip(4000)
    values = [float(r) for r in range(size)]
    for step in range(7):
        distance = 2 ** (step % (size - 1).bit_length())
        values = [(values[r] + values[(r - distance) % size]) / 2 for r in range(size)]
        partner.once()
        assert torch.allclose(partner.tensor, torch.full((1000,), values[rank])), step
    for nbytes in (0, 2, 6):
        try:
            GlooGossip(nbytes)
        except ArgumentError as error:
            assert "float32" in str(error)
        else:
            raise AssertionError(nbytes)
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
