"""ucxgossip.errors: the tree drawn in the docstring is the tree of the classes."""

import inspect
import pickle
import re

import pytest

from ucxgossip import errors
from ucxgossip.errors import (
    ExchangeTimeoutError,
    GossipError,
    PeerError,
    RankMissingError,
    UCXError,
)

NODE = re.compile(r"^(?P<branch>[ |]*(?:\+-- )?)(?P<name>[A-Z]\w+Error)(?: \((?P<builtin>\w+)\))?")

Tree = dict[str, tuple[str | None, str | None]]  # name: (parent, builtin base)


def drawn() -> Tree:
    tree: Tree = {}
    path: list[tuple[int, str]] = []  # (column, name) from the root to the node last read
    for line in (errors.__doc__ or "").splitlines():
        if (node := NODE.match(line)) is None:
            continue
        column = len(node["branch"])
        path = [(c, name) for c, name in path if c < column]
        assert node["name"] not in tree, f"{node['name']} is drawn twice"
        tree[node["name"]] = (path[-1][1] if path else None, node["builtin"])
        path.append((column, node["name"]))
    return tree


def defined() -> Tree:
    tree: Tree = {}
    for name, value in vars(errors).items():
        if inspect.isclass(value) and value.__module__ == errors.__name__:
            ours = [base.__name__ for base in value.__bases__ if base.__module__ != "builtins"]
            builtin = [
                base.__name__
                for base in value.__bases__
                if base.__module__ == "builtins" and base is not Exception
            ]
            assert len(ours) <= 1 and len(builtin) <= 1, name
            tree[name] = (ours[0] if ours else None, builtin[0] if builtin else None)
    return tree


def test_tree_is_drawn_as_it_is() -> None:
    assert drawn() == defined()


def test_tree_has_one_root() -> None:
    assert [name for name, (parent, _) in drawn().items() if parent is None] == ["GossipError"]
    assert GossipError.__bases__ == (Exception,)


@pytest.mark.parametrize("name", sorted(defined()))
def test_class_says_what_it_means(name: str) -> None:
    assert vars(errors)[name].__doc__


def test_ucx_error_names_call_and_status() -> None:
    error = UCXError("ucp_put_nbx", -6, "ERR_UNREACHABLE")
    assert (error.call, error.status, error.name) == ("ucp_put_nbx", -6, "ERR_UNREACHABLE")
    assert str(error) == "ucp_put_nbx: ERR_UNREACHABLE (-6)"


def test_ucx_error_ends_with_the_detail() -> None:
    error = UCXError("ucp_put_nbx", -20, "ERR_TIMED_OUT", "after 3 s")
    assert str(error) == "ucp_put_nbx: ERR_TIMED_OUT (-20): after 3 s"


def test_attributes_and_text() -> None:
    missing = RankMissingError("two are missing", (1, 3))
    assert (missing.ranks, str(missing)) == ((1, 3), "two are missing")
    assert RankMissingError("nobody knows").ranks == ()
    late = ExchangeTimeoutError("no credit", 2, "credit", 1.5)
    assert (late.rank, late.what, late.seconds, str(late)) == (2, "credit", 1.5, "no credit")
    peer = PeerError("rank 4 left", 4)
    assert (peer.rank, str(peer)) == (4, "rank 4 left")


@pytest.mark.parametrize(
    "error",
    [
        errors.UCXError("ucp_put_nbx", -6, "ERR_UNREACHABLE", "to rank 3"),
        errors.PeerError("rank 2 left", 2),
        errors.OutOfStepError("rank 2 has ended", 2),
        errors.ExchangeTimeoutError("waited", 1, "to put", 2.5),
        errors.RankMissingError("missing", (1, 2)),
        errors.ArrayError("bad"),
        errors.LibraryNotFoundError("none"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_survive_pickling(error: errors.GossipError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)
