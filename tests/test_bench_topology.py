"""ucxgossip.bench.topology: the figures are those of the algebra, and the table is whole."""

import math

import numpy as np
import pytest

from ucxgossip.bench.topology import MOST_RANKS, figures, left_after, measure, mix, run, schedules
from ucxgossip.errors import ArgumentError
from ucxgossip.schedule import (
    BaseTwo,
    Dissemination,
    GlobalAverage,
    Hierarchical,
    Hypercube,
    RandomMatching,
    Ring,
    Rotated,
    Strided,
)

KEYS = {"bench", "schedule", "ranks", "period", "exact", "contraction", "contraction_per_step"}


def circulant(size: int, distances: list[int]) -> float:
    """|product of (1 + w**d) / 2|, the most over the size-th roots of unity w but 1."""
    waves = np.exp(2j * np.pi * np.arange(1, size) / size)
    return float(max(abs(np.prod([(1 + waves**d) / 2 for d in distances], axis=0))))


@pytest.mark.parametrize("size", [2, 3, 4, 8, 13, 40])
def test_ring_contracts_as_its_eigenvalues_say(size: int) -> None:
    exact, factor = measure(Ring(size))
    assert exact is (size == 2)
    assert factor == pytest.approx(math.cos(math.pi / size) ** (size - 1), abs=1e-12)


@pytest.mark.parametrize("size", [3, 5, 6, 7, 12, 24, 100])
def test_dissemination_contracts_as_its_eigenvalues_say(size: int) -> None:
    schedule = Dissemination(size)
    exact, factor = measure(schedule)
    assert not exact
    assert factor == pytest.approx(circulant(size, [1 << k for k in range(schedule.period)]))


@pytest.mark.parametrize("size", [2, 8, 64])
def test_powers_of_two_are_exact(size: int) -> None:
    for schedule in (Hypercube(size), Dissemination(size), Rotated(Dissemination(size))):
        assert measure(schedule) == (True, 0.0)


@pytest.mark.parametrize("size", [2, 3, 6, 17, 100])
def test_base_two_is_exact(size: int) -> None:
    assert measure(BaseTwo(size)) == (True, 0.0)
    assert measure(Rotated(BaseTwo(size))) == (True, 0.0)


@pytest.mark.parametrize("size", [2, 6, 8])
def test_what_ends_is_exact_in_its_first_period_only(size: int) -> None:
    assert abs(left_after(GlobalAverage(size), 0)).max() < 1e-9
    assert measure(GlobalAverage(size)) == (False, 0.0)


def test_hierarchical_contracts_as_its_inner_schedule() -> None:
    assert measure(Hierarchical(4, Dissemination(3)))[1] == pytest.approx(0.25)
    assert measure(Hierarchical(3, BaseTwo(5))) == (True, 0.0)


def test_rotation_helps_where_a_period_is_not_exact() -> None:
    _, plain = measure(Dissemination(24))
    exact, rotated = measure(Rotated(Dissemination(24)))
    assert not exact
    assert 0 < rotated < plain


def test_random_matching_is_not_called_exact_for_a_lucky_period() -> None:
    lucky = RandomMatching(4, seed=0)
    assert abs(left_after(lucky, 0)).max() < 1e-9
    assert measure(lucky)[0] is False


def test_random_matching_halves_the_square_of_the_distance_in_a_step() -> None:
    """The mean over matchings of a step's square has eigenvalue (1 - 1/(p - 1)) / 2."""
    row = figures(RandomMatching(64))
    assert row["contraction_per_step"] == pytest.approx(math.sqrt((1 - 1 / 63) / 2), rel=0.05)


def test_what_never_mixes_does_not_contract() -> None:
    assert measure(Strided(Hypercube(8), 3)) == (False, pytest.approx(1.0))


def test_mix_is_one_round() -> None:
    held = mix(np.array([[0.0], [4.0], [8.0]]), Dissemination(3), 0)
    assert held.tolist() == [[4.0], [2.0], [6.0]]


@pytest.mark.parametrize("size", [2, 3, 4, 8, 12])
def test_schedules_of_a_size(size: int) -> None:
    found = schedules(size)
    assert {each.size for each in found} == {size}
    described = " ".join(each.describe() for each in found)
    assert ("Hypercube" in described) is (size in (2, 4, 8))
    assert ("Hierarchical" in described) is (size in (8, 12))


@pytest.mark.parametrize("markdown", [False, True])
def test_rows_and_table(markdown: bool, capsys: pytest.CaptureFixture[str]) -> None:
    facts, rows = run([3, 8], markdown)
    assert facts["numpy"] == np.__version__
    assert [set(row) for row in rows] == [KEYS] * len(rows)
    assert [row["ranks"] for row in rows] == [3] * 5 + [8] * 8
    for row in rows:
        assert isinstance(row["contraction"], float) and isinstance(row["period"], int)
        step = row["contraction_per_step"]
        assert step == pytest.approx(row["contraction"] ** (1 / row["period"]))
        assert row["contraction"] == 0 or not row["exact"]
    printed = capsys.readouterr().out.splitlines()
    lines = printed[2:] if markdown else [line for line in printed if line[0] != "#"]
    assert len(lines) == len(rows)
    for line, row in zip(lines, rows, strict=True):
        cells = [cell.strip() for cell in line.strip("| ").split("|")] if markdown else line.split()
        assert " ".join(cells[:-5]) == row["schedule"]
        assert cells[-3] == ("yes" if row["exact"] else "no")
        assert cells[-2] == f"{row['contraction']:.3f}"


@pytest.mark.parametrize("ranks", [[1], [8, 0], [-2], [MOST_RANKS + 1]])
def test_ranks_out_of_range(ranks: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ArgumentError, match=f"ranks is {ranks[-1]}"):
        run(ranks)
    assert capsys.readouterr().out == ""
