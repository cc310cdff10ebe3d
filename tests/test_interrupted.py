"""A wait, a step or a block that ends early: nothing is taken for whole, or for said, that is not.

By Ctrl-C, by an exception of the user's own code that he catches, or by another rank's end.
"""

import contextlib
import dis
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import ucxgossip as ug
from torch_jobs import F, Job, batch, flat, small_model, train_step
from ucxgossip import errors
from ucxgossip.engine import words as w
from ucxgossip.membership import log
from ucxgossip.mixing import Collective, InPlace, Meter, Outer, Stale
from ucxgossip.mixing.stream import array_of, registered
from ucxgossip.schedule import ALONE, Dissemination
from ucxgossip.torch_hook.packing import NOTHING
from ucxgossip.torch_hook.shuffle import Ring, Shuffled

DEADLINE_S = 30.0
VALUES = np.random.default_rng(3).integers(-1000, 1000, (2, 500)).astype(np.float64)
MEAN = VALUES.mean(axis=0)


def start(group: ug.Group) -> Any:
    buffer = registered(group, VALUES.shape[1], VALUES.dtype)
    array_of(buffer)[:] = VALUES[group.rank]
    return buffer


def once(owner: Any, name: str, error: type[BaseException]) -> None:
    """Have the next call of ``owner.name`` raise."""
    own = getattr(owner, name)

    def raises(*_: Any, **__: Any) -> None:
        setattr(owner, name, own)
        raise error("on purpose")

    setattr(owner, name, raises)


def interrupt(group: ug.Group, call: Callable[[], object]) -> None:
    """Have Ctrl-C end the wait of `call`."""
    once(group.engine, "wait", KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        call()


def await_failure(group: ug.Group) -> None:
    with group._steady_again:
        assert group._steady_again.wait_for(lambda: group.failed, DEADLINE_S)


# --- locks ---------------------------------------------------------------------------------------


def interrupted_at(place: int, call: Callable[[], object], then: Callable[[], object]) -> bool:
    """Whether `call` got to the `place`-th point at which Ctrl-C may end it, and did.

    Those points of our code are where CPython looks for signals: at a function's begin, as a loop
    jumps back, and when a function in C has returned. `then` is called while the exception is
    handled, as a ``with`` block's end is.
    """
    ours, passed = str(Path(ug.__file__).parent), 0

    def pass_one() -> None:
        nonlocal passed
        passed += 1
        if passed == place:
            sys.settrace(None)
            sys.setprofile(None)
            raise KeyboardInterrupt

    def is_ours(frame: Any) -> bool:
        return bool(frame.f_code.co_filename.startswith((ours, contextlib.__file__)))

    def trace(frame: Any, event: str, _: object) -> Any:
        if not is_ours(frame):
            return None
        frame.f_trace_opcodes = True
        code = frame.f_code.co_code[max(0, frame.f_lasti)]
        if event == "call" or (event == "opcode" and "JUMP_BACKWARD" in dis.opname[code]):
            pass_one()
        return trace

    def profile(frame: Any, event: str, _: object) -> None:
        if event == "c_return" and is_ours(frame):
            pass_one()

    before = sys.gettrace(), sys.getprofile()
    sys.settrace(trace)
    sys.setprofile(profile)
    try:
        call()
    except KeyboardInterrupt:
        then()
        return True
    finally:
        sys.settrace(before[0])
        sys.setprofile(before[1])
    return False


def test_a_post_that_is_interrupted_anywhere_keeps_no_lock(store: Any) -> None:
    """Or the warden's thread would wait for it, and `close` for that one, for ever."""
    with ug.join(0, 1, store, "shm") as group:
        box, buffer = group.mailbox(VALUES[0].nbytes), registered(group, 500, VALUES.dtype)
        free: list[bool] = []

        def look() -> None:
            free.append(group.lock.acquire(timeout=DEADLINE_S))
            group.lock.release()
            free[-1] = free[-1] and group.engine.words[w.DRIVERS] == 0

        def from_another_thread() -> None:
            other = threading.Thread(target=look)
            other.start()
            other.join()

        def post() -> None:
            if not group.engine.active(box):
                group.post(box, buffer, buffer, ALONE)
            group.wait(box)
            group.engine.exclusively(group.engine._check_open)  # in which the lock is held

        place = 1
        while interrupted_at(place, post, from_another_thread):
            assert free.pop()
            place += 1
        assert place > 30


# --- streams -------------------------------------------------------------------------------------


def test_an_interrupted_wait_is_made_again(job: Job) -> None:
    interrupted = threading.Event()

    def body(group: ug.Group) -> np.ndarray:
        stream = InPlace(group, start(group), Dissemination(2), Meter())
        assert group.rank == 0 or interrupted.wait(DEADLINE_S)
        stream.post()
        if group.rank == 0:
            interrupt(group, stream.wait)
            interrupted.set()
        stream.wait()
        return stream.array.copy()

    for found in job(2, body):
        assert np.array_equal(found, MEAN)


def test_an_outer_step_is_not_made_with_half_of_what_it_needs(job: Job) -> None:
    interrupted = threading.Event()

    def body(group: ug.Group) -> np.ndarray:
        settings = ug.Nesterov(rate=1.0, momentum=0.0)
        stream = Outer(group, start(group), Dissemination(2), Meter(), settings)
        stream.begin()
        stream.array += 1.0
        assert group.rank == 0 or interrupted.wait(DEADLINE_S)
        stream.post()
        if group.rank == 0:
            interrupt(group, stream.wait)
            interrupted.set()
        stream.wait()
        return stream.array.copy()

    for found in job(2, body):
        np.testing.assert_allclose(found, MEAN + 1.0)


def test_a_snapshot_is_no_correction_before_its_round_has_ended(job: Job) -> None:
    interrupted = threading.Event()

    def body(group: ug.Group) -> np.ndarray:
        stream = Stale(group, start(group), Dissemination(2), Meter(), 1)
        assert group.rank == 0 or interrupted.wait(DEADLINE_S)
        stream.post()
        if group.rank == 0:
            interrupt(group, stream.post)
            stream._collect()
            assert np.array_equal(stream.array, VALUES[0])
            interrupted.set()
        stream.finish()
        return stream.array.copy()

    for found in job(2, body):
        assert np.array_equal(found, MEAN)


def test_a_failed_round_is_no_correction(job: Job) -> None:
    posted = threading.Event()

    def body(group: ug.Group) -> None:
        stream = Stale(group, start(group), Dissemination(2), Meter(), 1)
        if group.rank:
            assert posted.wait(DEADLINE_S)
            raise LookupError("on purpose")
        stream.post()
        posted.set()
        await_failure(group)
        with pytest.raises(errors.PeerError):
            stream.finish()
        with pytest.raises(errors.ExchangeError):
            stream.state()
        assert np.array_equal(stream.array, VALUES[0])

    assert job(2, body, raw=True)[0] is None


def test_a_mean_that_breaks_off_leaves_the_array(job: Job) -> None:
    def body(group: ug.Group) -> None:
        collective, array = Collective(group), VALUES[group.rank].copy()
        collective.open()
        once(group, "run", KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            collective.average(array, 0.5 + group.rank)
        assert np.array_equal(array, VALUES[group.rank])

    job(2, body)


def test_exact_means_leave_nothing_behind(job: Job) -> None:
    def body(group: ug.Group) -> int:
        collective, array = Collective(group), VALUES[group.rank].copy()
        collective.average(array)
        before = len(group._livings)
        for _ in range(5):
            collective.average(array)
            collective.broadcast(array)
        return len(group._livings) - before

    assert job(2, body) == [1, 1]  # the broadcast's, once


def test_rounds_that_a_change_of_members_broke_off_are_counted(job: Job) -> None:
    def body(group: ug.Group) -> list[int]:
        array, counts = VALUES[group.rank].copy(), []
        group.exchange(array)
        own = group.wait
        for mix in (True, False):
            group.wait = lambda *a, **k: own(*a, **k) and False  # type: ignore[method-assign]
            group.exchange(array, mix=mix, schedule=Dissemination(2))
            counts.append(group.broken)
        return counts

    assert job(2, body) == [[1, 2]] * 2


# --- what all members share ----------------------------------------------------------------------


def test_who_loses_a_member_as_it_restarts_begins_with_the_others(job: Job) -> None:
    """Those who were through before have told their round, which is the base since."""

    def body(group: ug.Group) -> None:
        boxes = [group.mailbox(64) for _ in range(2)]
        number = boxes[0].round
        group.restart(boxes[0])
        boxes[1].base = boxes[0].round
        group.restart(boxes[1])
        assert boxes[0].round == boxes[1].round == boxes[1].base > number

    job(2, body)


def test_members_do_not_change_under_those_who_count(job: Job) -> None:
    def body(group: ug.Group) -> None:
        boxes = [group.mailbox(64) for _ in range(2)]
        threads: list[threading.Thread] = []

        def taken() -> int:
            threads.append(threading.Thread(target=group.count_taken, args=(boxes[1], lambda: 0)))
            threads[-1].start()
            threads[-1].join(0.05)
            return 7

        group.count_taken(boxes[0], taken)
        group._frozen = 5  # as if the warden had begun with it
        assert group._freeze(5).taken == ((group.rank, boxes[0].index, 7),)
        group._frozen = None
        for thread in threads:
            thread.join(DEADLINE_S)
            assert not thread.is_alive()
        group._taken.clear()

    job(2, body)


# --- who is told ---------------------------------------------------------------------------------


def test_who_ends_before_it_hears_of_a_failure_is_told_at_the_end(job: Job) -> None:
    def body(group: ug.Group) -> None:
        if group.rank:
            raise LookupError("no such sample")
        await_failure(group)

    told, _ = job(2, body, raw=True)
    assert isinstance(told, errors.PeerError) and "no such sample" in str(told)


def test_an_attached_model_is_given_back_and_then_the_failure_told(job: Job) -> None:
    stepped = threading.Event()

    def body(group: ug.Group) -> None:
        model = small_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        gossip = ug.attach(model, optimizer, group)
        train_step(model, optimizer, group.rank, 0)
        if group.rank:
            assert stepped.wait(DEADLINE_S)
            raise LookupError("no such sample")
        stepped.set()
        await_failure(group)
        with pytest.raises(errors.PeerError, match="no such sample"):
            gossip.detach()
        assert not any(module._forward_pre_hooks for module in model.modules())
        gossip.detach()  # once

    assert job(2, body, raw=True)[0] is None


def test_a_loop_that_is_left_leaves_the_failure_to_be_told(job: Job) -> None:
    """The generator is closed where no error can be raised."""
    leaving = threading.Event()

    class Broken(list[Any]):
        def __iter__(self) -> Iterator[Any]:
            yield self[0]
            assert leaving.wait(DEADLINE_S)
            raise LookupError("no such sample")

    def body(group: ug.Group) -> None:
        batches = [torch.full((2, 3), float(group.rank)) for _ in range(3)]
        if group.rank:
            for _ in Shuffled(group, Broken(batches), lambda: None):
                pass
        own = group.engine.wait

        def wait(*arguments: Any) -> bool:
            leaving.set()
            return own(*arguments)

        for _ in Shuffled(group, batches, lambda: None):
            group.engine.wait = wait  # type: ignore[method-assign]
            break
        assert leaving.is_set() and group.failed

    told, _ = job(2, body, raw=True)
    assert isinstance(told, errors.PeerError) and "no such sample" in str(told)


# --- a step --------------------------------------------------------------------------------------


@pytest.mark.parametrize("use", ["step", "backward"])
def test_a_backward_whose_end_was_interrupted_has_not_ended(job: Job, use: str) -> None:
    def body(group: ug.Group) -> None:
        model = small_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        gossip = ug.attach(model, optimizer, group, mix="gradients", bucket_bytes=64)
        x, y = batch(group.rank, 0)
        once(gossip._buckets[0].gradients_stream, "settle", LookupError)
        with pytest.raises(LookupError):
            F.cross_entropy(model(x), y).backward()
        before = flat(model)
        with pytest.raises(errors.ExchangeError, match="out of step"):
            optimizer.step() if use == "step" else F.cross_entropy(model(x), y).backward()
        assert np.array_equal(flat(model), before)
        gossip.detach()

    job(2, body)


def test_a_step_that_raised_leaves_no_moment_of_the_correction(job: Job) -> None:
    def body(group: ug.Group) -> None:
        model = small_model()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01, betas=(0.9, 0.9))
        with ug.attach(model, optimizer, group, noise_correction=True):
            for step in range(3):
                train_step(model, optimizer, group.rank, step)
            states = [optimizer.state[each] for each in model.parameters()]
            before = [state["exp_avg_sq"].clone() for state in states]
            handle = optimizer.register_step_pre_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                train_step(model, optimizer, group.rank, 3)
            plain = [
                0.9 * moment + 0.1 * parameter.grad**2
                for moment, parameter in zip(before, model.parameters(), strict=True)
            ]
            corrected = [state["exp_avg_sq"].clone() for state in states]
            assert not any(map(torch.allclose, corrected, plain))  # or the test shows nothing
            optimizer.state_dict()
            assert all(map(torch.allclose, (state["exp_avg_sq"] for state in states), plain))
            handle.remove()
            optimizer.step()

    job(3, body)  # with two ranks there is nothing to correct


# --- samples -------------------------------------------------------------------------------------


def ring(wait: Callable[[Any], bool], around: Any, put: bool) -> Ring:
    made = object.__new__(Ring)
    made.mailbox, made.schedule = None, None  # type: ignore[assignment]
    made.sent = [SimpleNamespace(buffer=None)] * 2  # type: ignore[list-item]
    made.came = SimpleNamespace(buffer=None, read=lambda: "came")  # type: ignore[assignment]
    engine = SimpleNamespace(active=lambda _: False, has_put=lambda _: put)
    made.group = SimpleNamespace(  # type: ignore[assignment]
        wait=wait, rank=0, failed=False, engine=engine, post_scheduled=lambda *_, **__: around
    )
    return made


AWAY = SimpleNamespace(to=1, sender=1)
STAYS = SimpleNamespace(to=None, sender=None)


@pytest.mark.parametrize(
    ("around", "whole", "put", "taken"),
    [
        (AWAY, True, True, "came"),
        (STAYS, True, True, "own"),
        (None, False, True, "own"),  # the others were past it: it went nowhere
        (AWAY, False, False, "own"),  # broken off before all of it was put: nobody has it
        (AWAY, False, True, NOTHING),  # the other one may have it
    ],
)
def test_a_batch_that_went_nowhere_stays(
    around: Any, whole: bool, put: bool, taken: Any, caplog: pytest.LogCaptureFixture
) -> None:
    made = ring(lambda _: whole, around, put)
    made.post(0, 1)
    with caplog.at_level("WARNING", log.name):
        assert made.take("own") is taken or made.take("own") == taken
    assert bool(caplog.records) is (taken is NOTHING)
