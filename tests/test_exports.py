"""What the package exports: the names, that each is documented, and that importing is light."""

import ast
import importlib.metadata
import inspect
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import ucxgossip
from ucxgossip import ucp

Python = Callable[..., subprocess.CompletedProcess[str]]

TOP = [
    "BaseTwo",
    "Broadcast",
    "Dissemination",
    "GlobalAverage",
    "Gossip",
    "Group",
    "Hierarchical",
    "Hypercube",
    "Nesterov",
    "RandomMatching",
    "Ring",
    "Rotated",
    "Round",
    "Schedule",
    "Tuning",
    "attach",
    "errors",
    "join",
    "ucp",
]
UCP = [
    "TRANSPORTS",
    "Context",
    "Endpoint",
    "Library",
    "MemoryRegion",
    "RemoteKey",
    "Worker",
    "load",
]
EXPORTS = [(ucxgossip, name) for name in TOP] + [(ucp, name) for name in UCP]


@pytest.mark.parametrize(
    ("module", "names"), [(ucxgossip, TOP), (ucp, UCP)], ids=["ucxgossip", "ucp"]
)
def test_names(module: ModuleType, names: list[str]) -> None:
    assert module.__all__ == names


def own_docstring(value: Any) -> str:
    """The docstring written for `value` itself, not one inherited or made by dataclass."""
    text = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
    if inspect.isclass(value) and (text or "").startswith(f"{value.__name__}("):
        return ""
    return text or ""


def constants_documented(module: ModuleType) -> set[str]:
    """Names assigned in `module` with a docstring right below."""
    body = ast.parse(Path(str(module.__file__)).read_text()).body
    found = set()
    for statement, following in zip(body, body[1:], strict=False):
        target = getattr(statement, "target", None) or getattr(statement, "targets", [None])[0]
        text = getattr(following, "value", None)
        if isinstance(target, ast.Name) and isinstance(text, ast.Constant):
            found |= {target.id} if isinstance(text.value, str) else set()
    return found


@pytest.mark.parametrize(
    ("module", "name"), EXPORTS, ids=[f"{module.__name__}.{name}" for module, name in EXPORTS]
)
def test_export_is_documented(module: ModuleType, name: str) -> None:
    value = getattr(module, name)
    if inspect.isclass(value) or inspect.isroutine(value) or inspect.ismodule(value):
        assert own_docstring(value)
    else:
        assert name in constants_documented(ucp.context)


CLASSES = {value for module, name in EXPORTS if inspect.isclass(value := getattr(module, name))}


@pytest.mark.parametrize("exported", sorted(CLASSES, key=lambda value: value.__name__))
def test_public_methods_are_documented(exported: type) -> None:
    members = {
        name: member
        for name, member in vars(exported).items()
        if not name.startswith("_") and (isinstance(member, property) or inspect.isroutine(member))
    }
    assert [name for name, member in members.items() if not member.__doc__] == []


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = ucxgossip.nonsense


def test_version_is_the_installed_one() -> None:
    assert ucxgossip.__version__ == importlib.metadata.version("ucxgossip")


@pytest.mark.spawn
def test_importing_loads_neither_torch_nor_ucx(python: Python) -> None:
    ended = python(
        "import sys, ucxgossip\n"
        "print('torch' in sys.modules, 'libucp' in open('/proc/self/maps').read())\n"
        "from ucxgossip import ucp\n"
        "ucp.load()\n"
        "print('torch' in sys.modules, 'libucp' in open('/proc/self/maps').read())"
    )
    assert ended.stdout.splitlines() == ["False False", "False True"], ended.stderr
