"""ucxgossip.rendezvous: ranks meet or all learn why not, and nobody waits beyond a deadline."""

import json
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest

from ucxgossip.bench import spawn
from ucxgossip.errors import (
    ArgumentError,
    ClosedError,
    MismatchError,
    PeerError,
    PortInUseError,
    RankMissingError,
    RendezvousError,
)
from ucxgossip.rendezvous import Rendezvous, first_difference
from ucxgossip.store import Place, Store, open_store

Ranks = Callable[..., list[Any]]
Facts = Mapping[str, object]

LONG = 60.0
SHORT = 0.5
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE")


@pytest.fixture(autouse=True)
def without_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*VARIABLES, "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)


# --- agreement ---------------------------------------------------------------------------------


def agree(store: Store, size: int, facts: Callable[[int], Facts], timeout: float = LONG) -> Any:
    """The body of a rank that joins and agrees once."""

    def body(rank: int) -> None:
        Rendezvous(store, rank, size, timeout).agree("join", facts(rank))

    return body


@pytest.mark.parametrize("size", [1, 2, 5])
def test_ranks_agree(store: Store, as_ranks: Ranks, size: int) -> None:
    facts = {"a": [1, 2.5, None, "x"], "b": {"c": (True, {})}}
    assert as_ranks(size, agree(store, size, lambda rank: facts)) == [None] * size


def test_ranks_agree_again_and_again(store: Store, as_ranks: Ranks) -> None:
    def body(rank: int) -> list[str]:
        meeting = Rendezvous(store, rank, 3, LONG)
        for number in range(5):
            meeting.agree("mailbox", {"bytes": number})
            meeting.agree("exchange", {"bytes": -number})
        with pytest.raises(MismatchError) as raised:
            meeting.agree("mailbox", {"bytes": rank // 2})
        meeting.agree("mailbox", {"bytes": 7})
        return [str(raised.value)]

    text = "mailbox: bytes: rank 0 has 0, rank 2 has 1"
    assert as_ranks(3, body) == [[text]] * 3


DIFFERENCES: dict[str, tuple[Facts, Facts, str]] = {
    "value": ({"x": 1, "y": 2}, {"x": 1, "y": 3}, "y: rank 0 has 2, rank 1 has 3"),
    "first of two": ({"x": 1, "y": 2}, {"x": 2, "y": 3}, "x: rank 0 has 1, rank 1 has 2"),
    "nested": (
        {"a": {"b": {"c": "f32"}}},
        {"a": {"b": {"c": "f64"}}},
        "a.b.c: rank 0 has 'f32', rank 1 has 'f64'",
    ),
    "list": (
        {"a": [[1, 2], [3, 4]]},
        {"a": [[1, 2], [3, 5]]},
        "a[1][1]: rank 0 has 4, rank 1 has 5",
    ),
    "length": ({"a": [1, 2]}, {"a": [1]}, "a: rank 0 has 2 entries, rank 1 has 1"),
    "list before length": ({"a": [1, 2]}, {"a": [3]}, "a[0]: rank 0 has 1, rank 1 has 3"),
    "missing here": (
        {"a": {"b": 1, "c": 2}},
        {"a": {"b": 1}},
        "a.c: rank 0 has it, rank 1 does not",
    ),
    "missing there": ({"a": 1}, {"a": 1, "b": 2}, "b: rank 1 has it, rank 0 does not"),
    "kind": ({"a": [1]}, {"a": {"0": 1}}, "a: rank 0 has [1], rank 1 has {'0': 1}"),
}


@pytest.mark.parametrize("case", DIFFERENCES)
def test_difference_is_told_to_every_rank(store: Store, as_ranks: Ranks, case: str) -> None:
    first, second, said = DIFFERENCES[case]
    ends = as_ranks(3, agree(store, 3, lambda rank: second if rank == 1 else first))
    assert [type(end) for end in ends] == [MismatchError] * 3
    assert {str(end) for end in ends} == {f"join: {said}"}


def test_many_differences_are_told_as_one(store: Store, as_ranks: Ranks) -> None:
    ends = as_ranks(6, agree(store, 6, lambda rank: {"rank": rank}))
    assert [type(end) for end in ends] == [MismatchError] * 6
    (text,) = {str(end) for end in ends}
    assert text in {f"join: rank: rank 0 has 0, rank {rank} has {rank}" for rank in range(1, 6)}


@pytest.mark.parametrize("same", [{}, {"a": [1, {"b": None}]}, {"a": 1.5, "b": "x"}])
def test_no_difference(same: Facts) -> None:
    assert first_difference(same, json.loads(json.dumps(same)), rank=1) == ""


def test_difference_of_bare_values_is_named_too() -> None:
    assert first_difference([1], [1, 2], rank=4) == "facts: rank 0 has 1 entries, rank 4 has 2"
    assert first_difference(1, 2, rank=4) == "facts: rank 0 has 1, rank 4 has 2"


# --- publish and collect -----------------------------------------------------------------------


def test_collect_waits_for_what_is_published(store: Store, as_ranks: Ranks) -> None:
    blobs = [bytes(range(256)), b"", b"\x00\xff"]

    def body(rank: int) -> list[bytes]:
        meeting = Rendezvous(store, rank, 3, LONG)
        got = [meeting.collect("worker", other) for other in range(rank)]
        meeting.publish("worker", blobs[rank])
        return got + [meeting.collect("worker", other) for other in range(rank, 3)]

    assert as_ranks(3, body) == [blobs] * 3


def test_successive_joins_of_one_store_do_not_mix(store: Store, as_ranks: Ranks) -> None:
    earlier, later = ([Rendezvous(store, rank, 2, LONG) for rank in range(2)] for _ in range(2))
    earlier[1].publish("worker", b"old")
    earlier[1].abort("an old failure")
    late = threading.Thread(target=lambda: later[1].publish("worker", b"new"), daemon=True)
    later[0].raise_if_aborted()
    late.start()
    assert later[0].collect("worker", 1) == b"new"
    late.join(LONG)
    assert as_ranks(2, lambda rank: later[rank].agree("join", {})) == [None] * 2


def test_restart_of_the_job_does_not_mix(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    Rendezvous(store, 1, 2, LONG).publish("worker", b"old")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    restarted = [Rendezvous(store, rank, 2, SHORT) for rank in range(2)]
    with pytest.raises(RankMissingError):
        restarted[0].collect("worker", 1)
    restarted[1].publish("worker", b"new")
    assert restarted[0].collect("worker", 1) == b"new"


# --- who does not come -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "present", "said"),
    [
        (4, (0, 1, 3), "for rank 2 at 'join'"),
        (4, (1, 2, 3), "for rank 0 at 'join'"),
        (5, (0, 2), "for ranks 1, 3, 4 at 'join'"),
    ],
)
def test_missing_ranks_are_named(
    store: Store, as_ranks: Ranks, size: int, present: tuple[int, ...], said: str
) -> None:
    start = threading.Barrier(len(present), timeout=LONG)

    def body(index: int) -> None:
        meeting = Rendezvous(store, present[index], size, SHORT)
        start.wait()
        meeting.agree("join", {})

    ends = as_ranks(len(present), body)
    absent = tuple(rank for rank in range(size) if rank not in present)
    for rank, end in zip(present, ends, strict=True):
        assert isinstance(end, RankMissingError) and isinstance(end, TimeoutError)
        assert end.ranks == absent
        seconds = float(str(end).removeprefix(f"rank {rank} waited ").split(" s ")[0])
        assert seconds >= SHORT
        assert said in str(end) and "MASTER_ADDR" in str(end)


def test_missing_blob_names_its_rank_and_name(store: Store) -> None:
    with pytest.raises(RankMissingError, match="for rank 1 to publish 'mailbox 3'") as raised:
        Rendezvous(store, 0, 2, SHORT).collect("mailbox 3", 1)
    assert raised.value.ranks == (1,)


def test_mismatch_is_told_though_a_rank_is_missing(store: Store, as_ranks: Ranks) -> None:
    ends = as_ranks(2, agree(store, 3, lambda rank: {"x": rank}))
    assert {str(end) for end in ends} == {"join: x: rank 0 has 0, rank 1 has 1"}


# --- abort and leave ---------------------------------------------------------------------------


@pytest.mark.parametrize("wait", ["agree", "collect"])
def test_abort_reaches_ranks_that_wait(store: Store, as_ranks: Ranks, wait: str) -> None:
    def body(rank: int) -> None:
        meeting = Rendezvous(store, rank, 3, LONG)
        if rank == 1:
            meeting.abort("ValueError: loss is nan")
        elif wait == "agree":
            meeting.agree("join", {})
        else:
            meeting.collect("worker", 1)

    first, second, third = as_ranks(3, body)
    assert second is None
    for end in (first, third):
        assert isinstance(end, PeerError)
        assert (end.rank, str(end)) == (1, "rank 1 left the job: ValueError: loss is nan")


def test_abort_is_not_raised_on_who_called_it(store: Store) -> None:
    meeting, other = Rendezvous(store, 0, 2, LONG), Rendezvous(store, 1, 2, LONG)
    meeting.raise_if_aborted()
    meeting.abort("reason")
    meeting.raise_if_aborted()
    with pytest.raises(PeerError, match="rank 0 left the job: reason"):
        other.raise_if_aborted()


@pytest.mark.parametrize("size", [1, 2, 5])
def test_leave_together_and_the_host_last(store: Any, as_ranks: Ranks, size: int) -> None:
    def body(rank: int) -> tuple[bool, int]:
        together = Rendezvous(store, rank, size, LONG).leave(LONG)
        return together, len(store.calls)

    ends = as_ranks(size, body)
    assert [together for together, _ in ends] == [True] * size
    assert ends[0][1] == len(store.calls), "a rank wrote to the store after its host had left"


def test_leave_without_a_rank_that_is_gone(store: Store, as_ranks: Ranks) -> None:
    ends = as_ranks(2, lambda rank: Rendezvous(store, rank, 3, LONG).leave(SHORT))
    assert ends == [False, False]


def test_leave_does_not_wait_after_an_abort(store: Store, as_ranks: Ranks) -> None:
    meetings = [Rendezvous(store, rank, 3, LONG) for rank in range(3)]
    meetings[2].abort("reason")
    assert as_ranks(2, lambda rank: meetings[rank].leave(LONG), deadline=LONG / 2) == [False] * 2


@pytest.mark.parametrize(
    "use",
    [
        lambda meeting: meeting.publish("x", b""),
        lambda meeting: meeting.collect("x", 0),
        lambda meeting: meeting.agree("x", {}),
    ],
    ids=["publish", "collect", "agree"],
)
def test_use_after_leave(store: Store, use: Callable[[Rendezvous], None]) -> None:
    meeting = Rendezvous(store, 0, 1, LONG)
    meeting.leave(LONG)
    with pytest.raises(ClosedError):
        use(meeting)
    meeting.abort("too late")  # nobody is there to be told


# --- a store that goes away --------------------------------------------------------------------


class FragileStore:
    """A store whose methods raise what torch's raise, once it is `lost`."""

    def __init__(self, inner: Store) -> None:
        self._inner = inner
        self.lost = False

    def __getattr__(self, name: str) -> Any:
        if self.lost:
            raise ConnectionResetError("Connection reset by peer")
        return getattr(self._inner, name)


@pytest.mark.parametrize(
    "use",
    [
        lambda meeting: meeting.publish("x", b""),
        lambda meeting: meeting.collect("x", 0),
        lambda meeting: meeting.agree("x", {}),
        lambda meeting: meeting.raise_if_aborted(),
    ],
    ids=["publish", "collect", "agree", "raise_if_aborted"],
)
def test_lost_store(store: Store, use: Callable[[Rendezvous], None]) -> None:
    fragile = FragileStore(store)
    meeting = Rendezvous(fragile, 1, 2, LONG)
    fragile.lost = True
    with pytest.raises(RendezvousError, match="rank 1 lost the store.*Connection reset by peer"):
        use(meeting)


def test_leave_from_a_lost_store(store: Store) -> None:
    fragile = FragileStore(store)
    host, other = (Rendezvous(fragile, rank, 2, LONG) for rank in range(2))
    fragile.lost = True
    assert not other.leave(LONG)
    with pytest.raises(RendezvousError, match="rank 0 could not leave: Connection reset"):
        host.leave(LONG)


# --- the place in the job ----------------------------------------------------------------------


def test_place_without_an_environment_is_a_job_of_one() -> None:
    assert Place.from_environment() == Place(0, 1, "127.0.0.1", 29500, 1)


def test_place_is_torchruns(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(VARIABLES, ("3", "8", "10.0.0.7", "1234", "4"), strict=True):
        monkeypatch.setenv(name, value)
    assert Place.from_environment() == Place(3, 8, "10.0.0.7", 1234, 4)
    assert Place.from_environment(rank=1, size=2) == Place(1, 2, "10.0.0.7", 1234, 4)
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert Place.from_environment().local_size == 1
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    assert Place.from_environment().local_size == 8


@pytest.mark.parametrize("name", [name for name in VARIABLES if name != "MASTER_ADDR"])
@pytest.mark.parametrize("value", ["", "two", "1.5"])
def test_variable_that_is_no_number(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ArgumentError, match=f"{name} is {value!r}; not a number"):
        Place.from_environment()


@pytest.mark.parametrize(
    ("rank", "size", "said"),
    [
        (0, 0, "world size is 0"),
        (0, -2, "world size is -2"),
        (-1, 2, "rank -1 does not fit world size 2"),
        (2, 2, "rank 2 does not fit world size 2"),
        (1, None, "rank 1 does not fit world size 1"),
        ("0", 2, "rank"),
        (0, 2.0, "world size"),
    ],
)
def test_place_that_does_not_fit(rank: Any, size: Any, said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        Place.from_environment(rank, size)


# --- torch's store -----------------------------------------------------------------------------


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A socket of another program, listening on a port of its own."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


@pytest.fixture
def free_port() -> int:
    # Below the range of outgoing connections: a client that comes before its server could be given
    # the very port that it connects to.
    return spawn.free_port()


def place(rank: int, size: int, port: int) -> Place:
    return Place(rank, size, "127.0.0.1", port, size)


def test_port_in_use(listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    with pytest.raises(PortInUseError, match=f"127.0.0.1:{port}.*MASTER_PORT"):
        open_store(place(0, 2, port), timeout=1.0)


def test_nobody_listens(free_port: int) -> None:
    with pytest.raises(RendezvousError, match=f"rank 1 found no store at 127.0.0.1:{free_port}"):
        open_store(place(1, 2, free_port), timeout=1.0)


def test_agents_store_is_not_opened_again(monkeypatch: pytest.MonkeyPatch, free_port: int) -> None:
    """Under torchrun rank 0 is a client as well; here no agent is there to be found."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with pytest.raises(RendezvousError, match="rank 0 found no store"):
        open_store(place(0, 2, free_port), timeout=1.0)


def over_torch(as_ranks: Ranks, size: int, port: int, body: Callable[[int, Store], Any]) -> Any:
    """Run `body` on ranks that have each a client of their own; rank 0 holds the server."""
    opened: list[Store] = []

    def rank_body(rank: int) -> Any:
        opened.append(store := open_store(place(rank, size, port), LONG))
        return body(rank, store)

    return as_ranks(size, rank_body)


def test_meeting_over_torchs_store(as_ranks: Ranks, free_port: int) -> None:
    def body(rank: int, store: Store) -> Any:
        meeting = Rendezvous(store, rank, 3, LONG)
        meeting.publish("worker", bytes([rank, 0, 255]))
        meeting.agree("join", {"x": [1, 2]})
        blobs = [meeting.collect("worker", other) for other in range(3)]
        with pytest.raises(MismatchError) as raised:
            meeting.agree("mailbox", {"bytes": rank // 2})
        return blobs, str(raised.value), meeting.leave(LONG)

    blobs = [bytes([rank, 0, 255]) for rank in range(3)]
    said = "mailbox: bytes: rank 0 has 0, rank 2 has 1"
    assert over_torch(as_ranks, 3, free_port, body) == [(blobs, said, True)] * 3


def test_absence_and_abort_over_torchs_store(as_ranks: Ranks, free_port: int) -> None:
    here, told = threading.Event(), threading.Event()

    def body(rank: int, store: Store) -> None:
        meeting = Rendezvous(store, rank, 2, LONG if rank else SHORT)
        if rank == 0:
            assert here.wait(LONG)  # connected, but at no meeting
            with pytest.raises(RankMissingError, match="for rank 1 at 'join'"):
                meeting.agree("join", {})
            meeting.abort("rank 1 is missing")
            assert told.wait(LONG)  # the store is ours
        else:
            here.set()
            with pytest.raises(PeerError, match="rank 0 left the job: rank 1 is missing"):
                meeting.collect("worker", 0)
            told.set()

    assert over_torch(as_ranks, 2, free_port, body) == [None, None]
