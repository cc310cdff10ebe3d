"""ucxgossip.rendezvous: ranks meet or all learn why not, and nobody waits beyond a deadline."""

import json
import re
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from ucxgossip import rendezvous
from ucxgossip import store as store_module
from ucxgossip.bench import spawn
from ucxgossip.board import Board
from ucxgossip.errors import (
    ArgumentError,
    ClosedError,
    MismatchError,
    PeerError,
    PortInUseError,
    RankMissingError,
    RendezvousError,
    SignatureError,
)
from ucxgossip.rendezvous import Rendezvous, first_difference
from ucxgossip.store import Place, Store, open_store
from ucxgossip.trust import Seal, find_token

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
    def earlier(rank: int) -> None:
        meeting = Rendezvous(store, rank, 2, LONG)
        meeting.publish("worker", b"old")
        meeting.abort("an old failure")

    def later(rank: int) -> bytes:
        meeting = Rendezvous(store, rank, 2, LONG)
        meeting.raise_if_aborted()
        meeting.publish("worker", b"new")
        meeting.agree("join", {})
        return meeting.collect("worker", 1 - rank)

    assert as_ranks(2, earlier) == [None] * 2
    assert as_ranks(2, later) == [b"new"] * 2


def test_restart_of_the_job_does_not_mix(
    store: Store, as_ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    def body(rank: int) -> bytes:
        meeting = Rendezvous(store, rank, 2, LONG)
        meeting.publish("worker", restart.encode())
        return meeting.collect("worker", 1 - rank)

    for restart in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restart)
        assert as_ranks(2, body) == [restart.encode()] * 2


# --- who does not come -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "present", "said"),
    [
        (4, (0, 1, 3), "for rank 2 to join"),
        (4, (1, 2, 3), "for rank 0 to join"),
        (5, (0, 2), "for ranks 1, 3, 4 to join"),
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


def test_missing_at_a_later_meeting_is_named(store: Store, as_ranks: Ranks) -> None:
    def body(rank: int) -> None:
        meeting = Rendezvous(store, rank, 3, LONG)
        meeting.agree("join", {})
        meeting.board.timeout = SHORT
        if rank != 1:
            meeting.agree("mailbox 3", {})

    first, second, third = as_ranks(3, body)
    assert second is None
    for end in (first, third):
        assert isinstance(end, RankMissingError)
        assert end.ranks == (1,) and "for rank 1 at 'mailbox 3'" in str(end)


def test_missing_blob_names_its_rank_and_name(store: Store, as_ranks: Ranks) -> None:
    def body(rank: int) -> None:
        meeting = Rendezvous(store, rank, 2, LONG)
        meeting.meet()
        meeting.board.timeout = SHORT
        if rank == 0:
            with pytest.raises(RankMissingError, match="rank 1 to publish 'mailbox 3'") as raised:
                meeting.collect("mailbox 3", 1)
            assert raised.value.ranks == (1,)

    assert as_ranks(2, body) == [None] * 2


def test_host_of_a_failed_join_stays_until_all_have_read_why(
    store: Store, as_ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendezvous, "_GOODBYE", LONG)
    gone: list[int] = []
    left = threading.Event()

    def body(rank: int) -> None:
        meeting = Rendezvous(store, rank, 3, LONG)
        if rank == 0:
            meeting.abort("no device")
            left.set()
            meeting.give_up()
        else:
            assert left.wait(LONG)
            with pytest.raises(PeerError, match="rank 0 left the job: no device"):
                meeting.meet()
            gone.append(rank)
            meeting.give_up()
            return
        assert sorted(gone) == [1, 2]

    assert as_ranks(3, body) == [None] * 3


# --- abort and leave ---------------------------------------------------------------------------


@pytest.mark.parametrize("wait", ["join", "agree", "collect"])
def test_abort_reaches_ranks_that_wait(store: Store, as_ranks: Ranks, wait: str) -> None:
    def body(rank: int) -> None:
        meeting = Rendezvous(store, rank, 3, LONG)
        if wait != "join":
            meeting.meet()
        if rank == 1:
            meeting.abort("ValueError: loss is nan")
        elif wait != "collect":
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
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")  # a torchrun for each rank
    assert Place.from_environment().local_size == 8


@pytest.mark.parametrize("size", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_tasks_of_another_launcher_are_no_jobs_of_one(
    monkeypatch: pytest.MonkeyPatch, size: str
) -> None:
    monkeypatch.setenv(size, "4")
    with pytest.raises(ArgumentError, match=rf"one of 4 tasks \({size}\).*WORLD_SIZE=\${size}"):
        Place.from_environment()
    assert Place.from_environment(1, 4).size == 4
    assert Place.from_environment(0, 1).size == 1
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert Place.from_environment().rank == 2
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setenv(size, "1")
    assert Place.from_environment().size == 1


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


def test_a_store_that_comes_later_is_waited_for(
    free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By ourselves: torch's client would sleep for half a second at least."""
    refused, connect = threading.Event(), socket.create_connection

    def counted(*arguments: Any) -> socket.socket:
        try:
            return connect(*arguments)
        except ConnectionRefusedError:
            refused.set()
            raise

    monkeypatch.setattr(socket, "create_connection", counted)
    found: list[Any] = []
    client = threading.Thread(target=lambda: found.append(open_store(place(1, 2, free_port), LONG)))
    client.start()
    assert refused.wait(LONG)
    server = open_store(place(0, 2, free_port), LONG)
    server.set("a", b"1")
    client.join(LONG)
    assert found[0].get("a") == b"1"


def test_agents_store_is_not_opened_again(monkeypatch: pytest.MonkeyPatch, free_port: int) -> None:
    """Under torchrun rank 0 is a client as well; here no agent is there to be found."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with pytest.raises(RendezvousError, match="rank 0 found no store"):
        open_store(place(0, 2, free_port), timeout=1.0)


def test_store_listens_on_its_own_address_alone(free_port: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        bound: list[Any] = []
        bind = socket.socket.bind
        patch.setattr(
            socket.socket, "bind", lambda self, where: (bound.append(where), bind(self, where))[1]
        )
        first = open_store(place(0, 2, free_port), LONG)
        second = open_store(place(0, 2, free_port), LONG)  # another job of this process
    assert {each[0] for each in bound} == {"127.0.0.1"}
    first.set("a", b"1")
    assert second.get("a") == b"1"
    listening = [
        line.split()[1]
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
        if line.split()[3] == "0A" and line.split()[1].endswith(f":{free_port:04X}")
    ]
    assert listening == [f"0100007F:{free_port:04X}"]


def test_store_where_its_name_is_no_address_of_this_host(free_port: int) -> None:
    """192.0.2.1 (RFC 5737) is nobody's: torch listens as it always did."""
    assert store_module._listen(Place(0, 2, "no-such-host.invalid", free_port, 1)) is None
    assert store_module._listen(Place(0, 2, "192.0.2.1", free_port, 1)) is None


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
    here, left, told = threading.Event(), threading.Event(), threading.Event()

    def body(rank: int, store: Store) -> None:
        meeting = Rendezvous(store, rank, 2, LONG if rank else SHORT)
        if rank == 0:
            assert here.wait(LONG)  # connected, but at no meeting
            with pytest.raises(RankMissingError, match="for rank 1 to join"):
                meeting.agree("join", {})
            meeting.abort("rank 1 is missing")
            left.set()
            assert told.wait(LONG)  # the store is ours
        else:
            here.set()
            assert left.wait(LONG)
            with pytest.raises(PeerError, match="rank 0 left the job: rank 1 is missing"):
                meeting.collect("worker", 0)
            told.set()

    assert over_torch(as_ranks, 2, free_port, body) == [None, None]


# --- who belongs to the job --------------------------------------------------------------------

SOON = 10.0  # seconds within which ranks that do not belong together must all have failed


@pytest.fixture(autouse=True)
def short_goodbye(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody here is so late that rank 0 had to stay for it."""
    monkeypatch.setattr(rendezvous, "_GOODBYE", SHORT)


def met(store: Store, rank: int, size: int, token: str = "the job's own token") -> Any:
    """Meet, and end as a failed join does."""
    meeting = Rendezvous(store, rank, size, LONG, token)
    try:
        meeting.meet()
    finally:
        meeting.give_up()


@pytest.mark.parametrize(
    "sizes",
    [(2, 3), (3, 2), (2, 3, 3), (3, 2, 3), (4, 4, 3), (3, 4, 4), (4, 3, 3), (4, 3, 2, 1)],
    ids=str,
)
def test_other_world_sizes_are_told_to_all(
    store: Store, as_ranks: Ranks, sizes: tuple[int, ...]
) -> None:
    def body(rank: int) -> None:
        met(store, rank, max(sizes[rank], rank + 1))

    ends = as_ranks(len(sizes), body, deadline=SOON)
    assert [type(end) for end in ends] == [MismatchError] * len(sizes)
    (text,) = {str(end) for end in ends}
    assert re.fullmatch(r"join: world size: rank \d has \d, rank \d has \d", text)


def test_other_world_sizes_are_told_though_rank_0_does_not_come(
    store: Store, as_ranks: Ranks
) -> None:
    ends = as_ranks(3, lambda index: met(store, index + 1, 5 if index == 1 else 4), deadline=SOON)
    assert [type(end) for end in ends] == [MismatchError] * 3
    (text,) = {str(end) for end in ends}
    assert re.fullmatch(
        r"join: world size: rank [13] has 4, rank 2 has 5|"
        r"join: world size: rank 2 has 5, rank 3 has 4",
        text,
    )


def test_rank_beyond_the_size_of_the_others_is_told_to_all(store: Store, as_ranks: Ranks) -> None:
    """Ranks 0 and 1 are a whole job of two, unless they hear that rank 2 counts three."""
    came = "ucxgossip/0/1/arrival/1"

    def body(rank: int) -> None:
        if rank != 2:
            store.wait([came], timedelta(seconds=LONG))
        met(store, rank, 3 if rank == 2 else 2)

    ends = as_ranks(3, body, deadline=SOON)
    assert [type(end) for end in ends] == [MismatchError] * 3
    (text,) = {str(end) for end in ends}
    assert re.fullmatch(r"join: world size: rank [01] has 2, rank 2 has 3", text)


def test_rank_beyond_a_job_under_way_is_told_to_all(store: Store, as_ranks: Ranks) -> None:
    started = threading.Barrier(3, timeout=LONG)

    def body(rank: int) -> None:
        if rank == 2:
            started.wait()
            met(store, rank, 3)
        meeting = Rendezvous(store, rank, 2, LONG, "the job's own token")
        meeting.meet()
        started.wait()
        meeting.collect("never", 1 - rank)

    ends = as_ranks(3, body, deadline=SOON)
    assert [type(end) for end in ends] == [MismatchError] * 3
    assert len({str(end) for end in ends}) == 1


@pytest.mark.parametrize("other", [(0,), (1,), (2,), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("first", [0, 1, 2])
def test_other_tokens_are_told_to_all(
    store: Store, as_ranks: Ranks, other: tuple[int, ...], first: int
) -> None:
    came = "ucxgossip/0/1/arrival/1"

    def body(rank: int) -> None:
        if rank != first:
            store.wait([came], timedelta(seconds=LONG))
        met(store, rank, 3, f"the token of rank {rank}" if rank in other else "the job's own token")

    ends = as_ranks(3, body, deadline=SOON)
    assert [type(end) for end in ends] == [SignatureError] * 3
    for end in ends:
        assert "another token" in str(end) and "ucxgossip run" in str(end)
        assert "the token of" not in str(end) and "the job's own" not in str(end)
    if len(other) == 1:
        assert any(f"rank {other[0]}" in str(end) for end in ends)
        assert len({str(ends[rank]) for rank in range(3) if rank not in other}) == 1


def test_notes_of_an_earlier_job_are_not_taken(store: Any, as_ranks: Ranks) -> None:
    """Somebody without the token puts an old job's notes into the store of a new one."""

    def job(rank: int) -> bytes:
        meeting = Rendezvous(store, rank, 2, LONG)
        meeting.publish("worker", b"old address")
        return meeting.collect("worker", 1 - rank)

    assert as_ranks(2, job) == [b"old address"] * 2
    old = {key: value for key, value in store.values.items() if "joins" not in key}
    store.values.clear()
    for key in ("ucxgossip/0/1/job", "ucxgossip/0/1/worker/0"):
        store.set(key, old[key])
    with pytest.raises(SignatureError, match="rank 1 got rank 0's answer to .* an earlier job"):
        Rendezvous(store, 1, 2, LONG).meet()

    store.values.clear()
    store.set("ucxgossip/0/1/worker/1", old["ucxgossip/0/1/worker/1"])

    def again(rank: int) -> None:
        meeting = Rendezvous(store, rank, 2, LONG)
        meeting.meet()
        if rank == 0:
            meeting.collect("worker", 1)

    host, guest = as_ranks(2, again)
    assert guest is None
    assert isinstance(host, SignatureError)
    assert "what rank 1 wrote as 'ucxgossip/0/1/worker/1'" in str(host)


def test_note_under_another_name_or_rank_is_not_taken(store: Any, as_ranks: Ranks) -> None:
    swapped = threading.Event()

    def body(rank: int) -> None:
        meeting = Rendezvous(store, rank, 3, LONG)
        meeting.publish("worker", b"w%d" % rank)
        meeting.publish("mailbox", b"m%d" % rank)
        meeting.agree("all have", {})
        if rank == 0:
            key = "ucxgossip/0/1"
            store.values[f"{key}/worker/1"] = store.values[f"{key}/worker/2"]
            store.values[f"{key}/mailbox/2"] = store.values[f"{key}/worker/2"]
            swapped.set()
        assert swapped.wait(LONG)
        for name, other in (("worker", 1), ("mailbox", 2)):
            with pytest.raises(SignatureError, match=f"'ucxgossip/0/1/{name}/{other}'"):
                meeting.collect(name, other)
        assert meeting.collect("worker", 2) == b"w2"

    assert as_ranks(3, body) == [None] * 3


@pytest.mark.parametrize("junk", [b"", b"\0", b"\0" * 36, b"\xff" * 200, b"[1, 2]"], ids=repr)
@pytest.mark.parametrize("key", ["job", "arrival/1", "aborted", "join#0/facts/0", "join#0/result"])
def test_junk_in_the_store_is_a_named_error(store: Store, junk: bytes, key: str) -> None:
    """Rank 1 finds junk where rank 0's notes would be."""
    if key != "job":  # an honest rank 0 has come and answered
        host = Board(store, 0, 2, LONG, Seal(find_token()))
        meeting = Rendezvous(store, 1, 2, LONG)
        challenge = bytes(16)
        number = bytes(range(16))
        if key.startswith("join"):
            meeting._seal = meeting.board.seal.of_job(number)
            facts = host.key("join#0", "facts", 0)
            host.write(meeting._seal, facts, b"[{}]")
        host.write(host.seal, host.key("job"), number + challenge * 2)
    else:
        meeting = Rendezvous(store, 1, 2, LONG)
    store.set(f"ucxgossip/0/1/{key}", junk)
    if key == "aborted":
        with pytest.raises(SignatureError):
            meeting.raise_if_aborted()
        return
    if key == "arrival/1":
        store.add("ucxgossip/0/1/arrivals", 1)
    said = f"cannot open what .* wrote as 'ucxgossip/0/1/{key}'"
    with pytest.raises(SignatureError, match=said if "join" in key else "has another token"):
        meeting.agree("join", {})


@pytest.mark.parametrize(
    "blob", [b"", b"nothing", b"{}", b"[]", b"[1]", b'["a", "b"]', b"[1, 2]", b"[" * 100_000]
)
def test_signed_by_another_release_is_a_named_error(store: Store, blob: bytes) -> None:
    host, seal = Board(store, 1, 2, LONG, Seal(find_token())), Seal(find_token())
    store.add(host.key("arrivals"), 1)
    host.write(seal, host.key("arrival", 1), blob)
    with pytest.raises(RendezvousError, match="rank 1 wrote what this rank does not understand"):
        Rendezvous(store, 0, 2, LONG).meet()


def test_rank_that_died_while_it_greeted_is_passed_over(store: Store, as_ranks: Ranks) -> None:
    store.add("ucxgossip/0/1/arrivals", 1)  # and nothing at arrival/1, ever

    def body(rank: int) -> None:
        Rendezvous(store, rank, 3, LONG).meet()

    assert as_ranks(3, body, deadline=SOON) == [None] * 3


# --- a store that does not answer --------------------------------------------------------------


class SilentStore:
    """A store that never answers, once it is `stopped`, until the test is `over`."""

    def __init__(self, inner: Store) -> None:
        self._inner, self.stopped, self.over = inner, False, threading.Event()

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            if self.stopped:
                self.over.wait(LONG)
            return getattr(self._inner, name)(*arguments)

        return call


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
def test_store_that_does_not_answer_is_given_up(
    store: Store, use: Callable[[Rendezvous], None]
) -> None:
    silent = SilentStore(store)
    meeting = Rendezvous(silent, 0, 1, SHORT)
    meeting.meet()
    silent.stopped = True
    try:
        for _ in range(2):
            with pytest.raises(RendezvousError, match="rank 0 lost the store .*no answer within"):
                use(meeting)
        with pytest.raises(RendezvousError, match="rank 0 could not leave: no answer"):
            meeting.leave(LONG)
    finally:
        silent.over.set()


def test_open_store_to_something_that_does_not_answer(listener: socket.socket) -> None:
    with pytest.raises(RendezvousError, match=r"rank 1 waited \d+ s") as raised:
        open_store(place(1, 2, listener.getsockname()[1]), timeout=1.0)
    assert f"127.0.0.1:{listener.getsockname()[1]}" in str(raised.value)
