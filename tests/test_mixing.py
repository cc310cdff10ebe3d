"""Names of mixes and combines; the collectives themselves are tested in test_group.py."""

import pytest

from ucxgossip import errors
from ucxgossip.mixing import COMBINES, MIXES, check_modes


@pytest.mark.parametrize("mix", list(MIXES))
@pytest.mark.parametrize("combine", COMBINES)
def test_known_modes(mix: str, combine: str) -> None:
    check_modes(mix, combine)


@pytest.mark.parametrize(
    ("mix", "combine", "word"),
    [
        ("all", "atc", "unknown mix 'all'; choose one of 'both', 'weights', 'gradients'"),
        ("both", "cta", "unknown combine 'cta'; choose one of 'atc', 'awc'"),
    ],
)
def test_unknown_modes(mix: str, combine: str, word: str) -> None:
    with pytest.raises(errors.ArgumentError, match=word):
        check_modes(mix, combine)
