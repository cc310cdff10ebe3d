"""The engine as a whole: its thread, who drives in its place, and its end.

Two engines in one process, also with NUMBA_DISABLE_JIT=1 (test_interpreted.py). Their rounds:
test_rounds.py, and what they tell each other: test_messages.py.
"""

import ast
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from numba import config

from engine_pair import (
    DEADLINE_S,
    TUNING,
    Pair,
    make_pair,
    until,
)
from ucxgossip import jit
from ucxgossip.engine import Engine, drive
from ucxgossip.engine import words as w
from ucxgossip.errors import ArgumentError, ClosedError, ExchangeError
from ucxgossip.mailbox import Layout, Mailbox
from ucxgossip.ucp import Context


def test_an_engine_may_be_stopped_while_it_starts(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the warden's thread, which hears of another rank's end."""
    engine, start = pair.engines[0], threading.Thread.start

    def stopped_first(thread: threading.Thread) -> None:
        engine.stop()
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", stopped_first)
    engine.start()
    engine.stop()
    assert engine._thread is not None and not engine._thread.is_alive()


def test_wait_says_whom_for_what(pair: Pair) -> None:
    array = np.ones(512)
    pair.post(0, array)
    assert not pair.engines[0].wait(pair.boxes[0], 0.05)
    error = pair.engines[0].describe_wait(pair.boxes[0], 0.05)
    assert error.rank == 1 and "free its slot" in error.what
    pair.open(1, 0)
    pair.until(lambda: pair.word(0, w.SENT) == 4)
    assert not pair.engines[0].wait(pair.boxes[0], 0.05)
    error = pair.engines[0].describe_wait(pair.boxes[0], 0.05)
    assert error.rank == 1 and "put chunk 1 of 4" in error.what
    pair.boxes[1].round = pair.boxes[0].round = 0
    with pytest.raises(ExchangeError, match="still under way"):
        pair.post(0, array)


def test_engine_threads_move_rounds_by_themselves(pair: Pair) -> None:
    for engine in pair.engines:
        engine.start()
    left, right = np.zeros(512), np.ones(512)
    pair.post(0, left)
    pair.post(1, right)
    assert pair.engines[0].wait(pair.boxes[0], DEADLINE_S)
    assert pair.engines[1].wait(pair.boxes[1], DEADLINE_S)
    assert (left == 0.5).all() and (right == 0.5).all()


@pytest.mark.skipif(config.DISABLE_JIT, reason="locks between threads are atomic when compiled")
def test_the_engine_thread_parks_while_one_caller_drives(pair: Pair) -> None:
    engine, words = pair.engines[0], pair.engines[0].words
    engine.start()
    left, right = np.zeros(512), np.ones(512)
    pair.post(0, left)
    ends: list[bool] = []
    caller = threading.Thread(target=lambda: ends.append(engine.wait(pair.boxes[0], DEADLINE_S)))
    caller.start()
    deadline = time.monotonic() + DEADLINE_S
    while words[w.PARKED] != drive.LONG:
        jit.yield_cpu()
        assert time.monotonic() < deadline
    pair.engines[1].start()
    pair.post(1, right)
    caller.join(DEADLINE_S)
    assert ends == [True] and (left == 0.5).all()
    # Before `right` is freed, which the other engine's thread would mix into all the same.
    assert pair.engines[1].wait(pair.boxes[1], DEADLINE_S) and (right == 0.5).all()


@pytest.mark.parametrize("parked", [0, drive.SHORT, drive.LONG])
def test_whoever_ends_a_drive_ends_a_long_park(pair: Pair, parked: int) -> None:
    words = pair.engines[0].words
    words[w.PARKED] = parked
    assert drive.acquire(words, jit.now_ns() + int(DEADLINE_S * 1e9))
    drive.release(words)
    woken = jit.wait_readable(-1, int(words[w.ENGINE_FD]), 0) & 2
    assert bool(woken) is (parked == drive.LONG)
    words[w.PARKED] = 0


def test_ctrl_c_as_the_worker_is_taken_gives_it_back(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = drive.hold

    def hold(*arguments: object) -> None:
        assert own(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(drive, "hold", hold)
        with pytest.raises(KeyboardInterrupt):
            pair.engines[0].exclusively(list)
    assert pair.engines[0].words[w.DRIVERS] == 0
    assert pair.engines[0].exclusively(list) == []


def test_close_is_idempotent_and_final(transport: str) -> None:
    context = Context(transport, {"NET_DEVICES": "lo"})
    engine = Engine(context, 0, 1, TUNING)
    engine.start()
    engine.close()
    engine.close()
    with pytest.raises(ClosedError):
        engine.exclusively(list)
    context.close()
    context.close()


def test_descriptors_stay_open_until_the_last_kick(transport: str) -> None:
    """A closed one's number may be another's by then."""
    context = Context(transport, {"NET_DEVICES": "lo"})
    engine = Engine(context, 0, 1, TUNING)
    engine.words[w.LEAVING] = 1  # as a thread that was held up in `drive.release`
    closing = threading.Thread(target=engine.close)
    closing.start()
    try:
        until(lambda: bool(engine.words[w.SHUT]))
        os.fstat(int(engine.words[w.ENGINE_FD]))
        assert closing.is_alive()
    finally:
        engine.words[w.LEAVING] = 0
        closing.join(DEADLINE_S)
    context.close()


@pytest.mark.skipif(jit.INTERPRETED, reason="the lock of the interpreted engine is no lock")
@pytest.mark.parametrize("waiters", [1, 3])
def test_who_waits_when_the_engine_is_closed_leaves(transport: str, waiters: int) -> None:
    """Promptly, and before what it drives is gone; nobody is let in any more."""
    pair = make_pair(transport, 4096, 2)
    engine, box = pair.engines[0], pair.boxes[0]
    array = np.zeros(16)
    pair.post(0, array)  # of which the other rank knows nothing
    ended: list[bool] = []

    def wait() -> None:
        ended.append(engine.wait(box, 2 * DEADLINE_S))

    threads = [threading.Thread(target=wait) for _ in range(waiters)]
    for thread in threads:
        thread.start()
    until(lambda: int(engine.words[w.DRIVERS]) == waiters)
    for each in pair.engines:
        each.close()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert ended == [False] * waiters
    assert engine.words[w.DRIVERS] == engine.words[w.LOCK] == 0
    assert not drive.acquire(engine.words, jit.now_ns() + 10**12)
    for each in pair.engines:
        each.context.close()


@pytest.mark.skipif(jit.INTERPRETED, reason="the lock of the interpreted engine is no lock")
def test_who_drives_an_engine_that_is_shut_leaves(transport: str) -> None:
    """By itself, not when `Engine.wait` looks the next time: its deadline is far."""
    pair = make_pair(transport, 4096, 2)
    engine, box = pair.engines[0], pair.boxes[0]
    array = np.zeros(16)
    pair.post(0, array)  # of which the other rank knows nothing
    far = jit.now_ns() + int(2 * DEADLINE_S * 1e9)
    driver = threading.Thread(target=drive.drive, args=(engine.words, box.index, far))
    driver.start()
    until(lambda: int(engine.words[w.DRIVERS]) == 1)
    engine.stop()
    left = drive.shut(engine.words, jit.now_ns() + int(DEADLINE_S * 1e9))
    driver.join(3 * DEADLINE_S)
    for each in pair.engines:
        each.close()
        each.context.close()
    assert left


def test_too_many_mailboxes_is_a_named_error(transport: str) -> None:
    context = Context(transport, {"NET_DEVICES": "lo"})
    engine = Engine(context, 0, 1, TUNING, max_mailboxes=1)
    layout = Layout(8, 1, 8, ranks=1)
    engine.open(Mailbox(context, layout))
    second = Mailbox(context, layout)
    with pytest.raises(ArgumentError, match="more than 1"):
        engine.open(second)
    second.close()
    engine.close()
    context.close()


def test_no_word_has_two_meanings() -> None:
    """A name that is given twice is the last one's value everywhere."""
    names = [
        target.id
        for node in ast.parse(Path(w.__file__).read_text()).body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    ]
    assert len(names) == len(set(names)) > 60
