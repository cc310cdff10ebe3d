"""bench.methods: names of methods are read, and unknown ones listed."""

import pytest

from ucxgossip.bench.methods import BASES, Method, parse
from ucxgossip.errors import ArgumentError


def test_names() -> None:
    assert parse("local") == Method("local")
    assert not parse("allreduce").gossips
    assert parse("gossip-both-awc") == Method("gossip-both-awc", "both", "awc")
    assert parse("gossip-weights-awc") == Method("gossip-weights-awc", "weights", "awc")
    name = "gossip-weights-atc+state+stale2+local4+global32"
    assert parse(name) == Method(name, "weights", "atc", True, 2, 4, 32)
    assert parse("gossip-push_sum+drop0.1").drop == 0.1
    assert parse("gossip-both-atc+shift2").shift == 2
    assert parse("gossip-both-atc+bucket256").bucket_kib == 256
    assert not parse("gossip-both-atc").simulated_only
    for base in BASES:
        assert parse(base).gossips


@pytest.mark.parametrize(
    "name",
    [
        "gossip-deferred",
        "gossip-push_sum+drop0.5",
        "gossip-both-atc+shift1",
    ],
)
def test_simulated_only(name: str) -> None:
    assert parse(name).simulated_only


@pytest.mark.parametrize(
    "name",
    [
        "",
        "gossip",
        "local+state",
        "gossip-both-atc+",
        "gossip-both-atc+state+state",
        "gossip-both-atc+state2",
        "gossip-both-atc+stale",
        "gossip-both-atc+stale1.5",
        "gossip-both-atc+often",
    ],
)
def test_unknown(name: str) -> None:
    with pytest.raises(ArgumentError, match="choose of local, lockstep, allreduce, gossip"):
        parse(name)


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("gossip-gradients+state", "no weights travel"),
        ("gossip-both-awc+stale1", "weights-atc only"),
        ("gossip-push_sum+stale1", "weights-atc only"),
        ("gossip-both-atc+local0", "starts at 1"),
        ("gossip-both-atc+bucket0", "starts at 1"),
        ("gossip-both-atc+drop2", "probability"),
    ],
)
def test_what_does_not_go_together(name: str, word: str) -> None:
    with pytest.raises(ArgumentError, match=word):
        parse(name)
