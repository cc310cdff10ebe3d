"""Wardens in one process: watch, meetings, questions, and a change of members."""

import logging
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from ucxgossip.errors import ExchangeTimeoutError, MismatchError, RankMissingError
from ucxgossip.members import Facts, View, Warden, switchboard
from ucxgossip.trust import Seal

DEADLINE_S = 20.0


class Ranks:
    """Wardens of a job, and what each told its group."""

    def __init__(self, size: int, dead_after: float) -> None:
        self.frozen: dict[int, list[int]] = {rank: [] for rank in range(size)}
        self.views: dict[int, list[View]] = {rank: [] for rank in range(size)}
        self.told: dict[int, list[str]] = {rank: [] for rank in range(size)}
        self.wardens = [self._make(rank, dead_after) for rank in range(size)]
        addresses = {warden.rank: warden.address for warden in self.wardens}
        for warden in self.wardens:
            warden.start(addresses)

    def _make(self, rank: int, dead_after: float) -> Warden:
        def freeze(epoch: int) -> Facts:
            self.frozen[rank].append(epoch)
            return Facts((epoch, rank), *self.wardens[rank].passed)

        return Warden(
            rank,
            "127.0.0.1",
            Seal(b"0123456789abcdef"),
            dead_after,
            freeze,
            self.views[rank].append,
            self.told[rank].append,
            lambda who, reason: self.told[rank].append(f"{who}: {reason}"),
        )

    def kill(self, rank: int) -> None:
        """What a kill leaves of a warden: closed sockets and no goodbye."""
        warden = self.wardens[rank]
        warden._do(lambda: setattr(warden, "_stop", True))
        warden._thread.join(DEADLINE_S)
        warden._pulse._words[0] = 1  # its thread ends; nothing more is written
        warden._pulse._thread.join(DEADLINE_S)
        for link in warden._every_link():
            link.close()
        for key in list(warden._selector.get_map().values()):
            if hasattr(key.fileobj, "close"):
                key.fileobj.close()
        warden._wake_write.close()

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait for what the wardens' own threads bring about."""
        changed = self.wardens[-1]._changed
        deadline = time.monotonic() + DEADLINE_S
        with changed:
            while not condition():
                changed.wait(0.01)
                assert time.monotonic() < deadline, "deadline"


@contextmanager
def ranks(size: int, dead_after: float = 10.0) -> Iterator[Ranks]:
    made = Ranks(size, dead_after)
    try:
        yield made
    finally:
        for warden in made.wardens:
            warden.leave()
        for warden in made.wardens:
            warden.close()
            warden.close()


def together(job: Ranks, call: Callable[[Warden], Any], who: list[int] | None = None) -> list[Any]:
    """Run `call` for each warden in a thread of its own; what each returned or raised."""
    wardens = [job.wardens[rank] for rank in who] if who else job.wardens
    ends: list[Any] = [None] * len(wardens)

    def body(place: int) -> None:
        try:
            ends[place] = call(wardens[place])
        except Exception as error:
            ends[place] = error

    threads = [threading.Thread(target=body, args=(i,), daemon=True) for i in range(len(wardens))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
        assert not thread.is_alive()
    return ends


def joined(blobs: list[bytes], ranks: Any) -> bytes:
    return b"|".join(blobs)


def test_meetings_give_all_the_same() -> None:
    with ranks(4) as job:
        for number in range(3):
            mine = [f"{rank}{number}".encode() for rank in range(4)]
            ends = together(
                job, lambda w, mine=mine: w.meet(0, "x", mine[w.rank], joined, DEADLINE_S)
            )
            assert ends == [f"0{number}|1{number}|2{number}|3{number}".encode()] * 4


def test_ranks_that_meet_for_different_things_are_told() -> None:
    with ranks(3) as job:
        ends = together(
            job, lambda w: w.meet(0, "attach" if w.rank else "mailbox", b"", joined, DEADLINE_S)
        )
    assert len({str(end) for end in ends}) == 1
    assert all(isinstance(end, MismatchError) for end in ends)
    assert "rank 0 is at 'mailbox', rank 1 at 'attach'" in str(ends[0])
    assert not job.wardens[0]._merges


def test_who_does_not_come_is_named() -> None:
    with ranks(4) as job:
        ends = together(job, lambda w: w.meet(0, "attach", b"", joined, 0.3), [0, 2])
    for end in ends:
        assert isinstance(end, RankMissingError) and end.ranks == (1, 3)
        assert "for ranks 1, 3 at 'attach'" in str(end)


def test_questions_wait_for_their_answer() -> None:
    with ranks(2) as job:
        job.wardens[1].offer("here", b"\x00\xff")
        assert job.wardens[0].fetch(1, "here", DEADLINE_S) == b"\x00\xff"
        with pytest.raises(ExchangeTimeoutError, match="to tell where its 'later' is"):
            job.wardens[0].fetch(1, "later", 0.2)
        ends = together(
            job,
            lambda w: w.offer("later", b"now") if w.rank else w.fetch(1, "later", DEADLINE_S),
        )
        assert ends[0] == b"now"


def test_answers_that_come_too_late_are_not_kept() -> None:
    with ranks(2) as job:
        with pytest.raises(ExchangeTimeoutError):
            job.wardens[0].fetch(1, "late", 0.2)
        job.wardens[1].offer("late", b"1")
        job.wardens[1].offer("next", b"2")
        assert job.wardens[0].fetch(1, "next", DEADLINE_S) == b"2"  # behind the late one
        assert not job.wardens[0]._answers


def test_what_has_not_ended_is_answered_at_once_and_not_kept() -> None:
    with ranks(2) as job:
        assert job.wardens[0].fetch(1, "ended model 0", DEADLINE_S) == b""
        assert not job.wardens[1]._wanted
        job.wardens[1].offer("ended model 0", b"{}")
        job.wardens[1].offer("told", b"")
        assert job.wardens[0].fetch(1, "told", DEADLINE_S) == b""  # behind the offer
        assert job.wardens[0].fetch(1, "ended model 0", DEADLINE_S) == b"{}"


def test_two_threads_ask_the_same() -> None:
    with ranks(2) as job:
        warden, ends = job.wardens[0], list[Any]()
        threads = [
            threading.Thread(target=lambda: ends.append(warden.fetch(1, "x", DEADLINE_S)))
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        job.until(lambda: len(job.wardens[1]._wanted) == 2)
        job.wardens[1].offer("x", b"here")
        for thread in threads:
            thread.join(2 * DEADLINE_S)
        assert ends == [b"here"] * 2


def test_a_rank_that_is_gone_is_left_out() -> None:
    """Those who wait for something meanwhile return with nothing, to begin anew."""
    with ranks(4) as job:
        together(job, lambda w: w.meet(0, "x", b"", joined, DEADLINE_S))
        job.kill(0)
        ends = together(job, lambda w: w.meet(0, "y", b"", joined, DEADLINE_S), [1, 2, 3])
        assert ends == [None] * 3
        job.until(lambda: all(job.views[rank] for rank in (1, 2, 3)))
        for rank in (1, 2, 3):
            (view,) = job.views[rank]
            assert view.members == (1, 2, 3) and view.epoch == 1
            assert view.facts.rounds == (1, 3) and view.facts.passed == 1
            assert job.frozen[rank][-1] == 1
        ends = together(
            job, lambda w: w.meet(1, "y", str(w.rank).encode(), joined, DEADLINE_S), [1, 2, 3]
        )
        assert ends == [b"1|2|3"] * 3
        assert job.wardens[1].fetch(0, "x", DEADLINE_S) is None


def test_an_abort_of_who_was_left_out_is_not_heard() -> None:
    with ranks(3) as job:
        left_out, others = job.wardens[1], [job.wardens[0], job.wardens[2]]
        others[0]._do(lambda: others[0]._agreement.suspect(1, True))
        job.until(lambda: bool(job.views[0]) and bool(job.views[2]))
        for warden in others:
            warden._on_abort(1, {"reason": "ExpelledError"})
            assert not warden.over
            warden._on_abort(2 - warden.rank, {"reason": "on purpose"})
            assert warden.over
        left_out.leave()
        assert [job.told[rank] for rank in (0, 2)] == [["2: on purpose"], ["0: on purpose"]]


def test_what_was_offered_for_an_epoch_goes_with_it() -> None:
    with ranks(3) as job:
        for warden in job.wardens:
            warden.offer("worker 0", b"old", 0)
            warden.offer("history", b"any")
        assert job.wardens[1].fetch(0, "worker 0", DEADLINE_S) == b"old"
        job.wardens[0].offer("worker 1", b"new", 1)  # as it does before others take up the view
        job.kill(2)
        job.until(lambda: all(job.views[rank] for rank in (0, 1)))
        assert job.wardens[1].fetch(0, "worker 1", DEADLINE_S) == b"new"
        assert sorted(job.wardens[0]._offers) == ["history", "worker 1"]


def test_a_question_of_the_epoch_before_is_not_kept() -> None:
    """Who asks it gives up when it takes up the view that this rank has."""
    with ranks(3) as job:
        job.kill(2)
        job.until(lambda: all(job.views[rank] for rank in (0, 1)))
        old = {"kind": "want", "epoch": 0, "name": "worker 0", "key": "old"}
        job.wardens[1]._do(lambda: job.wardens[1]._send(0, old))
        job.wardens[0].offer("next", b"here")
        assert job.wardens[1].fetch(0, "next", DEADLINE_S) == b"here"
        assert not job.wardens[0]._wanted


def test_a_silent_rank_is_left_out() -> None:
    with ranks(4, dead_after=1.0) as job:
        job.wardens[3]._pulse.close = lambda: None  # type: ignore[method-assign]
        words = job.wardens[3]._pulse._words
        words[0] = 1  # no pulse any more, and no connection is closed
        job.until(lambda: all(job.views[rank] for rank in (0, 1, 2)))
        assert job.views[0][0].members == (0, 1, 2)
        job.until(lambda: bool(job.told[3]))
        job.wardens[3]._pulse._thread.join(DEADLINE_S)


def test_an_error_reaches_all() -> None:
    with ranks(3) as job:
        job.wardens[1].abort("out of memory")
        job.until(lambda: bool(job.told[0] and job.told[2]))
        assert job.told[0] == job.told[2] == ["1: out of memory"]


def test_last_words_are_said_over_connections_that_are_not_open_yet() -> None:
    with ranks(3) as job:
        job.wardens[1].abort("out of memory")
        job.wardens[1].close()
        job.until(lambda: bool(job.told[0] and job.told[2]))
        assert job.told[0] == job.told[2] == ["1: out of memory"]


def test_ranks_that_leave_at_once_have_all_met() -> None:
    """The leader comes last, and goes before its connections to the others are open."""

    def leave(warden: Warden) -> bytes | None:
        if warden.rank == 0:
            job.until(lambda: len(warden._arrivals.get((0, 1), ())) == 2)
        try:
            return warden.meet(0, "leave", b"", joined, 2.0)
        finally:
            warden.leave()
            warden.close()

    for _ in range(5):
        with ranks(3) as job:
            assert together(job, leave) == [b"||"] * 3


@contextmanager
def mute() -> Iterator[Any]:
    """An address that takes connections and says nothing, as a process that is stopped does."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()


@pytest.mark.parametrize("talks", [False, True])
def test_closing_waits_for_a_mute_rank_only_to_say_something(
    monkeypatch: pytest.MonkeyPatch, talks: bool
) -> None:
    monkeypatch.setattr(switchboard, "_SAY_S", 0.2 if talks else 2 * DEADLINE_S)
    with ranks(1) as job, mute() as address:
        warden = job._make(0, 10.0)
        warden.start({0: warden.address, 1: address})
        warden.suspect(1)
        if talks:
            warden.abort("out of memory")
        (end,) = together(job, lambda _: warden.close())
        assert end is None and not warden._thread.is_alive()


def test_ranks_that_leave_in_peace_are_not_missed(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "ucxgossip")
    with ranks(4) as job:
        together(job, lambda w: w.meet(0, "leave", b"", joined, DEADLINE_S))
        job.wardens[2].close()
        job.wardens[0].close()
        job.wardens[3].close()
    assert all(not views for views in job.views.values())
    assert not caplog.records


def test_doubt() -> None:
    """Between ranks that live it ends at once; where one is gone, with the change."""
    with ranks(3) as job:
        assert job.wardens[0].doubt([1, 2], 0, DEADLINE_S) is True
        job.kill(2)
        assert job.wardens[0].doubt([1, 2], 0, DEADLINE_S) is False
        assert job.wardens[0].view.members == (0, 1)


def test_doubt_ends_when_the_group_is_closed() -> None:
    with ranks(1) as job, mute() as address:
        warden = job._make(0, 10.0)
        warden.start({0: warden.address, 1: address})

        def close_or_doubt(each: Warden) -> bool | None:
            if each is warden:
                return warden.doubt([1], 0, 3 * DEADLINE_S)
            job.until(lambda: 1 in warden._probes)
            warden.close()
            return None

        job.wardens.append(warden)
        assert together(job, close_or_doubt) == [None, True]


def test_a_connection_closed_by_the_event_before_its_own_is_passed_over() -> None:
    with ranks(2) as job:
        warden = job.wardens[0]
        through: list[bool] = []

        def command() -> None:
            link = warden._connect(1)
            warden._drop(link)
            warden._dispatch(link)
            through.append(True)

        warden._do(command)
        job.until(lambda: bool(through))
        assert job.told[0] == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nobody_waits_for_a_warden_that_broke() -> None:
    with ranks(2) as job:
        warden = job.wardens[0]

        def command() -> None:
            raise RuntimeError("broken")

        warden._do(command)
        job.until(lambda: bool(job.told[0]))
        assert "can watch over the others no longer: RuntimeError('broken')" in job.told[0][0]
        assert warden.meet(0, "anything", b"", lambda blobs, _: b"", DEADLINE_S) is None


@pytest.mark.parametrize("text", [b'{"rank":Infinity}', b"[" * 992])
def test_a_warden_outlives_what_a_stranger_says(text: bytes) -> None:
    with ranks(2) as job:
        address = job.wardens[0].address
        with socket.create_connection(address, DEADLINE_S) as stranger:
            stranger.settimeout(DEADLINE_S)
            stranger.sendall(struct.pack(">I", 32 + len(text)) + bytes(32) + text)
            while stranger.recv(64):  # the nonce, then the end
                pass
        assert job.wardens[1].doubt([0], 0, DEADLINE_S) and not job.told[0]


def test_a_guest_learns_who_is_there_and_when_it_may_come_in() -> None:
    """The lowest rank comes: it leads from then on, and must not let others in at once."""
    with ranks(3) as job:
        job.kill(0)
        job.until(lambda: job.wardens[1].view.members == (1, 2))
        for warden in job.wardens[1:]:
            warden.let_in("shuffled")
        guest = job._make(0, 10.0)
        contacts = {warden.rank: warden.address for warden in job.wardens}
        guest.start(contacts, guest=True)
        try:
            assert guest.knock(DEADLINE_S)
            assert guest.view.members == (1, 2)
            assert guest._door.kind == "shuffled"
            assert not guest.enter(DEADLINE_S, patience=0.1)
        finally:
            guest.close()


def test_nobody_is_there_any_more() -> None:
    with ranks(2) as job:
        contacts = {warden.rank: warden.address for warden in job.wardens}
        guest = job._make(1, 10.0)
        for rank in (0, 1):
            job.kill(rank)
        guest.start(contacts, guest=True)
        try:
            assert not guest.knock(DEADLINE_S)
        finally:
            guest.close()


NOWHERE = ("255.255.255.255", 9)
"""Connecting to it fails at once."""


def later(job: Ranks, rank: int, address: Sequence[Any]) -> None:
    """Have the warden of `rank` tell somebody else who brings rank 1 to come later."""
    warden = job.wardens[rank]
    warden._do(lambda: warden._tell_stranger(1, address, {"kind": "later"}))


def test_a_connection_to_a_stranger_that_never_comes_about_is_not_kept() -> None:
    with ranks(2, dead_after=1.0) as job, mute() as address:
        strangers = job.wardens[0]._strangers
        for where in (NOWHERE, address):
            through = threading.Event()
            later(job, 0, where)
            job.wardens[0]._do(through.set)
            assert through.wait(DEADLINE_S)
            job.until(lambda: not strangers)
        assert not job.views[0]


def test_strangers_are_none_after_a_change_of_members() -> None:
    with ranks(3) as job, mute() as address:
        later(job, 0, address)
        job.until(lambda: bool(job.wardens[0]._strangers))
        job.kill(1)
        job.until(lambda: bool(job.views[0]))
        assert not job.wardens[0]._strangers


def test_a_guest_is_in_only_when_its_group_knows() -> None:
    with ranks(2) as job:
        job.kill(1)
        job.until(lambda: job.wardens[0].view.members == (0,))
        guest = job._make(1, 10.0)
        entered = threading.Event()
        install = guest._install_group
        waited: list[bool] = []

        def slowly(view: View) -> None:
            waited.append(entered.wait(0.3))  # the thread that enters must not be through by now
            install(view)

        guest._install_group = slowly
        guest.start({0: job.wardens[0].address}, guest=True)
        try:
            assert guest.knock(DEADLINE_S)
            assert guest.enter(DEADLINE_S)
            entered.set()
            assert waited == [False]
            assert job.views[1][-1].members == (0, 1)
        finally:
            guest.close()
