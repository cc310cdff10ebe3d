"""What a benchmark ran on, to stand above its figures.

A figure without its machine cannot be compared. Nothing here tells whose machine it was: no host
name, no user, no path but the base name of the UCX library.
"""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

_GIT_S = 10.0


def environment(ucx_version: str | None, ucx_library: str | None) -> dict[str, object]:
    """Describe this machine and its software; what cannot be found out is None.

    `ucx_library` is the path of the libucp in use, of which only the base name is kept. Memory is
    in bytes, `cores` counts those this process may run on, the date is UTC in ISO 8601.
    """
    return {
        "ucxgossip": _version("ucxgossip"),
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "numpy": _version("numpy"),
        "numba": _version("numba"),
        "torch": _version("torch"),
        "ucx": ucx_version,
        "ucx_library": None if ucx_library is None else Path(ucx_library).name,
        "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "tcp_congestion_control": _read("/proc/sys/net/ipv4/tcp_congestion_control"),
    }


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of this source, with "+" where it was changed since; None for an installed copy.

    Only where git knows this very file: an environment may lie within somebody else's repository.
    """
    here = Path(__file__).resolve()
    git = ("git", "-C", str(here.parent))
    try:
        for command in (("ls-files", "--error-unmatch", here.name), ("rev-parse", "--short", "@")):
            found = subprocess.run(
                [*git, *command], capture_output=True, text=True, timeout=_GIT_S, check=True
            )
        changed = subprocess.run([*git, "diff", "--quiet", "@"], timeout=_GIT_S, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() + ("+" if changed.returncode else "")


def _cpu_model() -> str | None:
    for line in (_read("/proc/cpuinfo") or "").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or None


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return None
