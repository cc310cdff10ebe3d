"""How long ``import ucxgossip``, ``join`` and ``attach`` take beyond importing torch.

``torchrun --nproc-per-node 2 bench/startup.py``: each rank prints its seconds. By its path, since
``-m ucxgossip...`` would import the package before the clock starts. Run it twice: the first run
may compile.
"""

import os
import time

import torch


def main() -> None:
    """Measure once, in this process."""
    model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.Linear(256, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    times = [time.perf_counter()]
    from ucxgossip.group import join
    from ucxgossip.torch_hook import attach

    times.append(time.perf_counter())
    with join() as group:
        times.append(time.perf_counter())
        with attach(model, optimizer, group):
            times.append(time.perf_counter())
    parts = [after - before for before, after in zip(times, times[1:], strict=False)]
    print(
        f"rank {os.environ.get('RANK', '0')} of {os.environ.get('WORLD_SIZE', '1')}: "
        f"import {parts[0]:.2f} s, join {parts[1]:.2f} s, attach {parts[2]:.2f} s, "
        f"in all {sum(parts):.2f} s"
    )


if __name__ == "__main__":
    main()
