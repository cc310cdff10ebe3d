"""The note that says where a running job is, for ranks that come to it later.

It stands in the job's store, under a key that does not depend on how often a launcher has started
this rank: its number, and where its members' wardens listen. It is signed with the token, but may
be old (the job may have ended without taking it away), so it is only a hint: whoever reads it
knocks, and only a member of that very job can answer.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from datetime import timedelta
from typing import NamedTuple

from ucxgossip.board import Board, not_understood

_count = itertools.count(1)


class Running(NamedTuple):
    """A job that runs. number: what its seals are made with. contacts: host and port by rank."""

    number: bytes
    contacts: dict[int, tuple[str, int]]


def next_key() -> str:
    """The key of this process's next job: the n-th `join` of one process meets that of others."""
    return f"ucxgossip/running/{next(_count)}"


def write(board: Board, key: str, number: bytes, contacts: Mapping[int, tuple[str, int]]) -> None:
    """Note that the job runs, with these members."""
    where = [[rank, host, port] for rank, (host, port) in contacts.items()]
    board.write(board.seal, key, json.dumps([number.hex(), where]).encode())


def erase(board: Board, key: str) -> None:
    """Note that it ends."""
    board.store.set(key, b"")


def read(board: Board, key: str) -> Running | None:
    """The job that is noted as running; None if there is none."""
    with board.at("to look for a running job") as store:
        if not store.check([key]):
            return None
        note = bytes(store.get(key))
    if not note:
        return None
    rank, blob = board.open(board.seal, key, note)
    try:
        number, where = json.loads(blob)
        contacts = {int(rank): (str(host), int(port)) for rank, host, port in where}
        return Running(bytes.fromhex(number), contacts)
    except (ValueError, TypeError):
        raise not_understood(rank) from None


def wait(board: Board, key: str, seconds: float) -> None:
    """Wait until something is noted, or for `seconds`."""
    with board.at("to wait for a running job"):
        board.reached(key, timedelta(seconds=seconds))
