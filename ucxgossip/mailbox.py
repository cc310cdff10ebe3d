"""Mailboxes: slots in registered memory into which one partner a round puts.

A mailbox is one stream of rounds, and so of chunks: chunk c of round n has the number
``n * chunks + c``, its *position*. The slots hold `places` chunks, and a position stands in place
``position % places``. Beside each place stands a signal word; the sender puts it after the chunk
(see docs/protocol.md for why it cannot arrive first), and its value names epoch and position, so
that a word left from an earlier chunk is never taken for this one's. A place is free for its next
writer once that writer holds the *credit* for it.

Mostly a slot holds a whole payload, and round n uses slot ``n % depth``: a partner that is ahead
can put the next round while this rank still mixes the last, or has not posted it yet. Memory is
`depth` times the payload, whatever the number of ranks. In a *ring* a slot holds one chunk, and a
round goes through fewer places than it has chunks: they stay in the cache, where whole slots are
written to memory and read again, but nobody gets further ahead than they reach. That is for rounds
which are waited for as soon as they are posted.

A credit is a number: chunks of positions below it may be put to the rank that gave it. Whoever has
mixed all chunks below n says n + places; credits are kept by rank, the largest counts. So one
credit serves for many chunks, and may ride on a message that goes to the same rank anyway.

Guard bytes stand between the slots; tests check that nothing ever writes there.

Rejected: one slot per partner (memory grows with the number of ranks); a get by the receiver
(two latencies, and the sender could not change its source while it is read).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ucxgossip import jit
from ucxgossip.errors import ArgumentError
from ucxgossip.schedule import Round
from ucxgossip.ucp.context import Context
from ucxgossip.ucp.endpoint import MAX_BLOB
from ucxgossip.ucp.memory import MemoryRegion, RemoteKey

ALIGNMENT = 64
_FORESEEN = 64
GUARD = 64
GUARD_BYTE = 0xA5
MAX_DEPTH = 1024
SIGNAL_RING = 64
MAX_POSITION = 1 << 47
WAYS = 4
_BLOB = struct.Struct("<QQ")


SMALL = 1 << 16
"""Payloads of up to this many bytes get more than two slots, so that credits can ride."""


def usual_depth(nbytes: int) -> int:
    """Slots of a mailbox for payloads of `nbytes`: 2, and for small ones up to 32 (1 MiB)."""
    return 2 if nbytes > SMALL else min(32, 16 * SMALL // nbytes)


@jit.njit
def signal_word(epoch: int, position: int) -> int:
    """The word that says "the chunk of this position is there"; never 0."""
    return (epoch << 48) | (position + 1)


def _align(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Layout:
    """Where the parts of a mailbox stand in its region; equal on all ranks.

    nbytes: largest payload of a round. depth: slots. chunk: bytes of payload that are put,
    signalled and mixed at a time. verify: a checksum travels with each chunk. ranks: of the job.
    ring: a slot holds one chunk, not a payload; there are fewer than a payload's chunks.
    """

    nbytes: int
    depth: int
    chunk: int
    verify: bool = False
    ranks: int = 2
    ring: bool = False

    def __post_init__(self) -> None:
        for name in ("nbytes", "depth", "chunk", "ranks"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ArgumentError(f"mailbox: {name} is {value!r}; must be a whole number from 1")
        if self.chunk % 8:
            raise ArgumentError(f"mailbox: chunk is {self.chunk}; must be a multiple of 8 bytes")
        if self.depth > MAX_DEPTH:
            raise ArgumentError(f"mailbox: depth is {self.depth}; at most {MAX_DEPTH}")
        if self.ring and self.depth >= self.chunks:
            raise ArgumentError(
                f"mailbox: a ring of {self.depth} chunks; must be fewer than the payload's "
                f"{self.chunks}"
            )

    @property
    def ahead(self) -> int:
        """How many rounds before it is wanted a credit goes out, if no message has taken it along.

        A quarter of the slots: the others are for those that ride. In a ring one round.
        """
        return 1 if self.ring else max(min(self.depth, 2), self.depth // 4)

    @property
    def chunks(self) -> int:
        """Chunks of the largest payload."""
        return -(-self.nbytes // self.chunk)

    @property
    def per_slot(self) -> int:
        """Chunks that a slot holds."""
        return 1 if self.ring else self.chunks

    @property
    def places(self) -> int:
        """Chunks that all slots hold."""
        return self.depth * self.per_slot

    @property
    def reach(self) -> int:
        """Rounds, the next one included, of which a credit may open chunks."""
        return -(-self.places // self.chunks)

    @property
    def rounds(self) -> int:
        """How many rounds there may ever be."""
        return MAX_POSITION // self.chunks

    @property
    def slot_bytes(self) -> int:
        """Bytes of payload in a slot."""
        return self.chunk if self.ring else self.nbytes

    @property
    def stride(self) -> int:
        """Bytes from one slot to the next, guard included."""
        return _align(self.slot_bytes) + GUARD

    @property
    def slots(self) -> int:
        """Offset of slot 0."""
        return GUARD

    @property
    def signals(self) -> int:
        """Offset of the signal words that others put, one a place."""
        return self.slots + self.depth * self.stride

    @property
    def outgoing(self) -> int:
        """Offset of the words that this rank puts as signals, chunks of them for each of
        SIGNAL_RING rounds.

        Nobody waits for a signal's own completion. A word stays until no rank can be so far
        behind that its put is still on the way.
        """
        return self.signals + _align(8 * self.places) + GUARD

    @property
    def credits(self) -> int:
        """Offset of the credits that others give, one word a rank."""
        return self.outgoing + _align(8 * SIGNAL_RING * self.chunks) + GUARD

    @property
    def doze(self) -> int:
        """Offset of the doze word, which tells others who store here that a bell is needed."""
        return self.credits + _align(8 * self.ranks) + GUARD

    @property
    def checks(self) -> int:
        """Offset of the checksums that others put, one a place; with `verify` only."""
        return self.doze + _align(8) + GUARD

    @property
    def out_checks(self) -> int:
        """Offset of the checksums that this rank puts, chunks of them for each of SIGNAL_RING
        rounds; they stay as long as the words at `outgoing` do.
        """
        return self.checks + _align(8 * self.places) + GUARD

    @property
    def total(self) -> int:
        """Bytes of the region."""
        if not self.verify:
            return self.checks
        return self.out_checks + _align(8 * SIGNAL_RING * self.chunks) + GUARD


class Mailbox:
    """One stream of rounds: a region laid out by `layout`, and where its twins stand elsewhere.

    `index` is its row in the engine's table, `round` the number of the next round, `base` that of
    the first since the last restart or change of members (a rank that has not come so far yet
    passes over the rounds before: `alone` says that it did with the last one). `ahead`: this
    rank's parts, by step, in rounds whose writer has its credit already. `credited`: by round, who
    may put it or has done so (kept where endpoints are closed again). `told`: the credits given,
    by rank. `ways`: what `engine.ways` keeps, by rank. `itinerary`: the next rounds, where they are
    known; `asked`: what for, the last time; `look_again`: the round from which on it is worth
    looking ahead again, `foreseen`: how many rounds then. `in_flight` keeps the memory of the last
    round alive, which a put or a mix may touch until the next one is posted. `staging`: where a
    payload of several arrays is brought together, once there was one.
    """

    def __init__(self, context: Context, layout: Layout) -> None:
        self.layout = layout
        self.region = MemoryRegion(context, nbytes=layout.total)
        self.told = np.zeros(layout.ranks, np.int64)
        self.ways = np.zeros((layout.ranks, WAYS), np.int64)
        self.peers = np.zeros((layout.ranks, 3), np.int64)
        self.keys: dict[int, RemoteKey] = {}
        self.index = -1
        self.number = np.zeros(1, np.int64)
        self.base = 0
        self.alone = False
        self.retired: list[MemoryRegion] = []
        self.staging: MemoryRegion | None = None
        self.credited: dict[int, int] = {}
        self.what = self.owner = ""  # what it carries, and for what model, for messages
        self.ahead: dict[int, Round] = {}
        self.itinerary: Any = None
        self.asked: tuple[object, ...] = ()
        self.look_again = 0
        self.foreseen = _FORESEEN
        self.in_flight: tuple[object, ...] = ()
        self._lay_out()

    @property
    def round(self) -> int:
        """The number of the next round."""
        return int(self.number[0])

    @round.setter
    def round(self, number: int) -> None:
        self.number[0] = number

    @property
    def credits(self) -> NDArray[np.int64]:
        """The credits that others gave, by rank: chunks below may be put to it."""
        if self.region.closed:
            return np.zeros(self.layout.ranks, np.int64)
        return self.region.view(np.int64, self.layout.ranks, self.layout.credits)

    def opened(self, rank: int, number: int) -> bool:
        """Whether `rank` has given the credit for all of round `number`."""
        return int(self.credits[rank]) >= (number + 1) * self.layout.chunks

    def _lay_out(self) -> None:
        for guard in self._guards():
            guard[:] = GUARD_BYTE

    def renew(self, elsewhere: bool) -> None:
        """Forget the twins, their credits and what they put; the endpoints are closed already.

        elsewhere: in a new region, because a rank that was taken for dead may still store into the
        old one. That one stays mapped, for views of it, until the next post.
        """
        self.keys.clear()
        self.peers[:] = 0
        self.told[:] = 0
        self.credited.clear()
        self.ahead.clear()
        if elsewhere:
            self.retired.append(self.region)
            self.region = MemoryRegion(self.region.context, nbytes=self.layout.total)
            self._lay_out()
        self.credits[:] = 0

    def drop_retired(self) -> None:
        """Release the regions that `renew` left; no view of them is in use any more."""
        while self.retired:
            self.retired.pop().close()

    def _guards(self) -> list[NDArray[np.uint8]]:
        """Every byte of the region that belongs to no slot and no word."""
        layout, parts = self.layout, []
        ends = [(layout.slots + i * layout.stride, layout.slot_bytes) for i in range(layout.depth)]
        ends.append((layout.signals, 8 * layout.places))
        ends.append((layout.outgoing, 8 * SIGNAL_RING * layout.chunks))
        ends.append((layout.credits, 8 * layout.ranks))
        ends.append((layout.doze, 8))
        if layout.verify:
            ends.append((layout.checks, 8 * layout.places))
            ends.append((layout.out_checks, 8 * SIGNAL_RING * layout.chunks))
        position = 0
        for start, length in ends:
            parts.append(self.region.bytes[position:start])
            position = start + length
        return [*parts, self.region.bytes[position:]]

    def intact(self) -> bool:
        """Whether every guard byte is as it was made."""
        return all(bool((guard == GUARD_BYTE).all()) for guard in self._guards())

    def slot(self, number: int, dtype: Any, count: int) -> NDArray[Any]:
        """What stands in the slot of round `number` (no ring's), as `count` elements of `dtype`."""
        offset = self.layout.slots + (number % self.layout.depth) * self.layout.stride
        return self.region.view(dtype, count, offset)

    def describe(self) -> bytes:
        """What another rank needs to put here: address, size and packed remote key."""
        return _BLOB.pack(self.region.address, self.layout.total) + self.region.pack()

    def set_peer(self, rank: int, key: RemoteKey, address: int) -> None:
        """Remember where the twin of this mailbox stands on `rank`, and if it can be stored to."""
        self.keys[rank] = key
        self.peers[rank] = (address, key.handle, key.pointer(address))

    def forget(self, rank: int) -> None:
        """Forget the twin on `rank`, before the endpoint to it is closed."""
        key = self.keys.pop(rank, None)
        if key is not None:
            key.close()
            self.peers[rank] = 0

    def close(self) -> None:
        """Release the region and the keys. Further calls do nothing."""
        for key in self.keys.values():
            key.close()
        self.keys.clear()
        self.peers[:] = 0
        self.drop_retired()
        if self.staging is not None:
            self.staging.close()
        self.region.close()


def parse_description(blob: bytes, layout: Layout, rank: int) -> tuple[int, bytes]:
    """Address and packed key out of what `rank` published; `ArgumentError` if it does not fit."""
    if not _BLOB.size < len(blob) <= _BLOB.size + MAX_BLOB:
        raise ArgumentError(
            f"rank {rank} published a mailbox of {len(blob)} bytes; must be {_BLOB.size + 1} to "
            f"{_BLOB.size + MAX_BLOB}"
        )
    address, total = _BLOB.unpack_from(blob)
    if total != layout.total:
        raise ArgumentError(
            f"rank {rank} has a mailbox of {total} bytes where this rank has {layout.total}"
        )
    if not 0 < address < (1 << 63) - total:  # addresses are words of int64
        raise ArgumentError(f"rank {rank} published a mailbox at address {address:#x}")
    return address, blob[_BLOB.size :]
