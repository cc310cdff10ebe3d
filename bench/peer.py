"""What every method of `bench exchange` is: ours, its peers and the floors under them.

All of one size work on the same arrays, in turn. So memory is that of one method (a large model on
eight ranks would not fit otherwise), and none has the luck of better placed memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ucxgossip.errors import ArgumentError

Array = NDArray[np.float32]


class Arrays:
    """The arrays of one rank, and what several methods receive into."""

    def __init__(self, rank: int, size: int, arrays: Sequence[Array]) -> None:
        self.rank, self.size, self.arrays = rank, size, tuple(arrays)

    @cached_property
    def inbox(self) -> Array:
        """Room for the largest array; made when first used."""
        inbox = np.empty(max(map(len, self.arrays)), np.float32)
        inbox.fill(0)  # its pages exist before anything is timed
        return inbox


class Method(Protocol):
    """One way to do a round."""

    def once(self) -> object:
        """Collective. Do one whole round: every array becomes a mean, in place."""

    def partner(self) -> int | None:
        """Whose values the next round averages with this rank's; None for those of all."""

    def close(self) -> None:
        """Collective. Release what was made for it."""


class Gossip:
    """A method that goes by the dissemination schedule.

    partners: for each round of the period, the rank to send to and the rank to receive from.
    """

    def __init__(self, data: Arrays) -> None:
        rank, size = data.rank, data.size
        if size < 2:
            raise ArgumentError("gossip needs at least 2 ranks")
        distances = [1 << step for step in range((size - 1).bit_length())]
        self.partners = [((rank + each) % size, (rank - each) % size) for each in distances]
        self._step = 0

    def turn(self) -> int:
        """Number of this round within the period; the next call is the next round's."""
        step = self._step
        self._step = (step + 1) % len(self.partners)
        return step

    def partner(self) -> int | None:
        """Whose values the next round averages with this rank's."""
        return self.partners[self._step][1]

    def close(self) -> None:
        """Nothing is held."""


class Global:
    """A method that averages over all ranks."""

    def partner(self) -> int | None:
        """None: all of them."""
        return None

    def close(self) -> None:
        """Nothing is held."""
