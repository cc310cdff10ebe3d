"""Shared memory that killed processes left in /dev/shm, and its removal.

UCX unlinks a segment as soon as it is filled with zeros, and then shares it by its descriptor
(``/proc/PID/fd/N``), so the kernel frees it with the last process, however that ended. What stays
behind is a segment whose maker was killed while it filled it (milliseconds a MB), and every
segment where UCX was told to share by name (``UCX_POSIX_USE_PROC_LINK=n``). Such a file counts as
stale when it is ours, no process of this machine has it open or mapped, and it is a minute old.

Only `ucxgossip doctor --remove-stale` removes them. Rejected: doing so at each join; processes of
another container that shares /dev/shm cannot be seen, and their segments look just as stale.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_NAME = re.compile(r"ucx_shm_posix_[0-9a-f]+")
LEAST_AGE_S = 60.0


@dataclass(frozen=True)
class Segment:
    """A file of shared memory: where it is, and how many bytes it takes."""

    path: Path
    nbytes: int


def folder() -> Path:
    """Where UCX makes its segments: ``UCX_POSIX_DIR`` or /dev/shm."""
    return Path(os.environ.get("UCX_POSIX_DIR", "/dev/shm"))


def stale(where: Path | None = None, least_age_s: float = LEAST_AGE_S) -> list[Segment]:
    """Segments of this user that no process uses, at least `least_age_s` seconds old."""
    found: dict[tuple[int, int], Segment] = {}
    for path in (where or folder()).glob("ucx_shm_posix_*"):
        with suppress(OSError):  # unlinked meanwhile, as is usual
            status = path.lstat()
            old = time.time() - status.st_mtime >= least_age_s
            if _NAME.fullmatch(path.name) and status.st_uid == os.getuid() and old:
                found[status.st_dev, status.st_ino] = Segment(path, status.st_size)
    if found:
        for file in _in_use():
            found.pop(file, None)
    return sorted(found.values(), key=lambda segment: segment.path)


def remove(segments: Iterable[Segment]) -> None:
    """Unlink them; one that is gone already is no error."""
    for segment in segments:
        segment.path.unlink(missing_ok=True)


def _in_use() -> Iterator[tuple[int, int]]:
    """(device, inode) of every segment that a process has open or mapped."""
    for process in Path("/proc").glob("[0-9]*"):
        for files in ("fd", "map_files"):
            with suppress(OSError):  # ended meanwhile, or another user's
                for name in os.listdir(process / files):
                    with suppress(OSError):
                        link = process / files / name
                        if "ucx_shm_posix_" in os.readlink(link):
                            status = link.stat()
                            yield status.st_dev, status.st_ino
