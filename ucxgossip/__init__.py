"""ucxgossip: gossip in place of all-reduce, one-sided over UCX, for PyTorch.

Start with `join` and `attach`; `Group` and `ucp` are the layers below, without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ucxgossip import errors, ucp
from ucxgossip.group import Group, join
from ucxgossip.mixing import Nesterov
from ucxgossip.schedule import (
    BaseTwo,
    Broadcast,
    Dissemination,
    GlobalAverage,
    Hierarchical,
    Hypercube,
    RandomMatching,
    Ring,
    Rotated,
    Round,
    Schedule,
)
from ucxgossip.tuning import Tuning

if TYPE_CHECKING:
    from ucxgossip.torch_hook.attach import attach
    from ucxgossip.torch_hook.gossip import Gossip

__version__ = "0.1.0"

__all__ = [
    "BaseTwo",
    "Broadcast",
    "Dissemination",
    "GlobalAverage",
    "Gossip",
    "Group",
    "Hierarchical",
    "Hypercube",
    "Nesterov",
    "RandomMatching",
    "Ring",
    "Rotated",
    "Round",
    "Schedule",
    "Tuning",
    "attach",
    "errors",
    "join",
    "ucp",
]


def __getattr__(name: str) -> Any:
    """`attach` and `Gossip` import torch, so they are loaded on first use."""
    if name in ("attach", "Gossip"):
        from ucxgossip import torch_hook

        return getattr(torch_hook, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
