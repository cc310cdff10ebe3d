"""Groups whose ranks are threads of this process: rounds by schedule, named errors, deadlines."""

import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest

import ucxgossip as ug
from ucxgossip import errors
from ucxgossip.buffer import Buffer
from ucxgossip.engine import channel
from ucxgossip.mixing.collective import PIECE, Collective
from ucxgossip.schedule import Dissemination, Rotated
from ucxgossip.tuning import CONSTANTS, usual

Ranks = Callable[..., list[Any]]
TIMEOUT = 30.0


@pytest.fixture(params=["tcp", "shm"])
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def check(results: list[Any]) -> list[Any]:
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("count", [2, 3000])
def test_exchange_follows_the_schedule(
    job: Callable[..., list[Any]], transport: str, size: int, count: int
) -> None:
    schedule = Rotated(Dissemination(size), seed=3)
    steps = 3 * schedule.period + 1
    start = np.random.default_rng(0).standard_normal((size, count))

    def body(group: ug.Group) -> np.ndarray:
        array = start[group.rank].copy()
        for _ in range(steps):
            assert group.exchange(array, schedule=Rotated(Dissemination(size), seed=3)) is array
        return array

    expected = start.copy()
    for step in range(steps):
        if size > 1:
            senders = [schedule.round(rank, step).sender for rank in range(size)]
            expected = expected + 0.5 * (expected[senders] - expected)
    for rank, array in enumerate(job(size, body, transport)):
        np.testing.assert_array_equal(array, expected[rank])


@pytest.mark.parametrize(("size", "count"), [(2, 2), (2, 20_000), (3, 2), (8, 100)])
def test_many_rounds_in_a_row(
    job: Callable[..., list[Any]], transport: str, size: int, count: int
) -> None:
    """More than are foreseen at a time, of two arrays in turn, each with its own mailbox."""
    schedule, steps = Rotated(Dissemination(size), seed=7), 600
    start = np.random.default_rng(0).standard_normal((2, size, count))

    def body(group: ug.Group) -> list[np.ndarray]:
        arrays = [start[0, group.rank].copy(), start[1, group.rank].copy()]
        boxes = [group.mailbox(arrays[0].nbytes), group.mailbox(arrays[1].nbytes, depth=2)]
        for step in range(steps):
            which = step // 7 % 2 if step < 300 else 0
            group.exchange(arrays[which], schedule=schedule, mailbox=boxes[which])
        return arrays

    expected, numbers = start.copy(), [0, 0]
    for step in range(steps):
        which = step // 7 % 2 if step < 300 else 0
        number, numbers[which] = numbers[which], numbers[which] + 1
        senders = [schedule.round(rank, number).sender for rank in range(size)]
        values = expected[which]
        expected[which] = values + 0.5 * (values[senders] - values)
    for rank, arrays in enumerate(job(size, body, transport)):
        for which in (0, 1):
            np.testing.assert_array_equal(arrays[which], expected[which, rank])


class Astray(Dissemination):
    """A user's schedule that after a while names a rank that there is none of."""

    def round(self, rank: int, step: int) -> ug.Round:
        return ug.Round(self.size, self.size) if step >= 100 else super().round(rank, step)

    rounds = None  # type: ignore[assignment]


def test_a_rank_that_there_is_none_of_is_refused_also_where_rounds_are_foreseen(
    job: Callable[..., list[Any]], transport: str
) -> None:
    def body(group: ug.Group) -> bool:
        array, schedule = np.zeros(2), Astray(2)
        with pytest.raises(errors.ArgumentError, match="there is no rank 2"):
            for _ in range(200):
                group.exchange(array, schedule=schedule)
        return group._exchange_box is not None and group._exchange_box.round > 50

    assert job(2, body, transport) == [True, True]


@pytest.mark.parametrize(("size", "chunks", "ring"), [(2, 2, 1), (2, 40, 4), (3, 7, 2), (8, 9, 3)])
@pytest.mark.parametrize("verify", [False, True])
def test_large_arrays_go_through_a_ring(
    job: Callable[..., list[Any]],
    transport: str,
    size: int,
    chunks: int,
    ring: int,
    verify: bool,
) -> None:
    schedule, steps, count = Rotated(Dissemination(size), seed=7), 30, chunks * 512 - 100
    start = np.random.default_rng(0).standard_normal((size, count))

    def body(group: ug.Group) -> np.ndarray:
        array = start[group.rank].copy()
        box = group.mailbox(array.nbytes, ring=True)
        assert (box.layout.ring, box.layout.depth, box.layout.chunks) == (True, ring, chunks)
        for _ in range(steps):
            group.exchange(array, schedule=schedule, mailbox=box)
        assert box.intact()
        return array

    tuning = ug.Tuning(chunk=4096, ring=ring)
    expected = start.copy()
    for step in range(steps):
        senders = [schedule.round(rank, step).sender for rank in range(size)]
        expected = expected + 0.5 * (expected[senders] - expected)
    for rank, array in enumerate(job(size, body, transport, tuning=tuning, verify=verify)):
        np.testing.assert_array_equal(array, expected[rank])


def test_small_arrays_and_a_ring_of_zero_have_whole_slots(job: Callable[..., list[Any]]) -> None:
    def body(group: ug.Group) -> list[bool]:
        return [group.mailbox(nbytes, ring=True).layout.ring for nbytes in (4096, 8192, 8200)]

    assert job(1, body, "shm", tuning=ug.Tuning(chunk=4096, ring=2)) == [[False, False, True]]
    assert job(1, body, "shm", tuning=ug.Tuning(chunk=4096, ring=0)) == [[False] * 3]


def test_what_is_not_finite_in_a_round_that_was_foreseen(
    job: Callable[..., list[Any]], transport: str
) -> None:
    def body(group: ug.Group) -> tuple[dict[int, int], np.ndarray]:
        array = np.full(4, float(group.rank))
        for number in range(40):
            if number == 30 and group.rank == 0:
                array[1] = np.nan
            group.exchange(array)
        before = group.nonfinite
        with pytest.raises(errors.NonFiniteError):
            for _ in range(2):
                group.exchange(array, nonfinite="raise")
        return before, array

    for rank, (found, array) in enumerate(job(2, body, transport)):
        assert found == {0: 10}
        assert np.isnan(array).tolist() == [False, rank == 0, False, False]


def test_exchange_without_mixing_returns_what_came(
    job: Callable[..., list[Any]], transport: str
) -> None:
    def body(group: ug.Group) -> tuple[np.ndarray, np.ndarray]:
        array = np.full(100, group.rank, np.int32)
        return array, group.exchange(array, mix=False, schedule=Dissemination(3))

    for rank, (array, received) in enumerate(job(3, body, transport)):
        assert (array == rank).all()
        assert (received == (rank - 1) % 3).all()


def test_several_sizes_by_mailboxes_of_their_own(
    job: Callable[..., list[Any]], transport: str
) -> None:
    def body(group: ug.Group) -> list[float]:
        sizes = (8, 40000, 3_000_000)
        boxes = {nbytes: group.mailbox(nbytes) for nbytes in sizes}
        means = []
        for nbytes in sizes * 3:
            array = np.full(nbytes // 8, float(group.rank))
            group.exchange(array, mailbox=boxes[nbytes])
            assert (array == array[0]).all()
            means.append(float(array[0]))
        return means

    assert job(2, body, transport) == [[0.5] * 9, [0.5] * 9]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 6, 8])
def test_collectives_are_exact(job: Callable[..., list[Any]], transport: str, size: int) -> None:
    count = PIECE // 8 + 1001  # more than one piece
    values = np.random.default_rng(1).standard_normal((size, count))

    def body(group: ug.Group) -> tuple[np.ndarray, np.ndarray, float]:
        collective = Collective(group)
        mean, sent = values[group.rank].copy(), values[group.rank].copy()
        collective.average(mean)
        collective.broadcast(sent, root=size - 1)
        return mean, sent, collective.consensus_distance([values[group.rank]])

    center = values.mean(axis=0)
    apart = np.sqrt(((values - center) ** 2).sum(axis=1).mean()) / np.linalg.norm(center)
    for mean, sent, distance in job(size, body, transport):
        np.testing.assert_allclose(mean, center, rtol=0, atol=1e-12)
        np.testing.assert_array_equal(sent, values[size - 1])
        assert distance == pytest.approx(apart, rel=1e-9)


def test_two_groups_on_one_store(as_ranks: Ranks, store: Any) -> None:
    def rank(number: int) -> list[float]:
        seen = []
        for value in (1.0, 2.0):
            with ug.join(number, 2, store, "tcp", TIMEOUT) as group:
                array = np.full(4, value * number)
                group.exchange(array)
                seen.append(float(array[0]))
        return seen

    assert check(as_ranks(2, rank)) == [[0.5, 1.0], [0.5, 1.0]]


BAD_ARRAYS: list[tuple[Any, str]] = [
    (np.zeros((2, 2), np.float32), "1-D"),
    (np.zeros(8, np.float32)[::2], "contiguous"),
    (np.zeros(4, np.int64), "int64"),
    (np.zeros(4, np.float16), "float16"),
    (np.zeros(0, np.float32), "empty"),
    ([1.0, 2.0], "NumPy array"),
    (np.broadcast_to(np.float32(1), (1,)), "read-only"),
    (np.array([object()]), "objects"),
]


@pytest.mark.parametrize(("array", "word"), BAD_ARRAYS, ids=lambda each: str(each)[:20])
def test_bad_array_is_refused(store: Any, array: Any, word: str) -> None:
    with ug.join(0, 1, store) as group, pytest.raises(errors.ArrayError, match=word):
        group.exchange(array)


def test_torch_tensor_is_refused_with_advice(store: Any) -> None:
    torch = pytest.importorskip("torch")
    with ug.join(0, 1, store) as group, pytest.raises(errors.ArrayError, match="tensor.numpy"):
        group.exchange(torch.zeros(4))


def test_size_and_dtype_may_not_change_between_rounds(store: Any) -> None:
    with ug.join(0, 1, store) as group:
        group.exchange(np.zeros(4, np.float32))
        with pytest.raises(errors.ArrayError, match="sizes may not change"):
            group.exchange(np.zeros(5, np.float32))
        with pytest.raises(errors.ArrayError, match="dtypes may not change"):
            group.exchange(np.zeros(2, np.float64))
        group.exchange(np.zeros(4, np.float32))


def test_dtype_may_not_change_between_rounds_of_a_mailbox(store: Any) -> None:
    with ug.join(0, 1, store) as group:
        box = group.mailbox(16, ring=True)
        group.exchange(np.zeros(4, np.float32), mailbox=box)
        with pytest.raises(errors.ArrayError, match="dtypes may not change"):
            group.exchange(np.zeros(2), mailbox=box)
        group.exchange(np.zeros(4, np.float32), mailbox=box)


@pytest.mark.parametrize("what", ["dtype", "schedule"])
def test_ranks_exchange_the_same_through_a_mailbox(job: Ranks, transport: str, what: str) -> None:
    def body(group: ug.Group) -> None:
        box = group.mailbox(32, ring=True)
        odd = group.rank == 1
        array = np.zeros(8, np.float32) if odd and what == "dtype" else np.zeros(4)
        schedule = Rotated(Dissemination(2), 5) if odd and what == "schedule" else None
        with pytest.raises(errors.MismatchError, match=f"mailbox {box.index}: .*{what}"):
            group.exchange(array, schedule=schedule, mailbox=box)

    check(job(2, body, transport))


@pytest.mark.parametrize("schedule", [Dissemination(3), "ring", None.__class__])
def test_schedule_must_fit(store: Any, schedule: Any) -> None:
    with ug.join(0, 1, store) as group, pytest.raises(errors.ScheduleError):
        group.exchange(np.zeros(4), schedule=schedule)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"transport": "carrier-pigeon"}, "unknown transport"),
        ({"timeout": 0.0}, "timeout"),
        ({"timeout": float("nan")}, "timeout"),
        ({"timeout": float("inf")}, "timeout"),
        ({"verify": 1}, "verify is 1"),
        ({"rank": 2, "size": 2}, "does not fit"),
        ({"rank": 0, "size": 0}, "world size"),
        ({"settings": {"TLS": "no-such-transport"}}, "UCX|transport"),
    ],
)
def test_bad_join(arguments: dict[str, Any], word: str) -> None:
    with pytest.raises((errors.ArgumentError, errors.UCXError), match=word):
        ug.join(**{"rank": 0, "size": 1, **arguments})


@pytest.mark.parametrize("nbytes", [0, -8, 2.5, True, "8"])
def test_bad_mailbox(store: Any, nbytes: Any) -> None:
    with ug.join(0, 1, store) as group, pytest.raises(errors.ArgumentError):
        group.mailbox(nbytes)


def test_world_size_mismatch_is_one_message_for_all(as_ranks: Ranks, store: Any) -> None:
    results = as_ranks(2, lambda rank: ug.join(rank, 2 + rank, store, "tcp", TIMEOUT))
    assert all(isinstance(result, errors.MismatchError) for result in results), results
    assert str(results[0]) == str(results[1])
    assert "world size" in str(results[0])


def test_array_mismatch_is_one_message_for_all(job: Callable[..., list[Any]]) -> None:
    results = job(3, lambda group: group.exchange(np.zeros(4 + group.rank // 2)), "tcp", raw=True)
    assert all(isinstance(result, errors.MismatchError) for result in results), results
    assert len(set(map(str, results))) == 1
    assert "bytes: rank 0 has 32, rank 2 has 40" in str(results[0])


def test_missing_rank_is_named(store: Any) -> None:
    with pytest.raises(errors.RankMissingError, match=r"waited \d.* s for rank 1 ") as caught:
        ug.join(0, 2, store, "tcp", timeout=0.3)
    assert caught.value.ranks == (1,)


def test_silent_partner_is_named_and_group_stays_broken(as_ranks: Ranks, store: Any) -> None:
    done = threading.Event()

    def rank(number: int) -> None:
        group = ug.join(number, 2, store, "tcp", TIMEOUT)
        try:
            array = np.zeros(4)
            group.exchange(array)
            if number == 1:
                assert done.wait(TIMEOUT)
                return
            group.timeout = 0.3
            with pytest.raises(errors.ExchangeTimeoutError, match="rank 0 waited .* for rank 1"):
                group.exchange(array)
            with pytest.raises(errors.ExchangeError, match="failed before"):
                group.exchange(array)
        finally:
            done.set()
            group.close()

    check(as_ranks(2, rank))


def test_error_on_one_rank_reaches_the_others(as_ranks: Ranks, store: Any) -> None:
    def rank(number: int) -> None:
        with ug.join(number, 3, store, "tcp", TIMEOUT) as group:
            array = np.zeros(4)
            group.exchange(array)
            if number == 2:
                raise ZeroDivisionError("on purpose")
            for _ in range(1000):
                group.exchange(array)

    results = as_ranks(3, rank)
    assert isinstance(results[2], ZeroDivisionError)
    for result in results[:2]:
        assert isinstance(result, errors.PeerError), result
        assert result.rank in (0, 1, 2)
        assert "ZeroDivisionError: on purpose" in str(result) or "rank 2" in str(result)


def test_use_after_close(store: Any) -> None:
    group = ug.join(0, 1, store)
    box = group.mailbox(64)
    group.close()
    group.close()
    buffer = Buffer.of(np.zeros(8))
    for use in (
        lambda: group.exchange(np.zeros(4)),
        lambda: group.mailbox(8),
        lambda: group.allocate(8),
        lambda: group.wait(box),
        lambda: group.agree("x", {}),
        lambda: group.post(box, buffer, buffer, ug.Round(None, None)),
    ):
        with pytest.raises(errors.ClosedError):
            use()
    group.abort("nothing")


def test_port_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(listener.getsockname()[1]))
        with pytest.raises(errors.PortInUseError, match="MASTER_PORT"):
            ug.join(rank=0, size=2, timeout=5.0)


def test_memory_from_allocate_is_aligned_but_to_no_page(store: Any) -> None:
    with ug.join(0, 1, store) as group:
        for nbytes in (1, 100, 4096, 1 << 20):
            region = group.allocate(nbytes)
            assert region.nbytes == nbytes
            assert region.address % 4096 == 64
            assert not region.bytes.any()


def test_memory_from_allocate_outlives_the_group(store: Any) -> None:
    with ExitStack() as stack:
        group = stack.enter_context(ug.join(0, 1, store))
        view = group.allocate(1 << 20).view(np.float64, 1 << 17)
    view += 1.0
    assert (view == 1.0).all()


@pytest.mark.parametrize(
    "constants",
    [
        {"window": 0},
        {"chunk": 12},
        {"eager": 1 << 19, "chunk": 1 << 18},
        {"spins": -1},
        {"device_chunk": 0},
        {"device_chunk": 12},
        {"eager": 1.5},
    ],
    ids=str,
)
def test_bad_tuning(constants: dict[str, Any]) -> None:
    with pytest.raises(errors.ArgumentError, match="Tuning"):
        ug.Tuning(**constants)


@pytest.mark.parametrize("transport", CONSTANTS)
def test_tuning_leaves_the_rest_as_usual(transport: str) -> None:
    others = CONSTANTS[transport]
    eager = min(4096, others.eager)
    assert asdict(ug.Tuning()).keys() == asdict(others).keys()
    assert ug.Tuning(endpoints=64).over(transport) == replace(others, endpoints=64)
    small = replace(others, chunk=4096, eager=eager, device_chunk=4096)
    assert ug.Tuning(chunk=4096).over(transport) == small
    assert ug.Tuning(device_chunk=4096).over(transport) == replace(others, device_chunk=4096)
    assert ug.Tuning(eager=0, window=2).over(transport) == replace(others, eager=0, window=2)


@pytest.mark.parametrize("transport", ["auto", "tcp", "shm"])
def test_tuning_of_a_group_on_one_host(transport: str, store: Any) -> None:
    """There "auto" is shared memory, whose rings are to stay in the cache, and over TCP no answers
    are asked for."""
    here, afar = usual(transport, one_host=True), usual(transport)
    assert (here == afar) == (transport == "shm")
    with ug.join(0, 1, store, transport, tuning=ug.Tuning(yields=7)) as group:
        assert group.tuning == replace(here, yields=7)


@pytest.mark.parametrize(
    ("theirs", "asked", "fits"),
    [
        (True, {"ring": True}, True),
        (False, {"ring": True}, True),
        (False, {}, True),
        (True, {}, False),
        (True, {"ring": True, "nbytes": 1 << 23}, False),
        (False, {"depth": 3}, False),
    ],
)
def test_who_comes_back_takes_over_mailboxes_that_are_usual_elsewhere(
    store: Any, theirs: bool, asked: dict[str, Any], fits: bool
) -> None:
    """As where another launcher says whether all ranks are on one host. theirs: it is a ring."""
    nbytes = 1 << 22
    with ug.join(0, 1, store, "tcp", tuning=ug.Tuning(ring=16)) as group, group.naming("box"):
        known = group._open(group._layout(nbytes, 32, theirs, group.tuning.chunk))
        group._unclaimed["box 0"] = known
        call = {"nbytes": nbytes, **asked}
        if fits:
            assert group.mailbox(**call) is known
        else:
            with pytest.raises(errors.MismatchError, match="slots and chunks"):
                group.mailbox(**call)


def test_tuning_that_does_not_fit_the_transport(store: Any) -> None:
    tuning = ug.Tuning(eager=1 << 17)  # fits chunks over RDMA
    with pytest.raises(errors.ArgumentError, match="Tuning: chunk is 65536"):
        ug.join(0, 1, store, "tcp", tuning=tuning)


def test_mailbox_of_another_group(store: Any) -> None:
    with ug.join(0, 1, store) as one, ug.join(0, 1, store) as other:
        box = other.mailbox(32)
        with pytest.raises(errors.ArgumentError, match="not one of this group"):
            one.exchange(np.zeros(4), mailbox=box)


def test_latecomer_does_not_join_a_job_that_gave_up(as_ranks: Ranks, store: Any) -> None:
    with pytest.raises(errors.RankMissingError):
        ug.join(0, 2, store, "tcp", timeout=0.2)
    with pytest.raises(errors.PeerError, match="rank 0 left the job: RankMissingError"):
        ug.join(1, 2, store, "tcp", TIMEOUT)


# --- integrity ---------------------------------------------------------------------------------


def test_exchange_leaves_out_what_is_not_finite(job: Callable[..., list[Any]]) -> None:
    """skip by default; raise tells both after the round; allow mixes."""

    def body(group: ug.Group) -> dict[int, int]:
        def damaged() -> np.ndarray:
            return np.array([float(group.rank), np.nan if group.rank else 5.0], np.float32)

        array, other = damaged(), damaged()
        assert group.exchange(array) is array
        np.testing.assert_array_equal(array, other)
        with pytest.raises(errors.NonFiniteError, match="step 1: .* array held NaN") as caught:
            group.exchange(array, nonfinite="raise")
        assert (caught.value.rank, caught.value.what, caught.value.step) == (1, "array", 1)
        np.testing.assert_array_equal(array, other)
        came = group.exchange(array, mix=False)
        assert np.isnan(came[1]) == (group.rank == 0)
        group.exchange(array, nonfinite="allow")
        assert array[0] == 0.5 and np.isnan(array[1])
        return group.nonfinite

    assert job(2, body) == [{1: 2}, {1: 2}]


@pytest.mark.parametrize("policy", ["ignore", None, True])
def test_unknown_policy(store: Any, policy: Any) -> None:
    array = np.zeros(2)
    with (
        ug.join(0, 1, store) as group,
        pytest.raises(errors.ArgumentError, match="unknown nonfinite"),
    ):
        group.exchange(array, nonfinite=policy)


@pytest.mark.parametrize("count", [1, 1000, 50_001])
def test_verified_rounds_are_those_without(
    as_ranks: Ranks, store: Any, transport: str, count: int
) -> None:
    """Messages, puts and stores of several chunks, round after round, and a collective."""
    size, schedule = 3, Rotated(Dissemination(3), seed=1)
    values = np.random.default_rng(0).standard_normal((size, count))

    def rank(number: int) -> np.ndarray:
        tuning = ug.Tuning(chunk=1 << 16, window=3)
        with ug.join(number, size, store, transport, TIMEOUT, tuning=tuning, verify=True) as group:
            array = values[number].copy()
            for _ in range(70):  # more rounds than words in a ring
                group.exchange(array, schedule=schedule)
            collective = Collective(group)
            collective.average(array)
            group.agree("over", {})
            assert all(box.intact() for box in group.engine.mailboxes)
            return array

    for found in check(as_ranks(size, rank)):
        np.testing.assert_allclose(found, values.mean(axis=0), atol=1e-12)


def test_corrupt_chunk_is_a_named_error(as_ranks: Ranks, store: Any, transport: str) -> None:
    flipped = threading.Event()

    def rank(number: int) -> None:
        tuning = ug.Tuning(chunk=1024, window=2, eager=0)
        with ug.join(number, 2, store, transport, TIMEOUT, tuning=tuning, verify=True) as group:
            box = group.mailbox(4096)
            array = np.full(512, float(number))
            buffer = Buffer.of(array)
            schedule = Dissemination(2)
            group.post_scheduled(box, buffer, buffer, schedule, 0, held=number == 1)
            if number == 0:
                group.wait(box)
                group.agree("put", {})
                assert flipped.wait(TIMEOUT)
                return
            group.agree("put", {})
            deadline = time.monotonic() + TIMEOUT  # with UCX 1.13 puts end before they arrive
            while not channel.complete(group.engine.words, box.index, 0, 4096):
                assert time.monotonic() < deadline, "deadline"
            box.slot(0, np.uint8, 4096)[2 * 1024 + 5] ^= 1
            group.engine.unhold(box)
            with pytest.raises(errors.IntegrityError, match="chunk 2 of round 0") as caught:
                group.wait(box)
            flipped.set()
            error = caught.value
            assert (error.rank, error.mailbox, error.round, error.chunk) == (0, box.index, 0, 2)
            assert array.tolist() == [0.5] * 256 + [1.0] * 256
            with pytest.raises(errors.ExchangeError, match="failed before"):
                group.wait(box)

    for end in as_ranks(2, rank):
        assert end is None or isinstance(end, errors.PeerError), end


def test_verify_must_be_the_same_on_all_ranks(as_ranks: Ranks, store: Any) -> None:
    ends = as_ranks(2, lambda rank: ug.join(rank, 2, store, "shm", TIMEOUT, verify=rank == 1))
    assert all(isinstance(end, errors.MismatchError) for end in ends), ends
    assert "verify" in str(ends[0])


def test_a_credit_that_cannot_be_sent_to_a_living_rank_is_an_error(
    job: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To a dead one it is not: whoever sends it may hold the lock that its loss waits for."""

    def body(group: ug.Group) -> None:
        box = group.mailbox(64)
        group.exchange(np.ones(8), mailbox=box)
        group.agree("reached", {})
        if group.rank == 0:
            monkeypatch.setattr("ucxgossip.posting.credits.grant", lambda *_: -25)
            with group.lock:
                group.await_steady()
                group.grant(box, 1, 0)
            group.look_around()
        group.agree("the other one is told", {})

    first, second = job(2, body, "tcp", raw=True)
    assert isinstance(first, errors.UCXError) and "a credit" in str(first)
    assert isinstance(second, errors.PeerError)
