"""Who exchanges with whom: pure functions of (rank, step).

A schedule maps each rank's step to a `Round`: the rank to put to, the rank to receive from, and
the weight of what is received. Every round is a partial permutation: nobody receives two. All
ranks compute the same schedule from the same arguments; nothing is communicated.

`Dissemination` (with `Rotated` over it) is for training; `Hypercube`, `BaseTwo`, `Ring`,
`RandomMatching` and `Hierarchical` go in its place. `Broadcast` and `GlobalAverage` are finite:
they end exactly, after `period` steps. `Living` lays any of them over the ranks that live.
"""

from ucxgossip.schedule.base import ALONE, Round, Rounds, Schedule, endless, many, repeats
from ucxgossip.schedule.check import check_rounds
from ucxgossip.schedule.circulant import Dissemination, Ring
from ucxgossip.schedule.finite import Broadcast, GlobalAverage
from ucxgossip.schedule.living import Living, resized
from ucxgossip.schedule.nested import Hierarchical, Strided
from ucxgossip.schedule.pairs import BaseTwo, Hypercube
from ucxgossip.schedule.shuffled import RandomMatching, Rotated

__all__ = [
    "ALONE",
    "BaseTwo",
    "Broadcast",
    "Dissemination",
    "GlobalAverage",
    "Hierarchical",
    "Hypercube",
    "Living",
    "RandomMatching",
    "Ring",
    "Rotated",
    "Round",
    "Rounds",
    "Schedule",
    "Strided",
    "check_rounds",
    "endless",
    "many",
    "repeats",
    "resized",
]
