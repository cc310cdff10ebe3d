"""ucxgossip.ucp.lib: which libucp is chosen, and what is said when it will not do."""

import ctypes
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import pytest

from ucxgossip.errors import LibraryNotFoundError, UCXError
from ucxgossip.ucp import lib
from ucxgossip.ucp.abi import Status

Python = Callable[..., subprocess.CompletedProcess[str]]

LOAD = """
from ucxgossip import errors, ucp

try:
    library = ucp.load()
except errors.LibraryError as error:
    print(type(error).__name__, error)
else:
    print(library.origin, library.path)
"""

HIDE_WHEEL = "import sys; sys.modules['libucx'] = None\n"  # importing it raises ImportError now
HIDE_SYSTEM = "import ctypes.util; ctypes.util.find_library = lambda name: None\n"


def said(python: Python, code: str, **variables: str) -> str:
    ended = python(code, variables)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.strip()


def wheel_path() -> Path:
    """Where the wheel keeps libucp."""
    wheel = importlib.util.find_spec("libucx")
    if wheel is None or wheel.origin is None:
        pytest.skip("no libucx wheel")
    return Path(wheel.origin).parent / "lib" / "libucp.so.0"


# --- nothing to load, or the wrong thing -------------------------------------------------------


@pytest.mark.spawn
def test_no_libucp_at_all(python: Python) -> None:
    text = said(python, HIDE_WHEEL + HIDE_SYSTEM + LOAD)
    assert text.startswith("LibraryNotFoundError no libucp found")
    for way in ("pip install ucxgossip[ucx]", "apt install libucx0", "UCXGOSSIP_LIBUCP"):
        assert way in text


@pytest.mark.spawn
@pytest.mark.parametrize("name", ["missing.so", "text.so"])
def test_environment_names_what_cannot_be_loaded(python: Python, tmp_path: Path, name: str) -> None:
    (tmp_path / "text.so").write_text("not a library")
    text = said(python, LOAD, UCXGOSSIP_LIBUCP=str(tmp_path / name))
    assert text.startswith(f"LibraryNotFoundError UCXGOSSIP_LIBUCP={tmp_path / name} cannot be")
    assert "unset" in text


@pytest.mark.spawn
def test_environment_names_another_library(python: Python) -> None:
    text = said(python, LOAD, UCXGOSSIP_LIBUCP="libm.so.6")
    assert text.startswith("LibrarySymbolError libm.so.6 has no function ucp_get_version:")
    assert "UCXGOSSIP_LIBUCP" in text


@pytest.mark.spawn
def test_library_lacks_one_function(python: Python, tmp_path: Path) -> None:
    """All functions but one: the missing one is named, though it is called from compiled code."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    present = [name for name in lib.CONTROL | lib.DATA if name != "ucp_put_nbx"]
    source, path = tmp_path / "poor.c", tmp_path / "libpoor.so"
    source.write_text("\n".join(f"void {name}(void) {{}}" for name in present))
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-o", str(path), str(source)], check=True, timeout=60
    )
    text = said(python, LOAD, UCXGOSSIP_LIBUCP=str(path))
    assert text.startswith(f"LibrarySymbolError {path} has no function ucp_put_nbx:")


BROKEN_WHEEL = """
import sys, types
wheel = types.ModuleType("libucx")
wheel.__file__ = {file!r}
wheel.load_library = lambda: []
sys.modules["libucx"] = wheel
"""


@pytest.mark.spawn
def test_broken_wheel_counts_as_none(python: Python, tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libucp.so.0").write_text("not a library")
    broken = BROKEN_WHEEL.format(file=str(tmp_path / "__init__.py"))
    assert said(python, broken + HIDE_SYSTEM + LOAD).startswith("LibraryNotFoundError")


# --- which one is taken ------------------------------------------------------------------------


@pytest.mark.spawn
def test_wheel_is_taken_and_works(python: Python) -> None:
    path = wheel_path()
    assert said(python, HIDE_SYSTEM + LOAD) == f"wheel {path}"
    assert said(python, HIDE_WHEEL + LOAD, UCXGOSSIP_LIBUCP=str(path)) == f"environment {path}"


@pytest.mark.parametrize("devices", [(), ("mlx5_1", "mlx5_0")], ids=["no-rdma", "rdma"])
@pytest.mark.parametrize("wheel", [True, False], ids=["wheel", "no-wheel"])
@pytest.mark.parametrize("system", [True, False], ids=["system", "no-system"])
@pytest.mark.parametrize("environment", [True, False], ids=["environment", "no-environment"])
def test_order_of_choice(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    environment: bool,
    system: bool,
    wheel: bool,
    devices: tuple[str, ...],
) -> None:
    for device in devices:
        (tmp_path / device).mkdir()
    monkeypatch.setattr(lib, "_RDMA_DEVICES", tmp_path)
    there = {"environment": environment, "system": system, "wheel": wheel}
    for origin, exists in there.items():
        found = (f"/{origin}/libucp.so.0", object()) if exists else None
        monkeypatch.setattr(lib, f"_open_{origin}", lambda found=found: found)
    order = ["environment", *(("system", "wheel") if devices else ("wheel", "system"))]
    expected = next((origin for origin in order if there[origin]), None)

    if expected is None:
        with pytest.raises(LibraryNotFoundError):
            lib._find()
    else:
        path, origin, _ = lib._find()
        assert (path, origin) == (f"/{expected}/libucp.so.0", expected)


def test_rdma_devices_are_listed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(lib, "_RDMA_DEVICES", tmp_path / "none")
    assert lib.rdma_devices() == []
    monkeypatch.setattr(lib, "_RDMA_DEVICES", tmp_path)
    for name in ("mlx5_1", "mlx5_0"):
        (tmp_path / name).mkdir()
    assert lib.rdma_devices() == ["mlx5_0", "mlx5_1"]


def test_empty_environment_variable_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCXGOSSIP_LIBUCP", "")
    assert lib._open_environment() is None


# --- the library that was loaded ---------------------------------------------------------------


def test_version_is_that_of_the_library() -> None:
    library = lib.load()
    text = library.functions["ucp_get_version_string"]().decode()
    assert text.split()[0] == ".".join(map(str, library.version))
    assert library.version >= (1, 13, 0)


@pytest.mark.parametrize("name", lib.DATA)
def test_compiled_code_calls_the_same_functions(name: str) -> None:
    function = lib.load().functions[name]
    assert llvm.address_of_symbol(name) == ctypes.cast(function, ctypes.c_void_p).value


def test_load_finds_once() -> None:
    assert lib.load() is lib.load()


# --- statuses ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "name"),
    [
        (0, "OK"),
        (1, "INPROGRESS"),
        (-6, "ERR_UNREACHABLE"),
        (-25, "ERR_CONNECTION_RESET"),
        (-80, "ERR_ENDPOINT_TIMEOUT"),
        (-99, "unknown status"),
    ],
)
def test_status_name(status: int, name: str) -> None:
    assert lib.status_name(status) == name


@pytest.mark.parametrize("status", [Status.OK, Status.INPROGRESS, 5])
def test_check_passes_what_is_no_error(status: int) -> None:
    assert lib.check(status, "ucp_worker_fence") == status


def test_check_raises_what_is() -> None:
    with pytest.raises(UCXError) as raised:
        lib.check(-20, "ucp_ep_flush_nbx", "after 3 s")
    assert raised.value.call == "ucp_ep_flush_nbx"
    assert raised.value.status == Status.ERR_TIMED_OUT
    assert str(raised.value) == "ucp_ep_flush_nbx: ERR_TIMED_OUT (-20): after 3 s"


def test_library_checks_its_calls() -> None:
    calls: dict[str, Any] = {"good": lambda x: 0, "bad": lambda x: -5}
    library = lib.Library("path", "wheel", (1, 22, 0), calls)
    library("good", 1)
    with pytest.raises(UCXError, match=r"^bad: ERR_INVALID_PARAM \(-5\)$"):
        library("bad", 1)


# --- hooks in libc's memory functions ----------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "given", "during"),
    [
        (None, None, "none"),
        (None, "bistro", "bistro"),
        ("rdma", None, None),
        ("gpu", None, None),
    ],
)
def test_ucx_patches_libc_only_where_a_device_needs_it(
    device: str | None,
    given: str | None,
    during: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name, found, seen = "UCX_MEM_MMAP_HOOK_MODE", lib.load(), []
    (tmp_path / "mlx5_0").touch()
    nothing = tmp_path / "nothing"
    monkeypatch.setattr(lib, "_RDMA_DEVICES", tmp_path if device == "rdma" else nothing)
    monkeypatch.setattr(lib, "_GPU_DEVICES", (tmp_path if device == "gpu" else nothing,))
    monkeypatch.delenv(name, raising=False)
    if given is not None:
        monkeypatch.setenv(name, given)

    def find() -> tuple[str, str, ctypes.CDLL]:
        seen.append(os.environ.get(name))
        return found.path, found.origin, ctypes.CDLL(found.path)

    monkeypatch.setattr(lib, "_find", find)
    lib.load.__wrapped__()
    assert seen == [during]
    assert os.environ.get(name) == given
