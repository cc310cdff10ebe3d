"""Two engines in one process, whose rounds are of memory on a fake device: for tests, in turns."""

import os
from copy import copy
from typing import Any

import numpy as np

import engine_pair as engines
import fake_device as fake
from ucxgossip import jit
from ucxgossip.engine import device_rounds as d
from ucxgossip.engine import drive
from ucxgossip.engine import words as w

CHUNK = engines.TUNING.chunk


class DevicePair:
    """The two ranks of `engine_pair.Pair`; those in `on` exchange memory of a fake device."""

    def __init__(
        self, pair: Any, on: tuple[int, ...], pace: int, seed: int = 0, direct: bool = False
    ) -> None:
        self.pair, self.on = pair, on
        self.device = fake.FakeDevice(seed, pace)
        self.stagings = {
            rank: pair.engines[rank].equip(pair.boxes[rank], self.device) for rank in on
        }

        if direct:
            for rank in on:
                assert self.stagings[rank].expose()
            for rank in on:
                for other in on:
                    if other != rank:
                        way = self.stagings[other]._slots_there.address
                        self.stagings[rank].take_way(
                            other, self.device.map(f"{os.getpid()} {way}".encode())
                        )

    def another(self, nbytes: int) -> "DevicePair":
        """One mailbox more for each of the same engines, on the same device."""
        layout = engines.Layout(nbytes, 2, CHUNK)
        boxes = [engines.Mailbox(engine.context, layout) for engine in self.pair.engines]
        for engine, box in zip(self.pair.engines, boxes, strict=True):
            engine.open(box)
        for rank, engine in enumerate(self.pair.engines):
            address, packed = engines.parse_description(
                boxes[1 - rank].describe(), layout, 1 - rank
            )
            key = engines.RemoteKey(engine.endpoints[1 - rank], packed)
            boxes[rank].set_peer(1 - rank, key, address)
        found = copy(self)
        found.pair = engines.Pair(self.pair.engines, boxes)
        found.stagings = {r: self.pair.engines[r].equip(boxes[r], self.device) for r in self.on}
        return found

    def memory(self, values: np.ndarray) -> Any:
        """`values` on the device; the array views it."""
        memory = self.device.allocate(values.nbytes)
        memory.view(values.dtype, len(values))[:] = values
        return memory

    def post(self, rank: int, memory: Any, dtype: Any = np.float32, **changes: Any) -> None:
        """A round in place on `memory`, whose source event is recorded now."""
        if rank in self.on:
            self.stagings[rank].ready()
        other = 1 - rank
        what = {
            **{"source": memory.address, "target": memory.address, "nbytes": memory.nbytes},
            **{"to": other, "sender": other, "next_writer": other, "whole": 1},
            "operation": w.MIX_FLOAT64 if dtype == np.float64 else w.MIX_FLOAT32,
        }
        post = engines.Post(**{**what, **changes})
        self.pair.engines[rank].post(self.pair.boxes[rank], post)

    def word(self, rank: int, index: int) -> int:
        return int(self.stagings[rank].words[index])

    def step(self, rank: int, passes: int = 30) -> None:
        """Let one rank drive; with pace 0 the device stands still."""
        for _ in range(passes):
            drive.drive_once(self.pair.engines[rank].words)

    def tick_out(self, *streams: int) -> None:
        """Let everything happen that these streams hold."""
        while self.device.tick(*streams):
            pass

    def came(self, *ranks: int) -> bool:
        """Whether the last chunk of the first round is signalled to each of `ranks`."""
        rows = [self.pair.engines[r].table[self.pair.boxes[r].index] for r in ranks]
        return all(jit.view_words(row[w.SIGNALS], row[w.CHUNKS])[-1] != 0 for row in rows)

    def launched(self, rank: int) -> bool:
        return self.word(rank, d.PHASE) >= d.LAUNCHED


def values_of(count: int, seed: int, dtype: Any = np.float32) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(count).astype(dtype) for _ in range(2)]


def mean(mine: np.ndarray, other: np.ndarray, alpha: float = 0.5) -> np.ndarray:
    return mine + mine.dtype.type(alpha) * (other - mine)


def calls(device: fake.FakeDevice) -> dict[str, int]:
    """How often each function of the driver was called that enqueues something."""
    kinds = ("copy", "kernel 0", "kernel 1", "kernel 2", "event")
    return {kind: sum(what.startswith(kind) for what in device.log) for kind in kinds}
