"""Our round for arrays on a device, as a method of `bench exchange`. Untested on hardware.

Peers are left out: gloo's and Open MPI's CUDA paths depend on how they were built, and NCCL does
not take two ranks on one device.
"""

from __future__ import annotations

import os

import numpy as np
import torch

from ucxgossip.bench.peer import Arrays
from ucxgossip.device import Device
from ucxgossip.errors import BenchError
from ucxgossip.group import Group
from ucxgossip.mixing import DeviceArray, DeviceInPlace, Meter
from ucxgossip.schedule import Dissemination, Rotated
from ucxgossip.torch_hook.device import open_cuda


class OursOnDevice:
    """Our round: all arrays are posted, then waited for until the device is done with them.

    data: the host's arrays, which `Checked` fills and reads; each has a twin on `device`.
    """

    name = "ours"

    def __init__(self, group: Group, data: Arrays, device: Device) -> None:
        """Collective. Open a stream for each array."""
        self._group, self._data = group, data
        self._schedule = Rotated(Dissemination(group.size), seed=0)
        self._meter = Meter()
        self._twins = [
            DeviceArray(device, device.allocate(each.nbytes), np.dtype(np.float32), len(each))
            for each in data.arrays
        ]
        name = group.label("bench exchange")
        group.suit_devices(name, True)
        with group.naming(name):
            self._streams = [
                DeviceInPlace(group, twin, self._schedule, self._meter) for twin in self._twins
            ]
        group.agree("bench exchange", {})  # all are equipped
        for stream in self._streams:
            stream.begin()

    def once(self) -> None:
        """One whole round, to the end of the device's work."""
        for stream in self._streams:
            stream.post()
        for stream in self._streams:
            stream.finish()
        if self._meter.broken or self._meter.quarantine.counts:
            raise BenchError("an exchange on the device did not end whole")

    def partner(self) -> int | None:
        """Whose values the next round averages with this rank's."""
        return self._schedule.round(self._group.rank, self._streams[0].position).sender

    def load(self) -> None:
        """Copy the host's arrays to the device."""
        for twin, array in zip(self._twins, self._data.arrays, strict=True):
            twin.write(array)

    def fetch(self) -> None:
        """Copy the device's arrays to the host's."""
        for twin, array in zip(self._twins, self._data.arrays, strict=True):
            array[:] = twin.read()

    def close(self) -> None:
        """Nothing: the group keeps its mailboxes."""


class Checked:
    """`OursOnDevice` as a round on the host's arrays, for the check before anything is timed."""

    def __init__(self, ours: OursOnDevice) -> None:
        self._ours = ours

    def once(self) -> None:
        """To the device, one round, and back."""
        self._ours.load()
        self._ours.once()
        self._ours.fetch()

    def partner(self) -> int | None:
        """Whose values the next round averages with this rank's."""
        return self._ours.partner()

    def close(self) -> None:
        """Nothing."""


def open_shared() -> Device:
    """The device of this rank: of those there are, by its number on this host."""
    count = torch.cuda.device_count() if torch.version.cuda is not None else 0
    return open_cuda(int(os.environ.get("LOCAL_RANK", "0")) % max(1, count))
