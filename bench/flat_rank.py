"""One rank of `bench flat`: rounds of ours and of gloo's all-reduce, in turn, size by size.

Started by `ucxgossip.bench.flat` as ``python -m ucxgossip.bench.flat_rank JOB``, in a network
namespace; JOB is a JSON file.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import numpy as np
import torch.distributed as dist

from ucxgossip.bench.blocks import Block, in_turns
from ucxgossip.bench.exchange_rank import Ours, check
from ucxgossip.bench.gloo import GlooAllreduce, gloo_job
from ucxgossip.bench.network import DEVICE
from ucxgossip.bench.peer import Arrays, Method
from ucxgossip.bench.report import say_in_force
from ucxgossip.errors import BenchError
from ucxgossip.group import Group, join

TIMEOUT_S = 120.0


def measure(group: Group, nbytes: int, repeats: int, seconds: float) -> dict[str, object]:
    """Medians (us), spreads and idle cores (%) at one size. Collective."""
    data = Arrays(group.rank, group.size, [np.empty(nbytes // 4, np.float32)])
    methods: dict[str, Method] = {"ours": Ours(group, data), "allreduce": GlooAllreduce(data)}
    for name, method in methods.items():
        check(name, method, data, dist.barrier)
    blocks = in_turns({name: each.once for name, each in methods.items()}, repeats, seconds)
    if not np.isfinite(data.arrays[0]).all():
        raise BenchError(f"bench flat: rounds of {nbytes} bytes gave values that are not finite")
    return {
        "ranks": group.size,
        "bytes": nbytes,
        **_figures("ours", blocks["ours"]),
        **_figures("allreduce", blocks["allreduce"]),
    }


def _figures(name: str, blocks: Sequence[Block]) -> dict[str, float]:
    times = [each.seconds for each in blocks]
    return {
        f"{name}_us": 1e6 * median(times),
        f"{name}_spread": 100 * (max(times) - min(times)) / median(times),
        f"{name}_idle": 100 * median(each.idle for each in blocks),
    }


def main() -> None:
    """Run the job in the file named by the first argument; rank 0 prints a line a size."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    settings = {"NET_DEVICES": DEVICE}
    with (
        join(transport="tcp", timeout=TIMEOUT_S, settings=settings) as group,
        gloo_job(TIMEOUT_S, interface=DEVICE),
    ):
        say_in_force(group)
        for nbytes in job["sizes"]:
            found = measure(group, nbytes, job["repeats"], job["seconds"])
            if group.rank == 0:
                print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
