"""ucxgossip.bench.payloads: sizes and models by name."""

from __future__ import annotations

import pytest

from ucxgossip.bench.models import ResNet50
from ucxgossip.bench.payloads import gpt2, parse, resnet50
from ucxgossip.errors import ArgumentError


def test_sizes_are_one_array_each() -> None:
    assert [(each.name, each.arrays) for each in parse("8, 64K,102.4MB")] == [
        ("8", (8,)),
        ("65536", (65536,)),
        ("102400000", (102_400_000,)),
    ]


def test_models_as_one_array() -> None:
    pytest.importorskip("torch")
    found = parse("lenet,resnet50,GPT2")
    assert [each.name for each in found] == ["lenet", "resnet50", "gpt2"]
    assert [each.arrays for each in found] == [(79_016,), (102_228_128,), (497_759_232,)]


def test_models_by_tensor() -> None:
    residual, language = parse("resnet50/tensors,gpt2/tensors")
    assert (len(residual.arrays), residual.nbytes) == (161, 102_228_128)
    assert (len(language.arrays), language.nbytes) == (148, 497_759_232)
    assert max(language.arrays) == 4 * 50257 * 768 and min(residual.arrays) == 4 * 64


def test_shapes_are_those_of_the_papers() -> None:
    assert [tuple(each.shape) for each in ResNet50().parameters()] == list(resnet50())
    convolutions = [shape for shape in resnet50() if len(shape) == 4]
    assert len(convolutions) == 53 and convolutions[0] == (64, 3, 7, 7)
    assert convolutions[-1] == (2048, 512, 1, 1)
    assert sum(shape == (768, 2304) for shape in gpt2()) == 12


def test_what_is_asked_for_can_be_asked_for_again() -> None:
    text = "8,64K,resnet50,gpt2/tensors"
    assert parse(",".join(each.name for each in parse(text))) == parse(text)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("6", "6 bytes are no whole number of float32"),
        ("alexnet", "lenet, resnet50, gpt2"),
        ("resnet50/layers", "resnet50/tensors"),
        ("8x", "write bytes"),
        ("8,", "write bytes"),
    ],
)
def test_what_cannot_be_read(text: str, word: str) -> None:
    with pytest.raises(ArgumentError, match=word):
        parse(text)
