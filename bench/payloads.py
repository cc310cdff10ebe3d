"""What one round of `bench exchange` exchanges: so many bytes, or a model by name.

A size alone says little about a model: all-reduce and gossip are called on tensors, and of a
model's tensors most are small. So a model is offered both ways, as one array of its size and as
its tensors. The shapes are computed here: torchvision and transformers are large, and their
weights are not needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from math import prod

from ucxgossip.bench.table import parse_sizes
from ucxgossip.errors import ArgumentError

ITEM = 4
"""Bytes of a float32."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Payload:
    """float32 arrays that travel in one round: how it was asked for, and the bytes of each."""

    name: str
    arrays: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(self.arrays)


def parse(text: str) -> list[Payload]:
    """Read a list such as ``8,64K,resnet50,gpt2/tensors``.

    A model's name is one array of its size, ``/tensors`` behind it its tensors as so many arrays.
    """
    return [_parse_one(each.strip(), text) for each in text.split(",")]


def of(nbytes: int, name: str | None = None) -> Payload:
    """One array of `nbytes` bytes."""
    if nbytes < ITEM or nbytes % ITEM:
        raise ArgumentError(f"{nbytes} bytes are no whole number of float32 ({ITEM} bytes each)")
    return Payload(name or str(nbytes), (nbytes,))


def _parse_one(name: str, text: str) -> Payload:
    model, slash, part = name.lower().partition("/")
    if not model[:1].isalpha():
        (nbytes,) = parse_sizes(name)
        return of(nbytes)
    shapes = _SHAPES.get(model)
    if shapes is None or (slash and part != "tensors"):
        raise ArgumentError(
            f"size {name!r} in {text!r}: write bytes as in 8, 64K or 102.4MB, or a model: "
            f"{', '.join(_SHAPES)} (one array), {', '.join(f'{each}/tensors' for each in _SHAPES)}"
        )
    arrays = tuple(ITEM * prod(shape) for shape in shapes())
    return Payload(f"{model}/tensors", arrays) if slash else of(sum(arrays), model)


def lenet() -> Iterator[Shape]:
    """LeNet of `bench train`: 19,754 parameters in 10 tensors."""
    from ucxgossip.bench.models import LeNet  # torch takes a second to import

    return (tuple(parameter.shape) for parameter in LeNet().parameters())


def resnet50() -> Iterator[Shape]:
    """ResNet-50 (He et al. 2016) for 1000 classes: 25,557,032 parameters in 161 tensors."""

    def unit(into: int, out: int, kernel: int) -> Iterator[Shape]:
        """A convolution without bias, and its batch norm."""
        yield from ((out, into, kernel, kernel), (out,), (out,))

    yield from unit(3, 64, 7)
    into = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            yield from unit(into, width, 1)
            yield from unit(width, width, 3)
            yield from unit(width, 4 * width, 1)
            if block == 0:
                yield from unit(into, 4 * width, 1)
            into = 4 * width
    yield from ((1000, into), (1000,))


def gpt2(width: int = 768, blocks: int = 12) -> Iterator[Shape]:
    """GPT-2 small (Radford et al. 2019), its head tied: 124,439,808 parameters in 148 tensors."""

    def linear(into: int, out: int) -> Iterator[Shape]:
        yield from ((into, out), (out,))

    norm = partial(iter, ((width,), (width,)))
    yield from ((50257, width), (1024, width))
    for _ in range(blocks):
        yield from norm()
        yield from linear(width, 3 * width)
        yield from linear(width, width)
        yield from norm()
        yield from linear(width, 4 * width)
        yield from linear(4 * width, width)
    yield from norm()


_SHAPES = {"lenet": lenet, "resnet50": resnet50, "gpt2": gpt2}
