"""Who makes progress, and how it waits.

A put over TCP completes only when its target calls progress, so somebody must always be driving:
the engine thread, which runs this compiled code without the GIL. But a caller that blocks on a
round would pay two thread switches for each one, so whoever waits drives: the engine thread steps
back (`DRIVERS`), and comes back when no caller has driven for a millisecond. One lock serialises
the UCX worker.

A driver that finds nothing to do yields the core a few times, then arms the worker and sleeps in
poll(2): spinning costs where ranks outnumber cores (docs/performance.md), and sleeping at once
costs a system call and a wake-up on each message. How often it yields follows what came of it:
twice as often after a wait that ended in time, half as often after one that ended in a sleep, so
that a transfer over a slow link does not burn a core between two packets. Nobody sleeps while a
bell's signal is unseen.

A store into this rank's memory wakes nobody. Before it sleeps a driver raises a word in each
mailbox, the *doze word*, looks once more, and sleeps only then; whoever stores reads that word
afterwards, and rings if it is up. (Bells after every store cost more than the stores.)
"""

from __future__ import annotations

from typing import Any

from ucxgossip import jit
from ucxgossip.engine import words as w
from ucxgossip.engine.device_rounds import advance_device, launched, staged
from ucxgossip.engine.handlers import all_seen, mailbox_words
from ucxgossip.engine.rounds import advance, may_put
from ucxgossip.ucp import ops

_PARK_MS = 1
_NAP_NS = 50_000
_SLEEP_MS = 1000
_LEAST = 10
_MS = 1_000_000

SHORT, LONG = 1, 2
"""How the engine thread has stepped back: for a millisecond, or until whoever drives has ended."""


@jit.njit
def acquire(engine: Any, deadline_ns: int) -> bool:
    """Take the lock as a caller: the engine thread steps back. False when the deadline passed.

    Pair each success with `release`. False also after `shut`.
    """
    others = jit.fetch_add(engine, w.DRIVERS, 1)
    wanted = jit.load_acquire(engine, w.SHUT) == 0
    if others > 0 and wanted:
        jit.kick(engine[w.DRIVER_FD])
    while wanted:
        if jit.compare_swap(engine, w.LOCK, 0, 1):
            return True
        jit.yield_cpu()
        wanted = jit.load_acquire(engine, w.SHUT) == 0 and jit.now_ns() <= deadline_ns
    jit.fetch_add(engine, w.DRIVERS, -1)
    return False


@jit.njit
def hold(engine: Any, deadline_ns: int, held: Any) -> bool:
    """`acquire`, for callers in Python: ``held[0]`` becomes 1 with it.

    They know of it by that alone where Ctrl-C comes before the result is theirs.
    """
    if not acquire(engine, deadline_ns):
        return False
    held[0] = 1
    return True


@jit.njit
def release(engine: Any) -> None:
    """Give the lock back; the engine thread goes on at once if a round is under way.

    It is woken from a sleep in any case: what it armed for may have been consumed by this caller.
    And from a long park, of which it does not wake by itself.
    """
    wake = pending(engine, -1) or jit.load_acquire(engine, w.ASLEEP) != 0
    jit.fetch_add(engine, w.DRIVES, 1)
    jit.fetch_add(engine, w.LEAVING, 1)
    jit.store_release(engine, w.LOCK, 0)
    jit.fetch_add(engine, w.DRIVERS, -1)
    if wake or jit.load_acquire(engine, w.PARKED) == LONG:
        jit.kick(engine[w.ENGINE_FD])
    jit.fetch_add(engine, w.LEAVING, -1)


@jit.njit
def shut(engine: Any, deadline_ns: int) -> bool:
    """Refuse callers from now on; whether those who drive have left before the deadline.

    After the engine thread has ended, and before worker and descriptors are closed: a closed
    descriptor's number may be another's soon, and a late kick would be written into that.
    """
    jit.fetch_add(engine, w.SHUT, 1)
    while (
        jit.load_acquire(engine, w.DRIVERS) > 0
        or jit.load_acquire(engine, w.LEAVING) > 0
        or jit.load_acquire(engine, w.LOCK) != 0
    ):
        if jit.now_ns() > deadline_ns:
            return False
        jit.kick(engine[w.DRIVER_FD])
        jit.yield_cpu()
    return True


@jit.njit
def pending(engine: Any, index: int) -> bool:
    """Whether a round is under way in mailbox `index`, or (-1) in any."""
    if index >= 0:
        return jit.load_acquire(mailbox_words(engine, index), w.STATE) == w.ACTIVE
    for each in range(engine[w.MAILBOXES]):
        if jit.load_acquire(mailbox_words(engine, each), w.STATE) == w.ACTIVE:
            return True
    return False


@jit.njit
def _whose_turn(engine: Any) -> int:
    """The mailbox that puts a chunk in this pass: the round posted first that can; -1: none.

    Rounds that all put in every pass would all end at about the same time, and the first module of
    a forward would wait for the last one's weights.
    """
    chosen, earliest = -1, 0
    for index in range(engine[w.MAILBOXES]):
        mailbox = mailbox_words(engine, index)
        if (
            jit.load_acquire(mailbox, w.STATE) == w.ACTIVE
            and (chosen < 0 or mailbox[w.TURN] < earliest)
            and may_put(engine, mailbox)
            and staged(mailbox)
        ):
            chosen, earliest = index, mailbox[w.TURN]
    return chosen


@jit.njit
def _doze(engine: Any, value: int) -> None:
    """Raise or lower the doze words; what is read after it was raised is read later."""
    for index in range(engine[w.MAILBOXES]):
        word = jit.view_words(mailbox_words(engine, index)[w.DOZE], 1)
        jit.store_release(word, 0, value)
    engine[w.DOZING] = value
    jit.full_fence()


@jit.njit
def drive_once(engine: Any) -> int:
    """One pass: UCX progress, then each round under way; non-zero if anything moved.

    The caller holds the lock.
    """
    return move(engine, ops.progress(engine[w.WORKER]))


def move(engine: Any, moved: int) -> int:
    """The rounds' part of a pass; moved: what UCX's progress returned."""
    return move_rounds(engine[w.ADDRESS], moved)


jit.compiled_as(move, lambda engine, moved: jit.call(engine[w.MOVE], (engine[w.ADDRESS], moved)))


@jit.njit
def move_rounds(address: int, moved: int) -> int:
    """As `move`, of the engine whose words are at `address`.

    All that compiled code does for a round is in here. LLVM optimises what a function calls anew
    with every function that calls it, so those who drive call this one by its address.
    """
    engine = jit.view_words(address, w.ENGINE_WORDS)
    chosen = _whose_turn(engine)
    engine[w.NAPS] = 0
    for index in range(engine[w.MAILBOXES]):
        mailbox = mailbox_words(engine, index)
        if jit.load_acquire(mailbox, w.STATE) == w.ACTIVE:
            if mailbox[w.DEVICE] == 0:
                moved += advance(engine, mailbox, index == chosen)
            else:
                moved += advance_device(engine, index, index == chosen)
    if moved:
        if engine[w.DOZING]:
            _doze(engine, 0)
        if engine[w.QUIET] > engine[w.SPINS] and engine[w.SLEPT] == 0:
            engine[w.PATIENCE] = min(2 * engine[w.PATIENCE] + 1, engine[w.YIELDS])
        engine[w.QUIET], engine[w.SLEPT] = 0, 0
    else:
        engine[w.QUIET] += 1
    return moved


@jit.njit
def _may_sleep(engine: Any) -> bool:
    """After QUIET passes in which nothing moved: spin, yield, or (True) sleep on the worker."""
    if engine[w.QUIET] <= engine[w.SPINS]:
        return False
    tired = engine[w.QUIET] > engine[w.SPINS] + engine[w.PATIENCE]
    if tired and engine[w.RING] and not engine[w.DOZING]:
        _doze(engine, 1)
        return False
    if tired and all_seen(engine) and ops.arm(engine[w.WORKER]) == 0:
        engine[w.SLEEPS] += 1
        engine[w.SLEPT] = 1
        engine[w.PATIENCE] = max(engine[w.PATIENCE] // 2, engine[w.YIELDS] // _LEAST)
        return True
    jit.yield_cpu()
    return False


@jit.njit
def _sleep(engine: Any, wake_fd: int, timeout_ms: int, naps: int) -> None:
    if naps:  # a device wakes nobody
        woken = jit.wait_briefly(engine[w.EVENT_FD], wake_fd, _NAP_NS)
    else:
        woken = jit.wait_readable(engine[w.EVENT_FD], wake_fd, timeout_ms)
    if woken & 2:
        jit.drain(wake_fd)


@jit.njit
def _let_others(engine: Any) -> None:
    """Give another caller a turn with the worker."""
    jit.store_release(engine, w.LOCK, 0)
    jit.yield_cpu()
    while not jit.compare_swap(engine, w.LOCK, 0, 1):
        jit.yield_cpu()


@jit.njit
def drive(engine: Any, index: int, deadline_ns: int) -> bool:
    """Drive until the round of mailbox `index` (-1: every round) has ended.

    False when `deadline_ns` (CLOCK_MONOTONIC) came first.
    """
    if not acquire(engine, deadline_ns):
        return False
    ended = drive_locked(engine, index, deadline_ns)
    release(engine)
    return ended


@jit.njit
def drive_launched(engine: Any, index: int, deadline_ns: int) -> bool:
    """As `drive`, until all of the round of mailbox `index` is enqueued on its device."""
    if not acquire(engine, deadline_ns):
        return False
    ended = _drive(engine, index, deadline_ns, True)
    release(engine)
    return ended


@jit.njit
def drive_locked(engine: Any, index: int, deadline_ns: int) -> bool:
    """As `drive`, for a caller who holds the lock."""
    return _drive(engine, index, deadline_ns, False)


@jit.njit
def _drive(engine: Any, index: int, deadline_ns: int, launch: bool) -> bool:
    # What was just posted leaves before UCX looks for what has come, which over TCP is a system
    # call that mostly finds nothing yet.
    engine[w.QUIET] = 0
    move(engine, 0)
    engine[w.QUIET] = 0
    ended = True
    while True:
        drive_once(engine)
        if not pending(engine, index) or (launch and launched(mailbox_words(engine, index))):
            break
        if engine[w.QUIET] <= engine[w.SPINS]:
            continue
        left = deadline_ns - jit.now_ns()
        if left <= 0 or jit.load_acquire(engine, w.SHUT) != 0:
            ended = False
            break
        if jit.load_acquire(engine, w.DRIVERS) > 1:
            _let_others(engine)
        elif _may_sleep(engine):
            timeout_ms = min(left // _MS + 1, _SLEEP_MS)
            _sleep(engine, engine[w.DRIVER_FD], timeout_ms, engine[w.NAPS])
    return ended


@jit.njit
def _serve(engine: Any) -> None:
    """The engine thread's turn: until a caller drives, or after a sleep."""
    if not jit.compare_swap(engine, w.LOCK, 0, 1):
        return
    engine[w.QUIET] = 0
    asleep = False
    posts = jit.load_acquire(engine, w.POSTS)
    while (
        not asleep
        and jit.load_acquire(engine, w.DRIVERS) == 0
        and jit.load_acquire(engine, w.STOP) == 0
    ):
        posts = jit.load_acquire(engine, w.POSTS)
        drive_once(engine)
        asleep = _may_sleep(engine)
    naps = engine[w.NAPS]
    if asleep:
        jit.store_release(engine, w.ASLEEP, 1)
    jit.store_release(engine, w.LOCK, 0)
    if asleep:
        jit.full_fence()  # whoever posts a round reads ASLEEP after that
        if jit.load_acquire(engine, w.POSTS) == posts:
            _sleep(engine, engine[w.ENGINE_FD], _SLEEP_MS, naps)
        jit.store_release(engine, w.ASLEEP, 0)


@jit.njit
def _park(engine: Any, drives: int) -> bool:
    """Step back for a while; whether the engine thread is called for before it is over.

    drives: how many callers had ended at the last look. While one and the same drives, there is
    nothing to look for until it has ended, and `release` kicks.
    """
    long = jit.load_acquire(engine, w.DRIVES) == drives and jit.load_acquire(engine, w.DRIVERS) > 0
    jit.store_release(engine, w.PARKED, LONG if long else SHORT)
    jit.full_fence()  # whoever ends a drive reads PARKED after that
    timeout_ms = _PARK_MS
    if long and jit.load_acquire(engine, w.DRIVERS) > 0:
        timeout_ms = _SLEEP_MS
    kicked = jit.wait_readable(-1, engine[w.ENGINE_FD], timeout_ms) & 2
    jit.store_release(engine, w.PARKED, 0)
    if not kicked:
        return False
    jit.drain(engine[w.ENGINE_FD])
    return jit.load_acquire(engine, w.DRIVERS) == 0 and (not long or pending(engine, -1))


@jit.njit
def run(engine: Any) -> None:
    """The engine thread: serve, and step back while callers drive.

    Callers come in bursts, so they are left the worker until a millisecond has passed without
    one, or until one has left a round behind (`release` kicks).
    """
    while jit.load_acquire(engine, w.STOP) == 0:
        drives = jit.load_acquire(engine, w.DRIVES)
        if jit.load_acquire(engine, w.DRIVERS) == 0:
            _serve(engine)
        while jit.load_acquire(engine, w.STOP) == 0 and (
            jit.load_acquire(engine, w.DRIVERS) > 0 or jit.load_acquire(engine, w.DRIVES) != drives
        ):
            before, drives = drives, jit.load_acquire(engine, w.DRIVES)
            if _park(engine, before):
                break
