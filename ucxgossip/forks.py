"""What a forked child may do with what it inherited: nothing, and it is told so by name.

A fork copies the memory of UCX, of the store's client and of the engine, but neither their threads
nor their right to the sockets, event descriptors and shared memory, which now serve two processes.
A child that used them, or tidied them up at its exit, would break its parent's job. So in a child
all of it counts as closed: using it is a `ForkError`, closing it does nothing, and parent and
child both go on. DataLoader workers, which Linux forks by default, never notice.

The hook of ``os.register_at_fork`` runs once a fork, so nothing is asked in a round. Rejected:
comparing ``os.getpid()`` where a group is used (a system call a round); closing inherited
descriptors in the child (UCX does not say which are its own).
"""

from __future__ import annotations

import ctypes
import os
from typing import Protocol
from weakref import WeakSet

from ucxgossip.errors import ClosedError, ForkError, GossipError

_ADVICE = (
    "UCX cannot be used across fork: its threads stay in the parent. Fork before join(), or start "
    "the process with the spawn method, as in DataLoader(multiprocessing_context='spawn')"
)


class Owner(Protocol):
    """Something that belongs to the process that made it."""

    def disown(self) -> None:
        """Count as closed from now on, without touching what the parent shares."""


_owners: WeakSet[Owner] = WeakSet()
_contexts = 0
_inherited = False


def watch(owner: Owner) -> None:
    """Call ``owner.disown()`` in each child that is forked while `owner` lives."""
    _owners.add(owner)


def count_context(change: int) -> None:
    """Note that a UCX context was made (1) or released (-1)."""
    global _contexts
    _contexts += change


def check_usable() -> None:
    """`ForkError` in a process that was forked while its parent had a UCX context open.

    UCX's own threads and descriptors are global to a process, so not even a new context works.
    """
    if _inherited:
        raise ForkError(f"this process was forked after join(). {_ADVICE}.")


def gone(what: str, forked: bool, hint: str = "") -> GossipError:
    """The error of using `what` after its `close()`, or in a child that inherited it.

    hint: what to do after its `close()`.
    """
    if forked:
        return ForkError(f"{what} belongs to the process that this one was forked from. {_ADVICE}.")
    return ClosedError(f"{what} is closed" + (f"; {hint}" if hint else ""))


def never_freed(inherited: object) -> None:
    """Keep what a child inherited until it ends: a store ends its thread, which stayed behind.

    torch's TCPStore aborts the process when it is freed in a child of the process that opened it.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(inherited))


def _in_child() -> None:
    global _inherited
    _inherited = _inherited or _contexts > 0
    for owner in list(_owners):
        owner.disown()
    _owners.clear()


os.register_at_fork(after_in_child=_in_child)
