"""ucxgossip.bench.fuzz: a short run finds nothing, and each target does find what it looks for."""

import contextlib
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ucxgossip import mailbox
from ucxgossip.bench import fuzz
from ucxgossip.engine import words as w
from ucxgossip.trust import Seal


def test_short_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "fuzz.json"
    assert fuzz.main(["--inputs", "4000", "--seed", "1", "--json", str(path)]) == 0
    document = json.loads(path.read_text())
    assert document["environment"]["seed"] == 1
    assert [row["target"] for row in document["rows"]] == list(fuzz.TARGETS)
    assert sum(row["inputs"] for row in document["rows"]) == 4000
    for row in document["rows"]:
        assert row["faults"] == 0
        assert row["taken"] + row["refused"] == row["inputs"]
        assert row["refused"] > row["inputs"] / 10
    assert "# " in capsys.readouterr().out


def test_too_few_inputs(capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz.main(["--inputs", "3"]) == 1
    assert "inputs is 3" in capsys.readouterr().err


def test_mutations_differ_and_repeat_by_seed() -> None:
    valid = bytes(range(50))
    made = [fuzz.mutate(valid, random.Random(seed)) for seed in range(300)]
    assert made == [fuzz.mutate(valid, random.Random(seed)) for seed in range(300)]
    assert sum(each != valid for each in made) > 280
    assert {len(each) for each in made} > {0, 49, 50, 51, 4096}
    assert all(fuzz.mutate(b"", random.Random(seed)) is not None for seed in range(50))


def found(target: Any, inputs: int = 2000) -> list[str]:
    said: list[str] = []
    counts = target(inputs, random.Random("0"), said.append)
    assert counts[2] == len(said)
    return said


def test_seal_that_takes_anything_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Seal, "open", lambda self, name, sealed: sealed[32:])
    assert found(fuzz.seals)[0] == "a changed blob was taken"


def test_note_that_escapes_unnamed_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz.Board, "raise_if_aborted", lambda self: int("not a number"))
    assert any(said.startswith("aborted: ValueError") for said in found(fuzz.notes, 300))


def test_mailbox_out_of_bounds_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def unchecked(blob: bytes, layout: mailbox.Layout, rank: int) -> tuple[int, bytes]:
        address, _ = mailbox._BLOB.unpack_from(blob.ljust(17, b"\0"))
        return address, blob[16:]

    monkeypatch.setattr(fuzz, "parse_description", unchecked)
    assert found(fuzz.mailboxes)[0] == "ValueError: taken, and out of bounds"


@pytest.mark.parametrize("error", [OverflowError, RecursionError])
def test_greeting_that_escapes_is_found(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def unguarded(self: fuzz.Incoming, sealed: bytes) -> None:
        with contextlib.suppress(ValueError, TypeError, KeyError):
            int(json.loads(sealed[Seal.BYTES :])["rank"])
        self.lost = self.forged = True

    monkeypatch.setattr(fuzz.Incoming, "_greet", unguarded)
    assert any(said.startswith(error.__name__) for said in found(fuzz.wardens))


def test_frame_that_was_not_sealed_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Seal, "open", lambda self, name, sealed: sealed[32:])
    assert any(" came of [{'kind': 'hello'" in said for said in found(fuzz.wardens))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda arena: arena.raw.__setitem__(7, 0), "a guard byte"),
        (lambda arena: arena.table.__setitem__((0, w.PLACES), 9), "a word of the engine"),
        (lambda arena: arena.words.__setitem__(w.EPOCH, 4), "a word of the engine"),
        (lambda arena: arena.words.__setitem__(w.UNSEEN, 99), "99 bells"),
        (lambda arena: arena.credits[1].__setitem__(3, -7), "a credit"),
        (lambda arena: arena.signals[0].__setitem__(0, 1 << 50), "a signal of another epoch"),
    ],
    ids=range(6),
)
def test_damage_is_seen(spoil: Any, said: str) -> None:
    arena = fuzz.Arena()
    assert arena.fault() == ""
    spoil(arena)
    assert said in arena.fault()


def test_handler_that_takes_too_much_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The handlers are compiled; so the expectation is made stricter instead."""
    fitting = fuzz._fitting

    def stricter(headers: Any, *rest: Any) -> Any:
        return fitting(headers, *rest) & (headers[:, 1] < 1 << 40)

    monkeypatch.setattr(fuzz, "_fitting", stricter)
    (said,) = found(fuzz.messages)
    assert "do not fit" in said


def test_signal_of_another_round_is_told_apart() -> None:
    arena = fuzz.Arena()
    zero = np.zeros(1, np.int64)
    word = (fuzz._EPOCH << 48) | 1
    for value, taken in ((word, 1), (word + 1, 0), (word ^ (1 << 48), 0), (0, 0), (-1, 0)):
        words = np.array([value], np.int64)
        assert fuzz._arrivals(arena.words, 0, zero, zero, zero, words) == taken
