"""The engine: one worker, its endpoints and mailboxes, and the thread that drives them."""

from __future__ import annotations

import atexit
import ctypes
import logging
import os
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numba import types
from numpy.typing import NDArray

from ucxgossip import forks, jit
from ucxgossip.device import Device
from ucxgossip.engine import arrival, device_rounds, drive, itinerary, rounds
from ucxgossip.engine import words as w
from ucxgossip.engine.apply import apply_at
from ucxgossip.engine.post import Post
from ucxgossip.engine.staging import Staging
from ucxgossip.errors import ArgumentError, DeviceError, ExchangeError, ExchangeTimeoutError
from ucxgossip.kernels.cpu import mix
from ucxgossip.mailbox import Mailbox
from ucxgossip.ucp import abi, ops
from ucxgossip.ucp.context import Context
from ucxgossip.ucp.endpoint import Endpoint
from ucxgossip.ucp.memory import MemoryRegion, RemoteKey
from ucxgossip.ucp.worker import Worker

T = TypeVar("T")

_SLICE_NS = 250_000_000
_LOCK_NS = 60_000_000_000
_CLOSE_NS = 2_000_000_000
_DEVICE_S = 10.0
_log = logging.getLogger("ucxgossip")


LEAST_ENDPOINTS = 4
"""A round has three partners: whom it puts to, who puts, and who may put the next one."""


@dataclass(frozen=True)
class Constants:
    """What `ucxgossip.Tuning` names, in full: that docstring says what each of them is."""

    eager: int = 4096
    spins: int = 0
    yields: int = 40
    chunk: int = 1 << 18
    window: int = 16
    endpoints: int = 128
    ring: int = 8
    answers: bool = False
    device_chunk: int = 1 << 18

    def __post_init__(self) -> None:
        for name, least in {
            "eager": 0,
            "spins": 0,
            "yields": 0,
            "chunk": 8,
            "window": 1,
            "endpoints": LEAST_ENDPOINTS,
            "ring": 0,
            "device_chunk": 8,
        }.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ArgumentError(f"Tuning: {name} is {value!r}; a whole number from {least}")
        if not isinstance(self.answers, bool):
            raise ArgumentError(f"Tuning: answers is {self.answers!r}; must be True or False")
        if self.chunk % 8 or self.eager > self.chunk:
            raise ArgumentError(
                f"Tuning: chunk is {self.chunk}; must be a multiple of 8 and at least eager "
                f"({self.eager})"
            )
        if self.device_chunk % 8:
            raise ArgumentError(
                f"Tuning: device_chunk is {self.device_chunk}; must be a multiple of 8"
            )


class Engine:
    """Drives the rounds of all mailboxes of one rank. Close it after its mailboxes' last round."""

    def __init__(
        self,
        context: Context,
        rank: int,
        size: int,
        tuning: Constants | None = None,
        ring: bool = True,
        max_mailboxes: int = 4096,
    ) -> None:
        self.context, self.rank, self.size = context, rank, size
        self.tuning = tuning or Constants()
        self.worker = Worker(context)
        self.endpoints: dict[int, Endpoint] = {}
        self.mailboxes: list[Mailbox] = []
        self.stagings: dict[int, Staging] = {}
        self.words = np.zeros(w.ENGINE_WORDS, np.int64)
        self.address = int(self.words.ctypes.data)
        self.table = np.zeros((max_mailboxes, w.MAILBOX_WORDS), np.int64)
        self.floats = np.zeros((max_mailboxes, w.FLOATS), np.float64)
        self._handles = np.zeros(size, np.int64)
        self._wakes = np.zeros(size, np.int64)
        self._plain = abi.RequestParam()
        self._eager = abi.RequestParam(
            op_attr_mask=abi.OpAttr.FLAGS, flags=abi.AM_SEND_EAGER | abi.AM_SEND_COPY_HEADER
        )
        # Left to itself, UCX sends 8 bytes over TCP by zero copy: a request, a registration and a
        # completion more than for a short message.
        self._short = abi.RequestParam(
            op_attr_mask=self._eager.op_attr_mask | abi.OP_FAST_COMPLETION, flags=self._eager.flags
        )
        self._kept: list[NDArray[np.int64]] = []
        self._undo = np.zeros(self.tuning.chunk // 8, np.int64)
        self._thread: threading.Thread | None = None
        self._closed = False
        self._orderly = True
        self._forked = False
        self._closing = threading.RLock()
        forks.watch(self)
        self._fill(ring)
        with jit.warm_up(drive.run, mix):
            self._callbacks = arrival.callbacks()
            self._set_function(w.APPLY, apply_at, 5)
            self._set_function(w.MOVE, drive.move_rounds, 2)
            self.words[w.STOP] = 1
            drive.run(self.words)
            drive.drive(self.words, -1, jit.now_ns() + _LOCK_NS)
            drive.drive_launched(self.words, -1, jit.now_ns() + _LOCK_NS)
            self.words[w.STOP] = 0
            words = types.int64[::1]
            jit.compile_ahead(drive.shut, types.boolean(words, types.int64))
            jit.compile_ahead(drive.hold, types.boolean(words, types.int64, words))
            jit.compile_ahead(drive.release, types.void(words))
            jit.compile_ahead(rounds.post, rounds.POST_SIGNATURE)
            self.post_next = jit.compile_ahead(itinerary.post, itinerary.SIGNATURE)
            self.exchange_next = jit.compile_ahead(itinerary.exchange, itinerary.SIGNATURE)
        context.before_close(self.close)
        self._set_handlers()

    def _set_function(self, word: int, function: object, count: int) -> None:
        """Have compiled code call `function` of `count` words by its address in `word`."""
        self.words[word] = jit.c_callback(function, jit.words_in(count)).address

    def _set_handlers(self) -> None:
        self.worker.before_close(self.close)
        for ident, callback in self._callbacks.items():
            self.worker.set_handler(ident, callback.address, self.words.ctypes.data)

    def _fill(self, ring: bool) -> None:
        words = self.words
        words[w.ADDRESS] = self.address
        words[w.WORKER] = self.worker.handle
        words[w.EVENT_FD] = self.worker.event_fd
        words[w.ENGINE_FD] = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        words[w.DRIVER_FD] = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        words[w.TABLE] = self.table.ctypes.data
        words[w.FLOAT_TABLE] = self.floats.ctypes.data
        words[w.ENDPOINTS] = self._handles.ctypes.data
        words[w.WAKES] = self._wakes.ctypes.data
        words[w.RANKS] = self.size
        words[w.RANK] = self.rank
        words[w.EAGER] = self.tuning.eager
        words[w.RING] = ring
        words[w.SPINS] = self.tuning.spins
        words[w.ANSWERS] = self.tuning.answers
        words[w.YIELDS] = words[w.PATIENCE] = self.tuning.yields
        words[w.PLAIN] = ctypes.addressof(self._plain)
        words[w.EAGER_PARAM] = ctypes.addressof(self._eager)
        words[w.SHORT_PARAM] = ctypes.addressof(self._short)

    def start(self) -> None:
        """Start the engine thread."""
        # A bound method, so that the memory it works on lives as long as the thread does.
        thread = threading.Thread(target=self._run, name="ucxgossip-engine", daemon=True)
        thread.start()
        self._thread = thread  # only now: the warden's thread may `stop`, and joins what is here
        # libucp is unloaded under a thread that still runs when nobody closed the group.
        atexit.register(self.stop)

    def _run(self) -> None:
        drive.run(self.words)

    def stop(self) -> None:
        """End the engine thread: no round moves any more, unless a caller drives."""
        if self._closed:
            return
        self._orderly = False
        self._stop()

    def _stop(self) -> None:
        self.words[w.STOP] = 1
        jit.kick(int(self.words[w.ENGINE_FD]))
        if self._thread is not None:
            self._thread.join()
        atexit.unregister(self.stop)

    def exclusively(self, call: Callable[[], T]) -> T:
        """What `call` returns, which has the UCX worker to itself: for the control plane.

        No context manager: Ctrl-C between its taking the lock and the block, or as its ``__exit__``
        begins, would keep the lock. Here CPython looks for signals nowhere in between.
        """
        self._check_open()
        held = np.zeros(1, np.int64)
        try:
            if not drive.hold(self.words, jit.now_ns() + _LOCK_NS, held):
                self._check_open()
                raise ExchangeError("the engine did not give the UCX worker back within 60 s")
            return call()
        finally:
            if held[0]:
                drive.release(self.words)

    def _check_open(self) -> None:
        if self._closed:
            raise forks.gone("the engine", self._forked)

    def connect(self, rank: int, address: bytes) -> Endpoint:
        """Make the endpoint to `rank`, whose worker has `address`; the existing one if any."""
        if rank not in self.endpoints:
            self.exclusively(lambda: self._connect(rank, address))
        return self.endpoints[rank]

    def _connect(self, rank: int, address: bytes) -> None:
        endpoint = Endpoint(self.worker, address)
        self.endpoints[rank] = endpoint
        self._handles[rank] = endpoint.handle
        # A TCP put makes the target's socket readable; of an RDMA write it hears nothing.
        lanes = endpoint.transports()
        over_tcp = bool(lanes) and all(lane.startswith("tcp/") for lane in lanes)
        self._wakes[rank] = over_tcp or not self.words[w.RING]

    def disconnect(self, rank: int) -> None:
        """Close the endpoint to `rank`, to which nothing is under way.

        Nor may anything come from it before the endpoint is made anew: over TCP, a rank that makes
        one while a put from there is half received would crash (docs/protocol.md).
        """

        def close() -> None:
            for mailbox in self.mailboxes:
                mailbox.forget(rank)
            self._handles[rank] = 0
            self.endpoints.pop(rank).close()

        self.exclusively(close)

    def open(self, mailbox: Mailbox) -> None:
        """Take `mailbox` under the engine's care; sets its `index`."""
        index = len(self.mailboxes)
        if index == len(self.table):
            raise ArgumentError(f"more than {index} mailboxes in one group")
        layout = mailbox.layout
        requests = np.zeros(w.PIECES * self.tuning.window, np.int64)
        headers = np.zeros(4 * w.HEADER_RING * w.CHECKED_HEADER_BYTES // 8, np.int64)
        if self._undo.nbytes < layout.chunk:
            self._undo = np.zeros(layout.chunk // 8, np.int64)
        self._kept += [requests, headers, self._undo]
        row = self.table[index]
        row[w.INDEX] = index
        row[w.SLOTS_OFFSET] = layout.slots
        row[w.SIGNALS_OFFSET] = layout.signals
        row[w.STRIDE] = layout.stride
        row[w.PLACES] = layout.places
        row[w.PER_SLOT] = layout.per_slot
        row[w.CHUNK] = layout.chunk
        row[w.CHUNKS] = layout.chunks
        row[w.CAPACITY] = layout.nbytes
        row[w.WINDOW] = min(self.tuning.window, w.HEADER_RING)
        row[w.AHEAD] = layout.ahead
        row[w.TOLD] = mailbox.told.ctypes.data
        row[w.WAYS] = mailbox.ways.ctypes.data
        row[w.NUMBER] = mailbox.number.ctypes.data
        row[w.CREDITS_OFFSET] = layout.credits
        row[w.DOZE_OFFSET] = layout.doze
        row[w.PEERS] = mailbox.peers.ctypes.data
        row[w.REQUESTS] = requests.ctypes.data
        row[w.HEADERS] = headers.ctypes.data
        row[w.UNDO] = self._undo.ctypes.data

        def take() -> None:
            self._place(row, mailbox)
            self.mailboxes.append(mailbox)
            mailbox.index = index
            self.words[w.LARGEST] = max(self.words[w.LARGEST], layout.chunk)
            self.words[w.MAILBOXES] = index + 1

        self.exclusively(take)

    def introduce(self, mailbox: Mailbox, rank: int, packed: bytes, address: int) -> None:
        """Tell `mailbox` where that of `rank`, to which there is an endpoint, lies."""

        def set_peer() -> None:
            mailbox.set_peer(rank, RemoteKey(self.endpoints[rank], packed), address)

        self.exclusively(set_peer)

    def equip(self, mailbox: Mailbox, device: Device) -> Staging:
        """Let the rounds of `mailbox` exchange memory of `device`, by staging in pinned memory.

        Before its first round. Sources and targets are device addresses from then on; `Staging`
        says when they may be read. `DeviceError` where the device refuses. Untested on hardware.
        """
        self._check_open()
        self.compile_for_devices()

        def make() -> Staging:
            staging = Staging(self.context, mailbox, device)
            self.stagings[mailbox.index] = staging
            self.table[mailbox.index, w.DEVICE] = staging.words.ctypes.data
            return staging

        return self.exclusively(make)

    def unequip(self, mailbox: Mailbox) -> None:
        """Undo `equip`: no round is under way, and no other rank copies to slots on the device."""

        def undo() -> None:
            settled = self.stagings[mailbox.index].device.settle(_DEVICE_S)
            self.table[mailbox.index, w.DEVICE] = 0
            self.stagings.pop(mailbox.index).close(settled=settled)

        self.exclusively(undo)

    def compile_for_devices(self) -> None:
        """Compile what rounds on a device need, unless that was done; `equip` does."""
        if self.words[w.ADVANCE_DEVICE] == 0:
            with jit.warm_up(drive.run, mix, part="device"):
                self._set_function(w.ADVANCE_DEVICE, device_rounds.advance_at, 3)

    def device_error(self, mailbox: Mailbox) -> DeviceError:
        """The error that says what the device returned in this mailbox's failed round."""
        row, device = self.table[mailbox.index], self.stagings[mailbox.index].device
        status = w.DEVICE_FAILED - int(row[w.FAILURE])
        where = f"{device.name}, round {int(row[w.ROUND])} of mailbox {mailbox.index}"
        return DeviceError("a call of the engine", status, device.error_name(status), where)

    def _settle_devices(self) -> bool:
        """Wait until no device works for a round any more; False after a limited time."""
        settled = True
        for device in {id(each.device): each.device for each in self.stagings.values()}.values():
            if not device.settle(_DEVICE_S):
                _log.warning("%s: work of rounds is still under way", device.name)
                settled = False
        return settled

    def leave_ways(self, timeout: float) -> bool:
        """Let go of other ranks' memory on devices, once the rounds under way have left.

        Before all ranks meet for the last time: their owners may free it after that. False after
        `timeout` seconds, or where a device does not end its work, when it is left as it is.
        """
        deadline = time.monotonic() + timeout
        while self.stagings:
            left = self.exclusively(self._leave_ways)
            if left is not None:
                return left
            if time.monotonic() > deadline:
                return False
            os.sched_yield()
        return True

    def _leave_ways(self) -> bool | None:
        """Whether all ways were left; None while rounds under way have chunks to copy by them."""
        drive.drive_once(self.words)
        if any(self._leaves_by_way(each) for each in self.stagings.values()):
            return None
        if not self._settle_devices():
            return False
        for staging in self.stagings.values():
            staging.leave_ways()
        return True

    def _leaves_by_way(self, staging: Staging) -> bool:
        """Whether a round under way has chunks left to copy to another rank's device."""
        row = self.table[staging.mailbox.index]
        return bool(
            self.active(staging.mailbox)
            and staging.ways
            and row[w.TO] >= 0
            and row[w.SENT] < row[w.PARTS]
        )

    def _place(self, row: NDArray[np.int64], mailbox: Mailbox) -> None:
        """Write where the mailbox's region is into its row. The caller holds the lock."""
        layout, region = mailbox.layout, mailbox.region
        row[w.SLOTS] = region.address + layout.slots
        row[w.SIGNALS] = region.address + layout.signals
        row[w.OUTGOING] = region.address + layout.outgoing
        row[w.OUT_PARAM] = region.param_address
        row[w.CREDITS] = region.address + layout.credits
        row[w.DOZE] = region.address + layout.doze
        region.view(np.int64, 1, layout.doze)[0] = self.words[w.DOZING]
        if layout.verify:
            row[w.CHECKS] = region.address + layout.checks
            row[w.CHECKS_OFFSET] = layout.checks
            row[w.OUT_CHECKS] = region.address + layout.out_checks

    def renew(self, epoch: int, elsewhere: bool) -> None:
        """Break off every round and go on in `epoch` with a new worker, connected to nobody.

        Nothing that was under way arrives after that: the connections over which it would come
        are closed, and with `elsewhere` the mailboxes lie in other memory. Sources and targets
        stay as they are at that moment. Rejected: repairing the old worker (UCX completes nothing
        towards a dead rank without its error handling, which costs zero-copy puts over TCP).
        """
        self.exclusively(lambda: self._renew(epoch, elsewhere))
        jit.kick(int(self.words[w.ENGINE_FD]))

    def _renew(self, epoch: int, elsewhere: bool) -> None:
        worker = Worker(self.context)  # first: where the network is gone, it cannot be made
        for mailbox in self.mailboxes:
            row = self.table[mailbox.index]
            if row[w.STATE] in (w.ACTIVE, w.FAILED):
                row[w.DONE_NS] = jit.now_ns()
                jit.store_release(row, w.STATE, w.BROKEN)
        self._drop_requests()
        settled = self._settle_devices()
        for endpoint in self.endpoints.values():
            endpoint.abandon()
            endpoint.close()
        self.endpoints.clear()
        self._handles[:] = 0
        for mailbox in self.mailboxes:
            mailbox.renew(elsewhere)
            self._place(self.table[mailbox.index], mailbox)
        for staging in self.stagings.values():
            staging.forget_ways(settled)
            staging.follow(settled)
        self.worker.forget_users()  # of which this engine is one, and goes on
        self.worker.close()
        self.worker = worker
        self.words[w.WORKER] = self.worker.handle
        self.words[w.EVENT_FD] = self.worker.event_fd
        self.words[w.UNSEEN] = 0
        self.words[w.EPOCH] = epoch
        self._set_handlers()

    def post(self, mailbox: Mailbox, what: Post, kick: bool = True) -> None:
        """Start the mailbox's next round and return; `wait` for its end.

        kick: wake the engine thread, unless the caller waits at once.
        """
        self._check_open()
        if not 0 <= mailbox.round < mailbox.layout.rounds:
            raise ArgumentError(f"round {mailbox.round} is out of range")
        if what.scattered:
            self._stage(mailbox)
        if not rounds.post(self.words, mailbox.index, mailbox.round, *what, int(kick)):
            raise ExchangeError(f"mailbox {mailbox.index}: its last round is still under way")
        mailbox.round += 1

    def _stage(self, mailbox: Mailbox) -> None:
        """See to it that `mailbox` can bring pieces of its source together."""

        def make() -> None:
            places = min(self.tuning.window, mailbox.layout.chunks)
            nbytes = places * mailbox.layout.chunk
            mailbox.staging = MemoryRegion(self.context, nbytes=nbytes)
            row = self.table[mailbox.index]
            row[w.STAGING] = mailbox.staging.address
            row[w.STAGING_PARAM] = mailbox.staging.param_address

        if mailbox.staging is None:
            self.exclusively(make)

    def unhold(self, mailbox: Mailbox) -> None:
        """Let a held round mix."""
        jit.store_release(self.table[mailbox.index], w.HELD, 0)

    def active(self, mailbox: Mailbox) -> bool:
        """Whether a round of `mailbox` is under way."""
        return bool(self.table.item(mailbox.index, w.STATE) == w.ACTIVE)

    def has_put(self, mailbox: Mailbox) -> bool:
        """Whether all of the last round of `mailbox` was put, so that its target may have it."""
        row = self.table[mailbox.index]
        return bool(row[w.PUT] == row[w.PARTS])

    def launched(self, mailbox: Mailbox) -> bool:
        """Whether nothing of the last round of `mailbox` is left to be enqueued on its device."""
        return not self.active(mailbox) or self.stagings[mailbox.index].launched(
            self.table.item(mailbox.index, w.TURN)
        )

    def target_of(self, mailbox: Mailbox) -> int:
        """The rank to which the mailbox's last round goes, -1 for none."""
        return int(self.table[mailbox.index, w.TO])

    def wait(self, mailbox: Mailbox, timeout: float, launched: bool = False) -> bool:
        """Drive until the mailbox's round has ended, or `timeout` seconds; whether it ended.

        launched: until all of it is enqueued on its device, or it has ended.
        Returns to Python four times a second, so that signals are handled.
        """
        self._check_open()
        if self.table.item(mailbox.index, w.STATE) != w.ACTIVE:
            return True
        deadline = jit.now_ns() + int(timeout * 1e9)
        run = drive.drive_launched if launched else drive.drive
        while True:
            now = jit.now_ns()
            if run(self.words, mailbox.index, min(deadline, now + _SLICE_NS)):
                return True
            if now >= deadline or self._closed:
                return False

    def flush(self, timeout: float) -> None:
        """``ucp_ep_flush_nbx`` on every endpoint: all that this rank put is in place."""
        deadline = time.monotonic() + timeout

        def each() -> None:
            for endpoint in self.endpoints.values():
                endpoint.flush(max(0.0, deadline - time.monotonic()))

        self.exclusively(each)

    def close(self, orderly: bool = True) -> None:
        """Stop the thread, close mailboxes, endpoints and worker. Further calls do nothing.

        No last word is sent to partners, who may be gone: `flush` before, if it matters. orderly:
        they copy nothing to this rank's devices any more; else its slots there stay allocated.
        """
        with self._closing:
            if not self._closed:
                self._orderly &= orderly
                self._closed = True
                self._close()

    def disown(self) -> None:
        """Count as closed, in a forked child: worker and event descriptors are the parent's."""
        self._closed = self._forked = True
        self.words[w.SHUT] = 1
        self._closing = threading.RLock()  # another thread of the parent may have held it

    def _close(self) -> None:
        self._stop()
        if not drive.shut(self.words, jit.now_ns() + _CLOSE_NS):
            _log.warning("rank %d: a thread still drives the engine that is closed", self.rank)
        self._drop_requests()
        for endpoint in self.endpoints.values():
            endpoint.abandon()
        settled = self._settle_devices()
        for staging in self.stagings.values():
            staging.close(self._orderly, settled)
        for mailbox in self.mailboxes:
            mailbox.close()
        self.worker.close()
        os.close(int(self.words[w.ENGINE_FD]))
        os.close(int(self.words[w.DRIVER_FD]))

    def _drop_requests(self) -> None:
        """Give back the requests of rounds that were broken off."""
        for row in self.table[: len(self.mailboxes)]:
            requests = jit.view_words(int(row[w.REQUESTS]), w.PIECES * int(row[w.WINDOW]))
            for request in requests[requests > 0]:
                ops.free(int(request))
            requests[:] = 0
            row[w.SENT] = row[w.PUT]

    @staticmethod
    def _unopened(mailbox: Mailbox, row: NDArray[np.int64]) -> bool:
        """Whether the credit for the next chunk of the round under way is missing."""
        chunk = int(row[w.ROUND]) * mailbox.layout.chunks + int(row[w.PUT])
        return int(mailbox.credits[int(row[w.TO])]) <= chunk

    def describe_wait(
        self, mailbox: Mailbox, seconds: float, living: Collection[int] = ()
    ) -> ExchangeTimeoutError:
        """The error that says whom this mailbox's round waits for, for what, and how long.

        living: ranks that are known to be alive.
        """
        row = self.table[mailbox.index]
        to, sender = int(row[w.TO]), int(row[w.FROM])
        parts = int(row[w.PARTS])
        put = int(row[w.PUT])
        staging = self.stagings.get(mailbox.index)
        sent = to < 0 or int(row[w.SENT]) == parts
        if sent and row[w.UNANSWERED] and (sender < 0 or row[w.MIXED] == parts):
            rank, what = to, "to say that it has all of it"
        elif staging is not None and staging.waits_for_source:
            rank, what = self.rank, f"to compute on {staging.device.name} what it sends"
        elif staging is not None and staging.launched(int(row[w.TURN])):
            rank, what = self.rank, f"to mix on {staging.device.name} what has come"
        elif to >= 0 and put < parts and self._unopened(mailbox, row):
            rank, what = to, "to free its slot (it is at an earlier round)"
            if put:
                what = f"to free its place for chunk {put + 1} of {parts}"
        elif to >= 0 and row[w.SENT] < parts:
            rank, what = to, f"to take chunk {int(row[w.SENT]) + 1} of {parts}"
        else:
            rank, what = sender, f"to put chunk {int(row[w.MIXED]) + 1} of {parts}"
        if rank == self.rank:
            advice = "If the device is only slow"
        elif rank in living:
            advice = (
                f"Rank {rank} is alive, and has not come as far: do all ranks take equally many "
                "steps and make the same collective calls (skip_step() and shuffled() are for "
                "ranks with fewer batches)? If it is only slow (compiling, writing a checkpoint)"
            )
        else:
            advice = f"Is rank {rank} alive? If it is only slow (compiling, writing a checkpoint)"
        payload = f", {mailbox.what}" if mailbox.what else ""
        return ExchangeTimeoutError(
            f"rank {self.rank} waited {seconds:.1f} s for rank {rank} {what} (round "
            f"{int(row[w.ROUND])} of mailbox {mailbox.index}{payload}). {advice}, raise "
            "join(timeout=...).",
            rank,
            what,
            seconds,
        )
