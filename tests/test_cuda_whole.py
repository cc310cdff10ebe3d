"""kernels.cuda_whole without a GPU: NVRTC compiles it for sm_90, and a CPU runs its arithmetic.

As test_cuda_source: a warp's reduction, atomics and speed are for the tests marked `gpu`.
"""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import test_cuda_source as cuda
from ucxgossip.kernels.cpu import CAME_IN, OWN, mix_whole
from ucxgossip.kernels.cuda_source import SOURCE
from ucxgossip.kernels.cuda_whole import KINDS, WHOLE_SOURCE, names

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def compiled() -> SimpleNamespace:
    found: SimpleNamespace = cuda.compile_for_sm_90(WHOLE_SOURCE)
    return found


def test_every_kernel_is_there_without_a_warning(compiled: SimpleNamespace) -> None:
    assert {name for kind in KINDS for name in names(kind)} <= set(compiled.kernels)
    assert "warning" not in compiled.log.lower()


@pytest.mark.parametrize("kind", KINDS)
def test_16_bytes_at_a_time_and_nothing_spilled(compiled: SimpleNamespace, kind: str) -> None:
    _, gauge, whole = names(kind)
    wide = r"\.(v4\.[ubf]32|v2\.[ubf]64)"
    assert len(re.findall(rf"ld\.global\.nc{wide}", compiled.kernels[gauge])) == 2
    assert not re.findall(rf"st\.global{wide}", compiled.kernels[gauge])
    assert len(re.findall(rf"st\.global{wide}", compiled.kernels[whole])) == 1
    for name in (gauge, whole):
        assert ".local" not in compiled.kernels[name]
        said = compiled.facts[name]
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in said


# --- run on a CPU ------------------------------------------------------------------------------

RUNNER = r"""
extern "C" void run_{name}({kind} *dst, const {kind} *src, double alpha, long long count,
                           double *result, long long chunk, int blocks, int rows)
{{
    gridDim.x = blocks;
    for (blockIdx.y = 0; blockIdx.y < rows; ++blockIdx.y)
        for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x)
            for (threadIdx.x = 0; threadIdx.x < THREADS; ++threadIdx.x)
                {name}(dst, src, alpha, count, result{chunk});
}}
"""


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Any:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to run the CUDA source on a CPU with")
    source = WHOLE_SOURCE
    for theirs, ours in cuda.STAND_INS.items():
        assert SOURCE.count(theirs) == 1
        source = source.replace(theirs, ours)
    # One thread after the other, so that a block's sum is that of its threads.
    source = source.replace("add_up(total, result);", "*result += total;")
    shim = cuda.SHIM + (
        "static void atomicOr(unsigned long long *to, unsigned long long bits) { *to |= bits; }\n"
    )
    runners = [
        RUNNER.format(name=name, kind=kind, chunk="" if name == names(kind)[0] else ", chunk")
        for kind in KINDS
        for name in names(kind)
    ]
    folder = tmp_path_factory.mktemp("whole")
    (folder / "whole.cpp").write_text(shim + source + "".join(runners))
    made = subprocess.run(
        [
            *(compiler, "-std=c++17", "-O1", "-shared", "-fPIC", "-ffp-contract=off"),
            *("-fno-strict-aliasing", "-Wno-unknown-pragmas"),
            *("-o", str(folder / "whole.so"), str(folder / "whole.cpp")),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    if "_Float16" in made.stderr:
        pytest.skip("this g++ has no _Float16")
    assert made.returncode == 0, made.stderr
    library = ctypes.CDLL(str(folder / "whole.so"))
    for kind in KINDS:
        for name in names(kind):
            getattr(library, f"run_{name}").argtypes = (
                *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_double, ctypes.c_longlong),
                *(ctypes.c_void_p, ctypes.c_longlong, ctypes.c_int, ctypes.c_int),
            )
    return library


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 7, 1000, 4099])
@pytest.mark.parametrize("spoil", ["", "own", "came in", "both", "apart"])
def test_as_on_the_cpu(kernels: Any, kind: str, count: int, spoil: str) -> None:
    """One chunk, of any alignment."""
    rng = np.random.default_rng(count)
    for offset in range(4):
        dst, src = (rng.standard_normal(count + 4).astype(kind)[offset:] for _ in range(2))
        where = int(rng.integers(len(dst)))
        if spoil in ("own", "both"):
            dst[where] = np.nan
        if spoil in ("came in", "both"):
            src[where] = -np.inf
        if spoil == "apart":
            dst[where], src[where] = np.finfo(kind).max, np.finfo(kind).min
        wanted, undo = dst.copy(), np.empty_like(dst)
        with np.errstate(all="ignore"):
            found = mix_whole(wanted, src, wanted.dtype.type(0.25), undo)
        result = np.zeros(2)
        for name in names(kind)[1:]:
            run = getattr(kernels, f"run_{name}")
            run(
                dst.ctypes.data, src.ctypes.data, 0.25, len(dst), result.ctypes.data, len(dst), 2, 1
            )
        assert dst.tobytes() == wanted.tobytes()
        bits = int(result.view(np.int64)[1])
        if spoil:
            assert bits == int(-found)
            assert bits == {"own": OWN, "both": OWN | CAME_IN}.get(spoil, CAME_IN)
        else:
            assert bits == 0
            np.testing.assert_allclose(result[0], found, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [512, 1536, 1537, 2044])
def test_a_run_of_chunks_is_one_after_the_other(kernels: Any, kind: str, count: int) -> None:
    """Each with results of its own, and left out by itself."""
    rng, chunk = np.random.default_rng(count), 512
    dst, src = (rng.standard_normal(count + 2).astype(kind) for _ in range(2))
    src[min(600, count - 1)] = np.nan
    dst[count:] = src[count:] = 77  # which no row may touch
    wanted = dst.copy()
    rows = -(-count // chunk)
    undo = np.empty(chunk, kind)
    found = np.zeros((rows, 2))
    with np.errstate(all="ignore"):
        each = [
            mix_whole(
                wanted[at : min(at + chunk, count)],
                src[at : min(at + chunk, count)],
                wanted.dtype.type(0.25),
                undo,
            )
            for at in range(0, count, chunk)
        ]
    for name in names(kind)[1:]:
        run = getattr(kernels, f"run_{name}")
        run(
            *(dst.ctypes.data, src.ctypes.data, 0.25, count, found.ctypes.data),
            *(chunk, 2, rows),
        )
    assert dst.tobytes() == wanted.tobytes()
    for row, (distance, bits) in enumerate(
        zip(found[:, 0], found.view(np.int64)[:, 1], strict=True)
    ):
        spoiled = row == min(600, count - 1) // chunk
        assert bits == (CAME_IN if spoiled else 0)
        if not spoiled:
            np.testing.assert_allclose(distance, each[row], rtol=1e-5)
