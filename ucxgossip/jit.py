"""What compiled code stands on: the decorator, atomics, raw memory and a few libc calls.

The engine runs without the GIL, so everything it touches is either an ``int64`` array shared
with Python or raw memory that UCX writes.  numba has neither atomics on the CPU nor typed views
of an address, so they are made here, each as a pair: a plain Python function, which runs when
the caller is interpreted (``f.py_func``, in tests), and an ``overload`` that emits LLVM IR.

Rejected: ctypes function pointers as globals (numba cannot cache code that holds them, so every
rank would compile at every start); a C extension (no compiler at install).
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import logging
import os
import platform
import select
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import llvmlite.binding as llvm
import numba
import numpy as np
from llvmlite import ir
from numba import extending, types
from numba.core import cgutils

F = TypeVar("F", bound=Callable[..., Any])

_cfunc: Any = numba.cfunc
_config: Any = numba.config
_LOG = logging.getLogger("ucxgossip")


INTERPRETED = bool(_config.DISABLE_JIT)
"""Whether NUMBA_DISABLE_JIT turned compilation off; everything then runs as Python."""


def njit(function: F) -> F:
    """Compile `function` on its first call: nopython, without the GIL, cached on disk."""
    return numba.njit(cache=True, nogil=True, error_model="numpy")(function)  # type: ignore[return-value]


def intrinsic(generator: Callable[..., Any]) -> Any:
    """``numba.extending.intrinsic``, whose annotations describe the generator it is made from."""
    return extending.intrinsic(generator)


def compile_ahead(function: Any, signature: Any) -> Any:
    """Compile (or load from the cache) `function` for `signature`, and return that version.

    Called by itself it is quicker than through `function` (90 and 155 ns with one argument), which
    looks at the types of its arguments first.
    """
    return function if INTERPRETED else function.compile(signature)


_C_RESULTS = {types.int8: ctypes.c_int8, types.int32: ctypes.c_int32}


@cache
def c_callback(function: Any, signature: Any) -> Any:
    """`function` as a C function of integers: an object with `address`, kept for good."""
    if not INTERPRETED:
        compiled = _cfunc(signature, nopython=True, cache=True, error_model="numpy")
        return compiled(function.py_func)
    result = _C_RESULTS[signature.return_type]
    callback: Any = ctypes.CFUNCTYPE(result, *(ctypes.c_int64,) * len(signature.args))(function)
    callback.address = ctypes.cast(callback, ctypes.c_void_p).value
    return callback


def external(name: str, restype: Any, *argtypes: Any) -> Any:
    """A C function that compiled code can call, bound by `name` at link time.

    The address must be known to LLVM (`link`) before the first call: an unresolved symbol is a
    segmentation fault, not an error.
    """
    return types.ExternalFunction(name, restype(*argtypes))


def link(name: str, address: int) -> None:
    """Tell LLVM where the C function `name` lives in this process."""
    llvm.add_symbol(name, address)


def compiled_as(function: Callable[..., Any], implementation: Callable[..., Any]) -> None:
    """In compiled code, a call of `function` becomes `implementation` (same parameters, no hints).

    `function` itself stays what interpreted callers run.
    """
    extending.overload(function, strict=False)(lambda *arguments: implementation)


# --- atomics on int64 arrays -------------------------------------------------------------------


def _element(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    """Address of ``array[index]`` for an intrinsic whose first arguments are (array, index)."""
    array = context.make_array(signature.args[0])(context, builder, args[0])
    return builder.gep(array.data, [args[1]])


@intrinsic
def _load_acquire(typingctx: Any, array: Any, index: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _element(context, builder, signature, args)
        return builder.load_atomic(pointer, "acquire", 8)

    return types.int64(array, types.intp), codegen


@intrinsic
def _store_release(typingctx: Any, array: Any, index: Any, value: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _element(context, builder, signature, args)
        builder.store_atomic(args[2], pointer, "release", 8)
        return context.get_dummy_value()

    return types.void(array, types.intp, types.int64), codegen


@intrinsic
def _fetch_add(typingctx: Any, array: Any, index: Any, value: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _element(context, builder, signature, args)
        return builder.atomic_rmw("add", pointer, args[2], "seq_cst")

    return types.int64(array, types.intp, types.int64), codegen


@intrinsic
def _compare_swap(typingctx: Any, array: Any, index: Any, expected: Any, desired: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _element(context, builder, signature, args)
        pair = builder.cmpxchg(pointer, args[2], args[3], "seq_cst", "seq_cst")
        return builder.extract_value(pair, 1)

    return types.boolean(array, types.intp, types.int64, types.int64), codegen


@intrinsic
def _full_fence(typingctx: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


def load_acquire(array: Any, index: int) -> int:
    """Read ``array[index]``; nothing after it is read earlier."""
    return int(array[index])


def store_release(array: Any, index: int, value: int) -> None:
    """Write ``array[index]``; nothing before it becomes visible later."""
    array[index] = value


def fetch_add(array: Any, index: int, value: int) -> int:
    """Add `value` to ``array[index]`` atomically; the value from before."""
    before = int(array[index])
    array[index] = before + value
    return before


def compare_swap(array: Any, index: int, expected: int, desired: int) -> bool:
    """Set ``array[index]`` to `desired` if it holds `expected`; whether it did."""
    if array[index] != expected:
        return False
    array[index] = desired
    return True


def full_fence() -> None:
    """What was written before is visible before anything after it is read."""


compiled_as(full_fence, lambda: _full_fence())
compiled_as(load_acquire, lambda array, index: _load_acquire(array, index))
compiled_as(store_release, lambda array, index, value: _store_release(array, index, value))
compiled_as(fetch_add, lambda array, index, value: _fetch_add(array, index, value))
compiled_as(
    compare_swap,
    lambda array, index, expected, desired: _compare_swap(array, index, expected, desired),
)


# --- raw memory --------------------------------------------------------------------------------


@intrinsic
def _as_pointer(typingctx: Any, address: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), codegen


def _viewer(dtype: Any) -> Callable[[int, int], Any]:
    """A function (address, count) -> 1-D array of `dtype` over that memory, in both worlds."""
    ctype = np.ctypeslib.as_ctypes_type(dtype)

    def view(address: int, count: int) -> Any:
        return np.ctypeslib.as_array((ctype * int(count)).from_address(int(address)))

    compiled_as(view, lambda address, count: numba.carray(_as_pointer(address), (count,), dtype))
    return view


view_words = _viewer(np.int64)
view_unsigned = _viewer(np.uint64)
view_bytes = _viewer(np.uint8)
view_float32 = _viewer(np.float32)
view_float64 = _viewer(np.float64)


_memmove = external("memmove", types.int64, types.int64, types.int64, types.int64)


def copy_memory(target: int, source: int, nbytes: int) -> None:
    """memmove(3): copy `nbytes` bytes between two addresses."""
    ctypes.memmove(int(target), int(source), int(nbytes))


compiled_as(copy_memory, lambda target, source, nbytes: _memmove(target, source, nbytes))


# --- C functions known by address ---------------------------------------------------------------


@intrinsic
def _call(typingctx: Any, address: Any, arguments: Any) -> Any:
    count = len(arguments)
    tuple_of, unpack = cast(Any, types.UniTuple), cast(Any, cgutils.unpack_tuple)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = ir.IntType(64)
        kind = ir.FunctionType(ir.IntType(32), [word] * count)
        function = builder.inttoptr(args[0], kind.as_pointer())
        found = builder.call(function, unpack(builder, args[1], count))
        return builder.sext(found, word)

    return types.int64(types.int64, tuple_of(types.int64, count)), codegen


def words_in(count: int) -> Any:
    """The signature, for `c_callback`, of a C function of `count` words that `call` can call."""
    return types.int32(*(types.int64,) * count)


def call(address: int, arguments: tuple[int, ...]) -> int:
    """Call the C function at `address`: ``int f(int64_t, ...)``, pointers among its arguments.

    For functions that a table holds, where `external` would bind a name for the whole process.
    Smaller integers go as 64 bits, which is the same in registers and on the stack of the ABIs of
    Linux on x86-64 and aarch64.
    """
    prototype = ctypes.CFUNCTYPE(ctypes.c_int, *(ctypes.c_int64,) * len(arguments))
    return int(prototype(int(address))(*map(int, arguments)))


compiled_as(call, lambda address, arguments: _call(address, arguments))


LINE = 64
"""Bytes of a cache line, in which `stream_memory` stores."""

_X86 = platform.machine() in ("x86_64", "AMD64")


@intrinsic
def _stream_lines(typingctx: Any, target: Any, source: Any, lines: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        to, source, lines = args
        word = ir.IntType(64)
        line = ir.VectorType(word, LINE // 8)
        hint = builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)])
        with cgutils.for_range(builder, lines) as loop:
            offset = builder.mul(loop.index, ir.Constant(word, LINE))
            read = builder.inttoptr(builder.add(source, offset), line.as_pointer())
            write = builder.inttoptr(builder.add(to, offset), line.as_pointer())
            stored = builder.store(builder.load(read, align=1), write, align=LINE)
            stored.set_metadata("nontemporal", hint)
        if _X86:  # no fence of LLVM's orders these stores
            kind = ir.FunctionType(ir.VoidType(), [])
            fence = cgutils.get_or_insert_function(  # type: ignore[no-untyped-call]
                builder.module, kind, "llvm.x86.sse.sfence"
            )
            builder.call(fence, [])
        return context.get_dummy_value()

    return types.void(target, source, lines), codegen


def _stream(target: int, source: int, lines: int) -> None:
    copy_memory(target, source, LINE * lines)


compiled_as(_stream, lambda target, source, lines: _stream_lines(target, source, lines))


@njit
def stream_memory(target: int, source: int, nbytes: int) -> None:
    """As `copy_memory`, past the caches: whole lines of the target are neither read nor kept.

    What is copied is visible before anything stored later.
    """
    head = min(-target % LINE, nbytes)
    if head:
        copy_memory(target, source, head)
    lines = (nbytes - head) // LINE
    if lines:
        _stream(target + head, source + head, lines)
    done = head + LINE * lines
    if done < nbytes:
        copy_memory(target + done, source + done, nbytes - done)


# --- libc: time, scheduling, sleeping ----------------------------------------------------------


def _libc(name: str) -> None:
    function = getattr(ctypes.CDLL(None), name)
    link(name, ctypes.cast(function, ctypes.c_void_p).value or 0)


for _name in ("memmove", "clock_gettime", "sched_yield", "poll", "ppoll", "read", "write"):
    _libc(_name)

_clock_gettime = external("clock_gettime", types.int32, types.int32, types.voidptr)
_sched_yield = external("sched_yield", types.int32)
_poll = external("poll", types.int32, types.voidptr, types.uint64, types.int32)
_ppoll = external("ppoll", types.int32, types.voidptr, types.uint64, types.voidptr, types.int64)
_read = external("read", types.int64, types.int32, types.voidptr, types.uint64)
_write = external("write", types.int64, types.int32, types.voidptr, types.uint64)

_CLOCK_MONOTONIC = 1
_POLLIN, _POLLOUT, _POLLERR, _POLLHUP = 1, 4, 8, 16


@intrinsic
def _scratch(typingctx: Any) -> Any:
    """Address of 16 bytes on the caller's stack."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        with builder.goto_entry_block():  # once a call of the function, not once a pass of a loop
            space = builder.alloca(ir.ArrayType(ir.IntType(64), 2))
        return builder.bitcast(space, cgutils.voidptr_t)

    return types.voidptr(), codegen


def now_ns() -> int:
    """Nanoseconds of CLOCK_MONOTONIC, the clock of all deadlines."""
    return time.monotonic_ns()


def _now_ns() -> int:
    space = _scratch()
    _clock_gettime(_CLOCK_MONOTONIC, space)
    words = numba.carray(space, (2,), np.int64)
    return words[0] * 1_000_000_000 + words[1]  # type: ignore[no-any-return]


def yield_cpu() -> None:
    """sched_yield(2): let another runnable thread have this core."""
    os.sched_yield()


def wait_readable(first: int, second: int, timeout_ms: int) -> int:
    """poll(2) on two descriptors (-1: none) for at most `timeout_ms`.

    Bit 0 is set when `first` is readable, bit 1 when `second` is.
    """
    poller = select.poll()
    for descriptor in map(int, (first, second)):
        if descriptor >= 0:
            poller.register(descriptor, select.POLLIN)
    ready = {descriptor for descriptor, _ in poller.poll(timeout_ms)}
    return (first in ready) + 2 * (second in ready)


def _wait_readable(first: int, second: int, timeout_ms: int) -> int:
    # struct pollfd { int fd; short events; short revents; }
    space = _scratch()
    words = numba.carray(space, (2,), np.int64)
    words[0] = (first & 0xFFFFFFFF) | (_POLLIN << 32)
    words[1] = (second & 0xFFFFFFFF) | (_POLLIN << 32)
    if _poll(space, 2, timeout_ms) <= 0:
        return 0
    return ((words[0] >> 48) != 0) + 2 * ((words[1] >> 48) != 0)  # type: ignore[no-any-return]


def wait_briefly(first: int, second: int, timeout_ns: int) -> int:
    """As `wait_readable`, for at most `timeout_ns` nanoseconds (below a second), by ppoll(2)."""
    return wait_readable(first, second, timeout_ns / 1e6)  # type: ignore[arg-type]


def _wait_briefly(first: int, second: int, timeout_ns: int) -> int:
    space, limit = _scratch(), _scratch()
    words, times = numba.carray(space, (2,), np.int64), numba.carray(limit, (2,), np.int64)
    words[0] = (first & 0xFFFFFFFF) | (_POLLIN << 32)
    words[1] = (second & 0xFFFFFFFF) | (_POLLIN << 32)
    times[0], times[1] = 0, timeout_ns
    if _ppoll(space, 2, limit, 0) <= 0:
        return 0
    return ((words[0] >> 48) != 0) + 2 * ((words[1] >> 48) != 0)  # type: ignore[no-any-return]


def kick(descriptor: int) -> None:
    """Make an eventfd readable."""
    os.eventfd_write(int(descriptor), 1)


def _kick(descriptor: int) -> None:
    space = _scratch()
    numba.carray(space, (1,), np.int64)[0] = 1
    _write(descriptor, space, 8)


def drain(descriptor: int) -> None:
    """Make a non-blocking eventfd unreadable again."""
    with suppress(BlockingIOError):
        os.eventfd_read(int(descriptor))


def _drain(descriptor: int) -> None:
    _read(descriptor, _scratch(), 8)


def write_word(descriptor: int, value: int) -> None:
    """write(2) of one int64; what a descriptor that is full or closed does not take is dropped."""
    with suppress(OSError):
        os.write(int(descriptor), int(value).to_bytes(8, sys.byteorder, signed=True))


def _write_word(descriptor: int, value: int) -> None:
    space = _scratch()
    numba.carray(space, (1,), np.int64)[0] = value
    _write(descriptor, space, 8)


# --- libc: streams ------------------------------------------------------------------------------


def read_some(descriptor: int, address: int, nbytes: int) -> int:
    """read(2) into memory: how many bytes, 0 at the end, -1 where none came (or it failed)."""
    try:
        return os.readv(int(descriptor), [memoryview(view_bytes(address, nbytes))])
    except OSError:
        return -1


def _read_some(descriptor: int, address: int, nbytes: int) -> int:
    return _read(descriptor, _as_pointer(address), nbytes)  # type: ignore[no-any-return]


def write_some(descriptor: int, address: int, nbytes: int) -> int:
    """write(2) out of memory: how many bytes, -1 where none were taken (or it failed)."""
    try:
        return os.write(int(descriptor), memoryview(view_bytes(address, nbytes)))
    except OSError:
        return -1


def _write_some(descriptor: int, address: int, nbytes: int) -> int:
    return _write(descriptor, _as_pointer(address), nbytes)  # type: ignore[no-any-return]


def wait_stream(readable: int, writable: int, timeout_ms: int) -> bool:
    """poll(2) until `readable` has bytes or an end, or `writable` takes some (-1: none).

    False when `writable` has failed: its other side is gone.
    """
    if int(readable) == int(writable):
        events = [(int(readable), _POLLIN | _POLLOUT)]
    else:
        events = [(int(readable), _POLLIN), (int(writable), _POLLOUT)]
    poller = select.poll()
    for descriptor, mask in events:
        if descriptor >= 0:
            poller.register(descriptor, mask)
    ready = dict(poller.poll(timeout_ms))
    return not ready.get(int(writable), 0) & (_POLLERR | _POLLHUP)


def _wait_stream(readable: int, writable: int, timeout_ms: int) -> bool:
    space = _scratch()
    words = numba.carray(space, (2,), np.int64)
    words[0] = (readable & 0xFFFFFFFF) | (_POLLIN << 32)
    words[1] = (writable & 0xFFFFFFFF) | (_POLLOUT << 32)
    if _poll(space, 2, timeout_ms) <= 0:
        return True
    return ((words[1] >> 48) & (_POLLERR | _POLLHUP)) == 0  # type: ignore[no-any-return]


compiled_as(now_ns, _now_ns)
compiled_as(read_some, _read_some)
compiled_as(write_some, _write_some)
compiled_as(wait_stream, _wait_stream)
compiled_as(write_word, _write_word)
compiled_as(yield_cpu, lambda: _sched_yield())
compiled_as(wait_readable, _wait_readable)
compiled_as(wait_briefly, _wait_briefly)
compiled_as(kick, _kick)
compiled_as(drain, _drain)


# --- one compilation a machine -----------------------------------------------------------------


def _sources() -> Iterator[Path]:
    package = Path(__file__).parent
    for root in (package, package.parent / "kernels", package.parent / "bench"):
        yield from sorted(root.rglob("*.py"))


def _digest() -> str:
    """Identifies the sources and the compiler that a cache was filled from."""
    digest = hashlib.blake2b(digest_size=8)
    digest.update(f"{numba.__version__} {llvm.get_host_cpu_name()}".encode())
    for path in _sources():
        digest.update(path.read_bytes())
    return digest.hexdigest()


_DIGEST = _digest()
"""Of the sources that this process has imported, or does: they may change while it runs."""


def _clear(folders: set[Path]) -> None:
    """Remove what was compiled from other sources."""
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in (*folder.glob("*.nb[ic]"), *folder.glob("ucxgossip-*.warm")):
            stale.unlink(missing_ok=True)


@contextmanager
def warm_up(*compiled: Any, part: str = "core") -> Iterator[None]:
    """Run the first calls of `compiled` functions so that one process of a machine compiles.

    The first process to come compiles under a file lock, the others wait and load what it wrote.
    numba keys its cache by the file of each function alone, so code that calls changed functions
    of another file would be stale: the caches of other sources are removed first.

    part: names what is compiled here, where the same folders get more at another time.
    """
    if INTERPRETED:
        yield
        return
    folders = {Path(function.stats.cache_path) for function in compiled}
    marker = min(folders) / f"ucxgossip-{_DIGEST}-{part}.warm"
    if marker.exists():
        yield
        return
    name = Path(tempfile.gettempdir()) / f"ucxgossip-{os.getuid()}.lock"
    with name.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if marker.exists():
            fcntl.flock(lock, fcntl.LOCK_UN)
        else:
            level = logging.WARNING if part == "core" else logging.INFO  # for who sits and waits
            _LOG.log(level, "compiling, once for this machine: up to a minute (%s)", marker.parent)
            if not any(marker.parent.glob(f"ucxgossip-{_DIGEST}-*.warm")):
                _clear(folders)
        yield
        marker.touch()
