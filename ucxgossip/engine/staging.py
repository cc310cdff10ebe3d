"""The device side of a mailbox: staging memory, events, and the words that `device_rounds` reads.

Slots stay in host memory, pinned where the device can do that, so that its own engine copies from
them; where it cannot, copies are correct but block, and that is said once. Staging places are few:
a chunk stays in one only until its put has left.

Between processes of one host, slots on the device too can be put to: mapped by the driver's IPC,
and proved by bytes that the other side has seen (`ucxgossip.mixing.direct`). UCX does the same
inside (cuda_ipc), but its puts would have to be flushed before each signal, and need a context made
with CUDA's transports; a copy on a stream of ours is ordered by its event. This way ends with the
first change of members.

Untested on hardware.
"""

from __future__ import annotations

import logging
import mmap

import numpy as np
from numpy.typing import NDArray

from ucxgossip.device import Device, DeviceMemory
from ucxgossip.engine import device_rounds as d
from ucxgossip.errors import DeviceError
from ucxgossip.mailbox import Mailbox
from ucxgossip.ucp.context import Context
from ucxgossip.ucp.memory import MemoryRegion

PLACES = 4
"""Chunks that stand in staging memory at a time, each way, at least. Not tuned."""

STAGED = 1 << 20
"""Bytes of them that do, where chunks are small (over TCP). Not tuned."""

LONGEST_RUN_BY_WAY = 1 << 22
"""Bytes that are copied at a time to another device: the first can be mixed there while later ones
are copied. Not tuned."""

_kept_for_good: list[object] = []

PROBE = 16
"""Bytes by which a way between two devices is proved before it is used."""

_PAGE = mmap.PAGESIZE
_log = logging.getLogger("ucxgossip")


class Staging:
    """What mailbox `mailbox` needs to exchange memory of `device`. Made by `Engine.equip`."""

    def __init__(self, context: Context, mailbox: Mailbox, device: Device) -> None:
        layout = mailbox.layout
        self.device, self.mailbox = device, mailbox
        places = min(max(PLACES, STAGED // layout.chunk), layout.chunks)
        # First, since it may fail: events and pinned pages are not given back by themselves.
        self._inside = device.allocate(places * layout.chunk)
        self._found = device.allocate(16 * layout.chunks)
        self.words = np.zeros(d.WORDS, np.int64)
        self._pinned: list[int] = []
        self._slots = 0
        flying = min(d.MOST_IN_FLIGHT, layout.chunks)
        self._events = [device.event() for _ in range(places + flying + 4)]
        out, came = _ring(self._events[:places]), _ring(self._events[places:-4])
        self._kept = (out, came)
        self._slots_there: DeviceMemory | None = None
        self._handle, self._forgotten = b"", False
        self._ways = np.zeros(layout.ranks, np.int64)
        self.source_event, self.target_event, self.done_event, end_event = self._events[-4:]
        host = _pages(places * layout.chunk)
        self._pin(host.ctypes.data, host.nbytes)
        self.region = MemoryRegion(context, array=host)
        self._results = _pages(2 * 16 * layout.chunks)  # and as many zeros behind them
        self._pin(self._results.ctypes.data, self._results.nbytes)
        words = self.words
        words[d.TABLE] = device.table.ctypes.data
        words[d.OUT], words[d.OUT_PLACES] = self.region.address, places
        words[d.OUT_PARAM] = self.region.param_address
        words[d.MOST] = d.MOST_IN_FLIGHT
        words[d.OUT_EVENTS], words[d.IN_EVENTS] = out.ctypes.data, came.ctypes.data
        words[d.IN], words[d.IN_PLACES] = self._inside.address, places
        words[d.IN_EVENTS_COUNT] = flying
        words[d.WAY_RUN] = max(1, LONGEST_RUN_BY_WAY // layout.chunk)
        words[d.RESULTS] = self._found.address
        words[d.RESULTS_HERE] = self._results.ctypes.data
        words[d.ZEROS] = self._results.ctypes.data + 16 * layout.chunks
        words[d.DONE_EVENT], words[d.END_EVENT] = self.done_event, end_event
        words[d.ROUND_TURN] = -1
        for i in range(d.VALUES):
            words[d.ARGUMENTS + d.VALUES + i] = words.ctypes.data + 8 * (d.ARGUMENTS + i)
        self.follow()

    def _pin(self, address: int, nbytes: int) -> bool:
        if self.device.pin(address, nbytes):
            self._pinned.append(address)
            return True
        _log.warning(
            "%s: %d bytes of host memory cannot be pinned, so that copies from and to it block",
            self.device.name,
            nbytes,
        )
        return False

    def follow(self, settled: bool = True) -> None:
        """Pin the mailbox's region, which may have moved since the last call.

        settled: the device reads none of the old one any more; else that stays as it is.
        """
        region = self.mailbox.region
        start = region.address // _PAGE * _PAGE
        nbytes = -(-(region.address + region.nbytes - start) // _PAGE) * _PAGE
        if self._slots and settled:
            self._pinned.remove(self._slots)
            self.device.unpin(self._slots)
        elif self._slots:
            self.mailbox.retired.clear()  # goes with its context
            if start == self._slots:
                return
        self._slots = 0
        if self._pin(start, nbytes):
            self._slots = start

    # --- slots on the device -------------------------------------------------------------------

    def expose(self) -> bytes:
        """By which processes of this host can put into slots on the device; empty where none can.

        Behind the slots stands a place of `PROBE` bytes for each rank, which `seen` looks at.
        Calls after the first return the same, and none after `forget_ways` any.
        """
        layout = self.mailbox.layout
        if not self._handle and not layout.verify and not self._forgotten:
            self._probes = layout.depth * layout.stride
            memory = self.device.allocate(self._probes + PROBE * layout.ranks)
            self._handle = self.device.export(memory)
            if self._handle:
                self._slots_there = memory
                self.words[d.SLOTS_HERE] = memory.address
        return self._handle

    def seen(self, rank: int, token: bytes) -> bool:
        """Whether `rank` has put `token` (`PROBE` bytes) into its place behind the slots."""
        if self._slots_there is None or not 0 <= rank < self.mailbox.layout.ranks:
            return False
        found = np.empty(PROBE, np.uint8)
        self.device.read(self._slots_there.address + self._probes + PROBE * rank, found)
        return found.tobytes() == token

    def try_way(self, rank: int, here: int, handle: bytes, token: bytes) -> int:
        """Map the slots of `rank` and put `token` there as rank `here`; their address, or 0."""
        try:
            address = self.device.map(handle)
        except DeviceError as error:
            _log.info("rank %d: no way to rank %d's device: %s", here, rank, error)
            return 0
        if address:
            layout = self.mailbox.layout
            place = address + layout.depth * layout.stride + PROBE * here
            try:
                self.device.write(place, np.frombuffer(token, np.uint8))
            except DeviceError as error:
                _log.info("rank %d: no way to rank %d's device: %s", here, rank, error)
                self.device.unmap(address)
                return 0
        return address

    def take_way(self, rank: int, address: int) -> None:
        """Copy chunks for `rank` straight into its slots, which this process sees at `address`."""
        self._ways[rank] = address
        self.words[d.WAYS] = self._ways.ctypes.data

    @property
    def ways(self) -> list[int]:
        """The ranks into whose slots on their devices this one copies."""
        return [int(rank) for rank in np.flatnonzero(self._ways)]

    def forget_ways(self, settled: bool = True) -> None:
        """Stage all from now on: a rank that was taken for dead may still copy into the slots.

        The slots stay allocated to the end of the process, as that rank may write there; where the
        device has not settled, what is mapped stays so.
        """
        if self._slots_there is not None:
            _kept_for_good.append(self._slots_there)
            self._slots_there = None
        self._handle, self._forgotten = b"", True
        self._unmap(settled)

    def _unmap(self, settled: bool = True) -> None:
        self.words[d.SLOTS_HERE] = 0
        self.leave_ways(settled)

    def leave_ways(self, settled: bool = True) -> None:
        """Copy into no other rank's slots any more, whose owners may free them then.

        No chunk is copied and not signalled. settled: the device has done all copies; else it may
        still write there, and the slots stay mapped.
        """
        self.words[d.WAYS] = self.words[d.WAY] = 0
        for rank in self.ways:
            if settled:
                self.device.unmap(int(self._ways[rank]))
        self._ways[:] = 0

    # --- a round -------------------------------------------------------------------------------

    def ready(self) -> None:
        """The next round's source is whole once the current stream's work until now is done."""
        self.device.record(self.source_event, self.device.current_stream())
        self.words[d.SOURCE_EVENT] = self.source_event
        self.words[d.TARGET_EVENT] = 0

    def unheld(self) -> None:
        """What is mixed from now on in this round comes after the current stream's work."""
        self.device.record(self.target_event, self.device.current_stream())
        self.words[d.TARGET_EVENT] = self.target_event

    def launched(self, turn: int) -> bool:
        """Whether all of the round that was posted as `turn` is enqueued."""
        return bool(self.words[d.ROUND_TURN] == turn and self.words[d.PHASE] >= d.LAUNCHED)

    @property
    def waits_for_source(self) -> bool:
        """Whether the round under way has not begun, since its source is not written yet."""
        return bool(self.words[d.PHASE] == d.WAITING)

    def join_stream(self) -> int:
        """Let the current stream wait for the launched round's mixes; that stream.

        The caller's thread does not wait.
        """
        stream = self.device.current_stream()
        self.device.wait(stream, self.done_event)
        return stream

    # --- the end -------------------------------------------------------------------------------

    def close(self, orderly: bool = True, settled: bool = True) -> None:
        """Give everything back. Further calls do nothing.

        orderly: no other rank puts anything any more. settled: the device works for no round any
        more; else all stays as it is to the end of the process, since copies and kernels that are
        under way use it.
        """
        if not settled:
            _kept_for_good.append(self)
            return
        if not orderly:
            self.forget_ways()
        self._unmap()
        for event in self._events:
            self.device.drop_event(event)
        self._events.clear()
        self.region.close()
        for address in self._pinned:
            self.device.unpin(address)
        self._pinned.clear()
        self._slots = 0


def _ring(events: list[int]) -> NDArray[np.int64]:
    """Room for runs: an event, and how many chunks are through when it completes."""
    return np.array([(event, 0) for event in events], np.int64)


def _pages(nbytes: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """Zeroed host memory on pages of its own, since pages are what is pinned."""
    size = -(-nbytes // _PAGE) * _PAGE
    raw = np.zeros(size + _PAGE, np.uint8)
    start = -raw.ctypes.data % _PAGE
    return raw[start : start + size]
