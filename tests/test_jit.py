"""ucxgossip.jit: each pair does the same compiled and interpreted; one process compiles."""

import ctypes
import fcntl
import importlib.util
import os
import platform
import select
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
from numba import types

from ucxgossip import jit

DEADLINE = 60.0
DEADLINE_MS = 60_000

# Without the cache on disk: numba would not notice there that jit has changed.
uncached = numba.njit(nogil=True, error_model="numpy")


def both(*functions: Any) -> pytest.MarkDecorator:
    """Parametrize `run` with the compiled and the interpreted version of each function."""
    runs, ids = [], []
    for function in functions:
        runs += [function, function.py_func]
        ids += [f"compiled-{function.__name__}", f"interpreted-{function.__name__}"]
    return pytest.mark.parametrize("run", runs, ids=ids)


# --- atomics -----------------------------------------------------------------------------------


@uncached
def load(array: Any, index: int) -> int:
    return jit.load_acquire(array, index)


@uncached
def store(array: Any, index: int, value: int) -> None:
    jit.store_release(array, index, value)


@uncached
def add(array: Any, index: int, value: int) -> int:
    return jit.fetch_add(array, index, value)


@uncached
def swap(array: Any, index: int, expected: int, desired: int) -> bool:
    return jit.compare_swap(array, index, expected, desired)


@both(load)
def test_load_acquire(run: Any) -> None:
    array = np.array([5, -(1 << 62), 7])
    assert [run(array, index) for index in range(3)] == [5, -(1 << 62), 7]


@both(store)
def test_store_release_writes_one_word(run: Any) -> None:
    array = np.zeros(4, np.int64)
    run(array, 2, -(1 << 62))
    assert array.tolist() == [0, 0, -(1 << 62), 0]


@both(add)
def test_fetch_add_gives_the_value_from_before(run: Any) -> None:
    array = np.array([1, 10, 100])
    assert run(array, 1, 5) == 10
    assert run(array, 1, -20) == 15
    assert array.tolist() == [1, -5, 100]


@both(swap)
def test_compare_swap_sets_what_was_expected_only(run: Any) -> None:
    array = np.array([1, 10, 100])
    assert not run(array, 1, 11, 12)
    assert array.tolist() == [1, 10, 100]
    assert run(array, 1, 10, 12)
    assert array.tolist() == [1, 12, 100]


@uncached
def draw_numbers(array: Any, drawn: Any, times: int, threads: int) -> None:
    """Once all threads are here, add 1 so often; mark the values from before: no other's too."""
    jit.fetch_add(array, 2, 1)
    while jit.load_acquire(array, 2) < threads:
        jit.yield_cpu()
    for _ in range(times):
        drawn[jit.fetch_add(array, 1, 1)] += 1


@uncached
def take_tickets(array: Any, taken: Any, tickets: int) -> None:
    """Claim tickets 0, 1, ... by compare-and-swap; mark those that this thread got."""
    for ticket in range(tickets):
        if jit.compare_swap(array, 1, ticket, ticket + 1):
            taken[ticket] += 1
        while jit.load_acquire(array, 1) <= ticket:
            jit.yield_cpu()


@uncached
def send_down(array: Any, data: Any, items: int) -> None:
    """Write each item plainly, then its number with release; wait until it is taken."""
    for number in range(1, items + 1):
        data[0] = 3 * number
        jit.store_release(array, 0, number)
        while jit.load_acquire(array, 8) != number:
            jit.yield_cpu()


@uncached
def take_in(array: Any, data: Any, items: int) -> int:
    """How many items were not there yet when their number was."""
    wrong = 0
    for number in range(1, items + 1):
        while jit.load_acquire(array, 0) != number:
            jit.yield_cpu()
        wrong += data[0] != 3 * number
        jit.store_release(array, 8, number)
    return wrong


def in_threads(*calls: Callable[[], Any]) -> list[Any]:
    results: list[Any] = [None] * len(calls)

    def body(index: int) -> None:
        results[index] = calls[index]()

    threads = [threading.Thread(target=body, args=(i,), daemon=True) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    assert not any(thread.is_alive() for thread in threads)
    return results


def test_fetch_add_gives_each_number_to_one_thread() -> None:
    times, threads = 100_000, 3
    drawn = [np.zeros(threads * times, np.int64) for _ in range(threads)]
    array = np.zeros(3, np.int64)
    draw_numbers(array.copy(), drawn[0], 0, 1)  # compiles
    in_threads(*[lambda own=own: draw_numbers(array, own, times, threads) for own in drawn])
    assert array.tolist() == [0, threads * times, threads]
    assert (sum(drawn) == 1).all()


def test_compare_swap_lets_one_thread_win() -> None:
    array, taken = np.zeros(2, np.int64), [np.zeros(2000, np.int64) for _ in range(3)]
    take_tickets(array, taken[0], 0)
    in_threads(*[lambda own=own: take_tickets(array, own, 2000) for own in taken])
    assert (sum(taken) == 1).all()


def test_release_and_acquire_carry_the_data() -> None:
    array, data = np.zeros(16, np.int64), np.zeros(1, np.int64)
    send_down(array, data, 0), take_in(array, data, 0)
    _, wrong = in_threads(lambda: send_down(array, data, 2000), lambda: take_in(array, data, 2000))
    assert wrong == 0


# --- raw memory --------------------------------------------------------------------------------


@uncached
def double_words(address: int, count: int) -> Any:
    view = jit.view_words(address, count)
    view[:] = 2 * view
    return view.sum(), len(view), view.itemsize


@uncached
def double_bytes(address: int, count: int) -> Any:
    view = jit.view_bytes(address, count)
    for i in range(count):
        view[i] = 2 * view[i]
    return view.sum(), len(view), view.itemsize


@uncached
def double_float32(address: int, count: int) -> Any:
    view = jit.view_float32(address, count)
    view[:] = view + view
    return view.sum(), len(view), view.itemsize


@uncached
def double_float64(address: int, count: int) -> Any:
    view = jit.view_float64(address, count)
    view[:] = view + view
    return view.sum(), len(view), view.itemsize


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "interpreted"])
@pytest.mark.parametrize(
    ("function", "dtype"),
    [
        (double_words, np.int64),
        (double_bytes, np.uint8),
        (double_float32, np.float32),
        (double_float64, np.float64),
    ],
)
def test_view_is_that_memory(function: Any, dtype: Any, compiled: bool) -> None:
    run = function if compiled else function.py_func
    array = np.arange(10, dtype=dtype)
    total, length, itemsize = run(array.ctypes.data + 3 * array.itemsize, 4)
    assert (total, length, itemsize) == (2 * (3 + 4 + 5 + 6), 4, array.itemsize)
    assert array.tolist() == [0, 1, 2, 6, 8, 10, 12, 7, 8, 9]


@uncached
def copy(target: int, source: int, nbytes: int) -> None:
    jit.copy_memory(target, source, nbytes)


@both(copy)
@pytest.mark.parametrize("nbytes", [0, 1, 7, 8, 33])
def test_copy_memory_copies_so_many_bytes(run: Any, nbytes: int) -> None:
    source, target = np.arange(1, 65, dtype=np.uint8), np.full(64, 0xEE, np.uint8)
    run(target.ctypes.data + 5, source.ctypes.data + 3, nbytes)
    expected = [0xEE] * 64
    expected[5 : 5 + nbytes] = source[3 : 3 + nbytes].tolist()
    assert target.tolist() == expected
    assert source.tolist() == list(range(1, 65))


@both(copy)
@pytest.mark.parametrize(("target", "source"), [(3, 0), (0, 3)])
def test_copy_memory_may_overlap(run: Any, target: int, source: int) -> None:
    memory = np.arange(20, dtype=np.uint8)
    expected = memory.tolist()
    expected[target : target + 17] = expected[source : source + 17]
    run(memory.ctypes.data + target, memory.ctypes.data + source, 17)
    assert memory.tolist() == expected


# --- C functions known by address ---------------------------------------------------------------


@uncached
def call_one(address: int, first: int) -> int:
    return jit.call(address, (first,))


@uncached
def call_many(address: int, values: Any) -> int:
    first, second, third = values[0], values[1], values[2]
    return jit.call(address, (first, second, third, first, second, third, first, second, third))


@both(call_one)
def test_call_passes_and_returns(run: Any) -> None:
    kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int64)
    given: list[int] = []

    def function(value: int) -> int:
        given.append(value)
        return -5 if value < 0 else 600

    callback = kind(function)
    address = ctypes.cast(callback, ctypes.c_void_p).value
    assert run(address, 1 << 40) == 600
    assert run(address, -(1 << 40)) == -5  # int is 32 bits: its sign is kept
    assert given == [1 << 40, -(1 << 40)]


@both(call_many)
def test_call_passes_more_than_registers_hold(run: Any) -> None:
    kind = ctypes.CFUNCTYPE(ctypes.c_int, *(ctypes.c_int64,) * 9)
    given: list[tuple[int, ...]] = []

    def function(*values: int) -> int:
        given.append(values)
        return 0

    callback = kind(function)
    address = ctypes.cast(callback, ctypes.c_void_p).value
    values = np.array([1 << 50, -2, 3])
    assert run(address, values) == 0
    assert given == [tuple(values.tolist()) * 3]


@uncached
def stream(target: int, source: int, nbytes: int) -> None:
    jit.stream_memory(target, source, nbytes)


@both(stream)
@pytest.mark.parametrize("nbytes", [0, 1, 63, 64, 65, 127, 200, 1000])
@pytest.mark.parametrize("start", [0, 1, 8, 63])
def test_stream_memory_copies_so_many_bytes(run: Any, nbytes: int, start: int) -> None:
    random = np.random.default_rng(nbytes)
    source, raw = random.integers(0, 256, 1100, np.uint8), np.full(1300, 0xEE, np.uint8)
    target = raw[-raw.ctypes.data % jit.LINE :][:1100]
    expected = target.copy()
    expected[start : start + nbytes] = source[3 : 3 + nbytes]
    run(target.ctypes.data + start, source.ctypes.data + 3, nbytes)
    np.testing.assert_array_equal(target, expected)
    assert (raw[len(raw) - 64 :] == 0xEE).all()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="looks for x86 instructions")
def test_stream_memory_stores_past_the_caches_and_fences() -> None:
    stream(0, 0, 0)
    (code,) = stream.inspect_asm().values()
    assert code.index("movnt") < code.rindex("sfence")


# --- time, scheduling, sleeping ----------------------------------------------------------------


@uncached
def now() -> int:
    return jit.now_ns()


@uncached
def give_way() -> int:
    jit.yield_cpu()
    return 1


@uncached
def wait(first: int, second: int, timeout_ms: int) -> int:
    return jit.wait_readable(first, second, timeout_ms)


@uncached
def wait_briefly(first: int, second: int, timeout_ns: int) -> int:
    return jit.wait_briefly(first, second, timeout_ns)


@uncached
def wake(descriptor: int) -> None:
    jit.kick(descriptor)


@uncached
def calm(descriptor: int) -> None:
    jit.drain(descriptor)


@pytest.fixture
def bells() -> Iterator[tuple[int, int]]:
    """Two eventfds as the engine makes them."""
    made = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(2)]
    yield made[0], made[1]
    for descriptor in made:
        os.close(descriptor)


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = list(os.pipe())
    yield ends[0], ends[1]
    for descriptor in ends:
        os.close(descriptor)


def readable(descriptor: int) -> bool:
    return bool(select.select([descriptor], [], [], 0)[0])


@both(now)
def test_now_ns_is_the_monotonic_clock(run: Any) -> None:
    run()
    before = time.monotonic_ns()
    value = run()
    assert before <= value <= time.monotonic_ns()


@both(give_way)
def test_yield_cpu_returns(run: Any) -> None:
    assert run() == 1


@both(wake)
def test_kick_adds_one(run: Any, bells: tuple[int, int]) -> None:
    run(bells[1])
    run(bells[1])
    assert os.eventfd_read(bells[1]) == 2
    assert not readable(bells[0])


@both(calm)
def test_drain_empties_at_once(run: Any, bells: tuple[int, int]) -> None:
    os.eventfd_write(bells[0], 3)
    os.eventfd_write(bells[1], 1)
    run(bells[0])
    assert (readable(bells[0]), readable(bells[1])) == (False, True)


@both(calm)
def test_drain_of_an_empty_eventfd_returns(run: Any, bells: tuple[int, int]) -> None:
    run(bells[0])
    assert not readable(bells[0])


@both(wait)
@pytest.mark.parametrize("raised", [(), (0,), (1,), (0, 1)])
def test_wait_readable_says_which(run: Any, bells: tuple[int, int], raised: Any) -> None:
    for index in raised:
        os.eventfd_write(bells[index], 1)
    assert run(*bells, 0) == sum(1 << index for index in raised)
    assert run(*bells, 0) == sum(1 << index for index in raised)  # it takes nothing away


@both(wait_briefly)
def test_wait_briefly_says_which_and_ends(run: Any, bells: tuple[int, int]) -> None:
    first, second = bells
    assert run(first, second, 0) == 0  # compiled now, if it has to be
    start = time.monotonic()
    assert run(first, second, 50_000) == 0
    assert time.monotonic() - start < DEADLINE
    jit.kick(second)
    assert run(first, second, 900_000_000) == 2
    assert run(second, -1, 900_000_000) == 1
    assert time.monotonic() - start < 0.9


@both(wait)
def test_wait_readable_with_one_or_no_descriptor(run: Any, bells: tuple[int, int]) -> None:
    assert run(-1, -1, 0) == 0
    os.eventfd_write(bells[0], 1)
    assert run(bells[0], -1, DEADLINE_MS) == 1
    assert run(-1, bells[0], DEADLINE_MS) == 2
    assert run(bells[1], -1, 1) == 0


@both(wait)
def test_wait_readable_on_pipes(run: Any, bells: tuple[int, int], pipe: tuple[int, int]) -> None:
    assert run(pipe[0], bells[0], 0) == 0
    os.write(pipe[1], b"x")
    assert run(pipe[0], bells[0], DEADLINE_MS) == 1
    assert run(bells[0], pipe[0], DEADLINE_MS) == 2


@both(wait)
def test_wait_readable_sees_a_closed_pipe(run: Any) -> None:
    reader, writer = os.pipe()
    try:
        os.close(writer)
        assert run(reader, -1, DEADLINE_MS) == 1
    finally:
        os.close(reader)


@both(wait)
def test_wait_readable_wakes_when_kicked(run: Any, bells: tuple[int, int]) -> None:
    wait(-1, -1, 0), wake.compile("void(int64)")
    ready, _ = in_threads(lambda: run(*bells, DEADLINE_MS), lambda: wake(bells[1]))
    assert ready == 2


# --- streams -------------------------------------------------------------------------------------


@uncached
def read_some(descriptor: int, address: int, nbytes: int) -> int:
    return jit.read_some(descriptor, address, nbytes)


@uncached
def write_some(descriptor: int, address: int, nbytes: int) -> int:
    return jit.write_some(descriptor, address, nbytes)


@uncached
def wait_stream(readable: int, writable: int, timeout_ms: int) -> bool:
    return jit.wait_stream(readable, writable, timeout_ms)


@both(read_some)
def test_read_some_takes_what_is_there(run: Any) -> None:
    memory = np.zeros(8, np.uint8)
    near, far = socket.socketpair()
    with near:
        near.setblocking(False)
        with far:
            assert run(near.fileno(), memory.ctypes.data, 8) == -1
            far.sendall(b"abc")
            assert run(near.fileno(), memory.ctypes.data + 2, 6) == 3
        assert bytes(memory) == b"\0\0abc\0\0\0"
        assert run(near.fileno(), memory.ctypes.data, 8) == 0


@both(write_some)
def test_write_some_gives_what_is_taken(run: Any) -> None:
    memory = np.arange(1 << 20, dtype=np.uint8)
    near, far = socket.socketpair()
    with near:
        near.setblocking(False)
        with far:
            assert run(near.fileno(), memory.ctypes.data + 7, 3) == 3
            assert far.recv(8) == bytes([7, 8, 9])
            while run(near.fileno(), memory.ctypes.data, memory.nbytes) > 0:
                pass  # until it is full
        assert run(near.fileno(), memory.ctypes.data, 1) == -1


@both(wait_stream)
def test_wait_stream(run: Any) -> None:
    near, far = socket.socketpair()
    with near:
        assert run(near.fileno(), -1, 0) and run(-1, near.fileno(), DEADLINE_MS)
        start = time.monotonic()
        assert run(near.fileno(), near.fileno(), DEADLINE_MS)  # it takes bytes
        with far:
            far.sendall(b"a")
            assert run(near.fileno(), -1, DEADLINE_MS)
        assert not run(near.fileno(), near.fileno(), DEADLINE_MS)
        assert not run(-1, near.fileno(), DEADLINE_MS)
        assert time.monotonic() - start < DEADLINE


# --- callbacks and compiling ahead -------------------------------------------------------------

SCRATCH = """
from ucxgossip import jit

@jit.njit
def f(x):
    return x + 1

@jit.njit
def add_up(address, first, second):
    words = jit.view_words(address, 1)
    words[0] = 1000 * first + second
    return -7
"""
CALLBACK = types.int8(types.int64, types.int64, types.int64)


def imported(path: Path) -> Any:
    path.write_text(SCRATCH)
    spec = importlib.util.spec_from_file_location("scratch", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("interpreted", [False, True], ids=["compiled", "interpreted"])
def test_c_callback_is_called_from_c(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interpreted: bool
) -> None:
    function = imported(tmp_path / "scratch.py").add_up
    if interpreted:  # as with NUMBA_DISABLE_JIT, where njit gives the function itself
        monkeypatch.setattr(jit, "INTERPRETED", True)
        function = function.py_func
    callback = jit.c_callback(function, CALLBACK)
    word = np.zeros(1, np.int64)
    call = ctypes.CFUNCTYPE(ctypes.c_int8, *[ctypes.c_int64] * 3)(callback.address)
    assert call(word.ctypes.data, 12, -5) == -7
    assert word[0] == 11_995


def test_compile_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    function = imported(tmp_path / "scratch.py").f
    jit.compile_ahead(function, types.int64(types.int64))
    assert function.signatures == [(types.int64,)]
    monkeypatch.setattr(jit, "INTERPRETED", True)
    jit.compile_ahead(function.py_func, types.int64(types.int64))


# --- one compilation a machine -----------------------------------------------------------------


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of its own, hence a cache folder of its own; the lock file is kept apart too."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return imported(tmp_path / "scratch.py")


def names(folder: Path, pattern: str) -> set[str]:
    return {path.name for path in folder.glob(pattern)}


def test_warm_up_clears_what_other_sources_left(scratch: Any) -> None:
    folder = Path(scratch.f.stats.cache_path)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("old.f-1.py311.nbi", "old.f-1.py311.1.nbc", "ucxgossip-00.warm", "kept.txt"):
        (folder / name).touch()
    with jit.warm_up(scratch.f):
        assert names(folder, "*") == {"kept.txt"}
        assert scratch.f(1) == 2
    assert {"old.f-1.py311.nbi", "ucxgossip-00.warm"}.isdisjoint(names(folder, "*"))
    assert len(names(folder, "*.nbi")) == 1
    assert len(names(folder, "ucxgossip-*.warm")) == 1


def test_warm_up_keeps_what_the_same_sources_left(scratch: Any) -> None:
    folder = Path(scratch.f.stats.cache_path)
    with jit.warm_up(scratch.f):
        scratch.f(1)
    before = names(folder, "*")
    (folder / "other.f-1.py311.nbi").touch()
    with jit.warm_up(scratch.f):
        assert names(folder, "*") == before | {"other.f-1.py311.nbi"}


def test_warm_up_of_another_part_keeps_the_first(scratch: Any) -> None:
    folder = Path(scratch.f.stats.cache_path)
    with jit.warm_up(scratch.f):
        scratch.f(1)
    before = names(folder, "*")
    with jit.warm_up(scratch.f, part="more"):
        scratch.f(1.0)
    assert before < names(folder, "*")
    assert len(names(folder, "ucxgossip-*.warm")) == 2


def test_warm_up_that_failed_is_done_again(scratch: Any) -> None:
    folder = Path(scratch.f.stats.cache_path)
    with pytest.raises(ZeroDivisionError), jit.warm_up(scratch.f):
        _ = 1 / 0
    assert names(folder, "*.warm") == set()
    with jit.warm_up(scratch.f):  # nor is the lock held any more
        assert scratch.f(1) == 2
    assert len(names(folder, "*.warm")) == 1


def test_warm_up_without_a_compiler_does_nothing(
    scratch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jit, "INTERPRETED", True)
    with jit.warm_up(scratch.f.py_func):
        assert scratch.f.py_func(1) == 2
    assert names(tmp_path, "*.lock") == set()


PROCESS = """
import sys
from ucxgossip import jit
from scratch import f

print("at the door", flush=True)
with jit.warm_up(f):
    print("inside", flush=True)
    sys.stdin.readline()
    f(1)
    print("misses", sum(f.stats.cache_misses.values()), flush=True)
"""


def test_warm_up_holds_the_lock_while_inside(scratch: Any, tmp_path: Path) -> None:
    with jit.warm_up(scratch.f):
        (name,) = tmp_path.glob("*.lock")
        with name.open("w") as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with name.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Start PROCESS; each is ended with the test, or at the deadline, so that no read hangs."""
    (tmp_path / "scratch.py").write_text(SCRATCH)
    folders = {"PYTHONPATH": str(tmp_path), "TMPDIR": str(tmp_path)}
    environment = os.environ | folders | {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    started: list[tuple[subprocess.Popen[str], threading.Timer]] = []

    def run() -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", PROCESS],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        timer = threading.Timer(DEADLINE, process.kill)
        started.append((process, timer))
        timer.start()
        return process

    yield run
    for process, timer in started:
        timer.cancel()
        process.kill()
        process.communicate()


@pytest.mark.spawn
def test_warm_up_lets_one_of_two_processes_compile(
    start: Callable[[], subprocess.Popen[str]],
) -> None:
    """The second arrives while the first is inside; it gets in later, and finds the cache."""
    first = start()
    assert first.stdout is not None
    assert [first.stdout.readline() for _ in range(2)] == ["at the door\n", "inside\n"]
    second = start()
    assert second.stdout is not None and second.stdin is not None
    assert second.stdout.readline() == "at the door\n"
    second.stdin.write("go\n")
    second.stdin.flush()
    assert first.communicate("go\n", DEADLINE)[0] == "misses 1\n"
    assert second.communicate(None, DEADLINE)[0] == "inside\nmisses 0\n"
