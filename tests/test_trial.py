"""Wardens that cannot be reached: `join` says so, and nobody goes on alone."""

import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import ucxgossip as ug
from ucxgossip.errors import PeerError, RankMissingError, RendezvousError
from ucxgossip.members import Facts, View, Warden, trial
from ucxgossip.rendezvous import Rendezvous
from ucxgossip.store import Place, Store
from ucxgossip.trust import Seal

DEADLINE_S = 20.0
SEAL = Seal(b"0123456789abcdef")


# --- join ----------------------------------------------------------------------------------------


def closed_port() -> Any:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()


@contextmanager
def mute() -> Iterator[Any]:
    """An address that takes connections and says nothing, as a process that is slow does."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()


@contextmanager
def deaf() -> Iterator[Any]:
    """An address whose host takes no connection and refuses none: its queue is full."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        waiting = [socket.socket() for _ in range(4)]
        for each in waiting:
            each.setblocking(False)
            each.connect_ex(listener.getsockname())
        yield listener.getsockname()
        for each in waiting:
            each.close()


@pytest.fixture
def tell(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Any], None]:
    """Have a rank tell the others another address of its warden than its own."""
    publish = Rendezvous.publish

    def tell(rank: int, address: Any) -> None:
        def published(self: Rendezvous, name: str, blob: bytes) -> None:
            spoilt = name == "warden" and self.rank == rank
            publish(self, name, json.dumps(address).encode() if spoilt else blob)

        monkeypatch.setattr(Rendezvous, "publish", published)

    return tell


@pytest.mark.parametrize("host", ["192.0.2.1", "nowhere.invalid", "::ffff:192.0.2.1"])
def test_host_that_is_another(
    job: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    monkeypatch.setenv("UCXGOSSIP_HOST", host)
    ends = job(2, lambda group: group.members, timeout=2 * DEADLINE_S, raw=True)
    assert RendezvousError in map(type, ends)
    for end in ends:
        assert isinstance(end, RendezvousError | PeerError)
        assert f"cannot listen at {host}," in str(end) and "Set UCXGOSSIP_HOST" in str(end)


def test_master_address_that_nothing_leads_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UCXGOSSIP_HOST", raising=False)
    place = Place(0, 2, "nowhere.invalid", 29500, 1)
    with pytest.raises(RendezvousError, match="reaches nowhere.invalid: .*set UCXGOSSIP_HOST"):
        place.own_host()


@pytest.mark.parametrize(("size", "rank"), [(2, 0), (2, 1), (3, 1), (6, 3)])
def test_address_that_refuses(
    job: Callable[..., list[Any]], tell: Callable[[int, Any], None], size: int, rank: int
) -> None:
    address = closed_port()
    tell(rank, address)
    ends = job(size, lambda group: group.members, timeout=2 * DEADLINE_S, raw=True)
    assert [type(end) for end in ends] == [RendezvousError] * size
    (said,) = {str(end) for end in ends}
    assert f"could not reach rank {rank} at 127.0.0.1:{address[1]}" in said
    assert f"UCXGOSSIP_HOST for rank {rank}" in said and "firewall" in said


def test_address_at_which_nobody_speaks(
    store: Store, as_ranks: Callable[..., list[Any]], tell: Callable[[int, Any], None]
) -> None:
    with mute() as address:
        tell(1, address)
        ends = as_ranks(
            3, lambda rank: ug.join(rank, 3, store, "shm", 4.0 if rank == 1 else 2 * DEADLINE_S)
        )
    assert [type(end) for end in ends] == [PeerError, RankMissingError, PeerError]
    assert all("for ranks 0, 2 to connect to it at 127.0.0.1:" in str(end) for end in ends)


def test_who_fails_says_why_before_it_cannot_be_reached(
    job: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    collect = Rendezvous.collect

    def spoilt(self: Rendezvous, name: str, rank: int) -> bytes:
        found = collect(self, name, rank)
        if name == "wardens" and self.rank == 2:
            raise RendezvousError("the list is spoilt")
        return found

    monkeypatch.setattr(Rendezvous, "collect", spoilt)
    ends = job(3, lambda group: group.members, timeout=2 * DEADLINE_S, raw=True)
    assert [type(end) for end in ends] == [PeerError, PeerError, RendezvousError]
    assert all("the list is spoilt" in str(end) for end in ends)


# --- the trial -----------------------------------------------------------------------------------


class Job:
    """Wardens, and the views that they took up."""

    def __init__(self, size: int, seals: tuple[Seal, ...], dead_after: float) -> None:
        self.dead_after = dead_after
        self.views: list[list[View]] = [[] for _ in range(size)]
        seals = seals or (SEAL,) * size
        self.wardens = [self._make(rank, seals[rank]) for rank in range(size)]
        self.addresses = {warden.rank: warden.address for warden in self.wardens}

    def _make(self, rank: int, seal: Seal) -> Warden:
        views = self.views[rank]
        ignored: Callable[..., None] = lambda *_: None  # noqa: E731
        return Warden(
            rank,
            "127.0.0.1",
            seal,
            self.dead_after,
            lambda _: Facts(),
            views.append,
            ignored,
            ignored,
        )

    def until(self, condition: Callable[[], bool]) -> None:
        changed, deadline = self.wardens[0]._changed, time.monotonic() + DEADLINE_S
        with changed:
            while not condition():
                changed.wait(0.01)
                assert time.monotonic() < deadline, "deadline"


@contextmanager
def wardens(size: int, *seals: Seal, dead_after: float = DEADLINE_S) -> Iterator[Job]:
    made = Job(size, seals, dead_after)
    try:
        yield made
    finally:
        for warden in made.wardens:
            warden.leave()
        for warden in made.wardens:
            warden.close()


def test_all_are_reached() -> None:
    with wardens(4) as job:
        for warden in job.wardens:
            warden.start(job.addresses, trial=True)
        assert [warden.unproved(DEADLINE_S) for warden in job.wardens] == [()] * 4
        assert all(len(warden._pulses) == 2 and not warden._links for warden in job.wardens)


def test_a_slow_rank_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than those may be silent who are not on trial."""
    monkeypatch.setattr(trial, "CONNECT_S", 0.05)
    with wardens(2, dead_after=0.2) as job:
        here, slow = job.wardens
        here.start(job.addresses, trial=True)
        assert here.unproved(1.0) == (1,)
        slow.start(job.addresses, trial=True)
        assert here.unproved(DEADLINE_S) == slow.unproved(DEADLINE_S) == ()
        assert not any(job.views)


def test_a_host_that_drops_connections_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "CONNECT_S", 0.2)
    with wardens(2) as job, deaf() as address:
        job.wardens[0].start({**job.addresses, 1: address}, trial=True)
        with pytest.raises(RendezvousError, match="rank 0 could not reach rank 1 .* to nothing"):
            job.wardens[0].unproved(DEADLINE_S)
        assert not any(job.views)


def test_who_answers_at_a_wrong_address_proves_nothing() -> None:
    with wardens(2, SEAL, SEAL.of_job(b"another")) as job:
        job.wardens[0].start(job.addresses, trial=True)
        job.wardens[1].start(job.addresses, trial=True)
        assert [warden.unproved(0.3) for warden in job.wardens] == [(1,), (0,)]


def test_who_dies_on_trial_is_lost_after_it() -> None:
    with wardens(3) as job:
        for warden in job.wardens:
            warden.start(job.addresses, trial=True)
        assert [warden.unproved(DEADLINE_S) for warden in job.wardens] == [()] * 3
        dead = job.wardens[2]
        # No goodbye; but its thread ends before its sockets do, whose numbers others are given.
        dead._pulse._words[0] = 1
        dead._pulse._thread.join(DEADLINE_S)
        dead.close()
        job.until(lambda: all(warden._put_off for warden in job.wardens[:2]))
        assert not any(job.views)
        for warden in job.wardens[:2]:
            warden.trust()
        job.until(lambda: all(job.views[:2]))
        assert job.views[0][-1].members == (0, 1)
