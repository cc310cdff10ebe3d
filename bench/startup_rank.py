"""One rank of `bench startup`: ``python -P bench/startup_rank.py TRANSPORT FOLDER``.

By its path, since ``-m ucxgossip...`` would import the package before the clock starts. Writes what
it found to FOLDER, as a file named after its rank.
"""

import gc
import json
import os
import sys
import time
from pathlib import Path

import torch


def compiled() -> int:
    """How many versions of numba functions this process compiled, for want of them in the cache.

    numba's events, which would tell as well, cannot be listened to before it is imported, and its
    import belongs to what is measured.
    """
    from numba.core.ccallback import CFunc
    from numba.core.dispatcher import Dispatcher

    count = 0
    for each in gc.get_objects():
        if issubclass(type(each), Dispatcher):  # isinstance asks modules that warn
            count += sum(each.stats.cache_misses.values())
        elif issubclass(type(each), CFunc):
            count += not each.cache_hits
    return count


def main() -> None:
    """Measure once, in this process."""
    transport, folder = sys.argv[1], Path(sys.argv[2])
    model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.Linear(256, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    times = [time.perf_counter()]
    from ucxgossip.group import join
    from ucxgossip.torch_hook import attach

    times.append(time.perf_counter())
    with join(transport=transport) as group:
        times.append(time.perf_counter())
        with attach(model, optimizer, group):
            times.append(time.perf_counter())
        from ucxgossip.bench.report import say_in_force  # now that the clock has stopped

        say_in_force(group)
    parts = [after - before for before, after in zip(times, times[1:], strict=False)]
    found = dict(zip(("import_s", "join_s", "attach_s"), parts, strict=True))
    rank = os.environ.get("RANK", "0")
    (folder / f"{rank}.json").write_text(json.dumps({**found, "compiled": compiled()}))


if __name__ == "__main__":
    main()
