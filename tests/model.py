"""The protocol of docs/protocol.md as a model small enough to try every order of its steps.

`search` walks through all states that a job of two or three ranks can be in, every atomic step of a
rank and of the network apart, breadth first, and stops at the first state that breaks a promise;
what led there is a shortest counterexample. The network is the adversary: it delays everything as
long as it likes, moves a chunk word by word and in any order, and keeps only what UCX promises:
the puts of one endpoint are ordered by its fences, and by nothing else. Active messages (credits,
bells, small rounds) are ordered against nothing, not even each other. A rank may be killed between
any two steps, or be taken for dead and live on.

The model has the names of the engine (`engine/words.py`, `engine/rounds.py`); `Model.without`
removes a rule, to see that the search finds what the rule is for.

What is checked, in every state:

* a word that is mixed is that of the right rank, round and epoch: nothing torn, stale or foreign;
* no place is read once the credit of its next chunk was given, and none is written without credit;
* no word of a source has changed when the network reads it;
* no endpoint is made to a rank whose put is half received ("Why the first rounds need a credit");
* where no step is left, every round has ended; after a kill, whoever still waits waits for the
  dead one, or for somebody who does; after a regroup, the survivors have ended all rounds.

Not modelled: words shorter than the 8 bytes that a signal is (they are stored at once), UCX's own
state, deadlines, how survivors agree on who is left (the epoch begins for each of them at its own
time, after all have left the old one), and what docs/protocol.md says besides.

Rejected: Promela and spin (a second language to keep true, and no such tool in the test suite);
random walks alone (they do not say when they are done; `walk` takes them where the states are too
many).

``python tests/model.py`` prints how many states each case has.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

IDLE, ACTIVE, LEFT, DEAD = range(4)

RULES = {
    "order": "data before signal",
    "fence": "a fence between data and signal",
    "mix-then-credit": "the credit goes out when a place has been mixed, not when its signal came",
    "largest": "of the credits of one rank the largest counts, not the last",
    "first-credit": "the first rounds wait for a credit, too",
    "sent": "the source belongs to the put until the put has left it",
    "position-in-word": "the signal word names round and chunk",
    "epoch": "the signal word and the headers name the membership epoch",
    "closed": "a new epoch closes the connections of the old one",
    "new-region": "a new epoch has mailboxes of its own",
    "bell": "a bell follows each signal where a put wakes nobody",
    "unseen": "nobody sleeps while a bell's signal is not visible",
    "doze": "the doze word is raised before a rank looks for the last time and sleeps",
    "look": "whoever stores looks at the doze word when the store is in place",
    "answer": "who is asked whether it has a round says so, whatever it is at",
}
"""What `Model.without` can remove."""


@dataclass(frozen=True)
class Model:
    """One case to try.

    words: of each chunk; with two of them, a torn chunk is a state of its own. way: ``"put"`` (a
    network: data, fence, signal), ``"store"`` (shared memory: words are stored by the sender, in
    any order up to the release) or ``"message"`` (each chunk in one active message, on the first of
    which a credit rides). answers: the last message of several asks its target for an answer, and
    the round ends when that has come. sleeping: ranks with nothing to do sleep until a message
    comes; puts wake nobody (RDMA, where a bell follows each; stores, where it does if the target's
    doze word is up).
    failure: ``"kill"`` (the last rank dies at some time) or ``"suspect"`` (it is taken for dead and
    lives on). regroup: the survivors of either begin a new epoch. without: rules of `RULES`
    removed. depth, ring: slots, each of a round or (ring) of a chunk.
    """

    size: int = 2
    rounds: int = 2
    depth: int = 1
    chunks: int = 1
    words: int = 2
    way: str = "put"
    answers: bool = False
    sleeping: bool = False
    failure: str = ""
    regroup: bool = False
    ring: bool = False
    without: frozenset[str] = frozenset()

    @property
    def ahead(self) -> int:
        """As `Layout.ahead`."""
        return 1 if self.ring else max(min(self.depth, 2), self.depth // 4)

    @property
    def places(self) -> int:
        """As `Layout.places`."""
        return self.depth * (1 if self.ring else self.chunks)

    @property
    def victim(self) -> int:
        """The rank that fails."""
        return self.size - 1

    def members(self, epoch: int) -> int:
        """Ranks of an epoch: 0 to this, the victim last."""
        return self.size - epoch

    def to(self, epoch: int, rank: int, number: int) -> int:
        """Whom `rank` puts to in round `number`: dissemination, strides 1, 2, ... in turn."""
        count = self.members(epoch)
        return (rank + 1 + number % (count - 1)) % count

    def sender(self, epoch: int, rank: int, number: int) -> int:
        """Who puts to `rank`."""
        count = self.members(epoch)
        return (rank - 1 - number % (count - 1)) % count

    def put_steps(self) -> tuple[str, ...]:
        """What a sender does for one chunk, in order."""
        if self.way == "message":
            return ("message",)
        steps = ["data", "fence", "signal"]
        if "order" in self.without:
            steps.reverse()
        if "fence" in self.without:
            steps.remove("fence")
        bell = "look" if self.way == "store" else "bell"
        return (*steps, bell) if self.sleeping and "bell" not in self.without else tuple(steps)

    def position(self, number: int, chunk: int) -> int:
        """The number of (round, chunk) among all chunks."""
        return number * self.chunks + chunk

    def place(self, number: int, chunk: int) -> int:
        """Where (round, chunk) stands in a mailbox."""
        return self.position(number, chunk) % self.places

    def word(self, epoch: int, number: int, chunk: int) -> tuple[int, int]:
        """The signal word; without its parts if those rules are removed."""
        return (
            0 if "epoch" in self.without else epoch,
            0 if "position-in-word" in self.without else self.position(number, chunk),
        )


class Rank(NamedTuple):
    """One rank: the mailbox words of the same names, and what it knows."""

    state: int
    epoch: int
    base: int  # first round of this epoch
    round: int  # under way, or the next one
    credited: bool = False  # it needs no credit (without "first-credit")
    put: int = 0  # steps of putting done, all chunks
    sent: int = 0  # chunks that have left
    unanswered: bool = False  # the target has not said that it has the round
    saw: bool = False  # the signal of the chunk to mix has been seen
    mixed: int = 0  # words mixed, all chunks
    credits: tuple[int, ...] = ()  # by rank: chunks below may be put to it
    told: tuple[int, ...] = ()  # what was said to each rank
    looks: frozenset[int] = frozenset()  # whose doze word to look at, after a credit was stored
    endpoints: frozenset[int] = frozenset()
    doze: bool = False
    tired: bool = False  # it has looked, and will raise its doze word and sleep (without "doze")
    asleep: bool = False
    unseen: frozenset[tuple[int, int]] = frozenset()  # bells whose signal was not there


class Region(NamedTuple):
    """A rank's mailbox: what stands in each word of each place.

    A word holds (rank, position, epoch) of the chunk that it is part of.
    """

    epoch: int
    slots: tuple[tuple[int, int, int] | None, ...]
    signals: tuple[tuple[int, int] | None, ...]


class Put(NamedTuple):
    """A put under way; a signal has no `stages`, which are those of each word of a chunk: 0 not
    read yet, 1 read, 2 in place.
    """

    epoch: int
    round: int
    chunk: int
    stages: tuple[int, ...]


class Message(NamedTuple):
    """An active message under way, or a credit that is stored (which wakes nobody).

    read: whether its payload has been read at the source. credit: chunks below may be put. asks:
    for an answer.
    """

    kind: str
    epoch: int
    source: int
    target: int
    round: int
    chunk: int = 0
    read: bool = True
    credit: int = 0
    asks: bool = False


FENCE = None
Queue = tuple[Put | None, ...]
"""Puts of one endpoint, in order, with fences between them; what is in place is gone."""


class State(NamedTuple):
    ranks: tuple[Rank, ...]
    regions: tuple[Region, ...]
    queues: tuple[Queue, ...]  # by source * size + target
    messages: frozenset[Message]
    failed: bool  # the victim was killed, or is suspected


Step = tuple[str, State, str]
"""What happened, the state after it, and the promise that it broke ("": none)."""


def start(model: Model) -> State:
    """Nothing has happened yet."""
    return State(
        tuple(new_rank(model, 0, 0) for _ in range(model.size)),
        tuple(empty_region(model, 0) for _ in range(model.size)),
        ((),) * model.size**2,
        frozenset(),
        False,
    )


def new_rank(model: Model, epoch: int, base: int) -> Rank:
    """A rank that is new in an epoch: nobody has given it a credit, nor it one to anybody."""
    nothing = (0,) * model.size
    return Rank(IDLE, epoch, base, base, credits=nothing, told=nothing)


def empty_region(model: Model, epoch: int) -> Region:
    return Region(
        epoch,
        (None,) * (model.places * model.words),
        (None,) * model.places,
    )


def replaced(items: tuple, index: int, item: object) -> tuple:  # type: ignore[type-arg]
    return (*items[:index], item, *items[index + 1 :])


def with_rank(state: State, rank: int, /, **changes: object) -> State:
    changed = state.ranks[rank]._replace(**changes)  # type: ignore[arg-type]
    return state._replace(ranks=replaced(state.ranks, rank, changed))


def with_queue(state: State, place: int, queue: Queue) -> State:
    """Fences with nothing before them are over."""
    while queue and queue[0] is FENCE:
        queue = queue[1:]
    return state._replace(queues=replaced(state.queues, place, queue))


def sending(state: State, message: Message) -> State:
    return state._replace(messages=state.messages | {message})


# --- what a rank does --------------------------------------------------------------------------


def opened(model: Model, me: Rank, rank: int, position: int) -> bool:
    """Whether the writer of this chunk of `rank` was told that it may put it."""
    return me.told[model.sender(me.epoch, rank, position // model.chunks)] > position


def telling(state: State, rank: int, target: int, credit: int) -> State:
    """From now on `target` may put all chunks below `credit`."""
    told = state.ranks[rank].told
    return with_rank(state, rank, told=replaced(told, target, max(told[target], credit)))


def granting(model: Model, state: State, rank: int, number: int, mixed: int) -> Iterator[Step]:
    """Whoever writes round `number` gets a credit for it, as far as there is room and it has none;
    all chunks below `mixed` are out of the slots."""
    me = state.ranks[rank]
    first, last = model.position(number, 0), model.position(number + 1, 0)
    # Credits that nobody will use are left out: they only multiply the states.
    if number >= model.rounds:
        return
    target, credit = model.sender(me.epoch, rank, number), mixed + model.places
    told, grain = me.told[target], (model.places + 3) // 4
    if told >= last or credit <= first or (told > first and credit < min(last, told + grain)):
        return
    after = telling(state, rank, target, credit)
    if model.way == "store":
        after = sending(after, Message("store", me.epoch, rank, target, 0, credit=credit))
        if model.sleeping and "bell" not in model.without:
            after = with_rank(after, rank, looks=me.looks | {target})
    else:
        after = sending(after, Message("credit", me.epoch, rank, target, 0, credit=credit))
    yield f"{rank}: credit {credit} for {target}", after, ""


def looking(model: Model, state: State, rank: int) -> Iterator[Step]:
    """After a credit was stored: wake its owner, if that one dozes."""
    me = state.ranks[rank]
    for target in me.looks:
        stored = [m for m in state.messages if (m.source, m.target) == (rank, target)]
        if "look" not in model.without and any(m.kind == "store" for m in stored):
            continue
        after = with_rank(state, rank, looks=me.looks - {target})
        if state.ranks[target].doze:
            credit = me.told[target]
            after = sending(after, Message("credit", me.epoch, rank, target, 0, credit=credit))
        yield f"{rank}: look whether {target} dozes", after, ""


def begin(model: Model, state: State, rank: int) -> Iterator[Step]:
    """Endpoints to all whom the round concerns, then `post`."""
    me = state.ranks[rank]
    n = me.round
    if n == model.rounds:
        return
    for other in (
        model.to(me.epoch, rank, n),
        model.sender(me.epoch, rank, n),
        model.sender(me.epoch, rank, n + model.ahead),
    ):
        if other not in me.endpoints:
            half = any(
                put is not FENCE and put.stages.count(2) > 0
                for put in state.queues[other * model.size + rank]
            )
            fault = f"rank {rank} connects to {other}, whose put is half received"
            after = with_rank(state, rank, endpoints=me.endpoints | {other})
            yield f"{rank}: connect to {other}", after, fault if half and model.way == "put" else ""
            return
    first = n < me.base + model.depth and not model.ring
    yield (
        f"{rank}: post round {n}",
        with_rank(
            state,
            rank,
            state=ACTIVE,
            credited=first and "first-credit" in model.without,
            put=0,
            sent=0,
            unanswered=False,
            saw=False,
            mixed=0,
        ),
        "",
    )


def putting(model: Model, state: State, rank: int) -> Iterator[Step]:
    """One step of the next chunk's way out: data, fence, signal, bell."""
    me = state.ranks[rank]
    steps = model.put_steps()
    chunk, step = divmod(me.put, len(steps))
    if chunk == model.chunks:
        return
    n, to = me.round, model.to(me.epoch, rank, me.round)
    if step == 0 and not me.credited and me.credits[to] <= model.position(n, chunk):
        return
    place = rank * model.size + to
    queue = state.queues[place]
    what = steps[step]
    after = with_rank(state, rank, put=me.put + 1)
    if what == "data":
        # Stores are the sender's own: it has read the source when it has stored.
        stages = (1 if model.way == "store" else 0,) * model.words
        after = with_queue(after, place, (*queue, Put(me.epoch, n, chunk, stages)))
    elif what == "fence":
        after = with_queue(after, place, (*queue, FENCE))
    elif what == "signal":
        after = with_queue(after, place, (*queue, Put(me.epoch, n, chunk, ())))
    elif what == "look":
        if "look" not in model.without and queue:
            return  # a full fence: the signal is in place first
        if state.ranks[to].doze:
            after = sending(after, Message("bell", me.epoch, rank, to, n, chunk))
    elif what == "bell":
        after = sending(after, Message("bell", me.epoch, rank, to, n, chunk))
    else:
        credit = 0 if chunk else model.position(n, 0) + model.places
        after = telling(after, rank, to, credit)
        asks = model.answers and 0 < chunk == model.chunks - 1
        after = with_rank(after, rank, unanswered=asks)
        message = Message("data", me.epoch, rank, to, n, chunk, False, credit, asks)
        after = sending(after, message)
    yield f"{rank}: {what} of chunk {chunk}, round {n}", after, ""


def has_left(model: Model, state: State, rank: int, chunk: int) -> bool:
    """Whether the put of this chunk no longer needs its source (and its signal is put, too)."""
    me = state.ranks[rank]
    posted = (chunk + 1) * len(model.put_steps()) <= me.put
    if not posted or "sent" in model.without:
        return posted
    if model.way == "message":
        own = [m for m in state.messages if m.source == rank and not m.read]
        return not any((m.round, m.chunk) == (me.round, chunk) for m in own)
    queue = state.queues[rank * model.size + model.to(me.epoch, rank, me.round)]
    return not any(
        put is not FENCE and (put.round, put.chunk) == (me.round, chunk) and 0 in put.stages
        for put in queue
    )


def mixing(model: Model, state: State, rank: int) -> Iterator[Step]:
    """See the signal of the next chunk, mix it word by word."""
    me = state.ranks[rank]
    chunk, word = divmod(me.mixed, model.words)
    if chunk == model.chunks or me.sent <= chunk:
        return
    n, region, place = me.round, state.regions[rank], model.place(me.round, chunk)
    if not me.saw:
        if region.signals[place] == model.word(me.epoch, n, chunk):
            after = with_rank(state, rank, saw=True)
            yield f"{rank}: see signal of chunk {chunk}, round {n}", after, ""
        return
    after = with_rank(state, rank, mixed=me.mixed + 1, saw=word + 1 < model.words)
    found = region.slots[place * model.words + word]
    expected = (model.sender(me.epoch, rank, n), model.position(n, chunk), me.epoch)
    fault = ""
    if found != expected:
        fault = f"rank {rank} mixed {found} where {expected} (rank, position, epoch) was due"
    elif opened(model, me, rank, model.position(n, chunk) + model.places):
        fault = f"rank {rank} read place {place} after its credit was given"
    yield f"{rank}: mix word {word} of chunk {chunk}, round {n}", after, fault


def ending(model: Model, state: State, rank: int) -> Iterator[Step]:
    """The credit for whoever puts `ahead` rounds later, then the end of this one."""
    me = state.ranks[rank]
    n = me.round
    mixed = me.mixed == model.chunks * model.words
    done = me.sent == model.chunks and mixed and not me.unanswered
    early = "mix-then-credit" in model.without and me.saw
    granted = []
    if done or early:
        ended = model.position(n + 1, 0)
        granted = list(granting(model, state, rank, n + model.ahead, ended))
    if granted:
        yield from granted
    elif done:
        after = with_rank(state, rank, state=IDLE, round=n + 1, credited=False)
        yield f"{rank}: round {n} ends", after, ""


def rank_steps(model: Model, state: State, rank: int) -> Iterator[Step]:
    """All that `rank` can do next."""
    me = state.ranks[rank]
    if me.looks:
        yield from looking(model, state, rank)
    elif me.state == IDLE:
        yield from begin(model, state, rank)
    elif me.state == ACTIVE:
        mixed = model.position(me.round, me.mixed // model.words)
        first = list(granting(model, state, rank, me.round, mixed))
        if first:
            yield from first
            return
        yield from putting(model, state, rank)
        if me.sent < model.chunks and has_left(model, state, rank, me.sent):
            yield f"{rank}: chunk {me.sent} has left", with_rank(state, rank, sent=me.sent + 1), ""
        yield from mixing(model, state, rank)
        yield from ending(model, state, rank)


def sleep_step(model: Model, state: State, rank: int) -> Iterator[Step]:
    """A rank that finds nothing to do sleeps, unless a bell's signal is yet to come.

    Where others store, it raises its doze word and looks once more before.
    """
    me = state.ranks[rank]
    steps = model.put_steps()
    if me.looks or (me.state == ACTIVE and me.put and steps[me.put % len(steps)] == "look"):
        return  # in the middle of a step, at the fence before it looks
    if model.way == "store" and not me.doze and me.state == ACTIVE:
        late = "doze" in model.without
        after = with_rank(state, rank, doze=not late, tired=late)
        yield f"{rank}: {'will doze' if late else 'doze'}", after, ""
        return
    unseen = frozenset(bell for bell in me.unseen if not visible(model, state, rank, *bell))
    if me.state == ACTIVE and (not unseen or "unseen" in model.without):
        yield f"{rank}: sleep", with_rank(state, rank, asleep=True, unseen=frozenset()), ""


def visible(model: Model, state: State, rank: int, number: int, chunk: int) -> bool:
    """Whether this signal has come, or a later chunk's in its place."""
    found = state.regions[rank].signals[model.place(number, chunk)]
    return found is not None and found >= model.word(state.ranks[rank].epoch, number, chunk)


# --- what the network does ---------------------------------------------------------------------


def written(
    model: Model, state: State, source: int, target: int, put: Put, words: tuple[int, ...]
) -> tuple[State, str]:
    """These words of a chunk are put in place; or, for none, its signal."""
    region = state.regions[target]
    if region.epoch != put.epoch and "new-region" not in model.without:
        return state, ""  # a mailbox of an older epoch, which nobody reads any more
    position, place = model.position(put.round, put.chunk), model.place(put.round, put.chunk)
    fault = ""
    if not words:
        word = model.word(put.epoch, put.round, put.chunk)
        region = region._replace(signals=replaced(region.signals, place, word))
    else:
        slots = region.slots
        for each in words:
            payload = (source, position, put.epoch)
            slots = replaced(slots, place * model.words + each, payload)
        if region.epoch != put.epoch:
            fault = f"rank {source} of epoch {put.epoch} wrote into a mailbox of {region.epoch}"
        elif "first-credit" not in model.without and (
            not opened(model, state.ranks[target], target, position)
            or opened(model, state.ranks[target], target, position + model.places)
        ):
            fault = f"rank {source} wrote chunk {position} into place {place} without its credit"
        region = region._replace(slots=slots)
    return state._replace(regions=replaced(state.regions, target, region)), fault


def unchanged(model: Model, state: State, source: int, epoch: int, number: int, word: int) -> bool:
    """Whether word `word` (of all chunks) of the source is still that of round `number`."""
    me = state.ranks[source]
    return me.state == ACTIVE and (me.epoch, me.round) == (epoch, number) and me.mixed <= word


def reachable(model: Model, state: State, target: int, epoch: int, stored: bool) -> bool:
    """Whether what was sent to `target` in `epoch` can arrive now. stored: into shared memory."""
    me = state.ranks[target]
    if epoch > me.epoch:
        return False  # it has yet to enter that epoch
    if stored:
        return True
    return me.state not in (LEFT, DEAD) and (epoch == me.epoch or "closed" in model.without)


def put_steps(model: Model, state: State, source: int, target: int) -> Iterator[Step]:
    """Words of puts of this endpoint are read at the source, or put in place at the target."""
    place, stored = source * model.size + target, model.way == "store"
    queue = state.queues[place]
    fenced = False
    for i, put in enumerate(queue):
        if put is FENCE:
            fenced = True
            continue
        may_arrive = not fenced and reachable(model, state, target, put.epoch, stored)
        if not put.stages and may_arrive:
            after, fault = written(model, state, source, target, put, ())
            after = with_queue(after, place, queue[:i] + queue[i + 1 :])
            yield (
                f"signal of chunk {put.chunk}, round {put.round} arrives at {target}",
                after,
                fault,
            )
        for word, stage in enumerate(put.stages):
            where = f"word {word} of chunk {put.chunk}, round {put.round},"
            moved = put._replace(stages=replaced(put.stages, word, stage + 1))
            if stage == 0 and state.ranks[source].state != DEAD:
                intact = unchanged(
                    model, state, source, put.epoch, put.round, put.chunk * model.words + word
                )
                fault = "" if intact else f"the source of {where} of rank {source} has changed"
                after = with_queue(state, place, replaced(queue, i, moved))
                after = with_rank(after, source, asleep=False)  # completions wake, too
                yield f"{where} leaves {source}", after, fault
            elif stage == 1 and may_arrive:
                after, fault = written(model, state, source, target, put, (word,))
                rest = queue[:i] + queue[i + 1 :]
                whole = moved.stages.count(2) == model.words
                after = with_queue(after, place, rest if whole else replaced(queue, i, moved))
                yield f"{where} arrives at {target}", after, fault


def delivered(model: Model, state: State, message: Message) -> tuple[State, str]:
    """A handler runs at the target (engine/handlers.py)."""
    target, n, chunk = message.target, message.round, message.chunk
    me = state.ranks[target]
    state = state._replace(messages=state.messages - {message})
    if message.epoch != me.epoch and "epoch" not in model.without:
        return state, ""  # counted and dropped
    if message.credit:
        credit = message.credit
        if "largest" not in model.without:
            credit = max(credit, me.credits[message.source])
        credits = replaced(me.credits, message.source, credit)
        state = with_rank(state, target, credits=credits)
    if message.kind == "store":
        return state, ""
    state = with_rank(state, target, asleep=False)
    if message.kind == "credit":
        return state, ""
    if message.kind == "taken":
        mine = me.round == n and model.to(me.epoch, target, n) == message.source
        return with_rank(state, target, unanswered=me.unanswered and not mine), ""
    if message.kind == "bell":
        if visible(model, state, target, n, chunk):
            return state, ""
        return with_rank(state, target, unseen=me.unseen | {(n, chunk)}), ""
    if message.asks and "answer" not in model.without:
        state = sending(state, Message("taken", me.epoch, target, message.source, n))
    put = Put(message.epoch, n, chunk, ())
    state, fault = written(model, state, message.source, target, put, tuple(range(model.words)))
    return written(model, state, message.source, target, put, ())[0], fault


def message_steps(model: Model, state: State) -> Iterator[Step]:
    """An active message's payload is read, or it is handled."""
    for message in sorted(state.messages):  # sets of words have another order in each process
        target = message.target
        number = message.credit if message.kind in ("credit", "store") else message.round
        what = f"{message.kind} {number} from {message.source} to {message.target}"
        if not message.read:
            if state.ranks[message.source].state == DEAD:
                continue
            first = message.chunk * model.words
            intact = unchanged(model, state, message.source, message.epoch, message.round, first)
            after = state._replace(messages=state.messages - {message})
            after = sending(after, message._replace(read=True))
            after = with_rank(after, message.source, asleep=False)
            yield f"{what} leaves", after, "" if intact else f"the source of {what} has changed"
        elif reachable(model, state, target, message.epoch, message.kind == "store"):
            after, fault = delivered(model, state, message)
            yield f"{what} is handled", after, fault


# --- failures and epochs -----------------------------------------------------------------------


def cut_off(state: State, rank: int, model: Model) -> State:
    """The connections of `rank` are gone, with all that was under way on them.

    Stores into shared memory are no messages: they are seen in the end. (A credit that was stored
    is in the old region, which nobody reads any more.)
    """
    if model.way != "store":
        queues = tuple(
            () if rank in divmod(place, model.size) else queue
            for place, queue in enumerate(state.queues)
        )
        state = state._replace(queues=queues)
    return state._replace(
        messages=frozenset(m for m in state.messages if rank not in (m.source, m.target))
    )


def failure_steps(model: Model, state: State) -> Iterator[Step]:
    """The victim is killed or suspected; what it had under way lands, or is lost; a regroup."""
    victim = model.victim
    if not state.failed:
        if model.failure and state.ranks[victim].round < model.rounds:
            after = state._replace(failed=True)
            if model.failure == "kill":
                after = with_rank(after, victim, state=DEAD, asleep=False)
            yield f"{victim}: {model.failure}", after, ""
        return
    if model.failure == "kill":
        after = cut_off(state, victim, model)
        if after != state:
            yield f"connections of {victim} are reset", after, ""
    if not model.regroup:
        return
    survivors = range(victim)
    for rank in survivors:
        me = state.ranks[rank]
        if me.epoch == 0 and me.state != LEFT:
            after = with_rank(state, rank, state=LEFT, round=me.round + (me.state == ACTIVE))
            if "closed" not in model.without:
                after = cut_off(after, rank, model)
            yield f"{rank}: leave the epoch", after, ""
        elif me.state == LEFT and all(
            state.ranks[each].state == LEFT or state.ranks[each].epoch == 1 for each in survivors
        ):
            # Rounds up to the base are solo: each goes on alone to where the first of them is.
            others = [state.ranks[each] for each in survivors]
            base = max(each.base if each.epoch else each.round for each in others)
            region = state.regions[rank]
            if "new-region" not in model.without:
                region = empty_region(model, 1)
            region = region._replace(epoch=1)
            after = state._replace(
                ranks=replaced(state.ranks, rank, new_rank(model, 1, base)),
                regions=replaced(state.regions, rank, region),
            )
            yield f"{rank}: enter epoch 1 at round {base}", after, ""


# --- the search --------------------------------------------------------------------------------


def steps(model: Model, state: State) -> list[Step]:
    """Everything that can happen next."""
    found: list[Step] = []
    for rank, me in enumerate(state.ranks):
        if me.asleep:
            continue
        own = [] if me.tired else list(rank_steps(model, state, rank))
        if own and me.doze:  # whoever moves dozes no more
            own = [(name, with_rank(after, rank, doze=False), fault) for name, after, fault in own]
        if me.tired:
            own = [
                (f"{rank}: sleep", with_rank(state, rank, tired=False, doze=True, asleep=True), "")
            ]
        found += own if own or not model.sleeping else sleep_step(model, state, rank)
    for source in range(model.size):
        for target in range(model.size):
            if state.queues[source * model.size + target]:
                found += put_steps(model, state, source, target)
    found += message_steps(model, state)
    found += failure_steps(model, state)
    return found


def waits_for(model: Model, state: State, rank: int) -> int:
    """Whom the round of `rank` waits for, where it cannot go on."""
    me = state.ranks[rank]
    if me.sent < model.chunks or me.unanswered:
        return model.to(me.epoch, rank, me.round)
    return model.sender(me.epoch, rank, me.round)


def stuck(model: Model, state: State) -> str:
    """Why a state without further steps is no good end; "" if it is one."""
    for rank, me in enumerate(state.ranks):
        if me.state == DEAD or (state.failed and model.regroup and rank == model.victim):
            continue
        seen: list[int] = []
        waiting = rank
        while state.ranks[waiting].state == ACTIVE and waiting not in seen:
            seen.append(waiting)
            waiting = waits_for(model, state, waiting)
        if me.round < model.rounds and state.ranks[waiting].state != DEAD:
            chain = " for ".join(map(str, [*seen, waiting]))
            return f"no step is left, and round {me.round} of rank {rank} has not ended: {chain}"
    return ""


@dataclass
class Result:
    """states: looked at. ends: states without a further step. fault: the promise that is broken
    ("": none), and trace what led there."""

    states: int
    ends: int
    fault: str
    trace: list[str]


def search(model: Model, limit: int = 1_000_000) -> Result:
    """Try every order of steps; at most `limit` states (`RuntimeError` beyond)."""
    unknown = model.without - RULES.keys()
    if unknown:
        raise ValueError(f"no such rule: {', '.join(sorted(unknown))}")
    first = start(model)
    known: dict[State, tuple[State, str] | None] = {first: None}
    frontier = [first]
    ends = 0
    while frontier:
        following: list[State] = []
        for state in frontier:
            found = steps(model, state)
            if not found:
                ends += 1
                if fault := stuck(model, state):
                    return Result(len(known), ends, fault, trace(known, state))
            for name, after, fault in found:
                if fault:
                    return Result(len(known), ends, fault, [*trace(known, state), name])
                if after not in known:
                    known[after] = (state, name)
                    following.append(after)
        frontier = following
        if len(known) > limit:
            raise RuntimeError(f"{model}: more than {limit} states")
    return Result(len(known), ends, "", [])


def walk(model: Model, seed: int, limit: int = 100_000) -> Result:
    """One order of steps at random, to the end: for cases with too many states to try them all."""
    choose = random.Random(seed)
    state, names = start(model), []
    while found := steps(model, state):
        name, state, fault = choose.choice(found)
        names.append(name)
        if fault:
            return Result(len(names), 0, fault, names)
        if len(names) > limit:
            raise RuntimeError(f"{model}: more than {limit} steps")
    return Result(len(names), 1, stuck(model, state), names)


def trace(known: dict[State, tuple[State, str] | None], state: State) -> list[str]:
    """The steps that led to `state`."""
    names: list[str] = []
    while (origin := known[state]) is not None:
        state, name = origin
        names.append(name)
    return names[::-1]


CASES: dict[str, Model] = {
    "two ranks": Model(rounds=3),
    "two slots": Model(rounds=5, depth=2),
    "two chunks": Model(rounds=2, chunks=2, words=1),
    "two slots of two chunks": Model(rounds=3, depth=2, chunks=2, words=1),
    "ring of one": Model(rounds=2, chunks=2, words=1, ring=True),
    "ring of one, torn": Model(rounds=1, chunks=2, ring=True),
    "ring of two": Model(rounds=2, depth=2, chunks=3, words=1, ring=True),
    "ring, stores": Model(rounds=2, depth=2, chunks=3, words=1, way="store", ring=True),
    "ring, three ranks, stores": Model(3, 2, 1, 2, 1, way="store", ring=True),
    "ring, sleep, stores": Model(2, 1, 1, 2, 1, way="store", sleeping=True, ring=True),
    "ring, kill": Model(rounds=2, chunks=2, words=1, failure="kill", ring=True),
    "stores": Model(rounds=4, depth=2, way="store"),
    "stores, two chunks": Model(rounds=2, chunks=2, way="store"),
    "messages": Model(rounds=4, depth=2, way="message"),
    "two messages": Model(rounds=2, chunks=2, words=1, way="message"),
    "answers": Model(rounds=2, chunks=2, words=1, way="message", answers=True),
    "answers, sleep": Model(2, 2, 1, 2, 1, "message", answers=True, sleeping=True),
    "three ranks": Model(size=3, rounds=3, words=1),
    "three ranks, stores": Model(size=3, rounds=3, words=1, way="store"),
    "three ranks, messages": Model(size=3, rounds=4, words=1, way="message"),
    "sleep": Model(rounds=2, words=1, sleeping=True),
    "sleep, stores": Model(rounds=2, words=1, way="store", sleeping=True),
    "kill": Model(rounds=3, failure="kill"),
    "kill, stores": Model(rounds=3, way="store", failure="kill"),
    "kill, messages": Model(rounds=3, way="message", failure="kill"),
    "kill, answers": Model(2, 2, 1, 2, 1, "message", answers=True, failure="kill"),
    "kill, three ranks": Model(size=3, rounds=2, words=1, failure="kill"),
}
"""Cases of the protocol as it is."""

REGROUP = Model(size=3, rounds=2, words=1, regroup=True)

LONG_CASES: dict[str, Model] = {
    "answers, ring": Model(2, 2, 2, 3, 1, "message", answers=True, ring=True),
    "answers, three ranks": Model(3, 2, 1, 2, 1, "message", answers=True),
    "answers, three rounds, kill": Model(2, 3, 1, 2, 1, "message", answers=True, failure="kill"),
    "ring, three ranks": Model(size=3, rounds=2, chunks=2, words=1, ring=True),
    "ring, sleep": Model(rounds=1, chunks=2, words=1, sleeping=True, ring=True),
    "three ranks, two slots": Model(size=3, rounds=3, depth=2, words=1),
    "kill and regroup": replace(REGROUP, failure="kill"),
    "kill and regroup, stores": replace(REGROUP, failure="kill", way="store"),
    "kill and regroup, messages": replace(REGROUP, failure="kill", way="message"),
    "suspect and regroup": replace(REGROUP, failure="suspect"),
    "suspect and regroup, stores": replace(REGROUP, failure="suspect", way="store"),
    "suspect and regroup, messages": replace(REGROUP, failure="suspect", way="message"),
}
"""More of them, of 50,000 to 300,000 states each."""


def main() -> None:
    for name, model in {**CASES, **LONG_CASES}.items():
        begun = time.monotonic()
        result = search(model)
        seconds = time.monotonic() - begun
        print(
            f"{name:30} {result.states:8} states {result.ends:5} ends {seconds:6.1f} s  "
            f"{result.fault or 'sound'}"
        )
        for step in result.trace:
            print("    " + step)


if __name__ == "__main__":
    main()
