"""What every UCX handle has in common: one owner, an idempotent close, children before parents.

UCX crashes when a context goes before its workers, or a worker before its endpoints. So each
resource keeps the children made from it and closes them, newest first, before itself.
"""

from __future__ import annotations

from types import TracebackType
from typing import Self

from ucxgossip.errors import ClosedError


class Resource:
    """A UCX handle with a lifetime. Use as a context manager, or call `close()`."""

    def __init__(self, handle: int, parent: Resource | None = None) -> None:
        self._handle: int | None = handle
        self._parent = parent
        self._children: list[Resource] = []
        if parent is not None:
            parent._children.append(self)

    @property
    def handle(self) -> int:
        """The C handle as an integer; `ClosedError` after `close()`."""
        if self._handle is None:
            raise ClosedError(f"{type(self).__name__} is closed")
        return self._handle

    @property
    def closed(self) -> bool:
        """Whether `close()` was called."""
        return self._handle is None

    def close(self) -> None:
        """Release the handle, its children first. Further calls do nothing."""
        if self._handle is None:
            return
        while self._children:
            self._children[-1].close()
        try:
            self._release(self._handle)
        finally:
            self._handle = None
            if self._parent is not None:
                self._parent._children.remove(self)
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
