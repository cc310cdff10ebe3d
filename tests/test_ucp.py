"""ucxgossip.ucp: puts arrive whole and nowhere else; every handle closes once, children first.

One process puts into its own memory, or two workers of it into each other's, over both transports.
"""

import ctypes
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numba
import numpy as np
import pytest
from numpy.typing import NDArray

from ucxgossip import jit
from ucxgossip.errors import ArgumentError, ArrayError, ClosedError, UCXError
from ucxgossip.ucp import Context, Endpoint, MemoryRegion, RemoteKey, Worker, abi, lib, load, ops
from ucxgossip.ucp.resource import Resource

Python = Callable[..., subprocess.CompletedProcess[str]]

TRANSPORTS = ["tcp", "shm"]
SETTINGS = {"NET_DEVICES": "lo"}
CANARY = 0xA5
GUARD = 64
DEADLINE = 60.0

# Without the cache on disk: numba would not notice there that ops or jit have changed.
uncached = numba.njit(nogil=True, error_model="numpy")

needs_ucx_1_14 = pytest.mark.skipif(
    load().version < (1, 14, 0), reason="UCX 1.13 tells neither lanes nor unknown settings"
)


def deadline_ns() -> int:
    return time.monotonic_ns() + int(DEADLINE * 1e9)


def noise(nbytes: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)


class Target:
    """`nbytes` of memory to be put to, `offset` bytes from where they would be aligned."""

    def __init__(self, context: Context, nbytes: int, offset: int = 0) -> None:
        self.region = MemoryRegion(context, nbytes=nbytes + offset + 2 * GUARD)
        self.region.bytes[:] = CANARY
        start = GUARD + offset
        self.address = self.region.address + start
        self.inside = self.region.bytes[start : start + nbytes]
        self._outside = (self.region.bytes[:start], self.region.bytes[start + nbytes :])

    def intact(self) -> bool:
        return all(bool((side == CANARY).all()) for side in self._outside)


@pytest.fixture(scope="module", params=TRANSPORTS)
def loop(request: pytest.FixtureRequest) -> Iterator[SimpleNamespace]:
    """A worker with an endpoint to itself."""
    with Context(request.param, SETTINGS) as context:
        worker = Worker(context)
        endpoint = Endpoint(worker, worker.address)
        yield SimpleNamespace(context=context, worker=worker, endpoint=endpoint)


@pytest.fixture(params=TRANSPORTS)
def pair(request: pytest.FixtureRequest) -> Iterator[SimpleNamespace]:
    """Two workers, a and b, in contexts of their own, and endpoints both ways.

    An endpoint that closes waits for its peer, which nobody drives here: hence the short timeout.
    """
    with Context(request.param, SETTINGS) as left, Context(request.param, SETTINGS) as right:
        a, b = Worker(left), Worker(right)
        ab, ba = Endpoint(a, b.address, close_timeout=0.1), Endpoint(b, a.address, 0.1)
        yield SimpleNamespace(left=left, right=right, a=a, b=b, ab=ab, ba=ba)


# --- put ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["allocated", "registered"])
@pytest.mark.parametrize("offset", [0, 1, 13])
@pytest.mark.parametrize("nbytes", [1, 8, 64, 4096, 1 << 20, 3 * (1 << 20) + 5])
def test_put(loop: SimpleNamespace, nbytes: int, offset: int, kind: str) -> None:
    data = noise(nbytes)
    if kind == "allocated":
        source = MemoryRegion(loop.context, nbytes=nbytes)
        source.bytes[:] = data
    else:
        source = MemoryRegion(loop.context, array=data.copy())
    target = Target(loop.context, nbytes, offset)
    with source, target.region, RemoteKey(loop.endpoint, target.region.pack()) as key:
        loop.endpoint.put(source, target.address, key, timeout=DEADLINE)
        assert (target.inside == data).all()
        assert target.intact()
        assert (source.bytes == data).all()


@pytest.mark.parametrize("nbytes", [0, 1, 4095])
def test_put_of_the_first_bytes(loop: SimpleNamespace, nbytes: int) -> None:
    array = noise(4096).view(np.float32)
    target = Target(loop.context, 4096, 1)
    source = MemoryRegion(loop.context, array=array)
    with source, target.region, RemoteKey(loop.endpoint, target.region.pack()) as key:
        loop.endpoint.put(source, target.address, key, nbytes=nbytes, timeout=DEADLINE)
        assert (target.inside[:nbytes] == array.view(np.uint8)[:nbytes]).all()
        assert (target.inside[nbytes:] == CANARY).all()
        assert target.intact()


def test_puts_of_one_endpoint_to_several_regions(loop: SimpleNamespace) -> None:
    targets = [Target(loop.context, 100, offset) for offset in range(3)]
    keys = [RemoteKey(loop.endpoint, target.region.pack()) for target in targets]
    for seed, (target, key) in enumerate(zip(targets, keys, strict=True)):
        with MemoryRegion(loop.context, array=noise(100, seed)) as source:
            loop.endpoint.put(source, target.address, key, timeout=DEADLINE)
    for seed, target in enumerate(targets):
        assert (target.inside == noise(100, seed)).all()
        assert target.intact()
    for closing in (*keys, *(target.region for target in targets)):
        closing.close()


def test_key_gives_the_place_to_store_to(pair: SimpleNamespace) -> None:
    """Over shared memory another mapping of the same bytes; over TCP there is none."""
    target = Target(pair.right, 1000, 1)
    with RemoteKey(pair.ab, target.region.pack()) as key:
        place = key.pointer(target.address)
        if pair.left.transport == "tcp":
            assert place == 0
        else:
            jit.view_bytes(place, 1000)[:] = noise(1000)
            assert (target.inside == noise(1000)).all()
            assert target.intact()


@uncached
def put_through(
    worker: int,
    other: int,
    ep: int,
    source: int,
    nbytes: int,
    remote: int,
    rkey: int,
    param: int,
    plain: int,
    deadline: int,
) -> int:
    """Put, fence and flush while both workers progress: 0, the first error, 1 at the deadline."""
    request = ops.put(ep, source, nbytes, remote, rkey, param)
    flushing = False
    while True:
        status = request
        if request > 0:
            status = ops.check(request)
            while status == 1 and jit.now_ns() < deadline:
                ops.progress(worker)
                ops.progress(other)
                status = ops.check(request)
            ops.free(request)
        if status != 0 or flushing:
            return status
        status = ops.fence(worker)
        if status != 0:
            return status
        request = ops.flush(ep, plain)
        flushing = True


both = pytest.mark.parametrize(
    "run", [put_through, put_through.py_func], ids=["compiled", "interpreted"]
)
PLAIN = abi.RequestParam()


@both
@pytest.mark.parametrize("nbytes", [1, 8, 4096, 3 * (1 << 20) + 5])
def test_ops_compiled_and_interpreted(loop: SimpleNamespace, run: Any, nbytes: int) -> None:
    target, data = Target(loop.context, nbytes, 1), noise(nbytes)
    source, worker = MemoryRegion(loop.context, array=data), loop.worker.handle
    with source, target.region, RemoteKey(loop.endpoint, target.region.pack()) as key:
        status = run(
            worker,
            worker,
            loop.endpoint.handle,
            source.address,
            nbytes,
            target.address,
            key.handle,
            source.param_address,
            ctypes.addressof(PLAIN),
            deadline_ns(),
        )
        assert status == 0
        assert (target.inside == data).all()
        assert target.intact()


@both
def test_two_workers_put_to_each_other(pair: SimpleNamespace, run: Any) -> None:
    nbytes = 100_003
    ways = [
        (pair.left, pair.a, pair.b, pair.ab, Target(pair.right, nbytes, 1), noise(nbytes, 1)),
        (pair.right, pair.b, pair.a, pair.ba, Target(pair.left, nbytes, 3), noise(nbytes, 2)),
    ]
    for context, worker, other, endpoint, target, data in ways:
        source = MemoryRegion(context, array=data)
        key = RemoteKey(endpoint, target.region.pack())
        status = run(
            worker.handle,
            other.handle,
            endpoint.handle,
            source.address,
            nbytes,
            target.address,
            key.handle,
            source.param_address,
            ctypes.addressof(PLAIN),
            deadline_ns(),
        )
        assert status == 0
    for *_, target, data in ways:
        assert (target.inside == data).all()
        assert target.intact()


@uncached
def put_in_order(
    worker: int,
    other: int,
    ep: int,
    source: int,
    count: int,
    remote: int,
    rkey: int,
    plain: int,
    deadline: int,
) -> int:
    """Rounds of: put the data, fence, put the flag; wait for the flag, look at the data.

    source: data, then the flag, as ``count + 1`` words; remote: the same, where they are put.
    How many words were not there when the flag was; -1 at the deadline, -2 after an error.
    """
    words, seen = jit.view_words(source, count + 1), jit.view_words(remote, count + 1)
    wrong = 0
    for number in range(1, 33):
        words[:] = number
        data = ops.put(ep, source, 8 * count, remote, rkey, plain)
        ops.fence(worker)
        flag = ops.put(ep, source + 8 * count, 8, remote + 8 * count, rkey, plain)
        if data < 0 or flag < 0:
            return -2
        while jit.load_acquire(seen, count) != number:
            ops.progress(worker)
            ops.progress(other)
            if jit.now_ns() > deadline:
                return -1
        for i in range(count):
            wrong += seen[i] != number
        for request in (data, flag):
            while request > 0 and ops.check(request) == 1:
                ops.progress(worker)
                ops.progress(other)
                if jit.now_ns() > deadline:
                    return -1
            if request > 0:
                ops.free(request)
    return wrong


@pytest.mark.parametrize(
    "run", [put_in_order, put_in_order.py_func], ids=["compiled", "interpreted"]
)
@pytest.mark.parametrize("count", [1, 1000, 40_000])
def test_fence_keeps_the_order_of_puts(pair: SimpleNamespace, run: Any, count: int) -> None:
    source = MemoryRegion(pair.left, nbytes=8 * (count + 1))
    target = MemoryRegion(pair.right, nbytes=8 * (count + 1))
    key = RemoteKey(pair.ab, target.pack())
    wrong = run(
        pair.a.handle,
        pair.b.handle,
        pair.ab.handle,
        source.address,
        count,
        target.address,
        key.handle,
        ctypes.addressof(PLAIN),
        deadline_ns(),
    )
    assert wrong == 0


@pytest.mark.spawn
@pytest.mark.parametrize(
    ("statement", "error"),
    [
        ("endpoint.put(source, region.address, key, nbytes=65)", "ArgumentError"),
        ("endpoint.put(source, region.address, key, nbytes=-1)", "ArgumentError"),
        ("source.close(); endpoint.put(source, region.address, key)", "ClosedError"),
    ],
    ids=["more than the source", "less than nothing", "closed source"],
)
def test_put_that_would_read_what_is_not_there(python: Python, statement: str, error: str) -> None:
    """In a process of its own, which a put that is not refused may crash."""
    ended = python(
        "from ucxgossip import errors, ucp\n"
        "with ucp.Context('shm') as context, ucp.Worker(context) as worker:\n"
        "    source = ucp.MemoryRegion(context, nbytes=64)\n"
        "    region = ucp.MemoryRegion(context, nbytes=128)\n"
        "    endpoint = ucp.Endpoint(worker, worker.address)\n"
        "    key = ucp.RemoteKey(endpoint, region.pack())\n"
        "    try:\n"
        f"        {statement}\n"
        "    except errors.GossipError as error:\n"
        "        print(type(error).__name__, region.bytes.any())\n"
    )
    assert (ended.returncode, ended.stdout) == (0, f"{error} False\n"), ended.stderr


# --- deadlines, active messages, sleep ---------------------------------------------------------


@uncached
def start_flush(ep: int, plain: int) -> int:
    return ops.flush(ep, plain)


@pytest.mark.parametrize("run", [start_flush, start_flush.py_func], ids=["compiled", "interpreted"])
def test_flush_is_done_when_the_put_is(run: Any) -> None:
    """Over TCP that needs the target's progress."""
    with Context("tcp", SETTINGS) as left, Context("tcp", SETTINGS) as right:
        source, target = MemoryRegion(left, array=noise(64)), Target(right, 64)
        a, b = Worker(left), Worker(right)
        endpoint, plain = Endpoint(a, b.address, close_timeout=0.1), ctypes.addressof(PLAIN)
        key = RemoteKey(endpoint, target.region.pack())
        put = ops.put(endpoint.handle, source.address, 64, target.address, key.handle, plain)
        flush = run(endpoint.handle, plain)
        assert put >= 0 and flush > 0
        for _ in range(100):
            a.progress()
        assert ops.check(flush) == abi.Status.INPROGRESS
        assert (target.inside == CANARY).all()
        end = time.monotonic() + DEADLINE
        while ops.check(flush) == abi.Status.INPROGRESS and time.monotonic() < end:
            a.progress()
            b.progress()
        assert ops.check(flush) == abi.Status.OK
        assert (target.inside == noise(64)).all()
        for request in (put, flush):
            if request > 0:
                ops.free(request)


def test_wait_ends_at_its_deadline() -> None:
    """Over TCP a put is not done before its target has called progress; here it never does."""
    with Context("tcp", SETTINGS) as left, Context("tcp", SETTINGS) as right:
        source, target = MemoryRegion(left, nbytes=64), MemoryRegion(right, nbytes=64)
        a, b = Worker(left), Worker(right)
        endpoint = Endpoint(a, b.address, close_timeout=0.1)
        key = RemoteKey(endpoint, target.pack())
        with pytest.raises(UCXError, match="after 0.1 s") as raised:
            endpoint.put(source, target.address, key, timeout=0.1)
        assert raised.value.status == abi.Status.ERR_TIMED_OUT
        assert not target.bytes.any()


Handler = ctypes.CFUNCTYPE(ctypes.c_int8, *[ctypes.c_int64] * 6)


def test_active_message_wakes_an_armed_worker(pair: SimpleNamespace) -> None:
    came: list[tuple[int, bytes, bytes]] = []

    def take(argument: int, header: int, header_bytes: int, data: int, n: int, _: int) -> int:
        came.append((argument, ctypes.string_at(header, header_bytes), ctypes.string_at(data, n)))
        return 0

    handler = Handler(take)
    pair.b.set_handler(3, ctypes.cast(handler, ctypes.c_void_p).value or 0, 77)
    param = abi.RequestParam(
        op_attr_mask=abi.OpAttr.FLAGS, flags=abi.AM_SEND_EAGER | abi.AM_SEND_COPY_HEADER
    )
    kept: list[Any] = []  # payloads, until they have gone
    end = time.monotonic() + DEADLINE

    def send(header: bytes, data: bytes) -> None:
        buffers = [ctypes.create_string_buffer(text, len(text)) for text in (header, data)]
        kept.extend(buffers)
        head, body = (ctypes.addressof(buffer) for buffer in buffers)
        request = ops.send(
            pair.ab.handle, 3, head, len(header), body, len(data), ctypes.addressof(param)
        )
        assert request >= 0
        if request > 0:
            ops.free(request)

    def progress_both_until(done: Callable[[], bool]) -> None:
        while not done() and time.monotonic() < end:
            pair.a.progress()
            pair.b.progress()

    send(b"first", b"")  # brings the connection up
    progress_both_until(lambda: bool(came))
    progress_both_until(lambda: ops.arm(pair.b.handle) == 0)
    send(b"second", b"payload")
    while not jit.wait_readable(pair.b.event_fd, -1, 1) and time.monotonic() < end:
        pair.a.progress()
    assert jit.wait_readable(pair.b.event_fd, -1, 0) == 1
    progress_both_until(lambda: len(came) == 2)
    assert came == [(77, b"first", b""), (77, b"second", b"payload")]


@pytest.mark.parametrize(
    ("result", "signed"), [(None, 0), (0, 0), (5, 5), (2**64 - 6, -6), (2**63, -(2**63))]
)
def test_pointer_result_as_a_signed_integer(result: int | None, signed: int) -> None:
    assert ops.signed(result) == signed


# --- memory ------------------------------------------------------------------------------------


@pytest.mark.parametrize("nbytes", [0, -1])
def test_region_of_nothing(loop: SimpleNamespace, nbytes: int) -> None:
    with pytest.raises(ArgumentError, match=f"MemoryRegion of {nbytes} bytes"):
        MemoryRegion(loop.context, nbytes=nbytes)


@pytest.mark.parametrize(
    "array",
    [np.zeros(10)[::2], np.zeros((4, 4))[:, 1], np.zeros((4, 4)).T[:3], np.zeros(0)],
    ids=["stride", "column", "transposed", "empty"],
)
def test_region_of_an_array_that_cannot_be_registered(
    loop: SimpleNamespace, array: NDArray[Any]
) -> None:
    with pytest.raises(ArrayError, match="contiguous and not empty"):
        MemoryRegion(loop.context, array=array)


def test_region_takes_size_or_array(loop: SimpleNamespace) -> None:
    with pytest.raises(ArgumentError, match="either nbytes or array"):
        MemoryRegion(loop.context)
    with pytest.raises(ArgumentError, match="either nbytes or array"):
        MemoryRegion(loop.context, nbytes=8, array=np.zeros(1))


def test_allocated_region_is_zeroed_and_viewed(loop: SimpleNamespace) -> None:
    with MemoryRegion(loop.context, nbytes=100) as region:
        assert region.nbytes == len(region.bytes) == 100
        assert not region.bytes.any()
        view = region.view(np.int16, 3, offset=10)
        assert view.ctypes.data == region.address + 10
        view[:] = -1
        assert np.flatnonzero(region.bytes).tolist() == list(range(10, 16))


def test_registered_array_keeps_its_values(loop: SimpleNamespace) -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    with MemoryRegion(loop.context, array=array) as region:
        assert (region.address, region.nbytes) == (array.ctypes.data, 48)
        assert region.view(np.float32, 12).tolist() == list(range(12))
        region.view(np.float32, 12)[5] = -1
        assert array[1, 1] == -1


# --- settings ----------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["", "ib", "TCP", None])
def test_unknown_transport(transport: Any) -> None:
    known = "'auto', 'tcp', 'shm', 'verbs'"
    with pytest.raises(ArgumentError, match=f"{transport!r}; choose one of {known}"):
        Context(transport)


def test_verbs_without_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """UCX itself would say that no transport is usable."""
    monkeypatch.setattr(lib, "rdma_devices", lambda: [])
    with pytest.raises(ArgumentError, match="'verbs': this machine has no RDMA device"):
        Context("verbs")
    monkeypatch.setattr(lib, "rdma_devices", lambda: ["mlx5_0"])
    wheel = replace(lib.load(), origin="wheel")
    monkeypatch.setattr(lib, "load", lambda: wheel)
    with pytest.raises(ArgumentError, match="'verbs': the UCX wheel .* apt install libucx0"):
        Context("verbs")


@needs_ucx_1_14
@pytest.mark.parametrize(
    ("name", "value"), [("NO_SUCH_SETTING", "1"), ("MAX_RMA_LANES", "many"), ("MAX_RMA_LANES", 1)]
)
def test_setting_that_ucx_does_not_take(name: str, value: Any) -> None:
    with pytest.raises(ArgumentError, match=f"{name}={value!r}"):
        Context("tcp", {name: value})


@needs_ucx_1_14
@pytest.mark.parametrize("name", ["TLS", "UCX_TLS"])
def test_settings_go_before_those_of_the_transport(name: str) -> None:
    with Context("shm", SETTINGS | {name: "tcp"}) as context, Worker(context) as worker:
        assert context.settings["TLS"] == "tcp"
        assert set(Endpoint(worker, worker.address).transports()) == {"tcp/lo"}


@needs_ucx_1_14
@pytest.mark.parametrize(("transport", "lane"), [("tcp", "tcp/lo"), ("shm", "posix/memory")])
def test_transport_is_the_one_asked_for(transport: str, lane: str) -> None:
    with Context(transport, SETTINGS) as context, Worker(context) as worker:
        assert set(Endpoint(worker, worker.address).transports()) == {lane}


@pytest.mark.spawn
def test_users_environment_wins(python: Python) -> None:
    ended = python(
        "from ucxgossip import ucp\n"
        "with ucp.Context('shm', {'MAX_RMA_LANES': '2'}) as context:\n"
        "    worker = ucp.Worker(context)\n"
        "    endpoint = ucp.Endpoint(worker, worker.address)\n"
        "    print(context.settings['TLS'], context.settings['MAX_RMA_LANES'])\n"
        "    print(*set(endpoint.transports()))\n",
        {"UCX_TLS": "tcp", "UCX_NET_DEVICES": "lo", "UCX_MAX_RMA_LANES": "3"},
    )
    assert ended.stdout.splitlines() == ["tcp 3", "tcp/lo"], ended.stderr


ENVIRONMENT = """
import ctypes, itertools, os
from ucxgossip import ucp

def environment():
    # os.environ does not follow what C code sets; `environ` of libc does.
    entries = ctypes.POINTER(ctypes.c_char_p).in_dll(ctypes.CDLL(None), "environ")
    every = (entries[index] for index in itertools.count())
    return dict(os.environ), list(itertools.takewhile(lambda entry: entry is not None, every))

ucp.load()
before = environment()
with ucp.Context("tcp", {"MAX_RMA_LANES": "2"}), ucp.Context("shm"):
    inside = environment()
print(inside == before, environment() == before, len(before[0]) == len(before[1]) > 0)
"""


@pytest.mark.spawn
def test_settings_stay_out_of_the_environment(python: Python) -> None:
    ended = python(ENVIRONMENT)
    assert ended.stdout == "True True True\n", ended.stderr


# --- lifetimes ---------------------------------------------------------------------------------

KINDS = ["context", "region", "worker", "endpoint", "key"]


@pytest.fixture(params=TRANSPORTS)
def handles(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """One handle of each kind, each used once."""
    context = Context(request.param, SETTINGS)
    with context:
        region, worker = MemoryRegion(context, nbytes=64), Worker(context)
        endpoint = Endpoint(worker, worker.address)
        key = RemoteKey(endpoint, region.pack())
        endpoint.put(region, region.address, key, nbytes=0, timeout=DEADLINE)
        yield dict(zip(KINDS, (context, region, worker, endpoint, key), strict=True))


def test_context_closes_its_children_newest_first(
    handles: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    released: list[str] = []
    for kind in (Context, MemoryRegion, Worker, Endpoint, RemoteKey):

        def release(self: Any, handle: int, original: Any = kind._release) -> None:
            released.append(type(self).__name__)
            original(self, handle)

        monkeypatch.setattr(kind, "_release", release)
    handles["context"].close()
    assert released == ["RemoteKey", "Endpoint", "Worker", "MemoryRegion", "Context"]
    assert all(handle.closed for handle in handles.values())


@pytest.mark.parametrize(
    "order",
    [KINDS, KINDS[::-1], *(KINDS[i:] + KINDS[:i] for i in range(1, 5))],
    ids=lambda order: "-".join(order),
)
def test_close_in_any_order_any_number_of_times(handles: dict[str, Any], order: list[str]) -> None:
    for name in order:
        handles[name].close()
        assert handles[name].closed
        handles[name].close()
    assert all(handle.closed for handle in handles.values())


USES: dict[str, tuple[str, Callable[[dict[str, Any]], object]]] = {
    "region of a context": ("context", lambda h: MemoryRegion(h["context"], nbytes=8)),
    "worker of a context": ("context", lambda h: Worker(h["context"])),
    "pack": ("region", lambda h: h["region"].pack()),
    "progress": ("worker", lambda h: h["worker"].progress()),
    "set_handler": ("worker", lambda h: h["worker"].set_handler(0, 0, 0)),
    "endpoint of a worker": ("worker", lambda h: Endpoint(h["worker"], h["worker"].address)),
    "flush": ("endpoint", lambda h: h["endpoint"].flush()),
    "transports": ("endpoint", lambda h: h["endpoint"].transports()),
    "key of an endpoint": ("endpoint", lambda h: RemoteKey(h["endpoint"], h["blob"])),
    "put over an endpoint": (
        "endpoint",
        lambda h: h["endpoint"].put(h["region"], h["region"].address, h["key"]),
    ),
    "put with a key": (
        "key",
        lambda h: h["endpoint"].put(h["region"], h["region"].address, h["key"]),
    ),
}


@pytest.mark.parametrize("use", USES)
def test_use_after_close(handles: dict[str, Any], use: str) -> None:
    handles["blob"] = handles["region"].pack()
    closed, call = USES[use]
    handles[closed].close()
    with pytest.raises(ClosedError, match=f"{type(handles[closed]).__name__} is closed"):
        call(handles)


@pytest.mark.parametrize("blob", [b"", bytes(65537), "text", None, bytearray(8)], ids=range(5))
def test_blob_that_cannot_be_one_never_reaches_libucp(
    loop: SimpleNamespace, blob: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    library = type(loop.worker.library)
    monkeypatch.setattr(library, "__call__", lambda self, name, *rest: calls.append(name))
    with pytest.raises(ArgumentError, match="a worker address of .* must be 1 to 65536 bytes"):
        Endpoint(loop.worker, blob)
    with pytest.raises(ArgumentError, match="a packed key of"):
        RemoteKey(loop.endpoint, blob)
    assert calls == []


def test_abandoned_endpoint_goes_with_its_worker(handles: dict[str, Any]) -> None:
    handles["endpoint"].abandon()
    handles["endpoint"].close()
    assert handles["endpoint"].closed
    handles["worker"].close()


class Recorded(Resource):
    """A resource that needs no UCX."""

    def __init__(self, name: str, log: list[str], parent: Resource | None = None) -> None:
        super().__init__(1, parent)
        self.name, self.log = name, log

    def _release(self, handle: int) -> None:
        self.log.append(self.name)
        if self.name.startswith("bad"):
            raise UCXError("close", -3, "ERR_IO_ERROR")


def test_with_closes_when_its_body_fails() -> None:
    log: list[str] = []
    with pytest.raises(ZeroDivisionError), Recorded("root", log) as root:
        Recorded("child", log, root)
        _ = 1 / 0
    assert log == ["child", "root"]


def test_release_that_fails_is_not_repeated() -> None:
    log: list[str] = []
    root = Recorded("root", log)
    good, bad = Recorded("good", log, root), Recorded("bad", log, root)
    with pytest.raises(UCXError):
        root.close()
    assert bad.closed
    root.close()
    assert good.closed and root.closed
    assert log == ["bad", "good", "root"]


@pytest.mark.parametrize(("count", "offset"), [(9, 0), (8, 8), (-1, 0), (1, -8)])
def test_view_beyond_the_region(count: int, offset: int) -> None:
    with Context("shm") as context, MemoryRegion(context, nbytes=64) as region:
        assert len(region.view(np.float64, 8)) == 8
        with pytest.raises(ArgumentError, match="region of 64"):
            region.view(np.float64, count, offset)
