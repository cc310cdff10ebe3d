"""The engine's constants by transport, and what a user says of them.

Rejected: one class with defaults of its own for both (whoever named the number of endpoints got the
chunks, windows and rings of no transport in particular with it).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from ucxgossip.engine import Constants
from ucxgossip.ucp import lib

_64K = 1 << 16

CONSTANTS: dict[str, Constants] = {
    "tcp": Constants(chunk=_64K, window=16, eager=_64K, ring=128, answers=True, device_chunk=_64K),
    "shm": Constants(chunk=_64K, window=16, ring=16),
    "auto": Constants(chunk=_64K, window=16, eager=_64K, ring=128, answers=True),
    "verbs": Constants(chunk=1 << 18, window=16, ring=32),
}
"""eager: over TCP a message costs half of a put, its signal, its acknowledgement and a credit, so
that all chunks are messages there. answers: or a rank would begin its next round while the last
one's bytes still wait in its socket, and the two share the link. chunk: all ranks of a job must
have the same, also one that comes back by another launcher, so it does not hang on the hosts.
device_chunk: larger, since a device makes some calls of its driver a chunk; over TCP as for CPUs,
where larger ones are puts. With an RDMA device "auto" puts chunks of 64 KiB, which is not measured.
ring: over shared memory 1 MiB, as large as a core's L2 cache; over a network 8 MiB, since what is
under way must fit in (docs/performance.md). verbs: not measured."""

_ONE_HOST = {
    "tcp": replace(CONSTANTS["tcp"], ring=32, answers=False),
    "auto": replace(CONSTANTS["auto"], ring=CONSTANTS["shm"].ring, answers=False),
}
"""Where all ranks are on one host: nothing waits in a socket for long. "auto" is shared memory."""


def usual(transport: str, one_host: bool = False) -> Constants:
    """The constants of a transport, by whether all ranks are on one host.

    RDMA devices: small messages only, where one may carry them (not measured).
    """
    found = CONSTANTS[transport]
    if one_host:
        found = _ONE_HOST.get(transport, found)
    if transport == "auto" and lib.rdma_devices():
        found = replace(found, eager=4096)
    return found


@dataclass(frozen=True)
class Tuning:
    """Constants of the engine, for `join`; what is left out is as usual for the transport.

    eager: largest chunk (bytes) that travels over a network in one message with its signal, and is
    not put; at most `chunk`, and with a smaller `chunk` alone as large as that. spins, yields: idle
    passes before yielding, and (at most) before sleeping. chunk (bytes, a multiple of 8) and window
    (chunks, of which 64 count at most): what is sent, signalled and mixed at a time, and how many
    may be in flight. endpoints: connections to other ranks that are kept; beyond it the one that
    was not used for longest is closed. ring: chunks that a mailbox for large blocking rounds holds
    (`Group.mailbox`); 0: whole payloads. answers: whether a round of several messages ends only
    once its target has said that it has them all, as a round of puts does. device_chunk: the
    chunk (bytes, a multiple of 8; what is larger than `eager` is put) of models of which any rank's
    copy is on a device; as `chunk` where that alone is given.

    `ArgumentError` for what is no such number. ``ucxgossip doctor`` shows what is usual, and
    docs/performance.md what was measured.
    """

    eager: int | None = None
    spins: int | None = None
    yields: int | None = None
    chunk: int | None = None
    window: int | None = None
    endpoints: int | None = None
    ring: int | None = None
    answers: bool | None = None
    device_chunk: int | None = None

    def __post_init__(self) -> None:
        largest = max(each.chunk for each in CONSTANTS.values())
        self._over(replace(CONSTANTS["auto"], chunk=largest))

    def over(self, transport: str, one_host: bool = False) -> Constants:
        """These, and the usual ones of `transport` for the others."""
        return self._over(usual(transport, one_host))

    def _over(self, others: Constants) -> Constants:
        named = {name: value for name, value in asdict(self).items() if value is not None}
        if self.eager is None and isinstance(self.chunk, int):
            named["eager"] = min(others.eager, max(0, self.chunk))
        if self.device_chunk is None and self.chunk is not None:
            named["device_chunk"] = self.chunk
        return replace(others, **named)
