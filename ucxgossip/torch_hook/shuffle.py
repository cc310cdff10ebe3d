"""The ring shuffle of samples: training on other ranks' batches while nothing is lost or doubled.

Gossip averages slowly where each rank sees only its own shard. In step b of epoch e every rank
loads a batch of its own, puts it d = (e + b) mod p places on around the ring of the p ranks, and
trains on what comes from d places back; where d is 0 the batch stays. So a rank sees batches of
all ranks within p steps, however skewed the shards are, and batch b of a loader that does not
shuffle is elsewhere in each of p epochs. Each step is a permutation of the ranks: over an epoch,
what all ranks yield is exactly what all loaders gave, once each.

Batch b + 1 is loaded and posted before batch b is yielded, and travels under its forward and
backward. There are two payloads to send from, so that one can be filled while the other still
leaves; credits go out as a rank posts, a step before the batch is wanted, so the mailbox has one
slot.

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

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ucxgossip.errors import ArgumentError, ClosedError, ForkError, GossipError
from ucxgossip.group import Group
from ucxgossip.mixing import Collective
from ucxgossip.schedule import ALONE, Round
from ucxgossip.torch_hook.packing import NOTHING, Packing, Payload, describe, dump, load, merge

log = logging.getLogger("ucxgossip")

WINDOW = 8
"""Steps between two questions whether anyone has a batch left, where a loader has no len()."""

MEETING = "shuffled"
"""Where ranks meet between two epochs, and let others come in."""

UNKNOWN = -1
"""The length of a loader without len()."""


@dataclass(frozen=True)
class Turning:
    """A schedule: in step t everyone puts t places on around the ring; whole turns stay."""

    size: int

    @property
    def period(self) -> int:
        """One turn."""
        return self.size

    def round(self, rank: int, step: int) -> Round:
        """The part of `rank` in `step`."""
        distance = step % self.size
        if not distance:
            return ALONE
        return Round((rank + distance) % self.size, (rank - distance) % self.size)

    def resized(self, size: int) -> Turning:
        """The ring of `size` ranks."""
        return Turning(size)

    def describe(self) -> str:
        """``Turning(8)``."""
        return f"Turning({self.size})"


class Ring:
    """What carries the batches of one packing. Made, and its rounds posted, by all ranks."""

    def __init__(self, group: Group, packing: Packing, label: str = "loader") -> None:
        self.group, self.packing = group, packing
        self.sent = [Payload(group, packing) for _ in range(2)]
        self.came = Payload(group, packing)
        self.mailbox = group.mailbox(packing.nbytes, depth=1)
        self.mailbox.what = "samples"
        self.schedule = Turning(group.size)
        self.under_way, self.stays = False, False
        # Now, and not in the first steps: a rank that has left by then cannot be connected to,
        # and what UCX says of it is not why it left.
        if len(group.members) <= group.tuning.endpoints:
            for rank in group.members:
                if rank != group.rank:
                    group.reach(rank, self.mailbox)
        group.agree("ring", {}, once=label)

    def prepare(self, step: int, batch: Any) -> None:
        """Copy `batch` (or NOTHING) to where it is sent from; `ArrayError` if it does not fit."""
        self.sent[step % 2].write(batch)

    def post(self, step: int, turn: int) -> None:
        """Put what was prepared for `step` on its way, the ring turned by `turn` places."""
        source, target = self.sent[step % 2].buffer, self.came.buffer
        around = self.group.post_scheduled(
            self.mailbox, source, target, self.schedule, turn, how="copy", foresee=False
        )
        # None: the others have passed this round already, so that nobody gets what it holds.
        self.stays = around is None or (around.to is None and around.sender is None)
        self.under_way = True

    def take(self, own: Any) -> Any:
        """Wait for what comes: a batch or NOTHING; `own` where the ring is turned to itself.

        Where a change of members broke the round off, `own` if nobody can have it, and else
        NOTHING, though it may be lost. Raises what `Group.wait` does, also where the group failed
        while the loader was asked: an epoch never ends short.
        """
        whole = self._wait()
        if self.stays or not (whole or self.group.engine.has_put(self.mailbox)):
            return own
        if whole:
            return self.came.read()
        log.warning(
            "rank %d: a batch was on its way while the members changed, and may be lost",
            self.group.rank,
        )
        return NOTHING

    def _wait(self) -> bool:
        try:
            return self.group.wait(self.mailbox)
        finally:  # interrupted, it is under way still
            self.under_way = self.group.engine.active(self.mailbox)

    def drop(self) -> None:
        """Wait for the round under way, if there is one that still moves."""
        if self.under_way and not self.group.failed:
            self._wait()


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
        self._lengths: list[int] | None = None
        self._label = group.label("loader")
        self._collective = Collective(group)
        self._kind = "epoch-" + self._label.replace(" ", "-")
        group.answer(self._kind, lambda _: str(self._epoch).encode())
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

    def catch_up(self) -> None:
        """Take the epoch from the others, who are between two: this rank has just come in."""
        for rank in self.group.others:  # some may have come in with this one, and know no more
            found = self.group.fetch_from(rank, self._kind)
            self._epoch = self._epoch if found is None else max(self._epoch, int(found))

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
        members = self.group.members
        place, size = members.index(self.group.rank), len(members)
        return sum(
            len(range((place - sender - self._epoch) % size, self._lengths[rank], size))
            for sender, rank in enumerate(members)
        )

    # --- an epoch ------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Any]:
        return self._iterate()

    def _iterate(self) -> Iterator[Any]:
        self.close()
        turn, epoch, left = self._turn, self._epoch, False
        try:
            for batch in iter(self.loader) if self.group.size == 1 else self._together(epoch):
                yield batch
                if self._turn != turn:
                    raise ClosedError(
                        "this iteration has ended: another one was started, or close() called"
                    )
        except GeneratorExit:  # what is raised from here on nobody can catch
            left = True
            raise
        finally:
            if self._turn == turn:
                if self._epoch == epoch:
                    self._epoch += 1
                try:
                    self.close()
                except GossipError:
                    if not left:
                        raise
                    self.group.not_told()

    def close(self) -> None:
        """End an iteration that is under way: wait for the batch on its way, and drop it.

        A loop does so as it ends or is left; call it for an iterator that is kept. Collective.
        Where the job ended meanwhile, a loop that is left says nothing; the next call does.
        """
        self._turn += 1
        if self._ring is not None:
            with suppress(ClosedError, ForkError):  # nothing moves in a closed group
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
        ring.prepare(step, batch)
        going = self._going(step, batch)
        if going:
            ring.post(step, epoch)
        while going:
            following = source.next()
            ring.prepare(step + 1, following)
            received = ring.take(batch)
            going = self._going(step + 1, following)
            if going:
                ring.post(step + 1, epoch + step + 1)
            if received is NOTHING:
                self.idle()
            else:
                yield received
            step, batch = step + 1, following

    def _going(self, step: int, batch: Any) -> bool:
        """Whether the epoch has this step, for which this rank has `batch` (or NOTHING)."""
        assert self._lengths is not None
        if UNKNOWN not in self._lengths:
            return step < max(self._lengths)
        return step % WINDOW != 0 or bool(self._ask(int(batch is not NOTHING)).any())

    # --- agreement -----------------------------------------------------------------------------

    def _ask(self, *numbers: int) -> NDArray[np.int64]:
        """Every rank's numbers, a row for each rank; zeros for those that were lost."""
        with self.group.naming(self._label):
            return self._collective.table(np.array(numbers, np.int64))

    def _meet(self, length: int, epoch: int) -> None:
        """Learn all ranks' lengths, and that all are in the same epoch."""
        self.group.let_in(MEETING)
        self.group.agree(MEETING, {"epoch": epoch})
        self._lengths = self._ask(length)[:, 0].tolist()

    def _agree(self, batch: Any) -> Ring | None:
        """The ring for batches like `batch` (or NOTHING); None if no rank has one."""
        packing = None if batch is NOTHING else describe(batch)
        size = getattr(self.loader, "batch_size", None)
        merged = self.group.share(
            "batches of shuffled",
            dump(packing, size if isinstance(size, int) else 0),
            merge,
            once=f"{self._label}, packing",
        )
        common = load(merged)
        if common is not None:
            facts = (packing or common).facts()
            self.group.agree("batches of shuffled", facts, once=f"{self._label}, batches")
            with self.group.naming(self._label):
                self._ring = Ring(self.group, common, self._label)
        return self._ring
