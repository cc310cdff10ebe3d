"""A device as compiled code sees it: one int64 array of C functions, streams and kernels.

The engine runs without the GIL, so it can ask a device only for what is a C function with an
address. These are the driver API's own (``libcuda.so.1``); a call costs some ten nanoseconds. All
of them return 0, or an error in the driver's numbers (`ucxgossip.errors.DeviceError` names it).

Rejected: binding them by name, as libucp's (`jit.external`): a process without a driver could not
compile, and no test could bring another device.
"""

from __future__ import annotations

from typing import Any

from ucxgossip import jit

# --- functions: addresses ----------------------------------------------------------------------
PUSH = 0  # (context): make it this thread's current one
POP = 1  # (address of a word): back to the one before
QUERY = 2  # (event): 0 complete, NOT_READY, or an error
RECORD = 3  # (event, stream): completes when all that the stream holds now has
WAIT = 4  # (stream, event, 0): what the stream gets from now on waits for the event
COPY = 5  # (to, from, bytes, stream), host or device
LAUNCH = 6  # (function, 3 of the grid, 3 of a block, shared bytes, stream, arguments, 0)
EXCHANGE = 7  # (address of a word): this thread's capture mode, which it is given for the one there

# --- handles -----------------------------------------------------------------------------------
CONTEXT = 8
OUT = 9  # stream of what leaves: copies to staging memory
IN = 10  # stream of what comes in: copies from slots, kernels
SCRATCH = 11  # address of a word that POP may write

# --- shape of a launch -------------------------------------------------------------------------
THREADS = 12  # of a block
BLOCKS = 13  # at most

# --- kernels (functions), for float32 and then for float64 -------------------------------------
KERNELS = 16
MIX, GAUGE, MIX_WHOLE = 0, 1, 2
PER_KIND = 3

WORDS = 24

RELAXED = 2
"""The capture mode (``CU_STREAM_CAPTURE_MODE_RELAXED``) in which a thread may ask for events while
any thread captures a graph: in the usual one that is an error, and ends the other's capture."""

NOT_READY = 600
"""What QUERY returns of an event that has not completed (``CUDA_ERROR_NOT_READY``)."""


@jit.njit
def push(table: Any, mode: int) -> int:
    """Make the device's context current in this thread, in `RELAXED` mode; an error, or 0.

    mode: address of a word of the caller's own, until `pop`, with which to pair each success.
    """
    status = jit.call(table[PUSH], (table[CONTEXT],))
    if status != 0:
        return status
    jit.view_words(mode, 1)[0] = RELAXED
    status = jit.call(table[EXCHANGE], (mode,))
    if status != 0:
        jit.call(table[POP], (table[SCRATCH],))
    return status


@jit.njit
def pop(table: Any, mode: int) -> int:
    """Undo `push`."""
    jit.call(table[EXCHANGE], (mode,))
    return jit.call(table[POP], (table[SCRATCH],))


@jit.njit
def query(table: Any, event: int) -> int:
    """0 if what was recorded as `event` has completed, `NOT_READY` if not, or an error."""
    return jit.call(table[QUERY], (event,))


@jit.njit
def record(table: Any, event: int, stream: int) -> int:
    """`event` completes once all that `stream` holds now has; an error, or 0."""
    return jit.call(table[RECORD], (event, stream))


@jit.njit
def wait(table: Any, stream: int, event: int) -> int:
    """What `stream` gets from now on begins after `event`; an error, or 0."""
    nothing = stream - stream
    return jit.call(table[WAIT], (stream, event, nothing))


@jit.njit
def copy(table: Any, to: int, source: int, nbytes: int, stream: int) -> int:
    """Enqueue a copy between any two addresses, host or device; an error, or 0."""
    return jit.call(table[COPY], (to, source, nbytes, stream))


@jit.njit
def launch(table: Any, kernel: int, blocks: int, rows: int, stream: int, arguments: int) -> int:
    """Enqueue `kernel` on `rows` (65,535 at most) rows of `blocks`; an error, or 0.

    arguments: address of the addresses of its arguments.
    """
    nothing = blocks - blocks
    one = nothing + 1
    return jit.call(
        table[LAUNCH],
        (
            *(kernel, blocks, rows, one),
            *(table[THREADS], one, one),
            *(nothing, stream, arguments, nothing),
        ),
    )
