"""How much a core slows down when the one beside it is busy.

The cores of a virtual machine may be two threads of one core, or share a host that is oversold:
then work that is moved to "a free core" still takes time from the other one, and a bench that
gives the engine a core of its own measures that, too. So `bench step` prints this figure first.

Rejected: reading it from ``/proc/cpuinfo`` (a hypervisor need not tell), or from the steal time in
``/proc/stat`` (0 here while a core took 2.8 times as long).
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from statistics import median

from ucxgossip.bench.spawn import ended

_REPEATS = 7
_LOOPS = 300_000
_SPIN = "import os, sys; os.sched_setaffinity(0, {int(sys.argv[1])}); print(flush=True)\nwhile 1: 0"


def _timed() -> float:
    begun = time.perf_counter()
    total = 0
    for number in range(_LOOPS):
        total += number
    return time.perf_counter() - begun


def neighbour_cost(repeats: int = _REPEATS) -> list[float]:
    """Time of a loop on one core while the next one is busy, over that while it is idle.

    One ratio a repeat, in rising order, the two times taken in turn; empty where there is one core.
    """
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        return []
    ratios = []
    try:
        os.sched_setaffinity(0, {cores[0]})
        _timed()
        for _ in range(repeats):
            alone = _timed()
            processes: list[subprocess.Popen[bytes]] = []
            with ended(processes):
                command = [sys.executable, "-c", _SPIN, str(cores[1])]
                processes.append(subprocess.Popen(command, stdout=subprocess.PIPE))
                assert processes[0].stdout is not None
                processes[0].stdout.readline()  # it spins from here on
                ratios.append(_timed() / alone)
                processes[0].stdout.close()
    finally:
        os.sched_setaffinity(0, set(cores))
    return sorted(ratios)


def describe(ratios: list[float]) -> str:
    """For a bench's environment: median, least and most."""
    if not ratios:
        return "there is one core"
    return f"{median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
