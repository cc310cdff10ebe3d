"""kernels.mix_ and the kernels of `select`: each keeps the contract, to the bit."""

import itertools
import threading
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import mixing_cases as cases
from ucxgossip.errors import ArgumentError, ArrayError, MissingExtraError, NoDeviceError
from ucxgossip.kernels import bits16, cpu, host, mix_, select
from ucxgossip.kernels.contract import ITEMSIZE, PAIRS

TOLERANCE = {"float32": 1e-5, "float64": 1e-12, "bfloat16": 1e-5, "float16": 1e-5}


@pytest.fixture
def rng() -> np.random.Generator:
    """Fresh inputs each time; the seed stands in the output of a test that fails."""
    seed = np.random.SeedSequence().entropy
    print(f"seed {seed}")
    return np.random.default_rng(seed)


class OnHost:
    """Arrays where they are."""

    more: ClassVar[list[tuple[int, float]]] = []

    def place(self, guarded: Any) -> Any:
        return guarded.array

    def distance(self, start: float) -> Any:
        return np.full(1, start)

    def fetch(self, guarded: Any, placed: Any) -> None:
        pass


class OnDevice:
    """All of a guarded array's memory on the device, canaries too, and back."""

    more: ClassVar = [(cases.MORE_THAN_A_GRID, 0.3)]

    def __init__(self, cupy: Any) -> None:
        self.cupy, self.kept = cupy, {}

    def place(self, guarded: Any) -> Any:
        # Device memory starts on a boundary of 256 bytes: keep the offset from one of 64.
        lead = guarded.memory.ctypes.data % 64
        whole = self.cupy.empty(lead + len(guarded.memory), np.uint8)
        whole[lead:] = self.cupy.asarray(guarded.memory)
        self.kept[id(guarded)] = whole[lead:]
        return whole[lead + guarded.start : lead + guarded.end].view(guarded.array.dtype)

    def distance(self, start: float) -> Any:
        return self.cupy.full(1, start, np.float64)

    def fetch(self, guarded: Any, placed: Any) -> None:
        guarded.memory[:] = self.kept[id(guarded)].get()


def one_thread(*args: Any, **named: Any) -> float:
    return mix_(*args, threads=1, **named)


def three_threads(*args: Any, **named: Any) -> float:
    return mix_(*args, threads=3, **named)


def on_cuda(backend: str) -> tuple[Any, OnDevice]:
    try:
        kernel = select("cuda", backend)
        import cupy
    except (MissingExtraError, NoDeviceError, ModuleNotFoundError) as error:
        pytest.skip(f"no CUDA to test on: {error}")
    return kernel, OnDevice(cupy)


BACKENDS = [
    "one thread",
    "three threads",
    pytest.param("cupy", marks=pytest.mark.gpu),
    pytest.param("numba_cuda", marks=pytest.mark.gpu),
]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> tuple[Callable[..., Any], Any]:
    """(mix_, where its arrays live); what needs a GPU is skipped where there is none."""
    if request.param in ("cupy", "numba_cuda"):
        return on_cuda(request.param)
    return (one_thread if request.param == "one thread" else three_threads), OnHost()


@pytest.mark.parametrize("kinds", PAIRS, ids="-".join)
@pytest.mark.parametrize("offsets", cases.OFFSETS, ids=str)
def test_contract(
    backend: Any, kinds: tuple[str, str], offsets: tuple[int, int], rng: np.random.Generator
) -> None:
    """Against NumPy to the bit, against double to the last digit; nothing else is touched."""
    mix, place = backend
    for size, alpha in [*itertools.product(cases.SIZES, cases.ALPHAS), *place.more]:
        dst, src = (
            cases.Guarded(kind, size, offset, rng)
            for kind, offset in zip(kinds, offsets, strict=True)
        )
        before, source = dst.array.copy(), src.array.copy()
        own, theirs, total = place.place(dst), place.place(src), place.distance(2.5)
        returned = mix(own, theirs, alpha, distance=total)
        place.fetch(dst, own)
        place.fetch(src, theirs)

        label = f"{size} elements, alpha {alpha}"
        wanted = cases.expected(kinds, before, source, alpha)
        assert cases.same_bits(dst.array, wanted), label
        assert cases.same_bits(src.array, source), label
        assert dst.intact() and src.intact(), label
        found = cases.decode(kinds[0], dst.array)
        mean, bounds = cases.mean(kinds, before, source, alpha), cases.tolerance(kinds[0])
        np.testing.assert_allclose(found, mean, **bounds, err_msg=label)
        distance = cases.squared_distance(kinds, before, source)
        tolerance = TOLERANCE[kinds[0]]
        assert float(total[0]) - 2.5 == pytest.approx(distance, rel=tolerance, abs=1e-9), label
        if returned is not None:
            assert returned == pytest.approx(distance, rel=tolerance, abs=0), label


@pytest.mark.parametrize("alpha", cases.ALPHAS)
@pytest.mark.parametrize("kinds", PAIRS, ids="-".join)
@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_nan_and_infinity_are_carried_through(
    backend: Any, kinds: tuple[str, str], alpha: float, rng: np.random.Generator
) -> None:
    mix, place = backend
    before, source = cases.special_pairs(kinds)
    dst, src = (cases.Guarded(kind, len(before), 1, rng) for kind in kinds)
    dst.array[:], src.array[:] = before, source
    own, theirs, total = place.place(dst), place.place(src), place.distance(0.0)
    mix(own, theirs, alpha, distance=total)
    place.fetch(dst, own)
    assert cases.same_numbers(kinds[0], dst.array, cases.expected(kinds, before, source, alpha))
    assert dst.intact()
    assert np.isnan(float(total[0]))


@pytest.mark.parametrize("kinds", PAIRS, ids="-".join)
def test_copy_into_poison(backend: Any, kinds: tuple[str, str], rng: np.random.Generator) -> None:
    """With alpha 1 nothing of what `dst` held is left, were it NaN."""
    mix, place = backend
    dst, src = (cases.Guarded(kind, 1001, 1, rng) for kind in kinds)
    dst.array[:] = cases.encode(kinds[0], np.full(1001, np.nan))
    own, theirs = place.place(dst), place.place(src)
    mix(own, theirs, 1.0)
    place.fetch(dst, own)
    wanted = cases.encode(kinds[0], cases.decode(kinds[1], src.array))
    assert cases.same_bits(dst.array, wanted)


@pytest.mark.parametrize("kinds", PAIRS, ids="-".join)
def test_alpha_0_keeps_and_equals_stay(
    backend: Any, kinds: tuple[str, str], rng: np.random.Generator
) -> None:
    mix, place = backend
    dst, src = (cases.Guarded(kind, 1001, 0, rng) for kind in kinds)
    before = dst.array.copy()
    own, theirs, total = place.place(dst), place.place(src), place.distance(0.0)
    mix(own, theirs, 0.0)
    place.fetch(dst, own)
    assert cases.same_bits(dst.array, before)
    dst.array[:] = cases.encode(kinds[0], cases.decode(kinds[1], src.array))
    before = dst.array.copy()
    own = place.place(dst)
    mix(own, theirs, 0.3, distance=total)
    place.fetch(dst, own)
    assert cases.same_bits(dst.array, before) and float(total[0]) == 0.0


# --- on the CPU alone --------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", [pair for pair in PAIRS if ITEMSIZE[pair[1]] == 2], ids="-".join)
@pytest.mark.filterwarnings("ignore:invalid value encountered", "ignore:overflow encountered")
def test_16_bits_interpreted(kinds: tuple[str, str], rng: np.random.Generator) -> None:
    """The same function as plain Python."""
    for alpha in (0.3, 1.0):
        dst, src = (cases.Guarded(kind, 50, 1, rng) for kind in kinds)
        wanted = cases.expected(kinds, dst.array, src.array, alpha)
        distance = cases.squared_distance(kinds, dst.array, src.array)
        own, theirs = (
            each.array.view(np.int16) if each.array.dtype == np.float16 else each.array
            for each in (dst, src)
        )
        found = bits16.mix.py_func(own, theirs, np.float32(alpha))  # type: ignore[attr-defined]
        assert cases.same_bits(dst.array, wanted)
        assert found == pytest.approx(distance, rel=1e-5)


def test_large_arrays_use_all_threads(
    monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    """From PARALLEL bytes on, and only then; each thread gets whole blocks, none is left out."""
    asked: list[int] = []
    whole = host._mix

    def spy(dst: Any, src: Any, alpha: float, threads: int) -> float:
        asked.append(threads)
        return whole(dst, src, alpha, threads)

    monkeypatch.setattr(host, "_mix", spy)
    monkeypatch.setattr(host, "thread_count", lambda: 2)
    count = host.PARALLEL // 4
    for size, threads in ((count - 1, 1), (count + 1, 2)):
        dst, src = (rng.standard_normal(size, dtype=np.float32) for _ in range(2))
        wanted = cases.expected(("float32", "float32"), dst, src, 0.3)
        distance = cases.squared_distance(("float32", "float32"), dst, src)
        assert mix_(dst, src, 0.3) == pytest.approx(distance, rel=1e-5)
        assert cases.same_bits(dst, wanted)
        assert asked.pop() == threads


@pytest.mark.parametrize("size", [0, 1, cpu.BLOCK, cpu.BLOCK + 1, 3 * cpu.BLOCK - 1])
def test_more_threads_than_blocks(size: int, rng: np.random.Generator) -> None:
    dst, src = (rng.standard_normal(size, dtype=np.float32) for _ in range(2))
    wanted = cases.expected(("float32", "float32"), dst, src, 0.3)
    mix_(dst, src, 0.3, threads=7)
    assert cases.same_bits(dst, wanted)


def test_several_callers_at_once(rng: np.random.Generator) -> None:
    """Threads of the caller's own, each with parts on ours: no deadlock, no mix-up."""
    inputs = [[rng.standard_normal(50_000, dtype=np.float32) for _ in range(2)] for _ in range(8)]
    wanted = [cases.expected(("float32", "float32"), dst, src, 0.3) for dst, src in inputs]
    callers = [
        threading.Thread(target=mix_, args=(dst, src, 0.3), kwargs={"threads": 3})
        for dst, src in inputs
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    for (dst, _), each in zip(inputs, wanted, strict=True):
        assert cases.same_bits(dst, each)


@pytest.mark.spawn
def test_a_forked_child_mixes_with_threads_of_its_own(python: Any) -> None:
    ended = python(
        "import os, sys, warnings\n"
        "import numpy as np\n"
        "from ucxgossip.kernels import mix_\n"
        "warnings.simplefilter('ignore')\n"
        "def mix():\n"
        "    dst, src = np.zeros(50_000, np.float32), np.ones(50_000, np.float32)\n"
        "    return mix_(dst, src, 0.5, threads=3), float(dst.sum())\n"
        "print(mix(), flush=True)\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    print(mix(), flush=True)\n"
        "    os._exit(0)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == ["(50000.0, 25000.0)"] * 2


@pytest.mark.parametrize("threads", [0, -1, 1.5, "two"])
def test_bad_threads(threads: Any) -> None:
    dst = np.zeros(3, np.float32)
    with pytest.raises(ArgumentError, match="threads"):
        mix_(dst, np.ones(3, np.float32), 0.5, threads=threads)
    assert not dst.any()


@pytest.mark.parametrize(
    "distance", [0.0, [0.0], np.zeros(2), np.zeros((1, 1)), np.zeros(1, np.float32)], ids=repr
)
def test_bad_distance(distance: Any) -> None:
    dst = np.zeros(3, np.float32)
    with pytest.raises(ArrayError, match="distance"):
        mix_(dst, np.ones(3, np.float32), 0.5, distance=distance)
    assert not dst.any()


def test_a_stream_is_for_gpus() -> None:
    dst = np.zeros(3, np.float32)
    with pytest.raises(ArgumentError, match="stream"):
        mix_(dst, np.ones(3, np.float32), 0.5, stream=7)  # type: ignore[arg-type]
    assert not dst.any()


# --- torch, the baseline -----------------------------------------------------------------------


def tensor(kind: str, array: NDArray[Any]) -> torch.Tensor:
    found = torch.from_numpy(array)
    return found.view(torch.bfloat16) if kind == "bfloat16" else found


@pytest.mark.parametrize("kinds", PAIRS, ids="-".join)
@pytest.mark.parametrize("alpha", cases.ALPHAS)
def test_torch(kinds: tuple[str, str], alpha: float, rng: np.random.Generator) -> None:
    dst, src = (cases.Guarded(kind, 1001, 1, rng) for kind in kinds)
    mean = cases.mean(kinds, dst.array, src.array, alpha)
    before, source = dst.array.copy(), src.array.copy()
    total = torch.full((1,), 2.5, dtype=torch.float64)
    pair = [tensor(kind, each.array) for kind, each in zip(kinds, (dst, src), strict=True)]
    found = select("cpu", "torch")(*pair, alpha, distance=total)
    mixed = cases.decode(kinds[0], dst.array)
    np.testing.assert_allclose(mixed, mean, **cases.tolerance(kinds[0]))
    assert cases.same_bits(src.array, source) and dst.intact() and src.intact()
    distance = cases.squared_distance(kinds, before, source)
    assert found == pytest.approx(distance, rel=1e-6)
    assert float(total[0]) == pytest.approx(2.5 + distance, rel=1e-6)


@pytest.mark.parametrize(
    ("dst", "src", "message"),
    [
        (np.zeros(3, np.float32), torch.ones(3), "dst must be a torch tensor"),
        (torch.zeros(3), torch.ones(4), "src .4,."),
        (torch.zeros(2, 2), torch.ones(4), "dst must be 1-D"),
        (torch.zeros(8)[::2], torch.ones(4), "dst must be 1-D and contiguous"),
        (torch.zeros(3), torch.ones(3, dtype=torch.float64), "dst is float32 but src is float64"),
        (torch.zeros(3, dtype=torch.int32), torch.ones(3), "dst is int32"),
        (torch.zeros(3), torch.ones(3, device="meta"), "on meta"),
    ],
    ids=str,
)
def test_torch_refuses(dst: Any, src: Any, message: str) -> None:
    with pytest.raises(ArrayError, match=message):
        select("cpu", "torch")(dst, src, 0.5)
    assert not dst.any()


@pytest.mark.gpu
@pytest.mark.parametrize("kinds", PAIRS, ids="-".join)
def test_cupy_kernels_use_no_local_memory(kinds: tuple[str, str]) -> None:
    kernel, _ = on_cuda("cupy")
    assert kernel._kernels[kinds].local_size_bytes == 0


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cupy", "numba_cuda"])
def test_a_call_on_a_stream_neither_waits_nor_allocates(name: str) -> None:
    """Behind a long queue on the same stream the call returns first; on it the order holds."""
    kernel, place = on_cuda(name)
    cupy = place.cupy
    stream = cupy.cuda.Stream(non_blocking=True)
    dst, src = cupy.zeros(1 << 26, np.float32), cupy.ones(1 << 26, np.float32)
    cupy.cuda.Device().synchronize()  # they are filled on another stream
    kernel(dst, src, 0.5, stream=stream.ptr)  # numba compiles at first
    cupy.cuda.Device().synchronize()
    used = cupy.get_default_memory_pool().total_bytes(), cupy.cuda.runtime.memGetInfo()[0]
    done = cupy.cuda.Event()
    for _ in range(200):
        kernel(dst, src, 0.5, stream=stream.ptr)
    done.record(stream)
    assert not done.done
    stream.synchronize()
    after = cupy.get_default_memory_pool().total_bytes(), cupy.cuda.runtime.memGetInfo()[0]
    assert after == used
    assert float(dst[0]) == float(dst[-1]) == 1.0
