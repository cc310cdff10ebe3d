"""How the living agree on who lives: views, numbered by epoch, changed by all who are in the next.

A *view* is an epoch number and the ranks that are members in it. Every member installs the same
views in the same order, or is expelled. A rank that suspects another tells the leader, the lowest
rank that it does not suspect; the leader

1. asks the other members to *prepare* epoch e + 1: each freezes its rounds (what is under way is
   broken off, new endpoints are made) and answers *ready* with its `Facts`;
2. when all of them are ready, sends the *commit*: the members, and from which round of each
   mailbox on they exchange again, the largest that any had reached.

Who dies meanwhile is left out of a new attempt, with a higher ballot. If the leader dies, the next
one does the same; a member that has the commit already answers with it, and since every attempt
needs an answer of every living member, no commit that a living rank has seen is passed over.

Who is silent may be alive beyond a broken network. Ranks go on only if they are more than half of
the last view (or half, with its lowest rank); those whose death is *proven*, by a host that
refuses connections to a process that is gone, count on no side. The others stop with an error.

Rejected: consensus by majority (Raft, Paxos), which would not survive the death of half of the
ranks, where a refused connection leaves no doubt; the job's store as arbiter, which dies with
rank 0 where no launcher holds it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]


@dataclass(frozen=True)
class Facts:
    """What a member brings to a new view.

    rounds: the number of the next round of each of its mailboxes. passed: the meetings (see
    `Warden.meet`) that it has passed, and result, in hexadecimal, what the last one gave. taken:
    what it has read from channels, as (rank, mailbox, messages). steps: those of each model that
    it trains, which are the same on all members when guests come in.
    """

    rounds: tuple[int, ...] = ()
    passed: int = 0
    result: str = ""
    taken: tuple[tuple[int, int, int], ...] = ()
    steps: tuple[int, ...] = ()

    @classmethod
    def parse(cls, message: Mapping[str, Any]) -> Facts:
        """Facts out of a message."""
        return cls(
            tuple(map(int, message["rounds"])),
            int(message["passed"]),
            str(message["result"]),
            tuple((int(rank), int(box), int(n)) for rank, box, n in message["taken"]),
            tuple(map(int, message["steps"])),
        )

    def message(self) -> Message:
        """Facts as JSON values."""
        return {
            "rounds": list(self.rounds),
            "passed": self.passed,
            "result": self.result,
            "taken": list(self.taken),
            "steps": list(self.steps),
        }

    @classmethod
    def together(cls, all_facts: Sequence[Facts]) -> Facts:
        """What all members start from: the furthest that any has got."""
        length = max(len(facts.rounds) for facts in all_facts)
        rounds = [0] * length
        for facts in all_facts:
            for index, number in enumerate(facts.rounds):
                rounds[index] = max(rounds[index], number)
        taken = tuple(entry for facts in all_facts for entry in facts.taken)
        last = max(all_facts, key=lambda facts: facts.passed)
        steps = max(facts.steps for facts in all_facts)
        return cls(tuple(rounds), last.passed, last.result, taken, steps)


@dataclass(frozen=True)
class View:
    """The members of one epoch, ascending, and what they start it from."""

    epoch: int
    members: tuple[int, ...]
    facts: Facts = Facts()
    ballot: tuple[int, int] = (0, -1)

    @property
    def leader(self) -> int:
        """The lowest member."""
        return self.members[0]

    @classmethod
    def parse(cls, message: Mapping[str, Any]) -> View:
        """A view out of a commit message."""
        attempt, leader = message["ballot"]
        return cls(
            int(message["epoch"]),
            tuple(sorted(map(int, message["members"]))),
            Facts.parse(message["facts"]),
            (int(attempt), int(leader)),
        )

    def message(self) -> Message:
        """The commit message of this view."""
        return {
            "kind": "commit",
            "epoch": self.epoch,
            "members": list(self.members),
            "facts": self.facts.message(),
            "ballot": list(self.ballot),
        }


class Agreement:
    """One rank's part. Not thread-safe; nothing in it waits.

    send: hands a message to a rank's link; it may call `suspect` before it returns. freeze: breaks
    off this rank's rounds for the coming epoch and gives its facts; the same again when asked for
    the same epoch. install: takes up a view. expelled: called with the reason when the others go
    on without this rank.
    """

    def __init__(
        self,
        rank: int,
        view: View,
        send: Callable[[int, Message], None],
        freeze: Callable[[int], Facts],
        install: Callable[[View], None],
        expelled: Callable[[str], None],
    ) -> None:
        self.rank, self.view = rank, view
        self.suspects: dict[int, bool] = {}
        self.guests: set[int] = set()
        self.contacts: dict[int, Any] = {}
        self._send, self._freeze, self._install, self._expelled = send, freeze, install, expelled
        self._promised = (0, -1)
        self._attempt = 0
        self._proposal: tuple[int, ...] = ()
        self._ready: dict[int, Facts] = {}
        self._over = False
        self._busy = False

    @property
    def changing(self) -> bool:
        """Whether a change of view is under way as far as this rank knows."""
        return bool(self.suspects) or self._promised > (0, -1)

    @property
    def inside(self) -> bool:
        """Whether this rank is a member; else it is a guest that would like to be."""
        return self.rank in self.view.members

    def suspect(self, rank: int, proven: bool) -> None:
        """`rank` is silent, or (proven) its process is known to be gone."""
        if self._over or not self.inside or rank == self.rank or rank not in self.view.members:
            return
        news = rank not in self.suspects or (proven and not self.suspects[rank])
        if not news:
            return
        self.suspects[rank] = proven or self.suspects.get(rank, False)
        self._act()

    def admit(self, rank: int) -> None:
        """Guest `rank`, whose contact is known, asks to come in; for the leader to decide."""
        if self._over or not self.inside or rank in self.view.members or rank in self.guests:
            return
        self.guests.add(rank)
        self._act()

    def turn_away(self, rank: int) -> None:
        """Guest `rank` is gone: go on without it."""
        if rank in self.guests:
            self.guests.discard(rank)
            self._act()

    def retry(self) -> None:
        """Say again what may have been lost with a connection: call it while `changing` lasts.

        A guest that is not ready by then has to ask again.
        """
        if not self._over:
            self.guests.difference_update(set(self._proposal).difference(self._ready))
            self._act()

    @property
    def _outdated(self) -> bool:
        """Whether the proposal under way counts on a guest that is gone."""
        return any(r not in self.view.members and r not in self.guests for r in self._proposal)

    def _act(self) -> None:
        """Propose the living and the guests, or tell who will. Sending may bring new suspects."""
        if self._busy:
            return
        self._busy = True
        try:
            known: object = None
            while not self._over and known != (self.suspects, self.guests):
                if not (self.suspects or self.guests or self._outdated):
                    break
                known = dict(self.suspects), set(self.guests)
                living = tuple(m for m in self.view.members if m not in self.suspects)
                if not self._may_go_on(living):
                    return
                if living[0] == self.rank:
                    self._propose(living)
                    continue
                self.guests.clear()
                for rank, proven in list(self.suspects.items()):
                    self._send(
                        living[0],
                        {
                            "kind": "suspect",
                            "epoch": self.view.epoch,
                            "rank": rank,
                            "proven": proven,
                        },
                    )
        finally:
            self._busy = False
        self._commit_if_ready()

    def _may_go_on(self, living: tuple[int, ...]) -> bool:
        """Whether `living` are enough of the last view; this rank stops if they are not."""
        proven = {rank for rank, sure in self.suspects.items() if sure}
        doubtful = [rank for rank in self.view.members if rank not in proven]
        enough = 2 * len(living) > len(doubtful) or (
            2 * len(living) == len(doubtful) and doubtful[0] in living
        )
        if not enough:
            silent = [rank for rank in doubtful if rank not in living]
            self._stop(
                f"ranks {silent} are silent, and the {len(living)} that rank {self.rank} can hear "
                f"are not the greater part of {len(doubtful)}: the others may go on without them. "
                "Is the network whole?"
            )
        return enough

    def _stop(self, reason: str) -> None:
        self._over = True
        self._expelled(reason)

    def _propose(self, living: tuple[int, ...]) -> None:
        """Ask `living` and the guests to freeze."""
        self._attempt = max(self._attempt, self._promised[0]) + 1
        ballot = (self._attempt, self.rank)
        epoch = self.view.epoch + 1
        self._promised, self._proposal = ballot, tuple(sorted({*living, *self.guests}))
        self._ready = {self.rank: self._freeze(epoch)}
        contacts = [[rank, self.contacts.get(rank)] for rank in self._proposal]
        for rank in self._proposal:
            if rank != self.rank:
                self._send(
                    rank,
                    {
                        "kind": "prepare",
                        "epoch": epoch,
                        "ballot": list(ballot),
                        "dead": sorted(self.suspects.items()),
                        "view": self.view.message(),
                        "contacts": contacts,
                    },
                )

    def receive(self, sender: int, message: Mapping[str, Any]) -> None:
        """Take in what `sender` sent; messages of other kinds are not for here."""
        if self._over:
            return
        handler = {
            "suspect": self._on_suspect,
            "prepare": self._on_prepare,
            "ready": self._on_ready,
            "behind": self._on_behind,
            "commit": self._on_commit,
        }.get(str(message["kind"]))
        if handler is not None:
            handler(sender, message)

    def _on_suspect(self, sender: int, message: Mapping[str, Any]) -> None:
        if int(message["epoch"]) < self.view.epoch or sender not in self.view.members:
            self._send(sender, self.view.message())
        else:
            self.suspect(int(message["rank"]), bool(message["proven"]))

    def _on_prepare(self, sender: int, message: Mapping[str, Any]) -> None:
        epoch = int(message["epoch"])
        attempt, leader = message["ballot"]
        ballot = (int(attempt), int(leader))
        if epoch > self.view.epoch + 1:  # the commit before it is still on its way here
            self._on_commit(sender, message["view"])
        if epoch <= self.view.epoch or sender not in self.view.members:
            self._send(sender, self.view.message())
            return
        if ballot < self._promised:  # perhaps to one that is dead by now
            self._send(sender, {"kind": "behind", "epoch": epoch, "attempt": self._promised[0]})
            return
        self._promised, self._proposal = ballot, ()
        for rank, contact in message["contacts"]:
            if int(rank) not in self.view.members or not self.inside:
                self.contacts[int(rank)] = contact
        for rank, proven in message["dead"]:
            if int(rank) in self.view.members and int(rank) != self.rank:
                self.suspects[int(rank)] = bool(proven) or self.suspects.get(int(rank), False)
        self.suspects.pop(sender, None)  # it lives; whoever finds it dead will say so again
        facts = self._freeze(epoch)
        self._send(
            sender,
            {
                "kind": "ready",
                "epoch": epoch,
                "ballot": [*ballot],
                "facts": facts.message(),
            },
        )

    def _on_behind(self, sender: int, message: Mapping[str, Any]) -> None:
        """A member has promised a higher ballot: try again with one that is higher still."""
        attempt, current = int(message["attempt"]), int(message["epoch"]) == self.view.epoch + 1
        if self._proposal and current and attempt >= self._attempt:
            self._attempt = attempt
            self._act()

    def _on_ready(self, sender: int, message: Mapping[str, Any]) -> None:
        attempt, leader = message["ballot"]
        current = (int(attempt), int(leader)) == self._promised and int(leader) == self.rank
        if current and int(message["epoch"]) == self.view.epoch + 1 and sender in self._proposal:
            self._ready[sender] = Facts.parse(message["facts"])
            self._commit_if_ready()

    def _commit_if_ready(self) -> None:
        if self._over or self._busy or not self._proposal:
            return
        if set(self._ready) != set(self._proposal):
            return
        facts = Facts.together([self._ready[rank] for rank in self._proposal])
        view = View(self.view.epoch + 1, self._proposal, facts, self._promised)
        before = self.view.members
        self._proposal = ()
        self._take(view)
        others = [rank for rank in view.members if rank != self.rank]
        witnesses = [rank for rank in others if rank in before]
        for rank in witnesses or others:
            self._send(rank, view.message())

    def _on_commit(self, sender: int, message: Mapping[str, Any]) -> None:
        view = View.parse(message)
        if view.epoch <= self.view.epoch:
            return
        if self.rank not in view.members:
            if not self.inside:
                self.view, self._promised = view, (0, -1)
                return
            self._stop(
                f"rank {self.rank} was silent for too long, and ranks {list(view.members)} go on "
                f"without it (epoch {view.epoch}). Was it stopped, or cut off from the network? "
                "Start it again to let it join"
            )
            return
        came = [] if not self.inside else [r for r in view.members if r not in self.view.members]
        self._take(view)
        for rank in came:
            self._send(rank, view.message())

    def _take(self, view: View) -> None:
        self.view = view
        self._promised, self._attempt, self._proposal, self._ready = (0, -1), 0, (), {}
        self.suspects = {r: sure for r, sure in self.suspects.items() if r in view.members}
        self.guests.difference_update(view.members)
        self._install(view)
        if self.suspects or self.guests:
            self._act()
