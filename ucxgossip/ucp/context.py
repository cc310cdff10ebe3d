"""The UCP context: one per process and group, with the settings that the engine relies on.

Settings go in through ``ucp_config_modify`` on our own configuration, never through the process's
environment, where they would change other users of UCX; what the user sets in the environment
(``UCX_...``) wins over ours.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping

from ucxgossip import forks
from ucxgossip.errors import ArgumentError, UCXError
from ucxgossip.ucp import abi, lib
from ucxgossip.ucp.resource import Resource

_SEGMENTS = {"TCP_TX_SEG_SIZE": "68k", "TCP_RX_SEG_SIZE": "68k"}

TRANSPORTS: dict[str, dict[str, str]] = {
    "auto": {"TLS": "^cma,sysv", **_SEGMENTS},
    "tcp": {"TLS": "tcp", **_SEGMENTS},
    "shm": {"TLS": "posix"},
    "verbs": {"TLS": "ib"},
}
"""UCX settings by transport name. verbs: any RDMA device and nothing else; untested on hardware.

Without cma and sysv: with them larger puts take another lane than small ones, and an endpoint
fence must then flush (docs/protocol.md). Segments: an active message of 64 KiB goes as one, where
the usual 8 KiB would cut it into nine. No larger: what the first read of a put brings beyond its
header, up to a segment, is copied once more (docs/performance.md).
"""

COMMON: dict[str, tuple[str, tuple[int, int, int]]] = {
    "FENCE_MODE": ("ep_based", (1, 19, 0)),
    "MAX_RMA_LANES": ("1", (1, 14, 0)),
}
"""Settings of every context, with the release that brought each; older ones do not get it.

The default fence of UCX 1.22 is a blocking flush that spins; ``ep_based`` orders the puts of one
endpoint without waiting.
"""


class Context(Resource):
    """``ucp_context_h`` with RMA, active messages and wake-up.

    transport: ``"auto"``, ``"tcp"``, ``"shm"`` or ``"verbs"``. settings: further UCX settings by
    name, with or without ``UCX_``; an unknown one raises `ArgumentError`, and so does ``"verbs"``
    where no RDMA device is. estimated_peers: endpoints expected.
    """

    def __init__(
        self,
        transport: str = "auto",
        settings: Mapping[str, str] | None = None,
        estimated_peers: int = 1,
    ) -> None:
        if not isinstance(transport, str) or transport not in TRANSPORTS:
            known = ", ".join(repr(name) for name in TRANSPORTS)
            raise ArgumentError(f"unknown transport {transport!r}; choose one of {known}")
        forks.check_usable()
        self.library = lib.load()
        if transport == "verbs":
            _check_verbs(self.library.origin)
        self.transport = transport
        self.settings: dict[str, str] = {}
        config = ctypes.c_void_p()
        self.library("ucp_config_read", None, None, ctypes.byref(config))
        try:
            for name, value in self._choose(transport, settings or {}).items():
                self._modify(config, name, value)
            handle = self._init(config, estimated_peers)
        finally:
            self.library.functions["ucp_config_release"](config)
        super().__init__(handle)
        forks.count_context(1)

    def _choose(self, transport: str, settings: Mapping[str, str]) -> dict[str, str]:
        chosen = {
            name: value for name, (value, since) in COMMON.items() if self.library.version >= since
        }
        chosen |= TRANSPORTS[transport]
        return chosen | {name.removeprefix("UCX_"): value for name, value in settings.items()}

    def _modify(self, config: ctypes.c_void_p, name: str, value: str) -> None:
        if f"UCX_{name}" in os.environ:
            self.settings[name] = os.environ[f"UCX_{name}"]
            return
        if not isinstance(value, str):
            raise ArgumentError(f"UCX setting {name}={value!r}: the value must be a string")
        status = self.library.functions["ucp_config_modify"](config, name.encode(), value.encode())
        if status != abi.Status.OK:
            raise ArgumentError(
                f"UCX {'.'.join(map(str, self.library.version))} does not take {name}={value!r}: "
                f"{lib.status_name(status)}"
            )
        self.settings[name] = value

    def _init(self, config: ctypes.c_void_p, estimated_peers: int) -> int:
        params = abi.Params(
            field_mask=abi.ParamField.FEATURES
            | abi.ParamField.ESTIMATED_NUM_EPS
            | abi.ParamField.NAME,
            features=abi.Feature.RMA | abi.Feature.AM | abi.Feature.WAKEUP,
            estimated_num_eps=estimated_peers,
            name=b"ucxgossip",
        )
        handle = ctypes.c_void_p()
        status = self.library.functions["ucp_init_version"](
            *abi.API_VERSION, ctypes.byref(params), config, ctypes.byref(handle)
        )
        if status < 0 or handle.value is None:
            raise UCXError(
                "ucp_init_version",
                status,
                lib.status_name(status),
                f"transport {self.transport!r} with settings {self.settings}",
            )
        return handle.value

    def _release(self, handle: int) -> None:
        self.library.functions["ucp_cleanup"](handle)
        forks.count_context(-1)


def _check_verbs(origin: str) -> None:
    """`ArgumentError` where UCX would only say that it found no usable transport."""
    if not lib.rdma_devices():
        raise ArgumentError(
            "transport 'verbs': this machine has no RDMA device (/sys/class/infiniband has none)"
        )
    if origin == "wheel":
        raise ArgumentError(
            "transport 'verbs': the UCX wheel is built without it; install the system's UCX "
            f"(Debian: apt install libucx0), or point {lib.ENVIRONMENT_VARIABLE} to one"
        )
