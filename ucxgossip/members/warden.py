"""What ranks ask of each other by name, and where all of them meet.

A warden is five classes, each standing on the one before: `Switchboard` (the thread and its
connections), `Watch` (who lives), `Trial` (who can be reached), `Porter` (who comes in) and
`Warden` (what members tell each other). A meeting is the leader's to hold: all send it their
blobs, it merges them and tells all what came of it. Whoever missed that because the leader died
finds the result in the next view.

Rejected: one class for all of it (a thousand lines); meetings as an object beside the watch (each
change of views, each message and the end of the job would have to be told to it).
"""

from __future__ import annotations

import base64
import itertools
import json
import time
from collections.abc import Callable, Sequence

from ucxgossip import forks
from ucxgossip.errors import ExchangeTimeoutError, MismatchError, RankMissingError
from ucxgossip.members.agreement import Facts, Message, View
from ucxgossip.members.porter import Porter
from ucxgossip.members.watch import Setup
from ucxgossip.trust import Seal

_ABSENT_S = 1.0
_LAST_WORD_S = 0.5

_RESULTS = 64
_TOGETHER, _OUT_OF_STEP = b"=", b"!"

Merge = Callable[[list[bytes], Sequence[int]], bytes]


class Warden(Porter):
    """This rank's watch over the others.

    seal: signs all that goes between wardens. freeze, install, expelled: see `Agreement`; called
    in the warden's thread. aborted: called with (rank, reason) when another rank ends the job.
    dead_after: seconds of silence, at least, after which a rank is taken for dead.
    """

    def __init__(
        self,
        rank: int,
        host: str,
        seal: Seal,
        dead_after: float,
        freeze: Callable[[int], Facts],
        install: Callable[[View], None],
        expelled: Callable[[str], None],
        aborted: Callable[[int, str], None],
    ) -> None:
        super().__init__(Setup(rank, host, seal, dead_after, freeze, install, expelled, aborted))
        self._offers: dict[str, tuple[int | None, bytes]] = {}
        self._answerers: dict[str, Callable[[str], bytes | None]] = {"absent": self._absent}
        self._answerers["ended"] = self._ended
        self._wanted: list[tuple[int, Message]] = []
        self._questions = itertools.count()
        self._answers: dict[str, bytes | None] = {}
        self._arrivals: dict[tuple[int, int], dict[int, tuple[str, bytes]]] = {}
        self._merges: dict[int, Merge] = {}
        self._results: dict[int, bytes] = {}
        self._passed = 0
        self._handlers.update(
            {
                "want": self._on_want,
                "have": self._on_have,
                "arrive": self._arrive,
                "release": self._on_release,
            }
        )
        forks.watch(self)

    # --- what the group calls, in its own threads ----------------------------------------------

    @property
    def passed(self) -> tuple[int, str]:
        """How many meetings this rank has passed, and in hexadecimal what the last one gave."""
        with self._changed:
            return self._passed, self._results.get(self._passed, b"").hex()

    def offer(self, name: str, blob: bytes, epoch: int | None = None) -> None:
        """Give `blob` to whoever asks this rank for `name`, until something else is offered.

        epoch: until a later one than this is in force.
        """

        def command() -> None:
            self._offers[name] = epoch, blob
            self._serve()

        self._do(command)

    def answer(self, kind: str, answerer: Callable[[str], bytes | None]) -> None:
        """Let `answerer` answer what is asked for by names that begin with the word `kind`.

        It is called with the name in the warden's thread, and again if it returned None.
        """
        self._do(lambda: self._answerers.update({kind: answerer}))

    def fetch(self, rank: int, name: str, timeout: float) -> bytes | None:
        """What `rank` offers as `name`; None if it is no member, or the view changes before."""
        epoch, key = self.view.epoch, f"{next(self._questions)} {name}"
        with self._changed:
            self._answers[key] = None
        message = {"kind": "want", "epoch": epoch, "name": name, "key": key}
        self._do(lambda: self._send(rank, message))
        try:
            found: bytes | None = self._wait(
                lambda: self._answers[key],
                lambda: self.view.epoch != epoch or rank not in self.reachable,
                timeout,
                rank,
                f"to tell where its {name!r} is",
            )
            return found
        finally:
            with self._changed:
                del self._answers[key]

    def meet(
        self, epoch: int, name: str, blob: bytes, merge: Merge, timeout: float
    ) -> bytes | None:
        """Meet all members: what `merge` makes of their blobs, in the order of ranks. Collective.

        merge: called with the blobs and their ranks, on the leader alone. None: the view changed,
        and all meet again. Raises `RankMissingError` when the time is up, `MismatchError` where
        ranks meet for different things.
        """
        number = self._passed + 1

        def arrive() -> None:
            encoded = base64.b64encode(blob).decode()
            message = {"epoch": epoch, "number": number, "name": name, "blob": encoded}
            if self.view.leader == self.rank:
                self._merges[number] = merge
                self._arrive(self.rank, message)
            else:
                self._send(self.view.leader, {"kind": "arrive", **message})

        if self.view.epoch == epoch:
            self._do(arrive)
        start = time.monotonic()
        try:
            found: bytes | None = self._wait(
                lambda: self._results.get(number),
                lambda: self.view.epoch != epoch,
                timeout,
                self.view.leader,
                f"at {name!r}",
            )
        except ExchangeTimeoutError:
            absent = self._ask_who_is_absent(epoch, number)
            raise RankMissingError(
                f"rank {self.rank} waited {time.monotonic() - start:.1f} s for rank"
                f"{'s' if len(absent) != 1 else ''} {', '.join(map(str, absent))} at {name!r}. "
                "Do all ranks make the same calls, in the same order?",
                absent,
            ) from None
        if found is None and self._over:
            # Whoever ended the job may have done so because of what all are about to be told.
            with self._changed:
                self._changed.wait_for(lambda: number in self._results, _LAST_WORD_S)
                found = self._results.get(number)
        if found is None:
            return None
        if found[:1] == _OUT_OF_STEP:
            raise MismatchError(found[1:].decode())
        return found[1:]

    def _ask_who_is_absent(self, epoch: int, number: int) -> tuple[int, ...]:
        leader = self.view.leader
        try:
            blob = self.fetch(leader, f"absent {epoch} {number}", _ABSENT_S)
        except ExchangeTimeoutError:
            blob = None
        return (leader,) if blob is None else tuple(json.loads(blob))

    # --- what the watch brings about -----------------------------------------------------------

    def _look(self, now: float) -> None:
        if self._wanted:
            self._serve()
        super()._look(now)

    def _install(self, view: View) -> None:
        if view.facts.passed > self._passed:  # the last leader died before it could tell this rank
            self._passed_now(view.facts.passed, bytes.fromhex(view.facts.result))
        self._arrivals = {key: who for key, who in self._arrivals.items() if key[0] >= view.epoch}
        self._offers = {
            name: (epoch, blob)
            for name, (epoch, blob) in self._offers.items()
            if epoch is None or epoch >= view.epoch
        }
        super()._install(view)
        self._release_arrived()

    # --- messages ------------------------------------------------------------------------------

    def _on_want(self, sender: int, message: Message) -> None:
        self._wanted.append((sender, message))
        self._serve()

    def _serve(self) -> None:
        waiting, self._wanted = self._wanted, []
        for sender, message in waiting:
            if int(message["epoch"]) < self.view.epoch and sender in self.view.members:
                continue  # it asks no longer, once it hears of this view; a guest does not
            name = str(message["name"])
            answerer = self._answerers.get(name.partition(" ")[0])
            offered = self._offers.get(name, (None, None))[1]
            blob = offered if answerer is None else answerer(name)
            if blob is None:
                self._wanted.append((sender, message))
            else:
                answer = {"key": message["key"], "blob": base64.b64encode(blob).decode()}
                self._send(sender, {"kind": "have", **answer})

    def _on_have(self, _: int, message: Message) -> None:
        with self._changed:
            if message["key"] in self._answers:  # else nobody waits for it any more
                self._answers[message["key"]] = base64.b64decode(message["blob"])
                self._changed.notify_all()

    def _ended(self, name: str) -> bytes:
        """What is offered as `name`, or nothing: at once, since a rank that waits asks."""
        return self._offers.get(name, (None, b""))[1]

    def _absent(self, name: str) -> bytes:
        _, epoch, number = name.split()
        here = self._arrivals.get((int(epoch), int(number)), {})
        return json.dumps([rank for rank in self.view.members if rank not in here]).encode()

    def _arrive(self, sender: int, message: Message) -> None:
        key = int(message["epoch"]), int(message["number"])
        blob = base64.b64decode(message["blob"])
        self._arrivals.setdefault(key, {})[sender] = (str(message["name"]), blob)
        self._release_arrived()

    def _release_arrived(self) -> None:
        members = self.view.members
        for (epoch, number), here in list(self._arrivals.items()):
            if epoch != self.view.epoch or not set(members) <= set(here):
                continue
            if self._door.guests and here[members[0]][0] == self._door.kind:
                self._door.open()
                if self._agreement.changing or self.view.epoch != epoch:
                    return  # they meet again, with the guests
            del self._arrivals[epoch, number]
            names = [here[rank][0] for rank in members]
            other = next((rank for rank in members if here[rank][0] != names[0]), None)
            if other is None:
                blobs = [here[rank][1] for rank in members]
                result = _TOGETHER + self._merges[number](blobs, members)
            else:
                text = (
                    f"rank {members[0]} is at {names[0]!r}, rank {other} at {here[other][0]!r}; "
                    "all ranks must make the same calls, in the same order"
                )
                result = _OUT_OF_STEP + text.encode()
            encoded = base64.b64encode(result).decode()
            for rank in members:
                if rank != self.rank:
                    self._send(rank, {"kind": "release", "number": number, "result": encoded})
            self._passed_now(number, result)

    def _on_release(self, _: int, message: Message) -> None:
        self._passed_now(int(message["number"]), base64.b64decode(message["result"]))

    def _passed_now(self, number: int, result: bytes) -> None:
        self._merges.pop(number, None)
        with self._changed:
            self._passed = max(self._passed, number)
            self._results[number] = result
            self._results.pop(number - _RESULTS, None)
            self._changed.notify_all()
