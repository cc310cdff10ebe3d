"""kernels.cuda_source without a GPU: NVRTC compiles it for sm_90, and a CPU runs its arithmetic.

What this does not show: a warp's reduction, atomics, and anything about speed. Those are for the
tests marked `gpu`.
"""

import contextlib
import ctypes
import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import mixing_cases as cases
from ucxgossip.kernels.contract import ITEMSIZE, PAIRS
from ucxgossip.kernels.cuda_source import SOURCE, THREADS, kernel_name

HERE = Path(__file__).parent
ARCHITECTURE = "sm_90"


# --- compiled for a GPU ------------------------------------------------------------------------


def nvrtc() -> Any:
    """libnvrtc of a wheel (nvidia-cuda-nvrtc-cu12, or another major's), or the system's."""
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(each) for each in (spec.submodule_search_locations or [])] if spec else []
    wheels = [path for each in folders for path in each.glob("*/lib/libnvrtc.so.*")]
    for name in (*map(str, wheels), "libnvrtc.so", "libnvrtc.so.12", "libnvrtc.so.13"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    pytest.skip("no NVRTC: pip install nvidia-cuda-nvrtc-cu12")


def compile_for_sm_90(code: str) -> SimpleNamespace:
    """The PTX of each kernel, and what ptxas, which NVRTC runs for a real device, said of it."""
    library, program, size = nvrtc(), ctypes.c_void_p(), ctypes.c_size_t()

    def text(what: str) -> str:
        assert getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)) == 0
        buffer = ctypes.create_string_buffer(size.value)
        assert getattr(library, f"nvrtcGet{what}")(program, buffer) == 0
        return buffer.value.decode()

    options = [f"--gpu-architecture={ARCHITECTURE}", "--std=c++17", "--ptxas-options=-v"]
    given = (ctypes.c_char_p * len(options))(*map(str.encode, options))
    source = code.encode()
    assert library.nvrtcCreateProgram(ctypes.byref(program), source, b"mix.cu", 0, None, None) == 0
    status = library.nvrtcCompileProgram(program, len(options), given)
    log = text("ProgramLog")
    assert status == 0, log
    ptx = text("PTX")
    library.nvrtcDestroyProgram(ctypes.byref(program))
    kernels = {part.split("(")[0].strip(): part for part in ptx.split(".visible .entry ")[1:]}
    facts = {part.split("'")[0]: part for part in log.split("Compiling entry function '")[1:]}
    return SimpleNamespace(kernels=kernels, facts=facts, log=log)


@pytest.fixture(scope="module")
def compiled() -> SimpleNamespace:
    return compile_for_sm_90(SOURCE)


def test_there_is_a_kernel_for_each_pair(compiled: SimpleNamespace) -> None:
    names = {kernel_name(*pair) for pair in PAIRS}
    assert set(compiled.kernels) == set(compiled.facts) == names


def test_no_warnings(compiled: SimpleNamespace) -> None:
    assert "warning" not in compiled.log.lower()


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_memory_is_read_and_written_16_bytes_at_a_time(
    compiled: SimpleNamespace, pair: tuple[str, str]
) -> None:
    """As many 16-byte accesses as a group has 16-byte words, of each operand."""
    ptx = compiled.kernels[kernel_name(*pair)]
    wide = r"\.(v4\.[ubf]32|v2\.[ubf]64)"
    own = ITEMSIZE[pair[0]] // ITEMSIZE[pair[1]]
    assert len(re.findall(rf"ld\.global\.nc{wide}", ptx)) == 1
    assert len(re.findall(rf"ld\.global{wide}", ptx)) == own
    assert len(re.findall(rf"st\.global{wide}", ptx)) == own


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_nothing_is_spilled(compiled: SimpleNamespace, pair: tuple[str, str]) -> None:
    """PTX has unlimited registers and shows arrays in local memory only; ptxas says the rest."""
    name = kernel_name(*pair)
    assert ".local" not in compiled.kernels[name]
    said = compiled.facts[name]
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in said
    registers = int(re.findall(r"Used (\d+) registers", said)[0])
    # 65,536 a multiprocessor: 2048 threads at 32. Doubles take two; they may have fewer threads.
    assert registers <= (40 if pair[0] == "float64" else 32)


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_the_mix_is_not_fused(compiled: SimpleNamespace, pair: tuple[str, str]) -> None:
    """Its three operations are there as such, rounded to nearest even."""
    ptx = compiled.kernels[kernel_name(*pair)]
    bits = 64 if pair[0] == "float64" else 32
    each = 16 // ITEMSIZE[pair[1]]
    for operation in ("sub", "mul", "add"):
        assert len(re.findall(rf"{operation}\.rn\.f{bits}", ptx)) >= each, operation


# --- run on a CPU ------------------------------------------------------------------------------

SHIM = r"""
#include <cmath>
#include <cstring>
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __restrict__
#define __shared__ static
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct Place { unsigned x, y; };
static Place blockIdx, threadIdx, gridDim;
static float __uint_as_float(unsigned bits) { float to; memcpy(&to, &bits, 4); return to; }
static unsigned __float_as_uint(float value) { unsigned to; memcpy(&to, &value, 4); return to; }
static float __fsub_rn(float a, float b) { return a - b; }
static float __fadd_rn(float a, float b) { return a + b; }
static float __fmul_rn(float a, float b) { return a * b; }
static double __dsub_rn(double a, double b) { return a - b; }
static double __dadd_rn(double a, double b) { return a + b; }
static double __dmul_rn(double a, double b) { return a * b; }
template <typename T> T __ldg(const T *from) { return *from; }
static double __shfl_down_sync(unsigned, double, int) { return 0; }
static void __syncthreads() {}
static void atomicAdd(double *to, double by) { *to += by; }
"""
STAND_INS = {
    'asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));': (
        "_Float16 half; memcpy(&half, &value.bits, 2); wide = half;"
    ),
    'asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(value));': (
        "_Float16 half = value; memcpy(&to.bits, &half, 2);"
    ),
    "add_up(total, distance);": "*distance += total;",  # one thread after the other
}
"""What a CPU cannot run, and what stands for it."""

RUNNER = r"""
extern "C" void run_{name}({dst} *dst, const {src} *src, double alpha, long long count,
                           double *distance, int blocks)
{{
    gridDim.x = blocks;
    for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x)
        for (threadIdx.x = 0; threadIdx.x < THREADS; ++threadIdx.x)
            {name}(dst, src, alpha, count, distance);
}}
"""


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source as a library for this CPU; an access off its alignment ends the process."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to run the CUDA source on a CPU with")
    source = SOURCE
    for theirs, ours in STAND_INS.items():
        assert source.count(theirs) == 1, theirs
        source = source.replace(theirs, ours)
    runners = [RUNNER.format(name=kernel_name(dst, src), dst=dst, src=src) for dst, src in PAIRS]
    folder = tmp_path_factory.mktemp("cuda")
    (folder / "mix.cpp").write_text(SHIM + source + "".join(runners))
    made = subprocess.run(
        [
            *(compiler, "-std=c++17", "-O1", "-shared", "-fPIC", "-ffp-contract=off"),
            *("-fno-strict-aliasing", "-fsanitize=alignment"),
            *("-fsanitize-undefined-trap-on-error", "-Wno-unknown-pragmas"),
            *("-o", str(folder / "mix.so"), str(folder / "mix.cpp")),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    if "_Float16" in made.stderr:
        pytest.skip("this g++ has no _Float16")
    assert made.returncode == 0, made.stderr
    return folder / "mix.so"


def run_cases(library: str) -> None:
    """All pairs, sizes, weights and offsets; in a process of its own, which a trap would end."""
    kernels, rng = ctypes.CDLL(library), np.random.default_rng()
    for kinds in PAIRS:
        run = getattr(kernels, f"run_{kernel_name(*kinds)}")
        run.argtypes = (
            *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_double, ctypes.c_longlong),
            *(ctypes.c_void_p, ctypes.c_int),
        )
        for offsets in (*cases.OFFSETS, (2, 6), (3, 7), (4, 8), (7, 7)):
            for size in (0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 33, 1001, 2 * 8 * THREADS + 5):
                for alpha in (0.3, 1.0):
                    dst, src = (
                        cases.Guarded(kind, size, offset, rng)
                        for kind, offset in zip(kinds, offsets, strict=True)
                    )
                    check(run, kinds, dst, src, alpha, int(rng.integers(1, 4)))
        dst, src = (cases.Guarded(kind, 149, 1, rng) for kind in kinds)
        dst.array[:], src.array[:] = cases.special_pairs(kinds)
        check(run, kinds, dst, src, 0.5, 2)
        check_call(kernels, kinds, rng)
    print("all right")


def check(run: Any, kinds: Any, dst: Any, src: Any, alpha: float, blocks: int) -> None:
    label = f"{kinds}, {len(dst.array)} elements at {dst.start} and {src.start}, alpha {alpha}"
    source = src.array.copy()
    with np.errstate(invalid="ignore"):
        wanted = cases.expected(kinds, dst.array, source, alpha)
        distance = cases.squared_distance(kinds, dst.array, source)
    total = np.full(1, 2.5)
    addresses = dst.array.ctypes.data, src.array.ctypes.data
    # The CPU's alpha comes as a double; the kernel's parameter makes it what the GPU's is.
    run(*addresses, alpha, len(dst.array), total.ctypes.data, blocks)
    assert cases.same_numbers(kinds[0], dst.array, wanted), label
    assert cases.same_bits(src.array, source), label
    assert dst.intact() and src.intact(), label
    np.testing.assert_allclose(total[0] - 2.5, distance, rtol=1e-5, atol=1e-9, err_msg=label)


class StandIn:
    """What `CupyMix` uses of CuPy, for kernels in `library`; all launches are kept."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library, self.launches, self.streams = library, [], []
        self.cuda = SimpleNamespace(
            Device=lambda: SimpleNamespace(attributes={"MultiProcessorCount": 2}),
            Stream=SimpleNamespace(from_external=self.stream),
        )

    def stream(self, foreign: Any) -> Any:
        self.streams.append(foreign.__cuda_stream__())
        return contextlib.nullcontext()

    def RawModule(self, code: str, options: tuple[str, ...]) -> Any:
        assert (code, options) == (SOURCE, ("--std=c++17",))
        return SimpleNamespace(get_function=lambda name: Launcher(self, name))


class Launcher:
    def __init__(self, stand_in: StandIn, name: str) -> None:
        self.stand_in, self.run = stand_in, getattr(stand_in.library, f"run_{name}")

    def compile(self) -> None:
        pass

    def __call__(self, grid: Any, block: Any, arguments: Any) -> None:
        # By value, so their sizes are what the kernel takes.
        alpha = arguments[2]
        assert [each.nbytes for each in arguments] == [8, 8, alpha.nbytes, 8, 8]
        assert block == (THREADS,)
        self.stand_in.launches.append((grid, alpha.dtype))
        self.run(*(each.item() for each in arguments), grid[0])


def check_call(library: ctypes.CDLL, kinds: Any, rng: np.random.Generator) -> None:
    """`CupyMix` gives each kernel what it takes, on the stream asked for."""
    stand_in = StandIn(library)
    sys.modules["cupy"] = stand_in  # type: ignore[assignment]
    from ucxgossip.kernels.cupy_mix import CupyMix

    mix = CupyMix()
    each = THREADS * 16 // ITEMSIZE[kinds[1]]  # elements of a block's first round
    for size, blocks in ((1, 1), (each, 1), (each + 1, 2), (40 * each, 16)):
        dst, src = (cases.Guarded(kind, size, 1, rng) for kind in kinds)
        wanted = cases.expected(kinds, dst.array, src.array, 0.3)
        distance = cases.squared_distance(kinds, dst.array, src.array)
        total = np.full(1, 2.5)
        given = [
            SimpleNamespace(__cuda_array_interface__=array.__array_interface__)
            for array in (dst.array, src.array, total)
        ]
        assert mix(given[0], given[1], 0.3, distance=given[2], stream=77) is None
        assert cases.same_bits(dst.array, wanted) and dst.intact() and src.intact()
        np.testing.assert_allclose(total[0] - 2.5, distance, rtol=1e-5)
        assert mix(given[0], given[1], 0.0) is None  # no distance asked for, default stream
        assert cases.same_bits(dst.array, wanted)
        kind = "f8" if kinds[0] == "float64" else "f4"
        assert stand_in.launches[-2:] == [((blocks,), np.dtype(kind))] * 2
        assert stand_in.streams[-2:] == [(0, 77), (0, 0)]
    before = len(stand_in.launches)
    mix(
        *(
            SimpleNamespace(__cuda_array_interface__=each.array[:0].__array_interface__)
            for each in (dst, src)
        ),
        0.3,
    )
    assert len(stand_in.launches) == before  # a grid of 0 blocks is an error in CUDA


@pytest.mark.spawn
def test_the_source_mixes_right_on_a_cpu(on_cpu: Path, python: Callable[..., Any]) -> None:
    ended = python(
        f"import sys; sys.path.insert(0, {str(HERE)!r})\n"
        "import test_cuda_source\n"
        f"test_cuda_source.run_cases({str(on_cpu)!r})"
    )
    assert (ended.returncode, ended.stdout) == (0, "all right\n"), ended.stderr[-2000:]
