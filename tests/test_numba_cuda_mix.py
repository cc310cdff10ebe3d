"""kernels.numba_cuda_mix under numba's simulator, in a process that was started for it."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import mixing_cases as cases
from ucxgossip.kernels.contract import PAIRS

HERE = Path(__file__).parent


GRID = 1, 32  # the simulator's threads are Python's: few, and each takes many elements


def run_cases() -> None:
    """Every pair of types, under the simulator."""
    from numba import cuda

    from ucxgossip.kernels.numba_cuda_mix import KERNELS

    assert type(KERNELS[PAIRS[0]]).__name__ == "FakeCUDAKernel", cuda
    rng = np.random.default_rng()
    for kinds in PAIRS:
        for size, offsets, alpha in (
            (0, (0, 0), 0.5), (1, (1, 3), 0.5), (33, (1, 1), 0.0), (333, (5, 0), 0.3),
            (100, (0, 0), 1.0),
        ):  # fmt: skip
            dst, src = (
                cases.Guarded(kind, size, offset, rng)
                for kind, offset in zip(kinds, offsets, strict=True)
            )
            check(KERNELS[kinds], kinds, dst, src, alpha)
        dst, src = (cases.Guarded(kind, 149, 1, rng) for kind in kinds)
        dst.array[:], src.array[:] = cases.special_pairs(kinds)
        check(KERNELS[kinds], kinds, dst, src, 0.5)
    print("all right")


def check(kernel: Any, kinds: tuple[str, str], dst: Any, src: Any, alpha: float) -> None:
    label = f"{kinds}, {len(dst.array)} elements, alpha {alpha}"
    before, source = dst.array.copy(), src.array.copy()
    with np.errstate(all="ignore"):
        wanted = cases.expected(kinds, before, source, alpha)
        distance = cases.squared_distance(kinds, before, source)
        number = np.float64(alpha) if kinds[0] == "float64" else np.float32(alpha)
        for asked in (True, False):
            dst.array[:] = before
            total = np.full(1, 2.5)
            kernel[GRID](dst.array, src.array, number, total, asked)
            assert cases.same_numbers(kinds[0], dst.array, wanted), label
            wanted_total = 2.5 + distance if asked else 2.5
            np.testing.assert_allclose(total[0], wanted_total, rtol=1e-5, err_msg=label)
    assert cases.same_bits(src.array, source), label
    assert dst.intact() and src.intact(), label


def compile_all() -> None:
    """Every kernel to PTX for sm_90 by numba-cuda, which asks a device for its version only."""
    import numba.cuda.dispatcher
    from numba import cuda, types

    from ucxgossip.kernels.numba_cuda_mix import KERNELS

    hopper = SimpleNamespace(compute_capability=(9, 0))
    numba.cuda.dispatcher.get_current_device = lambda: hopper
    kinds = {"float32": types.float32, "float64": types.float64}
    kinds |= {"bfloat16": types.uint16, "float16": types.float16}
    for (dst, src), kernel in KERNELS.items():
        weight = kinds["float64" if dst == "float64" else "float32"]
        arguments = kinds[dst][::1], kinds[src][::1], weight, types.float64[::1], types.boolean
        ptx, _ = cuda.compile(kernel.py_func, arguments, cc=(9, 0), device=False, abi="numba")
        assert ".target sm_90" in ptx
        assert "fma.rn.f32" not in ptx, (dst, src)
        assert f"mul.rn.f{64 if dst == 'float64' else 32}" in ptx, (dst, src)
    print("all right")


@pytest.mark.spawn
@pytest.mark.skipif(
    importlib.util.find_spec("numba_cuda") is None, reason="no numba-cuda: ucxgossip[cu12]"
)
def test_compiles_for_hopper(python: Callable[..., Any]) -> None:
    ended = python(
        f"import sys; sys.path.insert(0, {str(HERE)!r})\n"
        "import test_numba_cuda_mix\n"
        "test_numba_cuda_mix.compile_all()",
        {"NUMBA_ENABLE_CUDASIM": "0"},
        120.0,
    )
    assert (ended.returncode, ended.stdout) == (0, "all right\n"), ended.stderr[-2000:]


@pytest.mark.spawn
def test_simulated(python: Callable[..., Any]) -> None:
    ended = python(
        f"import sys; sys.path.insert(0, {str(HERE)!r})\n"
        "import test_numba_cuda_mix\n"
        "test_numba_cuda_mix.run_cases()",
        {"NUMBA_ENABLE_CUDASIM": "1"},
        120.0,
    )
    assert (ended.returncode, ended.stdout) == (0, "all right\n"), ended.stderr[-2000:]
