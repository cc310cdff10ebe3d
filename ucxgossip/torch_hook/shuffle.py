"""The ring shuffle of samples: training on other ranks' batches while nothing is lost or doubled.

Gossip averages slowly where each rank sees only its own shard. In step b of epoch e every rank
loads a batch of its own, puts it d = (e + b) mod p places on around the ring of the p ranks, and
trains on what comes from d places back; where d is 0 the batch stays. So a rank sees batches of
all ranks within p steps, however skewed the shards are, and batch b of a loader that does not
shuffle is elsewhere in each of p epochs. Each step is a permutation of the ranks: over an epoch,
what all ranks yield is exactly what all loaders gave, once each.

Batch b + 1 is loaded and posted before batch b is yielded, and travels under its forward and
backward. There is a payload for each of the two, whose sender fills one while the other is read;
credits go out as a rank posts, a step before the batch is wanted, so the mailbox has one slot.

Ranks stay in lockstep whatever their loaders hold: a rank that has run out sends "no batch", and
one that gets none calls `idle`. How many steps an epoch has is agreed at its start from len() of
all loaders. Where one has no len(), the ranks ask each other every `WINDOW` steps, by one small
exact average, whether anyone still has a batch; the last window is gone through to its end, with
up to ``WINDOW - 1`` steps in which all are idle.

Rejected: keeping what came in as the next epoch's shard and a fixed neighbour, as the code of
GossipGraD's authors does (arXiv 1803.05880): it needs a whole shard of memory, works with no
loader that reads or augments as it goes, and mixes whole shards only. Sending each sample to a
rank drawn for it: uneven counts, p small puts a step. A collective in each step to learn when all
have run out: ranks would wait for the slowest.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils import _pytree as pytree

from ucxgossip.errors import ArgumentError, ArrayError, ClosedError, MismatchError
from ucxgossip.group import Buffer, Group
from ucxgossip.mailbox import Mailbox
from ucxgossip.schedule import GlobalAverage, Round

WINDOW = 8
"""Steps between two questions whether anyone has a batch left, where a loader has no len()."""

ALIGNMENT = 64
"""Bytes to which each tensor is aligned in a payload."""

UNKNOWN = -1
"""The length of a loader without len()."""


class _Nothing:
    """No batch: the loader has run out, or the sender's had."""


NOTHING = _Nothing()


def _align(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


# --- what a batch is -----------------------------------------------------------------------------


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
    if "spec" not in told:
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
        return b"{}"
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


# --- whose batches -------------------------------------------------------------------------------


class Ring:
    """What carries the batches of one packing. Made, and its rounds posted, by all ranks."""

    def __init__(self, group: Group, packing: Packing) -> None:
        self.group, self.packing = group, packing
        self.sent = [Payload(group, packing) for _ in range(2)]
        self.came = Payload(group, packing)
        self.mailbox = group.mailbox(packing.nbytes, depth=1)
        self.under_way = False
        # Now, and not in the first steps: a rank that has left by then cannot be connected to,
        # and what UCX says of it is not why it left.
        for rank in range(group.size):
            if rank != group.rank:
                group.reach(rank, self.mailbox)
        group.agree("ring", {})

    def prepare(self, step: int, distance: int, batch: Any) -> None:
        """Copy `batch` (or NOTHING) to where it is sent from; `ArrayError` if it does not fit."""
        if distance:
            self.sent[step % 2].write(batch)
        elif batch is not NOTHING:
            self.packing.check(batch)

    def post(self, step: int, distance: int) -> None:
        """Put what was prepared `distance` places on."""
        if distance:
            rank, size = self.group.rank, self.group.size
            source, target = self.sent[step % 2].buffer, self.came.buffer
            around = Round((rank + distance) % size, (rank - distance) % size)
            self.group.post(self.mailbox, source, target, around, mix=False)
            self.under_way = True

    def take(self, distance: int, own: Any) -> Any:
        """Wait for what comes from `distance` places back: a batch or NOTHING."""
        if not distance:
            return own
        self.drop()
        return self.came.read()

    def drop(self) -> None:
        """Wait for the round under way, if there is one that still moves."""
        if self.under_way and not self.group.failed:
            self.under_way = False
            self.group.wait(self.mailbox)


class Source:
    """One epoch of this rank's loader. length: what len(loader) said, or UNKNOWN."""

    def __init__(self, loader: Iterable[Any], length: int) -> None:
        self._batches: Iterator[Any] | None = iter(loader)
        self._length, self._count = length, 0

    def next(self) -> Any:
        """The next batch; NOTHING from the end on."""
        batch = NOTHING if self._batches is None else next(self._batches, NOTHING)
        if batch is NOTHING:
            self._batches = None
        elif self._count == self._length:
            raise ArgumentError(
                f"len(loader) is {self._length}, but the loader gives more batches than that; the "
                "ranks agreed on the number of steps by it. Correct the loader's __len__, or take "
                "it away"
            )
        self._count += 1
        return batch


def _length(loader: Iterable[Any]) -> int:
    try:
        return len(loader)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):  # what torch's own loaders and samplers raise
        return UNKNOWN


class Shuffled:
    """The batches of all ranks' loaders, around the ring. An iteration is an epoch; collective.

    loader: an iterable of batches that can be gone through again: a DataLoader, a list. Batches
    are CPU tensors in any nesting of tuples, lists and dicts, alike on all ranks but for dim 0.
    idle: called for each step in which this rank gets no batch.

    All ranks iterate together, and leave early (``break``) after the same batch: a rank that goes
    on alone ends in `ExchangeTimeoutError`. An exception of the loader propagates, a batch early.
    Raises `ArrayError` for a batch that cannot travel, `MismatchError` where ranks differ,
    `ArgumentError` for a loader of more batches than it said. With one rank the loader's batches
    are passed through as they are.
    """

    def __init__(self, group: Group, loader: Iterable[Any], idle: Callable[[], None]) -> None:
        if isinstance(loader, Iterator):
            raise ArgumentError(
                f"the loader is a {type(loader).__name__}, which ends after one epoch; pass the "
                "loader itself, not iter(loader)"
            )
        if not isinstance(loader, Iterable):
            raise ArgumentError(
                f"the loader is a {type(loader).__name__}, not an iterable of batches; pass a "
                "torch.utils.data.DataLoader or a list of batches"
            )
        self.group, self.loader, self.idle = group, loader, idle
        self._epoch = 0
        self._turn = 0  # of the iteration that may go on
        self._meetings = 0
        self._lengths: list[int] | None = None
        self._numbers: Mailbox | None = None
        self._ring: Ring | None = None

    # --- where in the training -----------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """The epoch under way, or else the coming one; set it when a training is resumed.

        It turns the ring, so it must be the same on all ranks (`MismatchError`). It is counted up
        when an iteration ends, however it ends.
        """
        return self._epoch

    @epoch.setter
    def epoch(self, value: int) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ArgumentError(f"epoch is {value!r}; must be a whole number from 0 on")
        self._epoch = value

    def state_dict(self) -> dict[str, int]:
        """The epoch; one that was under way starts over when it is loaded."""
        return {"epoch": self._epoch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        if "epoch" not in state:
            raise ArgumentError(f"the state has {sorted(state)}; it must have 'epoch'")
        self.epoch = state["epoch"]

    def __len__(self) -> int:
        """How many batches this rank gets in `epoch`, by the lengths that were agreed on last.

        Ranks may get different numbers. `TypeError` before the first iteration, since asking the
        others here would hang where only some ask, and where any rank's loader has no len().
        """
        if self.group.size == 1:
            return len(self.loader)  # type: ignore[arg-type]
        if self._lengths is None:
            raise TypeError(
                "how many batches come in is not known before the first iteration, in which all "
                "ranks agree on it; len(loader) is how many go out"
            )
        if UNKNOWN in self._lengths:
            raise TypeError(
                f"the loader of rank {self._lengths.index(UNKNOWN)} has no len(), so it is not "
                "known how many batches come in"
            )
        rank, size = self.group.rank, self.group.size
        return sum(
            len(range((rank - sender - self._epoch) % size, length, size))
            for sender, length in enumerate(self._lengths)
        )

    # --- an epoch ------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Any]:
        return self._iterate()

    def _iterate(self) -> Iterator[Any]:
        self.close()
        turn, epoch = self._turn, self._epoch
        try:
            for batch in iter(self.loader) if self.group.size == 1 else self._together(epoch):
                yield batch
                if self._turn != turn:
                    raise ClosedError(
                        "this iteration has ended: another one was started, or close() called"
                    )
        finally:
            if self._turn == turn:
                if self._epoch == epoch:
                    self._epoch += 1
                self.close()

    def close(self) -> None:
        """End an iteration that is under way: wait for the batch on its way, and drop it.

        A loop does so as it ends or is left; call it for an iterator that is kept. Collective.
        """
        self._turn += 1
        if self._ring is not None:
            with suppress(ClosedError):  # nothing moves in a closed group
                self._ring.drop()

    def _together(self, epoch: int) -> Iterator[Any]:
        length = _length(self.loader)
        source = Source(self.loader, length)
        batch = source.next()
        self._meet(length, epoch)
        ring = self._ring or self._agree(batch)
        if ring is None:
            return
        step = 0
        distance = epoch % self.group.size
        ring.prepare(step, distance, batch)
        going = self._going(step, batch)
        if going:
            ring.post(step, distance)
        while going:
            following, turned = source.next(), (distance + 1) % self.group.size
            ring.prepare(step + 1, turned, following)
            received = ring.take(distance, batch)
            going = self._going(step + 1, following)
            if going:
                ring.post(step + 1, turned)
            if received is NOTHING:
                self.idle()
            else:
                yield received
            step, distance, batch = step + 1, turned, following

    def _going(self, step: int, batch: Any) -> bool:
        """Whether the epoch has this step, for which this rank has `batch` (or NOTHING)."""
        assert self._lengths is not None
        if UNKNOWN not in self._lengths:
            return step < max(self._lengths)
        return step % WINDOW != 0 or bool(self._ask(batch is not NOTHING).any())

    # --- agreement -----------------------------------------------------------------------------

    def _ask(self, *numbers: int) -> NDArray[np.int64]:
        """Every rank's numbers, a row for each rank; exact up to 2**48."""
        size = self.group.size
        if self._numbers is None:
            self._numbers = self.group.mailbox(16 * size)
        rows = np.zeros((size, len(numbers)))
        rows[self.group.rank] = numbers
        self.group.run(self._numbers, Buffer.of(rows.reshape(-1)), GlobalAverage(size))
        return np.rint(rows * size).astype(np.int64)

    def _meet(self, length: int, epoch: int) -> None:
        """Learn all ranks' lengths, and that all are in the same epoch."""
        lengths, epochs = self._ask(length, epoch).T.tolist()
        for rank, other in enumerate(epochs):
            if other != epochs[0]:
                raise MismatchError(
                    f"shuffled: epoch: rank 0 has {epochs[0]}, rank {rank} has {other}"
                )
        self._lengths = lengths

    def _agree(self, batch: Any) -> Ring | None:
        """The ring for batches like `batch` (or NOTHING); None if no rank has one."""
        assert self._numbers is not None
        packing = None if batch is NOTHING else describe(batch)
        size = getattr(self.loader, "batch_size", None)
        self._meetings += 1
        merged = self.group.share(
            f"shuffled {self._numbers.index} {self._meetings}",
            dump(packing, size if isinstance(size, int) else 0),
            merge,
        )
        common = load(merged)
        if common is not None:
            self.group.agree("shuffled", (packing or common).facts())
            self._ring = Ring(self.group, common)
        return self._ring
