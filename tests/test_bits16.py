"""kernels.bits16: every 16-bit number is widened exactly, every float32 narrowed as by others."""

import platform
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ucxgossip.kernels import bits16

ALL = np.arange(1 << 16, dtype=np.uint16)
KINDS = ["bfloat16", "float16"]


# Not `jit.njit`: its cache would not notice a change in `bits16`.
@numba.njit
def widen_all(source: Any, target: Any) -> None:
    for i in range(len(source)):
        target[i] = bits16.widen(source[i])


@numba.njit
def narrow_all(source: Any, target: Any) -> None:
    for i in range(len(source)):
        target[i] = bits16.narrow(source[i], target[i])


def stored(kind: str, bits: NDArray[Any]) -> NDArray[Any]:
    """An array of `bits` in the integer type that says which kind it is."""
    return bits.view(np.uint16 if kind == "bfloat16" else np.int16)


def torch_narrow(kind: str, values: NDArray[Any]) -> NDArray[Any]:
    """Another's rounding: torch's, to the bits."""
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float16
    return torch.from_numpy(values.copy()).to(dtype).view(torch.uint16).numpy()


def torch_widen(kind: str, bits: NDArray[Any]) -> NDArray[Any]:
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float16
    return torch.from_numpy(bits.copy()).view(dtype).float().numpy()


def same(found: NDArray[Any], wanted: NDArray[Any], nan: NDArray[Any]) -> bool:
    kind = f"u{found.itemsize}"
    return bool((found.view(kind) == wanted.view(kind))[~nan].all())


def awkward(kind: str) -> NDArray[Any]:
    """Float32 numbers at, just below and just above each number of 16 bits and each midpoint."""
    exact = torch_widen(kind, ALL).view(np.uint32).astype(np.int64)
    half = 0x8000 if kind == "bfloat16" else 0x1000
    near = [exact + step for step in (-1, 0, 1, half - 1, half, half + 1)]
    drawn = np.random.default_rng().integers(0, 1 << 32, 1 << 18)
    bits = np.concatenate([*near, drawn]) & 0xFFFFFFFF
    subnormal = 2.0**-25 * np.arange(0, 4100, 0.25)  # float16's, their midpoints and quarters
    numbers = np.concatenate([subnormal, -subnormal]).astype(np.float32)
    return np.concatenate([bits.astype(np.uint32).view(np.float32), numbers])


@pytest.mark.parametrize("kind", KINDS)
def test_widen_every_number(kind: str) -> None:
    found, wanted = np.empty(len(ALL), np.float32), torch_widen(kind, ALL)
    widen_all(stored(kind, ALL), found)
    nan = np.isnan(wanted)
    assert same(found, wanted, nan)
    assert np.isnan(found[nan]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_narrow(kind: str) -> None:
    values = awkward(kind)
    found = stored(kind, np.full(len(values), 0x5555, np.uint16))
    narrow_all(values, found)
    nan = np.isnan(values)
    assert same(found, torch_narrow(kind, values), nan)
    assert np.isnan(torch_widen(kind, found[nan].view(np.uint16))).all()


@pytest.mark.spawn
def test_without_f16c(python: Any) -> None:
    """The same tests where numba compiles for any x86-64: no instruction, no missing symbol."""
    if platform.machine() != "x86_64":
        pytest.skip("F16C is x86's")
    ended = python(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import test_bits16 as tests\n"
        "assert not tests.bits16._F16C\n"
        "for kind in tests.KINDS:\n"
        "    tests.test_widen_every_number(kind)\n"
        "    tests.test_narrow(kind)\n"
        "assembly = ''.join(tests.narrow_all.inspect_asm().values())\n"
        "print('vcvtps2ph' in assembly, 'xmm' in assembly)",
        {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": ""},
        120.0,
    )
    assert (ended.returncode, ended.stdout) == (0, "False True\n"), ended.stderr[-2000:]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_interpreted_is_as_compiled(kind: str) -> None:
    values = np.random.default_rng().choice(awkward(kind), 2000)
    compiled, interpreted = (stored(kind, np.zeros(2000, np.uint16)) for _ in range(2))
    narrow_all(values, compiled)
    narrow_all.py_func(values, interpreted)  # type: ignore[attr-defined]
    assert same(interpreted, compiled, np.isnan(values))
    wide, plain = np.empty(2000, np.float32), np.empty(2000, np.float32)
    widen_all(compiled, wide)
    widen_all.py_func(compiled, plain)  # type: ignore[attr-defined]
    assert same(plain, wide, np.isnan(wide))
