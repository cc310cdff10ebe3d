"""The compiled loops of `bench put`: what ucx_perftest does in C, over our own `ops`.

Both sides spin, as ucx_perftest does: this measures the put, not the waiting (`bench exchange`
measures whole rounds as they are run).
"""

from __future__ import annotations

from typing import Any

from ucxgossip import jit
from ucxgossip.ucp import ops

TIMED_OUT = -1000
_IN_PROGRESS = 1


@jit.njit
def _await_byte(worker: int, inbox: Any, value: int, deadline_ns: int) -> bool:
    """Progress until the last byte of `inbox` is `value`; False at the deadline."""
    passes = 0
    while inbox[-1] != value:
        ops.progress(worker)
        passes += 1
        if passes % 65536 == 0 and jit.now_ns() > deadline_ns:
            return False
    return True


@jit.njit
def _finish(worker: int, request: int, deadline_ns: int) -> int:
    """Progress until a request is done; its status, or `TIMED_OUT`."""
    if request <= 0:
        return request
    status = ops.check(request)
    while status == _IN_PROGRESS:
        ops.progress(worker)
        status = ops.check(request)
        if status == _IN_PROGRESS and jit.now_ns() > deadline_ns:
            status = TIMED_OUT
    ops.free(request)
    return status


@jit.njit
def ping_pong(
    worker: int,
    endpoint: int,
    source: int,
    inbox: int,
    nbytes: int,
    remote: int,
    key: int,
    param: int,
    starts: bool,
    samples: Any,
    batch: int,
    deadline_ns: int,
) -> int:
    """``len(samples) * batch`` round trips; each sample the mean ns of one round trip of a batch.

    The number of the trip travels in the last byte, which the receiver watches, as in
    ucx_perftest's ucp_put_lat. Returns 0, a UCX error status, or `TIMED_OUT`, after the last put
    has left, which needs progress where it did not fit into a socket at once.
    """
    outbox, watched = jit.view_bytes(source, nbytes), jit.view_bytes(inbox, nbytes)
    value, request = 0, 0
    for sample in range(len(samples)):
        begun = jit.now_ns()
        for _ in range(batch):
            value = value % 255 + 1
            if not starts and not _await_byte(worker, watched, value, deadline_ns):
                return TIMED_OUT
            outbox[-1] = value
            if request > 0:
                ops.free(request)
            request = ops.put(endpoint, source, nbytes, remote, key, param)
            if request < 0:
                return request
            if starts and not _await_byte(worker, watched, value, deadline_ns):
                return TIMED_OUT
        samples[sample] = (jit.now_ns() - begun) // batch
    return _finish(worker, request, deadline_ns)


@jit.njit
def stream(
    worker: int,
    endpoint: int,
    source: int,
    nbytes: int,
    remote: int,
    key: int,
    param: int,
    puts: int,
    window: Any,
    deadline_ns: int,
) -> int:
    """`puts` puts, ``len(window)`` in flight, and a flush. Nanoseconds, or an error status."""
    window[:] = 0
    begun = jit.now_ns()
    for number in range(puts):
        place = number % len(window)
        status = _finish(worker, window[place], deadline_ns)
        if status < 0:
            return status
        window[place] = ops.put(endpoint, source, nbytes, remote, key, param)
        if window[place] < 0:
            return window[place]  # type: ignore[no-any-return]
        if number % 32 == 31:
            ops.progress(worker)
    for place in range(len(window)):
        status = _finish(worker, window[place], deadline_ns)
        if status < 0:
            return status
    status = _finish(worker, ops.flush(endpoint, param), deadline_ns)
    return status if status < 0 else jit.now_ns() - begun


@jit.njit
def serve(worker: int, flag: int, value: int, deadline_ns: int) -> int:
    """Progress until the byte at `flag` is `value`; 0, or `TIMED_OUT`."""
    return 0 if _await_byte(worker, jit.view_bytes(flag, 1), value, deadline_ns) else TIMED_OUT
