"""Find, load and check libucp, and name the errors it returns.

UCX is chosen at run time: the PyPI wheels need no root and no compiler but are built without
InfiniBand verbs; a system's UCX has verbs but may be old. The order is the environment variable
``UCXGOSSIP_LIBUCP``; the system's library where an RDMA device exists; the ``libucx`` wheel; the
system's library as the last resort.

libucp is bound directly because ucx-py is archived and ucxx exposes no put. Every function is
looked up here by ctypes before LLVM may see its name: an unresolved symbol in compiled code is a
segmentation fault.

While it loads, UCX patches the memory functions of libc one by one, and waits 5 ms for each: 0.4 s
of a start. It does so to notice memory that is unmapped, for its caches of registrations (RDMA) and
of kinds of memory (GPU). Where there is neither device the patching is turned off, for this load.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ucxgossip import jit
from ucxgossip.errors import LibraryNotFoundError, LibrarySymbolError, UCXError
from ucxgossip.ucp.abi import Handle, Status, size_t, uint64

ENVIRONMENT_VARIABLE = "UCXGOSSIP_LIBUCP"
_RDMA_DEVICES = Path("/sys/class/infiniband")
_GPU_DEVICES = (Path("/dev/nvidiactl"), Path("/dev/kfd"))
_HOOKS = "UCX_MEM_MMAP_HOOK_MODE"

_status = ctypes.c_int8
_p = Handle
_pp = ctypes.POINTER(Handle)

CONTROL: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ucp_get_version": (None, (_p, _p, _p)),
    "ucp_get_version_string": (ctypes.c_char_p, ()),
    "ucp_config_read": (_status, (_p, _p, _pp)),
    "ucp_config_modify": (_status, (_p, ctypes.c_char_p, ctypes.c_char_p)),
    "ucp_config_release": (None, (_p,)),
    "ucp_init_version": (_status, (ctypes.c_uint, ctypes.c_uint, _p, _p, _pp)),
    "ucp_cleanup": (None, (_p,)),
    "ucp_worker_create": (_status, (_p, _p, _pp)),
    "ucp_worker_destroy": (None, (_p,)),
    "ucp_worker_query": (_status, (_p, _p)),
    "ucp_worker_release_address": (None, (_p, _p)),
    "ucp_worker_get_efd": (_status, (_p, ctypes.POINTER(ctypes.c_int))),
    "ucp_worker_set_am_recv_handler": (_status, (_p, _p)),
    "ucp_ep_create": (_status, (_p, _p, _pp)),
    "ucp_ep_close_nbx": (_p, (_p, _p)),
    "ucp_ep_query": (_status, (_p, _p)),
    "ucp_mem_map": (_status, (_p, _p, _pp)),
    "ucp_mem_unmap": (_status, (_p, _p)),
    "ucp_mem_query": (_status, (_p, _p)),
    "ucp_rkey_pack": (_status, (_p, _p, _pp, ctypes.POINTER(size_t))),
    "ucp_rkey_buffer_release": (None, (_p,)),
    "ucp_ep_rkey_unpack": (_status, (_p, _p, _pp)),
    "ucp_rkey_ptr": (_status, (_p, uint64, _pp)),
    "ucp_rkey_destroy": (None, (_p,)),
}
"""Called from Python: creation, queries, destruction."""

DATA: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ucp_worker_progress": (ctypes.c_uint, (_p,)),
    "ucp_worker_fence": (_status, (_p,)),
    "ucp_worker_arm": (_status, (_p,)),
    "ucp_put_nbx": (_p, (_p, _p, size_t, uint64, _p, _p)),
    "ucp_ep_flush_nbx": (_p, (_p, _p)),
    "ucp_am_send_nbx": (_p, (_p, ctypes.c_uint, _p, size_t, _p, size_t, _p)),
    "ucp_request_check_status": (_status, (_p,)),
    "ucp_request_free": (None, (_p,)),
}
"""Called from compiled code (see `ops`)."""


@dataclass(frozen=True)
class Library:
    """A loaded libucp: where it came from, its version and its functions.

    `origin` is ``"environment"``, ``"system"`` or ``"wheel"``; `functions` are ctypes functions
    by C name.
    """

    path: str
    origin: str
    version: tuple[int, int, int]
    functions: Mapping[str, Any]

    def __call__(self, name: str, *arguments: Any) -> None:
        """Call the status-returning function `name`; an error status becomes a `UCXError`."""
        check(self.functions[name](*arguments), name)


def status_name(status: int) -> str:
    """``"ERR_UNREACHABLE"`` for -6, as ``ucs_status_t`` names it without its ``UCS_``."""
    try:
        return Status(status).name
    except ValueError:
        return "unknown status"


def check(status: int, call: str, detail: str = "") -> int:
    """`status` if it is no error, else the `UCXError` that names the C function `call`."""
    if status < 0:
        raise UCXError(call, status, status_name(status), detail)
    return status


def _open_environment() -> tuple[str, ctypes.CDLL] | None:
    path = os.environ.get(ENVIRONMENT_VARIABLE)
    if not path:
        return None
    try:
        return path, ctypes.CDLL(path)
    except OSError as error:
        raise LibraryNotFoundError(
            f"{ENVIRONMENT_VARIABLE}={path} cannot be loaded: {error}. Set it to the full path "
            "of a libucp.so.0, or unset it to let ucxgossip choose."
        ) from error


def _open_system() -> tuple[str, ctypes.CDLL] | None:
    name = ctypes.util.find_library("ucp")
    if name is None:
        return None
    try:
        return name, ctypes.CDLL(name)
    except OSError:
        return None


def _open_wheel() -> tuple[str, ctypes.CDLL] | None:
    try:
        wheel = importlib.import_module("libucx")
    except ImportError:
        return None
    path = Path(str(wheel.__file__)).parent / "lib" / "libucp.so.0"
    try:
        wheel.load_library()
        return str(path), ctypes.CDLL(str(path))
    except OSError:
        return None


def rdma_devices() -> list[str]:
    """Names of the RDMA devices the kernel knows, such as ``mlx5_0``."""
    return sorted(entry.name for entry in _RDMA_DEVICES.glob("*"))


@contextmanager
def _unpatched() -> Iterator[None]:
    """Load UCX without hooks in libc's memory functions, where nothing here needs them.

    libucm reads this while it is loaded, from the environment alone; what the user set wins.
    """
    if _HOOKS in os.environ or rdma_devices() or any(each.exists() for each in _GPU_DEVICES):
        yield
        return
    os.environ[_HOOKS] = "none"
    try:
        yield
    finally:
        del os.environ[_HOOKS]


def _find() -> tuple[str, str, ctypes.CDLL]:
    system = ("system", _open_system)
    wheel = ("wheel", _open_wheel)
    order = [system, wheel] if rdma_devices() else [wheel, system]
    for origin, opener in [("environment", _open_environment), *order]:
        found = opener()
        if found is not None:
            return (*found[:1], origin, found[1])
    raise LibraryNotFoundError(
        "no libucp found. Get one in one of these ways: "
        "`pip install ucxgossip[ucx]` (the UCX wheel; needs no GPU; TCP and shared memory); "
        "`apt install libucx0` or your system's UCX (InfiniBand); or set "
        f"{ENVIRONMENT_VARIABLE} to the full path of a libucp.so.0."
    )


def bind(path: str, origin: str, dll: ctypes.CDLL) -> Library:
    """Look every function up, give it its prototype, and show it to LLVM.

    A missing function raises `LibrarySymbolError`.
    """
    functions: dict[str, Any] = {}
    for name, (restype, argtypes) in (CONTROL | DATA).items():
        try:
            function = getattr(dll, name)
        except AttributeError:
            raise LibrarySymbolError(
                f"{path} has no function {name}: it is not UCX 1.13 or newer. Install another "
                f"UCX, or point {ENVIRONMENT_VARIABLE} to one."
            ) from None
        function.restype, function.argtypes = restype, argtypes
        functions[name] = function
    for name in DATA:
        jit.link(name, ctypes.cast(functions[name], ctypes.c_void_p).value or 0)
    numbers = [ctypes.c_uint() for _ in range(3)]
    functions["ucp_get_version"](*(ctypes.addressof(number) for number in numbers))
    version = (numbers[0].value, numbers[1].value, numbers[2].value)
    return Library(path, origin, version, functions)


@lru_cache(maxsize=1)
def load() -> Library:
    """The libucp of this process, found once."""
    with _unpatched():
        path, origin, dll = _find()
    return bind(path, origin, dll)
