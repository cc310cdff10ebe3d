"""Batches of samples as payloads of one size: any nesting of CPU tensors, dim 0 as it comes.

Rejected: pickling (a copy, and code on the wire); a mailbox for each tensor.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from ucxgossip.buffer import Buffer
from ucxgossip.errors import ArrayError
from ucxgossip.group import Group
from ucxgossip.meetings import NOT_YET

ALIGNMENT = 64
"""Bytes to which each tensor is aligned in a payload."""


class _Nothing:
    """No batch: the loader has run out, or the sender's had."""


NOTHING = _Nothing()


def _align(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def flatten(batch: Any) -> tuple[list[torch.Tensor], pytree.TreeSpec]:
    """The tensors of a batch and how they nest; `ArrayError` for what cannot travel."""
    leaves, spec = pytree.tree_flatten(batch)
    for index, leaf in enumerate(leaves):
        fault = _fault(leaf)
        if fault:
            path, _ = pytree.tree_flatten_with_path(batch)[0][index]
            raise ArrayError(f"the batch's leaf{_spaced(pytree.keystr(path))} {fault}")
    return leaves, spec


def _spaced(path: str) -> str:
    return f" {path}" if path else ""


def _fault(leaf: object) -> str:
    """Why `leaf` cannot travel; empty if it can."""
    if not isinstance(leaf, torch.Tensor):
        return f"is a {type(leaf).__name__}; make it a tensor in the loader's collate_fn"
    if leaf.device.type != "cpu":
        return f"is on {leaf.device}; batches travel on the CPU: move them there in the loop's body"
    if leaf.layout != torch.strided or leaf.is_quantized or leaf.is_nested:
        return f"has layout {leaf.layout} and dtype {leaf.dtype}; it must be a plain dense tensor"
    return ""


@dataclass(frozen=True)
class Leaf:
    """One tensor of every batch. shape: without dim 0, None if it has no dimension at all.

    rows: the most that dim 0 may be.
    """

    dtype: torch.dtype
    shape: tuple[int, ...] | None
    rows: int

    def __str__(self) -> str:
        return "()" if self.shape is None else f"({', '.join(map(str, ('*', *self.shape)))})"

    @property
    def full(self) -> tuple[int, ...]:
        """The shape of the largest such tensor."""
        return () if self.shape is None else (self.rows, *self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the largest such tensor."""
        return math.prod(self.full) * self.dtype.itemsize

    def fault(self, tensor: torch.Tensor) -> str:
        """Why `tensor` is not of this kind; empty if it is."""
        if tensor.dtype != self.dtype:
            return f"is {tensor.dtype}, but {self.dtype} in the first batch"
        if _tail(tensor) != self.shape:
            return (
                f"has shape {tuple(tensor.shape)}, but {self} in the first batch; only dim 0 may "
                "change"
            )
        if self.shape is not None and len(tensor) > self.rows:
            return (
                f"has {len(tensor)} rows, more than the {self.rows} there is room for: those of "
                "the largest first batch of any rank, or the loader's batch_size"
            )
        return ""


def _tail(tensor: torch.Tensor) -> tuple[int, ...] | None:
    return tuple(tensor.shape[1:]) if tensor.dim() else None


class Packing:
    """How a batch lies in a payload of `nbytes` bytes.

    First int64 words: whether there is a batch, and dim 0 of each leaf; then the leaves, each
    with room for its largest. Equal on all ranks, so that payloads are.
    """

    def __init__(self, spec: pytree.TreeSpec, leaves: Sequence[Leaf]) -> None:
        self.spec, self.leaves = spec, list(leaves)
        self.words = 1 + len(self.leaves)
        self.offsets, self.nbytes = [], _align(8 * self.words)
        for leaf in self.leaves:
            self.offsets.append(self.nbytes)
            self.nbytes += _align(leaf.nbytes)

    def check(self, batch: Any) -> list[torch.Tensor]:
        """The batch's tensors; `ArrayError` if it is not like the first one, or too large."""
        tensors, spec = flatten(batch)
        if spec != self.spec:
            raise ArrayError(f"a batch is {_words(spec)}; the first one was {_words(self.spec)}")
        for index, (leaf, tensor) in enumerate(zip(self.leaves, tensors, strict=True)):
            fault = leaf.fault(tensor)
            if fault:
                path, _ = pytree.tree_flatten_with_path(batch)[0][index]
                raise ArrayError(f"the batch's leaf{_spaced(pytree.keystr(path))} {fault}")
        return tensors

    def facts(self) -> dict[str, object]:
        """What all ranks must have in common."""
        leaves = [{"dtype": str(leaf.dtype), "shape": str(leaf)} for leaf in self.leaves]
        return {"batch": _words(self.spec), "leaves": leaves}


def describe(batch: Any) -> Packing:
    """The packing with room for `batch` and no more."""
    tensors, spec = flatten(batch)
    try:
        same = pytree.treespec_loads(pytree.treespec_dumps(spec)) == spec
    except (NotImplementedError, TypeError, ValueError):
        same = False
    if not same:
        raise ArrayError(
            f"a batch is {_words(spec)}, which other ranks cannot be told about; let the loader's "
            "collate_fn give tuples, lists, and dicts with text as keys"
        )
    return Packing(spec, [Leaf(t.dtype, _tail(t), len(t) if t.dim() else 1) for t in tensors])


def dump(packing: Packing | None, batch_size: int) -> bytes:
    """`packing` as JSON, for `merge`. batch_size: rows that each leaf gets room for at least."""
    told: dict[str, object] = {"batch_size": batch_size}
    if packing is not None:
        told["spec"] = pytree.treespec_dumps(packing.spec)
        told["leaves"] = [
            [str(leaf.dtype).removeprefix("torch."), leaf.shape, leaf.rows]
            for leaf in packing.leaves
        ]
    return json.dumps(told).encode()


def load(blob: bytes) -> Packing | None:
    """The packing that `merge` wrote; None where no rank has a batch."""
    told = json.loads(blob)
    if told is None:
        return None
    return Packing(
        pytree.treespec_loads(told["spec"]),
        [
            Leaf(getattr(torch, dtype), None if shape is None else tuple(shape), rows)
            for dtype, shape, rows in told["leaves"]
        ],
    )


def merge(blobs: Sequence[bytes]) -> bytes:
    """The packing of the first rank that has a batch, with room for the largest of any rank.

    Ranks that differ in more than rows are for `Group.agree` to find.
    """
    told = [json.loads(blob) for blob in blobs]
    whole = [each for each in told if "spec" in each]
    if not whole:
        return NOT_YET
    least = max(each["batch_size"] for each in told)
    for index, leaf in enumerate(whole[0]["leaves"]):
        rows = [each["leaves"][index][2] for each in whole if index < len(each["leaves"])]
        leaf[2] = max(least, *rows, 0)
    return json.dumps(whole[0]).encode()


def _words(spec: pytree.TreeSpec) -> str:
    return " ".join(str(spec).split())


class Payload:
    """Registered memory of one batch, and the views of its parts."""

    def __init__(self, group: Group, packing: Packing) -> None:
        self.packing = packing
        region = group.allocate(packing.nbytes)
        array = region.view(np.uint8, packing.nbytes)
        self.buffer = Buffer.of(array, region)
        self.words = region.view(np.int64, packing.words)
        raw = torch.from_numpy(array)
        self.views = [
            raw[offset : offset + leaf.nbytes].view(leaf.dtype).view(leaf.full)
            for leaf, offset in zip(packing.leaves, packing.offsets, strict=True)
        ]

    def write(self, batch: Any) -> None:
        """Put `batch` (or NOTHING) in; `ArrayError` and nothing is changed if it does not fit."""
        tensors = [] if batch is NOTHING else self.packing.check(batch)
        self.words[0] = batch is not NOTHING
        for index, (tensor, view) in enumerate(zip(tensors, self.views, strict=False)):
            part = view
            if tensor.dim():
                self.words[1 + index] = len(tensor)
                part = view[: len(tensor)]
            part.copy_(tensor.detach())

    def read(self) -> Any:
        """The batch (or NOTHING), in memory of its own."""
        if not self.words[0]:
            return NOTHING
        leaves = [
            (view[: int(rows)] if view.dim() else view).clone()
            for view, rows in zip(self.views, self.words[1:], strict=True)
        ]
        return pytree.tree_unflatten(leaves, self.packing.spec)
