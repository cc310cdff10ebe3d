"""Engines of several ranks in one process, connected all to all, with one mailbox each.

Nobody drives them but the caller, so every step of a round is under its control: for `soak`, which
steps them at random, and for tests that try orders of steps one by one. They speak the real
transports; only the rendezvous is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Self

from ucxgossip.engine import Constants, Engine
from ucxgossip.mailbox import Layout, Mailbox, parse_description
from ucxgossip.ucp import Context, RemoteKey


class Engines:
    """Rank r's engine is ``engines[r]``, its mailbox ``boxes[r]``. Close it, or use it in `with`.

    nbytes, depth, ring: of each mailbox. settings: of UCX; the loopback device by default.
    """

    def __init__(
        self,
        transport: str,
        ranks: int,
        nbytes: int,
        depth: int,
        tuning: Constants,
        settings: Mapping[str, str] | None = None,
        ring: bool = False,
    ) -> None:
        chosen = {"NET_DEVICES": "lo", **(settings or {})}
        self.engines: list[Engine] = []
        self.boxes: list[Mailbox] = []
        layout = Layout(nbytes, depth, tuning.chunk, ranks=ranks, ring=ring)
        try:
            for rank in range(ranks):
                context = Context(transport, chosen, estimated_peers=ranks)
                try:
                    engine = Engine(context, rank, ranks, tuning, transport != "tcp", 1)
                except BaseException:
                    context.close()
                    raise
                self.engines.append(engine)
                self.boxes.append(Mailbox(context, layout))
                engine.open(self.boxes[rank])
            for rank in range(ranks):
                for other in range(ranks):
                    if other != rank:
                        self._connect(rank, other)
        except BaseException:
            self.close()
            raise

    def _connect(self, rank: int, other: int) -> None:
        endpoint = self.engines[rank].connect(other, self.engines[other].worker.address)
        layout = self.boxes[other].layout
        address, packed = parse_description(self.boxes[other].describe(), layout, other)
        self.boxes[rank].set_peer(other, RemoteKey(endpoint, packed), address)

    def intact(self) -> bool:
        """Whether every guard byte of every mailbox is as it was made."""
        return all(box.intact() for box in self.boxes)

    def close(self) -> None:
        """Release everything. Further calls do nothing."""
        for engine in self.engines:
            engine.close()
            engine.context.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
