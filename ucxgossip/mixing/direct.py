"""Ways between devices of one host: opened when streams begin, and proved before they are used.

Each rank asks each other one of its host for its slots on its device, maps them, puts a token
behind them and asks whether it came. Only then are chunks copied there. Where any of it fails,
which is no error, chunks are staged through host memory; the log says why, at INFO.

Rejected: asking at each first round with a partner (it would stop a step); trusting a mapping that
was not tried (peers that the driver cannot connect).

Untested on hardware: proved with devices of one process (tests/fake_device.py).
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Iterator

from ucxgossip.engine.staging import PROBE, Staging
from ucxgossip.errors import GossipError
from ucxgossip.group import Group

_KIND = "slots"
_NOTHING, _YES = b"-", b"+"
_log = logging.getLogger("ucxgossip")


def serve(group: Group) -> None:
    """Answer what ranks that open ways ask of this one, be it on a device or not.

    Whoever may be partner of a rank on a device must, or that one would wait for an answer. Calls
    after the first change nothing.
    """

    def answer(name: str) -> bytes | None:
        try:
            return _answer(group, name.split()[1:])
        except (GossipError, ValueError):  # too little memory; a name that is none
            return _NOTHING

    group.answer(_KIND, answer)


def _answer(group: Group, words: list[str]) -> bytes | None:
    """The slots of a mailbox, or whether a rank's token came to them; None: not yet."""
    index, *rest = words
    if int(index) >= len(group.engine.mailboxes):
        return None
    staging = group.engine.stagings.get(int(index))
    if staging is None:
        return _NOTHING
    if not rest:
        return staging.expose() or _NOTHING
    rank, token = rest
    return _YES if staging.seen(int(rank), bytes.fromhex(token)) else _NOTHING


def open_ways(group: Group, staging: Staging) -> None:
    """Find out into whose slots `staging` can copy. All ranks answer by `serve`."""
    index = staging.mailbox.index
    for rank in _neighbours(group):
        handle = group.fetch_from(rank, f"{_KIND} {index}")
        if not handle or handle == _NOTHING:
            _log.info("rank %d: rank %d has no slots on a device to offer", group.rank, rank)
            continue
        token = secrets.token_bytes(PROBE)
        address = staging.try_way(rank, group.rank, handle, token)
        if not address:
            continue
        said = group.fetch_from(rank, f"{_KIND} {index} {group.rank} {token.hex()}")
        if said == _YES:
            staging.take_way(rank, address)
        else:
            _log.info("rank %d: what it put to rank %d's device did not come", group.rank, rank)
            staging.device.unmap(address)


def _neighbours(group: Group) -> Iterator[int]:
    """Other members that may be of this host: those that one torchrun started, if it was one."""
    count = int(os.environ.get("LOCAL_WORLD_SIZE", "0") or 0) or group.size
    for rank in group.members:
        if rank != group.rank and rank // count == group.rank // count:
            yield rank
