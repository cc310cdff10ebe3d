"""What every UCX handle has in common: one owner, an idempotent close, children before parents.

UCX crashes when a context goes before its workers, or a worker before its endpoints. So each
resource keeps the children made from it and closes them, newest first, before itself. One lock
serves a context and all that was made from it, so that two threads may close what they like: the
second one waits until the first has done it. In a forked child everything inherited counts as
closed (`ucxgossip.forks`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

from ucxgossip import forks
from ucxgossip.errors import GossipError


class Resource:
    """A UCX handle with a lifetime. Use as a context manager, or call `close()`."""

    def __init__(self, handle: int, parent: Resource | None = None) -> None:
        self._handle: int | None = handle
        self._parent = parent
        self._children: list[Resource] = []
        self._users: list[Callable[[], None]] = []
        self._forked = False
        self._lock: threading.RLock = threading.RLock() if parent is None else parent._lock
        if parent is not None:
            parent._children.append(self)
        forks.watch(self)

    @property
    def handle(self) -> int:
        """The C handle as an integer; `ClosedError` after `close()`, `ForkError` in a child."""
        if self._handle is None:
            raise forks.gone(f"this {type(self).__name__}", self._forked)
        return self._handle

    @property
    def closed(self) -> bool:
        """Whether `close()` was called."""
        return self._handle is None

    def close(self) -> None:
        """Release the handle, its children first. Further calls do nothing, in any thread.

        An error of one release does not keep the others from theirs; the first is raised.
        """
        while self._users and self._handle is not None:
            self._users.pop()()  # without the lock, for which the user may wait while it closes
        if self._handle is None:
            return
        with self._lock:
            failure: GossipError | None = None
            while self._children:
                try:
                    self._children[-1].close()
                except GossipError as error:
                    failure = failure or error
            if self._handle is None:
                return
            try:
                self._release(self._handle)
            except GossipError as error:
                failure = failure or error
            finally:
                self._handle = None
                if self._parent is not None:
                    self._parent._children.remove(self)
                    self._parent = None
            if failure is not None:
                raise failure

    def before_close(self, stop: Callable[[], None]) -> None:
        """Call `stop` first when this is closed, once: for a thread that works on the handle."""
        self._users.append(stop)

    def forget_users(self) -> None:
        """Call nobody of `before_close` when this is closed."""
        self._users.clear()

    def disown(self) -> None:
        """Count as closed, in a forked child: the handle is the parent's."""
        self._handle, self._forked = None, True
        self._children.clear()
        self._users.clear()
        self._parent = None

    def _release(self, handle: int) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
