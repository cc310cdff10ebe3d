"""Blocking rounds: `exchange`, on NumPy arrays wherever they are, and memory to register for them.

For those who mix without torch, and for benches; an attached model posts its rounds itself
(`ucxgossip.mixing`). Rejected: `exchange` by way of a stream of that floor (a round of 8 bytes over
shared memory takes 4 us in all; the plain case is one compiled call).
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ucxgossip.buffer import Buffer
from ucxgossip.engine import itinerary
from ucxgossip.engine.itinerary import Itinerary
from ucxgossip.errors import ArgumentError, ArrayError, ClosedError, ScheduleError
from ucxgossip.mailbox import Mailbox
from ucxgossip.membership import Setup
from ucxgossip.posting import OPERATIONS, Posting
from ucxgossip.quarantine import Quarantine, check_policy
from ucxgossip.schedule import Dissemination, Rotated, Schedule
from ucxgossip.ucp.memory import MemoryRegion

_Payload = TypeVar("_Payload", NDArray[Any], Sequence[NDArray[Any]])

_PAST_PAGE = 64
_ENDED = itinerary.ENDED
_Call = tuple[object, object, object, str, Callable[[int], int], int, Itinerary | None]
"""What `exchange` was last called with, and how its next round is done: all that is looked at in a
round that is laid out. (The itinerary is kept alive by it.) Each object that is not in the cache
costs where ranks outnumber cores (docs/performance.md)."""


def _leave(address: int) -> int:
    return itinerary.LEAVE


def _identity(payload: object) -> object:
    """What tells whether the same arrays are passed again, as long as they live."""
    if type(payload) is np.ndarray or not isinstance(payload, list | tuple):  # the plain case first
        return id(payload)
    return tuple(map(id, payload))


class Blocking(Posting):
    """Partners who exchange arrays and wait for it.

    broken: rounds of `exchange` that a change of members broke off or left out.
    """

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._quarantine = Quarantine()
        self._exchange_box: Mailbox | None = None
        self._exchanged: dict[int, np.dtype[Any]] = {}
        self.broken = 0
        self._last_buffer: tuple[object, Buffer] | None = None
        self._forget_call()
        self._default_schedule = Rotated(Dissemination(self.size), seed=0)
        self._checked_schedule: Schedule = self._default_schedule

    def _forget_call(self) -> None:
        """Compare the next call of `exchange` with the itinerary of its mailbox again."""
        self._again: _Call = (object(), None, None, "", _leave, 0, None)

    # --- memory --------------------------------------------------------------------------------

    def allocate(self, nbytes: int) -> MemoryRegion:
        """Zeroed registered memory for payloads, 64 bytes past the start of a page.

        Not at its start: what travels behind a header of up to 15 bytes would be copied at a third
        of the speed there (docs/performance.md, "64 KiB over TCP"). It is registered until it
        is freed or the group closes, and belongs to NumPy: views outlive the group.
        """
        self._check_usable()
        if isinstance(nbytes, bool) or not isinstance(nbytes, int) or nbytes < 1:
            raise ArgumentError(f"allocate {nbytes!r} bytes; must be a positive whole number")
        page = mmap.PAGESIZE
        raw = np.zeros(nbytes + page, np.uint8)
        start = (_PAST_PAGE - raw.ctypes.data) % page
        used = raw[start : start + nbytes]
        return self.engine.exclusively(lambda: MemoryRegion(self.context, array=used))

    def give_back(self, mailbox: Mailbox) -> None:
        """As `Meetings.give_back`; the next exchange through it may be of another dtype."""
        super().give_back(mailbox)
        self._exchanged.pop(mailbox.index, None)
        self._forget_call()

    def free(self, buffer: Buffer) -> None:
        """Deregister memory of `allocate` that no round uses any more; views of it stay valid.

        Where engine or group are closed, it goes with the context.
        """
        if buffer.region is not None:
            with suppress(ClosedError):
                self.engine.exclusively(buffer.region.close)

    # --- rounds --------------------------------------------------------------------------------

    def exchange(
        self,
        array: _Payload,
        mix: bool = True,
        schedule: Schedule | None = None,
        mailbox: Mailbox | None = None,
        nonfinite: str = "skip",
    ) -> _Payload:
        """One blocking round: put `array` to this step's partner, take another's. Collective.

        array: 1-D, contiguous, writeable; float32 or float64 where mix=True, and of the same size
        and dtype in each call on a mailbox (`ArrayError`), and on all ranks in the first one
        (`MismatchError`). Or a list or tuple of such arrays, all of one dtype: they travel in one
        round, as if they stood one behind the other. With mix=True the array becomes the mean of
        itself and what came in, and is returned; with mix=False it stays, and what came in is
        returned as a new array, or a list of them. Where a change of members broke the round off,
        the array stays, or a copy of it is returned; `broken` counts that.
        schedule: `Rotated(Dissemination(size))` by default; the same in each call. mailbox: one of
        `mailbox(nbytes, ring=True)`, to exchange payloads of several sizes.
        nonfinite: what mixing does with a chunk in which this rank or the other has a NaN or an
        infinity: ``"skip"`` leaves this rank's values as they are, counts (`nonfinite`) and warns;
        ``"raise"`` does so and raises `NonFiniteError` after the round; ``"allow"`` mixes.
        """
        payload, chosen, box, policy, following, address, _ = self._again
        if (
            payload is array
            and chosen is schedule
            and box is mailbox
            and policy is nonfinite
            and mix is True
        ):
            said = following(address)
            if said == _ENDED:
                return array
        else:
            said = self._foreseen(array, mix, schedule, mailbox, nonfinite)
            if said == _ENDED:
                return array
        return self._exchange(array, mix, schedule, mailbox, nonfinite, said != itinerary.LEAVE)

    def _foreseen(
        self,
        array: _Payload,
        mix: bool,
        schedule: Schedule | None,
        mailbox: Mailbox | None,
        nonfinite: str,
    ) -> int:
        """Do the next round of `exchange` if it is laid out; what became of it (`itinerary`)."""
        plan = getattr(self._exchange_box if mailbox is None else mailbox, "itinerary", None)
        usable = mix is True and not self._closed and self._failure is None
        if plan is None or not usable or plan.engine != self.engine.address:
            return itinerary.LEAVE
        if plan.asked != self._asked(array, schedule, nonfinite):
            return itinerary.LEAVE
        return self._by(plan, array, schedule, mailbox, nonfinite)

    def _asked(
        self, array: _Payload, schedule: Schedule | None, nonfinite: str
    ) -> tuple[object, ...]:
        """What tells whether `exchange` is asked for the same again; its objects live so long."""
        return (_identity(array), id(schedule), nonfinite, id(self))

    def _by(
        self,
        plan: Itinerary,
        array: _Payload,
        schedule: Schedule | None,
        mailbox: Mailbox | None,
        nonfinite: str,
    ) -> int:
        """Do the next round of an itinerary, and remember the call where it is of one array."""
        following = self.engine.exchange_next
        if type(array) is np.ndarray:
            self._again = (array, schedule, mailbox, nonfinite, following, plan.address, plan)
        return int(following(plan.address))

    def _exchange(
        self,
        array: _Payload,
        mix: bool,
        schedule: Schedule | None,
        mailbox: Mailbox | None,
        nonfinite: str,
        posted: bool,
    ) -> _Payload:
        """A round of `exchange` that is not foreseen, or what is left to do of one that was."""
        self._check_usable()
        check_policy(nonfinite)
        buffer = self._buffer_of(array)
        if mix and buffer.dtype not in OPERATIONS["mix"]:
            raise ArrayError(f"the array is {buffer.dtype}; float32 and float64 can be mixed")
        chosen = self.check_schedule(schedule or self._default_schedule)
        box = self._mailbox_of_exchange(buffer, chosen) if mailbox is None else mailbox
        mine = isinstance(box, Mailbox)
        if not mine or self.engine.mailboxes[box.index : box.index + 1] != [box]:
            raise ArgumentError("exchange: the mailbox is not one of this group")
        if box.index in self._spare:
            raise ArgumentError("exchange: the mailbox was given back; make one anew")
        if box.layout.nbytes != buffer.nbytes:
            raise ArrayError(
                f"exchange: the array has {buffer.nbytes} bytes, its mailbox {box.layout.nbytes}; "
                "sizes may not change between rounds. For several sizes make one "
                "group.mailbox(nbytes, ring=True) each and pass it as mailbox="
            )
        self._agree_on_exchange(box, buffer, chosen)
        if self.size == 1:
            return array if mix else buffer.copy().contents
        # A copy, not empty memory: a schedule may give this rank nobody to receive from.
        target = buffer if mix else buffer.copy()
        how = "mix" if mix else "copy"
        looks = mix and nonfinite != "allow"
        if mix and not posted:
            asked = self._asked(array, schedule, nonfinite)
            self._look_ahead(box, buffer, buffer, chosen, asked, whole=looks)
            if box.itinerary is not None:
                said = self._by(box.itinerary, array, schedule, mailbox, nonfinite)
                if said == itinerary.ENDED:
                    return array
                posted = said != itinerary.LEAVE
        number = box.round - posted
        if not posted:
            self.post_scheduled(
                box, buffer, target, chosen, number, how=how, kick=False, whole=looks
            )
        whole = self.wait(box)
        self.broken += not whole
        if whole and looks:
            found = self.left_out(box)
            self._quarantine.left_out(self.rank, found, "array", number, nonfinite)
        if mix:
            return array
        return (target if whole else buffer.copy()).contents  # type: ignore[no-any-return]

    @property
    def nonfinite(self) -> dict[int, int]:
        """Chunks that `exchange` left out, by the rank whose values were not finite."""
        return dict(sorted(self._quarantine.counts.items()))

    def _buffer_of(self, array: _Payload) -> Buffer:
        """`Buffer.of` or `of_all`, remembered (with its arrays) for the next call."""
        same = _identity(array)
        if self._last_buffer is None or self._last_buffer[0] != same:
            several = isinstance(array, list | tuple)
            made = Buffer.of_all(array) if several else Buffer.of(array)  # type: ignore[arg-type]
            self._last_buffer = (same, made)
        return self._last_buffer[1]

    def check_schedule(self, schedule: Schedule) -> Schedule:
        """`schedule` if it fits this group; `ScheduleError` else."""
        if schedule is self._checked_schedule:
            return schedule
        if not isinstance(schedule, Schedule):
            raise ScheduleError(
                f"{schedule!r} is not a schedule; pass one such as "
                f"ug.Rotated(ug.Dissemination({self.size}))"
            )
        if schedule.size != self.size:
            raise ScheduleError(
                f"{schedule.describe()} is for {schedule.size} ranks; this group has {self.size}"
            )
        self._checked_schedule = schedule
        return schedule

    def _mailbox_of_exchange(self, buffer: Buffer, schedule: Schedule) -> Mailbox:
        if buffer.nbytes == 0:
            raise ArrayError("the array is empty")
        if self._exchange_box is None:
            self._agree("exchange", buffer, schedule)  # what differs is told before memory is taken
            with self.naming("exchange"):
                self._exchange_box = self.mailbox(buffer.nbytes, ring=True)
            self._exchanged[self._exchange_box.index] = buffer.dtype
        return self._exchange_box

    def _agree_on_exchange(self, box: Mailbox, buffer: Buffer, schedule: Schedule) -> None:
        """In the first round of a mailbox all ranks bring the same; later the dtype stays."""
        first = self._exchanged.get(box.index)
        if first is None:
            self._agree(f"exchange, mailbox {box.index}", buffer, schedule)
            self._exchanged[box.index] = buffer.dtype
        elif first != buffer.dtype:
            raise ArrayError(
                f"exchange: the array is {buffer.dtype}, the first one was {first}; dtypes may not "
                "change between rounds of a mailbox"
            )

    def _agree(self, name: str, buffer: Buffer, schedule: Schedule) -> None:
        facts = {
            "bytes": buffer.nbytes,
            "dtype": str(buffer.dtype),
            "schedule": schedule.describe(),
        }
        self.agree(name, facts, once=name)
