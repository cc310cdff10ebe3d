"""The calls of the data plane, for compiled and for interpreted callers.

All arguments are plain integers: handles, addresses, byte counts. Each function is a pair (see
`jit`): Python calls libucp through ctypes, compiled code calls it directly, about 2 ns a call.
A pointer result is returned as a signed integer: 0 completed at once, negative a
``ucs_status_t``, positive a request to be tested and freed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types

from ucxgossip import jit
from ucxgossip.ucp import lib

PUT = "ucp_put_nbx"
FLUSH = "ucp_ep_flush_nbx"
SEND = "ucp_am_send_nbx"
"""What an error of these calls is named by."""

_word = types.int64
_uint = types.uint32
_status = types.int8

_put = jit.external("ucp_put_nbx", _word, _word, _word, _word, _word, _word, _word)
_fence = jit.external("ucp_worker_fence", _status, _word)
_flush = jit.external("ucp_ep_flush_nbx", _word, _word, _word)
_progress = jit.external("ucp_worker_progress", _uint, _word)
_arm = jit.external("ucp_worker_arm", _status, _word)
_send = jit.external("ucp_am_send_nbx", _word, _word, _uint, _word, _word, _word, _word, _word)
_check = jit.external("ucp_request_check_status", _status, _word)
_free = jit.external("ucp_request_free", types.void, _word)


def _call(name: str, *arguments: int) -> Any:
    return lib.load().functions[name](*map(int, arguments))


def signed(result: int | None) -> int:
    """A pointer that ctypes returned, as the signed integer that compiled code would see."""
    value = result or 0
    return value - (1 << 64) if value >= 1 << 63 else value


def put(ep: int, source: int, nbytes: int, remote: int, rkey: int, param: int) -> int:
    """``ucp_put_nbx``: copy `nbytes` at `source` to `remote` in the memory of `ep`'s worker."""
    return signed(_call("ucp_put_nbx", ep, source, nbytes, remote, rkey, param))


def fence(worker: int) -> int:
    """``ucp_worker_fence``: puts after it are not seen before puts ahead of it, per endpoint."""
    return int(_call("ucp_worker_fence", worker))


def flush(ep: int, param: int) -> int:
    """``ucp_ep_flush_nbx``: completes when all puts on `ep` are visible in the target's memory."""
    return signed(_call("ucp_ep_flush_nbx", ep, param))


def progress(worker: int) -> int:
    """``ucp_worker_progress``: non-zero if something moved."""
    return int(_call("ucp_worker_progress", worker))


def arm(worker: int) -> int:
    """``ucp_worker_arm``: 0 when the event descriptor may be slept on, ERR_BUSY (-15) when not."""
    return int(_call("ucp_worker_arm", worker))


def send(
    ep: int, ident: int, header: int, header_bytes: int, data: int, nbytes: int, param: int
) -> int:
    """``ucp_am_send_nbx``: an active message `ident` with a header and a payload."""
    return signed(_call("ucp_am_send_nbx", ep, ident, header, header_bytes, data, nbytes, param))


def check(request: int) -> int:
    """``ucp_request_check_status``: 1 in progress, 0 done, negative an error."""
    return int(_call("ucp_request_check_status", request))


def free(request: int) -> None:
    """``ucp_request_free``: give the request back; UCX finishes it if it is under way."""
    _call("ucp_request_free", request)


jit.compiled_as(
    put,
    lambda ep, source, nbytes, remote, rkey, param: _put(ep, source, nbytes, remote, rkey, param),
)
jit.compiled_as(fence, lambda worker: np.int64(_fence(worker)))
jit.compiled_as(flush, lambda ep, param: _flush(ep, param))
jit.compiled_as(progress, lambda worker: np.int64(_progress(worker)))
jit.compiled_as(arm, lambda worker: np.int64(_arm(worker)))
jit.compiled_as(
    send,
    lambda ep, ident, header, header_bytes, data, nbytes, param: _send(
        ep, ident, header, header_bytes, data, nbytes, param
    ),
)
jit.compiled_as(check, lambda request: np.int64(_check(request)))
jit.compiled_as(free, lambda request: _free(request))


def load() -> None:
    """Bind the functions above; must come before the first compiled call."""
    lib.load()
