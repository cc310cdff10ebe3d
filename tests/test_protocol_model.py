"""Every order of the protocol's steps, in a model (model.py), and what each rule is good for."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

import model

Model, search, walk, REGROUP = model.Model, model.search, model.walk, model.REGROUP


def check(case: Any) -> None:
    result = search(case)
    assert not result.fault, "\n".join([result.fault, *result.trace])
    assert result.ends > 0


@pytest.mark.parametrize("name", model.CASES)
def test_no_order_of_steps_breaks_a_promise(name: str) -> None:
    check(model.CASES[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", model.LONG_CASES)
def test_nor_any_of_more_ranks_and_epochs(name: str) -> None:
    check(model.LONG_CASES[name])


def without(*rules: str, of: Any = None, **case: Any) -> Any:
    return replace(of or Model(), without=frozenset(rules), **case)


TORN = "where .* was due"
BLOCKED = "no step is left"


@pytest.mark.parametrize(
    ("case", "fault"),
    [
        (without("order"), TORN),
        (without("order", way="store"), TORN),
        (without("fence"), TORN),
        (without("fence", way="store"), TORN),
        (without("fence", chunks=2, words=1), TORN),
        (without("mix-then-credit"), "after its credit was given"),
        (without("mix-then-credit", rounds=3, depth=2), "after its credit was given"),
        (without("mix-then-credit", way="store"), "after its credit was given"),
        (without("mix-then-credit", way="message"), "after its credit was given"),
        (without("largest", words=1, rounds=4, depth=2), BLOCKED),
        (without("first-credit"), "half received"),
        (without("sent"), "has changed"),
        (without("sent", chunks=2, words=1), "has changed"),
        (without("sent", way="message"), "has changed"),
        (without("position-in-word"), TORN),
        (without("position-in-word", way="store"), TORN),
        (without("position-in-word", way="message"), TORN),
        (without("position-in-word", chunks=2, words=1, rounds=1, ring=True), TORN),
        (without("mix-then-credit", chunks=2, words=1, ring=True), "after its credit was given"),
        (without("fence", chunks=2, words=1, ring=True), TORN),
        (without("look", sleeping=True, chunks=2, words=1, way="store", ring=True), BLOCKED),
        (without("bell", sleeping=True, words=1), BLOCKED),
        (without("unseen", sleeping=True, words=1), BLOCKED),
        (without("bell", sleeping=True, words=1, way="store"), BLOCKED),
        (without("doze", sleeping=True, words=1, way="store"), BLOCKED),
        (without("look", sleeping=True, words=1, way="store"), BLOCKED),
        (without("answer", chunks=2, words=1, way="message", answers=True), BLOCKED),
        (without("sent", chunks=2, words=1, way="message"), "has changed"),
        (
            without("mix-then-credit", chunks=2, words=1, way="message"),
            "after its credit was given",
        ),
        (without("closed", of=REGROUP, failure="kill"), "has changed"),
        (without("closed", of=REGROUP, failure="kill", way="message"), "has changed"),
        (without("new-region", of=REGROUP, failure="suspect", way="store"), "wrote into a mailbox"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "+".join(sorted(value.without)),
)
def test_each_rule_is_needed(case: Any, fault: str) -> None:
    """Without it the search finds what goes wrong: it can fail."""
    result = search(case)
    assert re.search(fault, result.fault), result.fault or "nothing found"
    assert result.trace


def test_first_rounds_over_shared_memory_would_need_no_credit() -> None:
    """They get one all the same: there is one protocol, and a credit also says "connected"."""
    check(without("first-credit", way="store"))


@pytest.mark.slow
def test_the_epoch_in_a_word_is_for_mailboxes_that_outlive_it() -> None:
    """A new epoch has new mailboxes, so that its number is a second line of defence: were the
    old ones kept, a signal of the dead would pass for one of the living.
    """
    kept = without("new-region", of=REGROUP, failure="kill", way="message")
    check(kept)
    result = search(replace(kept, without=frozenset({"new-region", "epoch"})))
    assert "where (0, 1, 1)" in result.fault or "where (1, 1, 1)" in result.fault


@pytest.mark.slow
def test_the_epoch_in_a_header_is_for_connections_that_outlive_it() -> None:
    """A credit of the old epoch would open a slot of the new one that nobody has freed."""
    kept = without("closed", of=REGROUP, failure="kill", way="store", rounds=3)
    result = search(replace(kept, without=frozenset({"closed", "epoch"})))
    assert "without its credit" in result.fault


LARGE = Model(size=4, rounds=9, depth=3, chunks=3, words=3)


@pytest.mark.parametrize("way", ["put", "store", "message"])
def test_large_cases_at_random(way: str) -> None:
    for seed in range(20):
        ring, answers = seed % 4 > 1, way == "message" and seed % 8 > 3
        case = replace(LARGE, way=way, answers=answers, ring=ring, depth=2 if ring else 3)
        result = walk(replace(case, sleeping=seed % 2 == 1), seed)
        assert not result.fault, "\n".join([f"seed {seed}: {result.fault}", *result.trace])
        regrouped = replace(
            LARGE,
            way=way,
            answers=answers,
            ring=ring,
            depth=2,
            failure=("kill", "suspect")[seed % 2],
            regroup=True,
        )
        result = walk(regrouped, seed)
        assert not result.fault, "\n".join([f"seed {seed}: {result.fault}", *result.trace])


def test_a_walk_can_fail_too() -> None:
    assert any(walk(without("fence", of=LARGE), seed).fault for seed in range(20))


def test_a_rule_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="no such rule: fences"):
        search(without("fences"))


def test_a_case_too_large_is_an_error_and_no_success() -> None:
    with pytest.raises(RuntimeError, match="more than 100 states"):
        search(Model(), limit=100)
