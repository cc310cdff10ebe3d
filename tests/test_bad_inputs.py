"""Every row of docs/errors.md: refused by name, with that message, and nothing was changed."""

from __future__ import annotations

from typing import Any

import pytest

import bad_inputs
from ucxgossip import errors


@pytest.fixture(scope="module")
def found() -> dict[Any, Any]:
    results: dict[Any, Any] = bad_inputs.find()
    return results


@pytest.mark.parametrize("case", bad_inputs.CASES, ids=lambda case: case.text)
def test_refused_by_name_before_anything_changes(case: Any, found: dict[Any, Any]) -> None:
    assert found[case].error == case.error, found[case].message
    assert issubclass(vars(errors)[case.error], errors.GossipError)
    assert found[case].changed == []
    assert len(found[case].message) > 15


def test_document_is_what_the_cases_make(found: dict[Any, Any]) -> None:
    assert bad_inputs.DOCUMENT.read_text(encoding="utf-8") == bad_inputs.markdown(found), (
        "run python tests/bad_inputs.py"
    )


def test_cases_differ_and_are_enough() -> None:
    texts = [case.text for case in bad_inputs.CASES]
    assert len(set(texts)) == len(texts) >= 60
