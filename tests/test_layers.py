"""The house stands on floors: a module imports only from floors below its own."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]

# "name.*" is a package with all its modules; "name" is one module, or a package's __init__.
FLOORS = {
    0: (
        "errors",
        "schedule.*",
        "jit",
        "kernels.*",
        "store",
        "forks",
        "segments",
        "trust",
        "quarantine",
        "history",
        "scattered",
    ),
    1: (
        "ucp.abi",
        "ucp.lib",
        "device.*",
        "board",
        "running",
        "greeting",
        "rendezvous",
        "members.*",
    ),
    2: (
        "ucp",
        "ucp.ops",
        "ucp.context",
        "ucp.worker",
        "ucp.endpoint",
        "ucp.memory",
        "ucp.resource",
    ),
    3: ("mailbox", "buffer", "landing"),
    4: ("engine.*",),
    5: (
        "membership",
        "guests",
        "meetings",
        "partners",
        "posting",
        "blocking",
        "tuning",
        "group",
        "channel",
    ),
    6: ("mixing.*",),
    7: ("torch_hook.*",),
    8: ("bench.*", "doctor", "cli", "__main__"),
    9: ("__init__",),
}

# A package's modules on one floor may import each other; beyond that, on one floor, only these.
NEIGHBOURS = {
    "schedule": {"errors", "jit"},
    "quarantine": {"errors"},
    "jit": {"errors"},
    "scattered": {"jit"},
    "store": {"errors"},
    "trust": {"errors"},
    "forks": {"errors"},
    "history": {"errors"},
    "running": {"board"},
    "greeting": {"board"},
    "rendezvous": {"board", "greeting"},
    "kernels": {"errors", "jit"},
    "guests": {"membership"},
    "meetings": {"membership", "guests"},
    "partners": {"membership", "meetings"},
    "posting": {"membership", "partners"},
    "blocking": {"membership", "posting"},
    "group": {"membership", "meetings", "posting", "blocking", "tuning"},
    "channel": {"group"},
    "doctor": {"bench"},
    "cli": {"bench", "doctor"},
    "__main__": {"cli"},
}

TORCH_USERS = {"torch_hook", "bench", "doctor", "cli"}
LAZY_TORCH_USERS = {"store"}  # inside a function only


def family(module: str) -> str:
    return module.partition(".")[0]


def floor_of(module: str) -> int | None:
    """Return the floor of `module`, or None where it is not listed."""
    wildcard = f"{family(module)}.*"
    for floor, names in FLOORS.items():
        if module in names or wildcard in names:
            return floor
    return None


def module_name(path: str) -> str:
    """Name the module at `path` as FLOORS does; ucxgossip/__init__.py is "__init__"."""
    parts = list(Path(path).with_suffix("").parts)
    if parts[0] == "ucxgossip":
        del parts[0]
    if len(parts) > 1 and parts[-1] == "__init__":
        del parts[-1]
    return ".".join(parts)


def imports(path: str, tree: ast.AST) -> Iterator[tuple[str, int, bool]]:
    """Yield (dotted name, line, whether inside a function) for all that the module imports."""
    package = ["ucxgossip", *module_name(path).split(".")]
    if not path.endswith("__init__.py") or package[-1] == "__init__":
        del package[-1]

    def visit(node: ast.AST, lazy: bool) -> Iterator[tuple[str, int, bool]]:
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *filter(None, [node.module])])
            yield from ((f"{origin}.{alias.name}", node.lineno, lazy) for alias in node.names)
        lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, lazy)

    return visit(tree, False)


def target_module(dotted: str) -> str:
    """Find which of our modules `dotted` names, or takes something from."""
    name = dotted.partition(".")[2]
    while name and floor_of(name) is None:
        name = name.rpartition(".")[0]
    return name or "__init__"


def may_import(module: str, target: str) -> bool:
    own, other = floor_of(module), floor_of(target)
    if own is None or other is None:
        return False
    if own == other:
        same_package = family(module) == family(target)
        return same_package or family(target) in NEIGHBOURS.get(family(module), set())
    return other < own


def may_import_torch(module: str, lazy: bool) -> bool:
    return family(module) in TORCH_USERS or (lazy and family(module) in LAZY_TORCH_USERS)


def faults(path: str, source: str) -> list[str]:
    """Return one line for each import of the module at `path` that the house forbids."""
    module = module_name(path)
    if floor_of(module) is None:
        return [f"{path}: {module} is on no floor; list it in FLOORS"]
    found = []
    for dotted, line, lazy in imports(path, ast.parse(source)):
        top = family(dotted)
        if top == "ucxgossip" and not may_import(module, target := target_module(dotted)):
            found.append(
                f"{path}:{line}: {module} (floor {floor_of(module)})"
                f" imports {target} (floor {floor_of(target)})"
            )
        if top == "torch" and not may_import_torch(module, lazy):
            found.append(f"{path}:{line}: {module} imports torch")
    return found


def test_house_stands() -> None:
    paths = [
        path.relative_to(REPOSITORY).as_posix()
        for root in ("ucxgossip", "kernels", "bench")
        for path in sorted((REPOSITORY / root).rglob("*.py"))
    ]
    assert {"ucxgossip/__init__.py", "kernels/__init__.py", "bench/__init__.py"} <= set(paths)
    found = [fault for path in paths for fault in faults(path, (REPOSITORY / path).read_text())]
    assert not found, "\n".join(found)


def test_neighbours_share_a_floor_and_do_not_lean_on_each_other() -> None:
    TopologicalSorter(NEIGHBOURS).prepare()  # raises CycleError
    for module, others in NEIGHBOURS.items():
        assert {floor_of(other) for other in others} == {floor_of(module)}


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("ucxgossip/mailbox.py", "from ucxgossip.ucp.ops import put"),
        ("ucxgossip/mailbox.py", "from ucxgossip.ucp import MemoryRegion"),
        ("ucxgossip/mailbox.py", "from ucxgossip import ucp, errors"),
        ("ucxgossip/mailbox.py", "import numpy as np"),
        ("ucxgossip/ucp/lib.py", "from ucxgossip.ucp.abi import UCS_OK"),
        ("ucxgossip/ucp/__init__.py", "from ucxgossip.ucp.worker import Worker"),
        ("ucxgossip/ucp/worker.py", "from .context import Context\nfrom ..errors import UCXError"),
        ("ucxgossip/engine/__init__.py", "from .loop import Engine"),
        ("ucxgossip/schedule/base.py", "from ucxgossip.errors import GossipError"),
        ("ucxgossip/store.py", "def store():\n    from torch.distributed import TCPStore"),
        ("ucxgossip/torch_hook/ddp.py", "import torch\nfrom ucxgossip.mixing import Mix"),
        ("ucxgossip/__init__.py", "from ucxgossip.torch_hook import attach\nfrom .cli import main"),
        ("kernels/cpu.py", "import ucxgossip.kernels.contract\nfrom ucxgossip.jit import njit"),
        ("bench/put.py", "import torch.distributed\nfrom ucxgossip import ucp"),
        ("ucxgossip/cli.py", "def main():\n    from ucxgossip.bench import put"),
    ],
)
def test_allowed(path: str, source: str) -> None:
    assert faults(path, source) == []


@pytest.mark.parametrize(
    ("path", "source", "fault"),
    [
        (
            "ucxgossip/mailbox.py",
            "import ucxgossip.group",
            "ucxgossip/mailbox.py:1: mailbox (floor 3) imports group (floor 5)",
        ),
        (
            "ucxgossip/mailbox.py",
            "\nfrom ucxgossip import engine",
            "ucxgossip/mailbox.py:2: mailbox (floor 3) imports engine (floor 4)",
        ),
        (
            "ucxgossip/group.py",
            "if TYPE_CHECKING:\n    from ucxgossip.mixing import modes",
            "ucxgossip/group.py:2: group (floor 5) imports mixing.modes (floor 6)",
        ),
        (
            "ucxgossip/group.py",
            "def late():\n    from .torch_hook import bucket",
            "ucxgossip/group.py:2: group (floor 5) imports torch_hook.bucket (floor 7)",
        ),
        (
            "ucxgossip/engine/loop.py",
            "from ..group import Group",
            "ucxgossip/engine/loop.py:1: engine.loop (floor 4) imports group (floor 5)",
        ),
        (
            "ucxgossip/ucp/lib.py",
            "from ucxgossip.ucp import Worker",
            "ucxgossip/ucp/lib.py:1: ucp.lib (floor 1) imports ucp (floor 2)",
        ),
        (
            "ucxgossip/rendezvous.py",
            "from ucxgossip.ucp.lib import check",
            "ucxgossip/rendezvous.py:1: rendezvous (floor 1) imports ucp.lib (floor 1)",
        ),
        (
            "ucxgossip/errors.py",
            "import ucxgossip.jit",
            "ucxgossip/errors.py:1: errors (floor 0) imports jit (floor 0)",
        ),
        (
            "bench/put.py",
            "from ucxgossip.cli import main",
            "bench/put.py:1: bench.put (floor 8) imports cli (floor 8)",
        ),
        (
            "kernels/cpu.py",
            "from ucxgossip.bench import put",
            "kernels/cpu.py:1: kernels.cpu (floor 0) imports bench.put (floor 8)",
        ),
        (
            "ucxgossip/cli.py",
            "import ucxgossip as ug",
            "ucxgossip/cli.py:1: cli (floor 8) imports __init__ (floor 9)",
        ),
        (
            "ucxgossip/mixing.py",
            "from ucxgossip import attach",
            "ucxgossip/mixing.py:1: mixing (floor 6) imports __init__ (floor 9)",
        ),
        ("ucxgossip/mixing.py", "import torch", "ucxgossip/mixing.py:1: mixing imports torch"),
        (
            "ucxgossip/__init__.py",
            "import torch",
            "ucxgossip/__init__.py:1: __init__ imports torch",
        ),
        (
            "ucxgossip/mixing.py",
            "def f():\n    import torch.nn",
            "ucxgossip/mixing.py:2: mixing imports torch",
        ),
        (
            "ucxgossip/store.py",
            "from torch.distributed import TCPStore",
            "ucxgossip/store.py:1: store imports torch",
        ),
        (
            "ucxgossip/extra.py",
            "",
            "ucxgossip/extra.py: extra is on no floor; list it in FLOORS",
        ),
        (
            "ucxgossip/ucp/extra.py",
            "",
            "ucxgossip/ucp/extra.py: ucp.extra is on no floor; list it in FLOORS",
        ),
    ],
)
def test_reported(path: str, source: str, fault: str) -> None:
    assert faults(path, source) == [fault]
