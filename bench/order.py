"""When each of many rounds that were posted together ends: whether the first comes first.

    torchrun --standalone --nproc-per-node 2 -m ucxgossip.bench.order [RANKS' TRANSPORT] [ROUNDS]

Rank 0 prints the milliseconds from the first post to the end of the first, the middle and the last
round, medians over repeats: a forward that needs the first weights waits for the first figure.
"""

from __future__ import annotations

import sys
import time
from statistics import median

import numpy as np

from ucxgossip.buffer import Buffer
from ucxgossip.group import Group, join
from ucxgossip.mixing import InPlace, Meter
from ucxgossip.schedule import Dissemination

BUCKET = 1 << 22
REPEATS = 20


def measure(group: Group, count: int) -> list[float]:
    """Milliseconds to the end of each of `count` rounds of 4 MiB, posted in order."""
    schedule, meter = Dissemination(group.size), Meter()
    streams = []
    for _ in range(count):
        region = group.allocate(BUCKET)
        array = region.view(np.float32, BUCKET // 4)
        streams.append(InPlace(group, Buffer.of(array, region), schedule, meter))
    ends: list[list[float]] = [[] for _ in streams]
    for repeat in range(REPEATS):
        group.agree(f"repeat {repeat}", {})
        start = time.perf_counter()
        for stream in streams:
            stream.post()
        for stream, times in zip(streams, ends, strict=True):
            stream.wait()
            times.append(1e3 * (time.perf_counter() - start))
    return [median(times[2:]) for times in ends]


def main() -> None:
    """Measure, and print on rank 0."""
    transport = sys.argv[1] if len(sys.argv) > 1 else "auto"
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 24
    with join(transport=transport) as group:
        ends = measure(group, count)
        if group.rank == 0:
            print(
                f"# {count} rounds of 4 MiB, {group.size} ranks, {transport}: first {ends[0]:.1f} "
                f"ms, middle {ends[count // 2]:.1f} ms, last {ends[-1]:.1f} ms"
            )


if __name__ == "__main__":
    main()
