"""Rounds of a mailbox: posted, with partners by schedule over the members, and waited for.

A round that is posted needs its partners' endpoints, credits out in time, and members who stay;
`Posting.post` sees to all of it. Where rounds follow a schedule, the next ones are laid out for
compiled code (`engine.itinerary`), and a stream that posts the same each step pays one call.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from ucxgossip.buffer import Buffer
from ucxgossip.engine import Post, credits, itinerary
from ucxgossip.engine import words as w
from ucxgossip.engine.itinerary import Itinerary
from ucxgossip.errors import (
    ArgumentError,
    ExchangeTimeoutError,
    IntegrityError,
    OutOfStepError,
    UCXError,
)
from ucxgossip.mailbox import Mailbox
from ucxgossip.membership import Setup
from ucxgossip.partners import Partners
from ucxgossip.schedule import ALONE, Round, Schedule, many
from ucxgossip.ucp import ops
from ucxgossip.ucp.lib import status_name

_SLICE = 1.0

_ASK_S, _ANSWER_S = 2.0, 0.25
"""After how many seconds of waiting, and twice that and so on, a partner is asked whether it has
ended what is waited for, and how long for its answer."""
_FORESEEN, _LOOK_AGAIN = 2048, 32
"""Rounds that are laid out at a time at most, and after how many it is tried again where a partner
is new."""

_FLOAT32, _FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)
OPERATIONS: dict[str, dict[np.dtype[Any], int]] = {
    "mix": {_FLOAT32: w.MIX_FLOAT32, _FLOAT64: w.MIX_FLOAT64},
    "delta": {_FLOAT32: w.DELTA_FLOAT32, _FLOAT64: w.DELTA_FLOAT64},
}
"""What a round does, by what is asked for and the array's dtype."""


class Posting(Partners):
    """Partners who exchange by rounds."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._doubtful: list[tuple[int, int, UCXError]] = []

    def post(
        self,
        mailbox: Mailbox,
        source: Buffer,
        target: Buffer,
        this: Round,
        ahead: Round | None = None,
        how: str = "mix",
        held: bool = False,
        kick: bool = True,
        whole: bool = False,
    ) -> Round | None:
        """Start the next round of `mailbox` and return.

        source goes to ``this.to``; what ``this.sender`` puts is taken into target: ``"mix"``, or
        ``"copy"``, or ``"delta"`` (target becomes what mixing would add to it). ahead: the
        mailbox's round `Layout.ahead` later, if it is known: its sender gets its credit as soon as
        the slot is free, and may then put before this rank posts. Without it the credit goes out
        when that round is posted, if none has gone out before. All rounds of one mailbox are of
        one kind. whole: chunks that hold a NaN or an infinity are left out: their part of target
        stays, or as a ``"delta"`` becomes zeros, and `left_out` counts them.

        Returns `this`; None where the members have changed and the others have passed this round
        already, so that it is left out.
        """
        return self._post(mailbox, source, target, lambda: (this, ahead), how, held, kick, whole)

    def _post(
        self,
        mailbox: Mailbox,
        source: Buffer,
        target: Buffer,
        parts: Callable[[], tuple[Round, Round | None]],
        how: str,
        held: bool,
        kick: bool,
        whole: bool,
        only: int | None = None,
    ) -> Round | None:
        if self.guest:
            self.enter()
        while True:
            with self._lock:
                self.await_steady()
                if only is not None and self.epoch != only:
                    return None
                mailbox.drop_retired()
                mailbox.alone = mailbox.round < mailbox.base
                if mailbox.alone:
                    mailbox.round += 1
                    return None
                now, later = parts()
                this, ahead = self._among_members(now) or ALONE, self._among_members(later)
                ranks = (this.to, this.sender, ahead.sender if ahead else None)
                missing = [r for r in ranks if r is not None and r not in mailbox.keys]
                if not missing:
                    if self._capped:
                        self._note_use(mailbox, this, ahead)
                    self._post_reached(mailbox, source, target, this, ahead, how, held, kick, whole)
                    return this
                if self._capped:
                    new = [rank for rank in missing if rank not in self.engine.endpoints]
                    self._close_unused(ranks, len(new))
            for rank in missing:
                self.reach(rank, mailbox)

    def _among_members(self, part: Round | None) -> Round | None:
        """`part` without partners that are no members any more."""
        if part is None or all(r is None or r in self.members for r in (part.to, part.sender)):
            return part
        for rank in (part.to, part.sender):
            if rank is not None and not 0 <= rank < self.size:
                raise ArgumentError(f"there is no rank {rank}; ranks are 0 to {self.size - 1}")
        return replace(
            part,
            to=part.to if part.to in self.members else None,
            sender=part.sender if part.sender in self.members else None,
        )

    def _post_reached(
        self,
        mailbox: Mailbox,
        source: Buffer,
        target: Buffer,
        this: Round,
        ahead: Round | None,
        how: str,
        held: bool,
        kick: bool,
        whole: bool,
    ) -> None:
        what = Post(
            source=source.address,
            target=target.address,
            nbytes=source.nbytes,
            to=-1 if this.to is None else this.to,
            sender=-1 if this.sender is None else this.sender,
            operation=w.COPY if how == "copy" else OPERATIONS[how][target.dtype],
            alpha=this.weight,
            source_param=source.param,
            held=int(held),
            next_writer=-1 if ahead is None or ahead.sender is None else ahead.sender,
            whole=int(whole),
            scattered=int(source.scattered),
        )
        self.engine.post(mailbox, what, kick)
        mailbox.in_flight = (source.owner, target.owner)

    def _look_ahead(
        self,
        mailbox: Mailbox,
        source: Buffer,
        target: Buffer,
        schedule: Schedule,
        asked: tuple[object, ...],
        stride: int = 1,
        weight: float = 1.0,
        how: str = "mix",
        held: bool = False,
        whole: bool = False,
        offset: int = 0,
    ) -> None:
        """Lay out the next rounds of `mailbox` in which no rank takes part that is new to it.

        From the second time on that the same is asked for, and not in every round while there are
        new ranks. Round n is that of step ``stride * n + offset``; the rest is as in `post`.
        """
        before, mailbox.itinerary, mailbox.asked = mailbox.asked, None, asked
        begin = max(mailbox.base, mailbox.look_again)
        if before != asked or mailbox.round < begin or self._capped:
            return
        with self._lock:
            self.await_steady()
            first, ahead = mailbox.round, mailbox.layout.ahead
            steps = offset + stride * np.arange(first, first + mailbox.foreseen + ahead)
            found = many(self.living(schedule), np.full(len(steps), self.rank), steps)
            known = self._reached(mailbox, found[0]) & self._reached(mailbox, found[1])
            count = len(steps) if known.all() else int(known.argmin())
            if count < len(steps):
                mailbox.look_again = first + _LOOK_AGAIN
            else:
                mailbox.foreseen = min(4 * mailbox.foreseen, _FORESEEN)
            if count <= ahead:
                return
            what = Post(
                source=source.address,
                target=target.address,
                nbytes=source.nbytes,
                to=-1,
                sender=-1,
                operation=OPERATIONS[how][target.dtype],
                source_param=source.param,
                held=int(held),
                whole=int(whole),
                scattered=int(source.scattered),
            )
            parts = (found[0][:count], found[1][:count], weight * found[2][:count])
            mailbox.ahead.clear()
            # The words, so that no other engine's get their address while this is known by it.
            kept = (source, target, schedule, self.engine.words)
            mailbox.itinerary = Itinerary(
                self.engine.address,
                mailbox.index,
                asked,
                first,
                self.epoch,
                parts,
                ahead,
                what,
                kept,
            )

    def _reached(self, mailbox: Mailbox, ranks: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of `ranks` have exchanged the mailbox's addresses with this one, or are none (-1).

        A schedule of the user's own may say ranks that there are none of: those have not.
        """
        reached = np.zeros(self.size + 2, bool)  # the last two: there is none such, -1
        reached[[-1, *mailbox.keys]] = True
        return reached[np.where((ranks >= -1) & (ranks < self.size), ranks, self.size)]

    def wait(self, mailbox: Mailbox, timeout: float | None = None, launched: bool = False) -> bool:
        """Block until the mailbox's round has ended; drives the engine meanwhile.

        launched: until all of it is enqueued on the mailbox's device (`Staging`), or it has ended.
        Whether it ended whole. False: the members have changed, and it was broken off or left out;
        of the target, whole chunks were mixed or none.
        Raises `ExchangeTimeoutError` after `timeout` seconds (the group's by default), `PeerError`
        when another rank left with an error, `UCXError` when a put failed between living ranks,
        `IntegrityError` when a chunk was not what its checksum says, `DeviceError` when the device
        failed.
        """
        self._check_usable()
        if mailbox.alone:
            return False
        limit = self.timeout if timeout is None else timeout
        start, ask = time.monotonic(), _ASK_S
        while not self.engine.wait(mailbox, min(_SLICE, limit), launched):
            waited = time.monotonic() - start
            self._check_usable()
            if waited >= ask:
                ask *= 2
                self._check_in_step(mailbox)
            if waited >= limit:
                self._fail(self.engine.describe_wait(mailbox, waited, self._living(waited)))
        self._check_usable()
        with self._lock:
            state, epoch = self.engine.table.item(mailbox.index, w.STATE), self.epoch
        if state == w.FAILED:
            row = self.engine.table[mailbox.index]
            status = int(row[w.FAILURE])
            to, sender = int(row[w.TO]), int(row[w.FROM])
            if status == w.CORRUPT:
                self.fail_corrupt(mailbox, sender, int(row[w.ROUND]), int(row[w.MIXED]))
            if status <= w.DEVICE_FAILED:
                self._fail(self.engine.device_error(mailbox))
            where = (
                f"round {int(row[w.ROUND])} of rank {self.rank}, with ranks {to} (to) and {sender} "
                "(from)"
            )
            error = UCXError(ops.PUT, status, status_name(status), where)
            self._doubt((to, sender), epoch, error)
        return bool(state == w.DONE or (launched and state == w.ACTIVE))

    def ended(self, owner: str) -> None:
        """No more rounds of `owner`'s mailboxes, all of which have ended: told to who asks."""
        if self._warden is not None:
            boxes = (each for each in self.engine.mailboxes if each.owner == owner)
            last = {each.index: each.round - 1 for each in boxes}
            self._warden.offer(f"ended {owner}", json.dumps(last).encode())

    def _check_in_step(self, mailbox: Mailbox) -> None:
        """`OutOfStepError` if a partner has ended without the round that is under way here."""
        item, index = self.engine.table.item, mailbox.index
        for rank in {item(index, w.TO), item(index, w.FROM)}:
            if self._warden is None or rank == self.rank or rank not in self.members:
                continue
            with suppress(ExchangeTimeoutError):
                found = self._warden.fetch(rank, f"ended {mailbox.owner}", _ANSWER_S)
                last = json.loads(found).get(str(index)) if found else None
                if last is not None and last < item(index, w.ROUND):
                    self._fail(
                        OutOfStepError(
                            f"rank {rank} has ended its training ({mailbox.owner}), and rank "
                            f"{self.rank} waits for its {mailbox.what or 'part'} of a step more. "
                            "All ranks take equally many steps: DistributedSampler(drop_last="
                            "True), gossip.shuffled() or gossip.skip_step() keep them so",
                            rank,
                        )
                    )

    def _living(self, waited: float) -> tuple[int, ...]:
        """Ranks that were heard of within the last `waited` seconds, for sure."""
        heard = self._warden is not None and waited > self._dead_after
        return self.members if heard else ()

    def fail_corrupt(self, mailbox: Mailbox, sender: int, number: int, chunk: int) -> NoReturn:
        """Break off: `chunk` of round `number`, put by `sender`, is not what its checksum says."""
        self._fail(
            IntegrityError(
                f"rank {self.rank}: chunk {chunk} of round {number} of mailbox {mailbox.index}, "
                f"put by rank {sender}, is not what its checksum says. Somebody wrote to the "
                "array while it was under way, or memory, network or driver changed it",
                sender,
                mailbox.index,
                number,
                chunk,
            )
        )

    def left_out(self, mailbox: Mailbox) -> dict[int, int]:
        """How many chunks the mailbox's last round left out, by the rank whose values they were."""
        item, index = self.engine.table.item, mailbox.index
        came_in, own = item(index, w.SPOILED), item(index, w.OWN_SPOILED)
        if not came_in and not own:
            return {}
        return {item(index, w.FROM): came_in, self.rank: own}

    def run(
        self,
        mailbox: Mailbox,
        buffer: Buffer,
        schedule: Schedule,
        mix: bool = True,
        epoch: int | None = None,
    ) -> bool:
        """All rounds of a finite `schedule` on `buffer`, in place, one after the other. Collective.

        For `Broadcast` and `GlobalAverage`, over the members. The mailbox serves such runs only.
        Whether all ended whole; if not, the members have changed, and the buffer holds anything:
        see `together`. epoch: nothing is posted in another one.
        """
        self.enter()
        with self._lock:
            self.await_steady()
            if epoch is None:
                epoch = self.epoch
            if epoch != self.epoch:
                return False
            mailbox.round = max(mailbox.round, mailbox.base)
            living = self.living(schedule)
        for step in range(living.period):

            def part(step: int = step) -> tuple[Round, None]:
                return living.round(self.rank, step), None

            this = living.round(self.rank, step)
            copy = not mix or this.weight == 1.0
            if this.to is None and this.sender is None:
                with self._lock:
                    self.await_steady()
                    if self.epoch != epoch:
                        return False
                    mailbox.round += 1
                continue
            how = "copy" if copy else "mix"
            posted = self._post(mailbox, buffer, buffer, part, how, False, False, False, only=epoch)
            if posted is None or not self.wait(mailbox):
                return False
        return self.epoch == epoch

    def post_scheduled(
        self,
        mailbox: Mailbox,
        source: Buffer,
        target: Buffer,
        schedule: Schedule,
        step: int,
        stride: int = 1,
        weight: float = 1.0,
        how: str = "mix",
        held: bool = False,
        kick: bool = True,
        foresee: bool = True,
        whole: bool = False,
    ) -> Round | None:
        """`post` the round of `step` on a mailbox that serves every `stride`-th step of `schedule`.

        The schedule is laid over the members. weight: factor on its weights. foresee: steps follow
        each other, so that credits can go out ahead.
        """

        def parts() -> tuple[Round, Round | None]:
            living = self.living(schedule)
            this = mailbox.ahead.pop(step, None) or living.round(self.rank, step)
            ahead = None
            if foresee:
                later = step + stride * mailbox.layout.ahead
                ahead = mailbox.ahead[later] = living.round(self.rank, later)
            return (this if weight == 1.0 else replace(this, weight=weight * this.weight)), ahead

        return self._post(mailbox, source, target, parts, how, held, kick, whole)

    def post_step(
        self,
        mailbox: Mailbox,
        source: Buffer,
        target: Buffer,
        schedule: Schedule,
        step: int,
        stride: int = 1,
        weight: float = 1.0,
        how: str = "mix",
        held: bool = False,
        whole: bool = False,
    ) -> bool:
        """As `post_scheduled`, for a stream that posts the same each time; False for None.

        The rounds to come are laid out ahead, and cost one call each.
        """
        offset = step - stride * mailbox.round
        same = (id(source), id(target), id(schedule), stride, weight, how, held, whole, offset)
        plan: Itinerary | None = mailbox.itinerary
        if plan is not None and plan.asked == same:
            with self._lock:
                steady = self._frozen is None and plan.epoch == self.epoch
                usable = steady and self._failure is None and not self._closed
                if usable and self.engine.post_next(plan.address) == itinerary.POSTED:
                    return True
        posted = self.post_scheduled(
            mailbox, source, target, schedule, step, stride, weight, how, held, whole=whole
        )
        if posted is not None:
            self._look_ahead(
                mailbox,
                source,
                target,
                schedule,
                same,
                stride,
                weight,
                how,
                held,
                whole,
                offset,
            )
        return posted is not None

    def grant(self, mailbox: Mailbox, rank: int, number: int) -> None:
        """Tell `rank` that it may put all rounds of `mailbox` below `number` here.

        Where that fails, `rank` may be dead: the next `look_around` finds out.
        """
        words, table = self.engine.words, self.engine.table
        credit = number * mailbox.layout.chunks
        status = self.engine.exclusively(
            lambda: credits.grant(words, table[mailbox.index], rank, credit)
        )
        if status < 0:
            error = UCXError(ops.SEND, int(status), status_name(int(status)), "a credit")
            self._doubtful.append((rank, self.epoch, error))

    def look_around(self) -> None:
        """`PeerError` if another rank left with an error: for whoever waits for nobody.

        `UCXError` where a credit could not be sent to a rank that lives.
        """
        self._check_usable()
        while self._doubtful:
            rank, epoch, error = self._doubtful.pop()
            if epoch == self.epoch:
                self._doubt((rank,), epoch, error)
