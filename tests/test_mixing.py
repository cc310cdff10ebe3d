"""The choices of `attach`: each by its name, and those that do not go together."""

import itertools

import pytest

from ucxgossip import errors
from ucxgossip.mixing import COMBINES, MIXES, Modes, Nesterov


@pytest.mark.parametrize(
    ("mix", "combine"),
    [each for each in itertools.product(MIXES, COMBINES) if each != ("push_sum", "awc")],
)
def test_known_modes(mix: str, combine: str) -> None:
    modes = Modes(mix, combine)
    assert (modes.weights_travel, modes.gradients_travel) == MIXES[mix]
    assert modes.in_place == (modes.weights_travel and combine == "atc")


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"mix": "all"}, "unknown mix 'all'; choose one of 'both', 'weights', 'gradients'"),
        ({"combine": "cta"}, "unknown combine 'cta'; choose one of 'atc', 'awc'"),
        ({"optimizer_state": "momentum"}, "unknown optimizer_state 'momentum'"),
        ({"buffers": None}, "unknown buffers None"),
        ({"optimizer_state": 1}, "unknown optimizer_state 1"),
        ({"staleness": -1}, "staleness is -1"),
        ({"staleness": True}, "staleness is True"),
        ({"local_steps": 0}, "local_steps is 0; must be a whole number from 1 on"),
        ({"global_average_every": 0}, "global_average_every is 0"),
        ({"outer": "nesterov"}, "outer is 'nesterov'; must be ug.Nesterov"),
        ({"mix": "push_sum", "combine": "awc"}, "waits for nobody already"),
        ({"mix": "push_sum", "staleness": 1}, "waits for nobody already"),
        ({"mix": "push_sum", "optimizer_state": True}, "moves weights only"),
        ({"mix": "push_sum", "buffers": True}, "moves weights only"),
        ({"staleness": 1, "combine": "awc"}, "leave combine='atc'"),
        ({"mix": "gradients", "optimizer_state": True}, "travels with the weights"),
        ({"outer": Nesterov(), "combine": "awc"}, "outer needs"),
        ({"outer": Nesterov(), "staleness": 1}, "outer needs"),
        ({"outer": Nesterov(), "mix": "push_sum"}, "outer needs"),
        ({"outer": Nesterov(), "mix": "gradients"}, "works on the weights"),
    ],
)
def test_refused_modes(changes: dict[str, object], word: str) -> None:
    with pytest.raises(errors.ArgumentError, match=word):
        Modes(**changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "settings",
    [
        {"rate": 0},
        {"rate": "1"},
        {"rate": float("inf")},
        {"momentum": 1.0},
        {"momentum": -0.1},
    ],
)
def test_refused_outer_optimizers(settings: dict[str, object]) -> None:
    with pytest.raises(errors.ArgumentError, match="Nesterov: "):
        Nesterov(**settings)  # type: ignore[arg-type]
