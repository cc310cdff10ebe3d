"""`Shuffled` on ranks that are threads: nothing lost or doubled, each batch where it should be."""

import gc
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, TensorDataset

import ucxgossip as ug
from ucxgossip import errors
from ucxgossip.torch_hook.shuffle import WINDOW, Ring, Shuffled

Ranks = Callable[..., list[Any]]
Job = Callable[..., list[Any]]
TIMEOUT = 30.0
LONG = 120.0
"""For processes that start and import torch."""
ROWS = 3
IDLE = "idle"


@pytest.fixture(params=["tcp", "shm"])
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Stream:
    """A loader without len()."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


class Sized(Stream):
    """A loader that says how many batches it has, truly or not."""

    def __init__(self, batches: list[Any], length: int) -> None:
        super().__init__(batches)
        self.length = length

    def __len__(self) -> int:
        return self.length


def shard(rank: int, sizes: list[int], width: int = 5) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of the given sizes; no number occurs twice in all ranks' shards."""
    batches, start = [], 100_000 * rank
    for count in sizes:
        ids = torch.arange(start, start + count)
        batches.append((ids[:, None].double() + torch.arange(width) / width, ids))
        start += count
    return batches


def full(count: int) -> list[int]:
    """Sizes of `count` batches, the last one smaller."""
    return [ROWS] * (count - 1) + [1] * (count > 0)


def ids(batch: Any) -> list[int]:
    """The samples in a batch; each must be whole."""
    x, y = batch
    assert x.dtype == torch.float64 and y.dtype == torch.int64
    width = x.shape[1]
    assert torch.equal(x, y[:, None].double() + torch.arange(width) / width)
    return y.tolist()  # type: ignore[no-any-return]


def expected(rank: int, epoch: int, shards: list[list[Any]], steps: int) -> list[Any]:
    """What `rank` sees in each step of an epoch: samples, or that it was idle."""
    seen = []
    for step in range(steps):
        batches = shards[(rank - (epoch + step)) % len(shards)]
        seen.append(ids(batches[step]) if step < len(batches) else IDLE)
    return seen


def watch(shuffled: Shuffled, events: list[Any]) -> list[Any]:
    """One epoch of `shuffled`, whose idle() appends to `events`, in `events`."""
    events.clear()
    for batch in shuffled:
        events.append(ids(batch))
    return list(events)


def watched(group: ug.Group, loader: Any) -> tuple[Shuffled, list[Any]]:
    events: list[Any] = []
    return Shuffled(group, loader, lambda: events.append(IDLE)), events


def intact(group: ug.Group) -> bool:
    return all(mailbox.intact() for mailbox in group.engine.mailboxes)


def epochs_of(job: Job, shards: list[list[Any]], epochs: int, **how: Any) -> list[list[list[Any]]]:
    """By epoch and rank: what was seen."""

    def body(group: ug.Group) -> list[list[Any]]:
        shuffled, events = watched(group, shards[group.rank])
        seen = []
        for epoch in range(epochs):
            assert shuffled.epoch == epoch
            seen.append(watch(shuffled, events))
            assert intact(group)
        return seen

    return [list(each) for each in zip(*job(len(shards), body, **how), strict=True)]


def assert_nothing_lost(seen: list[list[Any]], shards: list[list[Any]]) -> None:
    came = Counter(i for rank in seen for batch in rank if batch != IDLE for i in batch)
    assert came == Counter(i for batches in shards for batch in batches for i in ids(batch))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8])
def test_every_sample_once_where_it_should_be(job: Job, transport: str, size: int) -> None:
    counts = [6, 4, 0, 7, 1, 2, 6, 7][:size]
    shards = [shard(rank, full(count)) for rank, count in enumerate(counts)]
    for epoch, seen in enumerate(epochs_of(job, shards, 3, transport=transport)):
        assert_nothing_lost(seen, shards)
        for rank, events in enumerate(seen):
            assert events == expected(rank, epoch, shards, max(counts))


def test_a_rank_sees_all_ranks_and_a_batch_travels(job: Job) -> None:
    size = 4
    shards = [shard(rank, full(size)) for rank in range(size)]
    epochs = epochs_of(job, shards, size)
    for seen in epochs:
        for events in seen:
            assert {batch[0] // 100_000 for batch in events} == set(range(size))
    first = ids(shards[0][0])
    places = [rank for seen in epochs for rank in range(size) if first in seen[rank]]
    assert sorted(places) == list(range(size))


@settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    phases=[Phase.explicit, Phase.generate],  # to shrink a hang takes too long
)
@given(
    sizes=st.lists(st.lists(st.integers(0, 4), max_size=10), min_size=2, max_size=4),
    unsized=st.booleans(),
)
def test_any_lengths_and_sizes(job: Job, sizes: list[list[int]], unsized: bool) -> None:
    shards = [shard(rank, each) for rank, each in enumerate(sizes)]

    class Loader(Stream):
        batch_size = 4

    def body(group: ug.Group) -> list[list[Any]]:
        loader = Loader(shards[group.rank])
        if not unsized:
            loader.__class__ = type("Lengthy", (Loader,), {"__len__": lambda s: len(s.batches)})
        shuffled, events = watched(group, loader)
        seen = [watch(shuffled, events) for _ in range(2)]
        assert intact(group)
        return seen

    longest = max(len(each) for each in shards)
    steps = -(-longest // WINDOW) * WINDOW if unsized else longest
    results = job(len(shards), body)
    for epoch in range(2):
        assert_nothing_lost([seen[epoch] for seen in results], shards)
        for rank, seen in enumerate(results):
            assert seen[epoch] == expected(rank, epoch, shards, steps)


# --- loaders that have little, or do not say ------------------------------------------------------


def test_all_loaders_empty(job: Job) -> None:
    assert epochs_of(job, [[], [], []], 2) == [[[], [], []]] * 2


def test_samples_that_come_in_a_later_epoch(job: Job) -> None:
    """What a batch is like is learnt in the first epoch that has one."""
    shards = [shard(0, []), shard(1, full(3))]

    def body(group: ug.Group) -> list[list[Any]]:
        batches: list[Any] = []
        shuffled, events = watched(group, batches)
        seen = [watch(shuffled, events)]
        batches.extend(shards[group.rank])
        return [*seen, watch(shuffled, events)]

    for rank, seen in enumerate(job(2, body)):
        assert seen == [[], expected(rank, 1, shards, 3)]


@pytest.mark.parametrize(
    ("counts", "steps"),
    [((0, 0), 0), ((1, 0), 8), ((8, 8), 8), ((9, 3), 16), ((3, 16, 7), 16)],
)
@pytest.mark.parametrize("unsized", [1, 2])
def test_loaders_without_len(job: Job, counts: tuple[int, ...], steps: int, unsized: int) -> None:
    """One loader without len() is enough for all to ask each other as they go."""
    shards = [shard(rank, full(count)) for rank, count in enumerate(counts)]

    def body(group: ug.Group) -> list[list[Any]]:
        batches = shards[group.rank]
        shuffled, events = watched(group, Stream(batches) if group.rank < unsized else batches)
        seen = [watch(shuffled, events) for _ in range(2)]
        with pytest.raises(TypeError, match="the loader of rank 0 has no len"):
            len(shuffled)
        return seen

    for rank, seen in enumerate(job(len(counts), body)):
        assert seen == [expected(rank, epoch, shards, steps) for epoch in range(2)]


def test_fewer_batches_than_len_said(job: Job) -> None:
    shards = [shard(0, full(2)), shard(1, full(4))]

    def body(group: ug.Group) -> list[Any]:
        shuffled, events = watched(group, Sized(shards[group.rank], 5))
        return watch(shuffled, events)

    for rank, seen in enumerate(job(2, body)):
        assert seen == expected(rank, 0, shards, 5)


@pytest.mark.parametrize("lengths", [(3, 3), (3, 9)])
def test_more_batches_than_len_said(job: Job, lengths: tuple[int, int]) -> None:
    def body(group: ug.Group) -> None:
        shuffled, events = watched(group, Sized(shard(group.rank, full(6)), lengths[group.rank]))
        watch(shuffled, events)

    ends = job(2, body, raw=True)
    assert all(isinstance(end, errors.PeerError | errors.ArgumentError) for end in ends)
    liars = [end for end in ends if isinstance(end, errors.ArgumentError)]
    assert liars and (lengths == (3, 3) or liars == ends[:1])  # of two, one may hear of the other
    assert all("len(loader) is 3, but the loader gives more" in str(liar) for liar in liars)


def test_len_is_what_comes_in(job: Job) -> None:
    shards = [shard(rank, full(count)) for rank, count in enumerate((5, 2, 0))]

    def body(group: ug.Group) -> None:
        shuffled, events = watched(group, shards[group.rank])
        with pytest.raises(TypeError, match="not known before the first iteration"):
            len(shuffled)
        list(shuffled)  # asks for a length by itself, and does without
        for _ in range(3):
            told = len(shuffled)
            seen = watch(shuffled, events)
            assert told == len(seen) - seen.count(IDLE)

    job(3, body)


# --- what travels --------------------------------------------------------------------------------


def nest(number: int, rows: int) -> dict[str, Any]:
    whole = torch.arange(number, number + 4 * rows)
    return {
        "image": whole.view(rows, 4).to(torch.bfloat16),
        "mask": whole % 3 == 0,
        "rest": (torch.tensor(number), [whole.to(torch.float16).view(rows, 1, 2, 2)]),
        "turned": whole.view(4, rows).float().t(),
        "none": torch.zeros(rows, 0),
        "learnt": torch.full((rows,), number / 7, dtype=torch.complex64, requires_grad=True),
    }


def assert_same(left: Any, right: Any) -> None:
    left_leaves, left_spec = pytree.tree_flatten(left)
    right_leaves, right_spec = pytree.tree_flatten(right)
    assert left_spec == right_spec
    for a, b in zip(left_leaves, right_leaves, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def test_any_nesting_and_dtype(job: Job, transport: str) -> None:
    sizes = [[2, 5, 1], [], [5, 0, 3, 4]]
    loaders = [
        [nest(1000 * rank + 10 * b, rows) for b, rows in enumerate(each)]
        for rank, each in enumerate(sizes)
    ]

    def body(group: ug.Group) -> None:
        shuffled = Shuffled(group, loaders[group.rank], lambda: None)
        for epoch in range(2):
            came = iter(list(shuffled))
            for step in range(4):
                batches = loaders[(group.rank - epoch - step) % 3]
                if step < len(batches):
                    assert_same(next(came), batches[step])
            assert next(came, None) is None

    job(3, body, transport)


def test_a_bare_tensor_is_a_batch(job: Job) -> None:
    def body(group: ug.Group) -> list[Any]:
        batches = [torch.full((2,), 10 * group.rank + step) for step in range(2)]
        return [batch.tolist() for batch in Shuffled(group, batches, lambda: None)]

    assert job(2, body) == [[[0, 0], [11, 11]], [[10, 10], [1, 1]]]


def test_batches_larger_than_a_chunk_are_whole(job: Job, transport: str) -> None:
    width = 120_000  # 2.9 MB a batch of three samples
    shards = [shard(rank, full(3), width) for rank in range(2)]

    for epoch, seen in enumerate(epochs_of(job, shards, 2, transport=transport)):
        for rank, events in enumerate(seen):
            assert events == expected(rank, epoch, shards, 3)


def test_what_the_user_keeps_is_not_overwritten(job: Job) -> None:
    shards = [shard(rank, [ROWS] * 6) for rank in range(3)]

    def body(group: ug.Group) -> None:
        kept, then = [], []
        shuffled = Shuffled(group, shards[group.rank], lambda: None)
        for _ in range(2):
            for batch in shuffled:
                kept.append(batch)
                then.append([tensor.clone() for tensor in batch])
        for batch, before in zip(kept, then, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(batch, before, strict=True))
        places = [tensor.data_ptr() for batch in kept[:6] for tensor in batch]
        assert len(set(places)) == len(places)

    job(3, body)


def test_a_batch_may_be_changed_by_its_user(job: Job) -> None:
    """Neither the sender's data nor what still travels is touched."""
    shards = [shard(rank, [ROWS] * 4) for rank in range(2)]
    before = [expected(rank, 1, shards, 4) for rank in range(2)]

    def body(group: ug.Group) -> list[Any]:
        def fresh() -> list[Any]:
            return [(x.clone(), y.clone()) for x, y in shards[group.rank]]

        shuffled, events = watched(group, fresh())
        for x, y in shuffled:
            x.zero_()
            y.fill_(-1)
        shuffled.loader = fresh()
        return watch(shuffled, events)

    assert job(2, body) == before


def test_the_next_batch_is_under_way_before_this_one_is_yielded(job: Job) -> None:
    size, steps = 3, 7

    def body(group: ug.Group) -> None:
        loaded = []

        class Loader(Sized):
            def __iter__(self) -> Iterator[Any]:
                for number, batch in enumerate(self.batches):
                    loaded.append(number)
                    yield batch

        shuffled = Shuffled(group, Loader(shard(group.rank, [1] * steps), steps), lambda: None)
        for step, _ in enumerate(shuffled):
            ready = min(step + 2, steps)
            assert loaded == list(range(ready))
            assert shuffled._ring is not None
            assert shuffled._ring.mailbox.round == ready
        assert step == steps - 1

    job(size, body)


def test_what_is_sent_is_not_overwritten_by_the_next(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 has its batch 2 ready before anyone can take its batch 1."""
    shards = [shard(rank, [ROWS] * 4) for rank in range(3)]
    ready = threading.Event()
    prepare = Ring.prepare

    def watched_prepare(ring: Ring, step: int, batch: Any) -> None:
        prepare(ring, step, batch)
        if (ring.group.rank, step) == (0, 2):
            ready.set()

    monkeypatch.setattr(Ring, "prepare", watched_prepare)

    class Late(Sized):
        def __iter__(self) -> Iterator[Any]:
            for step, batch in enumerate(self.batches):
                assert step != 1 or ready.wait(TIMEOUT)
                yield batch

    def body(group: ug.Group) -> list[Any]:
        batches = shards[group.rank]
        shuffled, events = watched(group, Late(batches, 4) if group.rank else batches)
        return watch(shuffled, events)

    for rank, seen in enumerate(job(3, body)):
        assert seen == expected(rank, 0, shards, 4)


def test_training_under_attach(job: Job) -> None:
    """The same weights, to the bit, as when each rank has what it should see in a list."""
    size, steps = 3, 5
    shards = [shard(rank, [ROWS] * steps) for rank in range(size)]

    def train(group: ug.Group, shuffle: bool) -> torch.Tensor:
        model = torch.nn.Linear(5, 1, bias=False).double()
        model.weight.data.fill_(0.5)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-12)
        with ug.attach(model, optimizer, group) as gossip:
            shuffled = Shuffled(group, shards[group.rank], lambda: pytest.fail("idle"))
            for epoch in range(2):
                listed = [shards[(group.rank - epoch - b) % size][b] for b in range(steps)]
                for x, y in shuffled if shuffle else listed:
                    optimizer.zero_grad()
                    (model(x).squeeze(1) - y).square().mean().backward()
                    optimizer.step()
            gossip.wait()
            return model.weight.detach().clone()

    ours = job(size, lambda group: train(group, True))
    theirs = job(size, lambda group: train(group, False))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert not torch.equal(ours[0], torch.full((1, 5), 0.5, dtype=torch.float64))


def test_room_for_the_largest_first_batch_and_for_batch_size(job: Job) -> None:
    class Loader(Stream):
        batch_size: int | None = None

    sizes = [[1, 6, 2], [4, 6, 1]]

    def body(group: ug.Group, batch_size: int | None) -> list[int]:
        loader = Loader(shard(group.rank, sizes[group.rank]))
        loader.batch_size = batch_size if group.rank == 0 else None
        return [len(y) for _, y in Shuffled(group, loader, lambda: None)]

    assert job(2, lambda group: body(group, 6)) == [[1, 6, 2], [4, 6, 1]]
    for error in job(2, lambda group: body(group, None), raw=True):
        assert isinstance(error, errors.ArrayError | errors.PeerError)
    few = [[1, 4, 2], [4, 1, 1]]
    sizes[:] = few
    assert job(2, lambda group: body(group, None)) == [[1, 1, 2], [4, 4, 1]]


# --- leaving early -------------------------------------------------------------------------------


@pytest.mark.parametrize("unsized", [False, True])
@pytest.mark.parametrize("after", [1, 2, 5])
def test_break_and_then_a_whole_epoch(job: Job, transport: str, after: int, unsized: bool) -> None:
    shards = [shard(rank, full(6)) for rank in range(3)]

    def body(group: ug.Group) -> None:
        batches = shards[group.rank]
        shuffled, events = watched(group, Stream(batches) if unsized else batches)
        seen = []
        for batch in shuffled:
            seen.append(ids(batch))
            if len(seen) == after:
                break
        assert seen == expected(group.rank, 0, shards, after)
        assert shuffled.epoch == 1
        assert shuffled._ring is not None and not group.engine.active(shuffled._ring.mailbox)
        steps = WINDOW if unsized else 6
        assert watch(shuffled, events) == expected(group.rank, 1, shards, steps)
        assert intact(group)

    job(3, body, transport)


def test_an_exception_in_the_loop_and_then_a_whole_epoch(job: Job) -> None:
    shards = [shard(rank, full(4)) for rank in range(2)]

    def body(group: ug.Group) -> list[Any]:
        shuffled, events = watched(group, shards[group.rank])
        with suppress(KeyError):
            for _ in shuffled:
                raise KeyError
        return watch(shuffled, events)

    assert job(2, body) == [expected(rank, 1, shards, 4) for rank in range(2)]


def test_an_iterator_that_is_kept(job: Job) -> None:
    shards = [shard(rank, full(4)) for rank in range(2)]

    def body(group: ug.Group) -> list[Any]:
        shuffled, events = watched(group, shards[group.rank])
        for end in (lambda: watch(shuffled, events), shuffled.close):
            shuffled.epoch = 7
            iterator = iter(shuffled)
            assert ids(next(iterator)) == expected(group.rank, 7, shards, 1)[0]
            end()
            with pytest.raises(errors.ClosedError, match="this iteration has ended"):
                next(iterator)
        assert not group.engine.active(shuffled._ring.mailbox)  # type: ignore[union-attr]
        return watch(shuffled, events)

    assert job(2, body) == [expected(rank, 7, shards, 4) for rank in range(2)]


def test_an_iterator_that_outlives_its_group(job: Job) -> None:
    kept: list[Any] = []

    def body(group: ug.Group) -> None:
        shuffled = Shuffled(group, shard(group.rank, full(3)), lambda: None)
        kept.append(iter(shuffled))
        next(kept[-1])
        assert shuffled._ring is not None and shuffled._ring.under_way
        group.wait(shuffled._ring.mailbox)  # behind its back: nothing may move in a closed group

    job(2, body)
    kept.clear()
    gc.collect()  # an error in a finalizer would fail this test


def test_an_exception_of_the_loader(job: Job) -> None:
    class Broken(Sized):
        def __iter__(self) -> Iterator[Any]:
            yield from self.batches[:2]
            raise LookupError("no such sample")

    def body(group: ug.Group) -> None:
        batches = shard(group.rank, full(4))
        shuffled, events = watched(group, batches if group.rank else Broken(batches, 4))
        watch(shuffled, events)

    broken, other = job(2, body, raw=True)
    assert isinstance(broken, LookupError) and str(broken) == "no such sample"
    assert isinstance(other, errors.PeerError) and "no such sample" in str(other)


def test_a_rank_that_fails_while_the_last_batch_is_loaded(job: Job) -> None:
    """The epoch does not end short of that batch, as if nothing had happened."""

    class Waiting(Sized):
        """Gives its last batch when the group has failed."""

        def __init__(self, group: ug.Group, batches: list[Any]) -> None:
            super().__init__(batches, len(batches))
            self.group = group

        def __iter__(self) -> Iterator[Any]:
            yield from self.batches
            failure = self.group._steady_again
            with failure:
                assert failure.wait_for(lambda: self.group.failed, TIMEOUT)

    def body(group: ug.Group) -> None:
        batches = shard(group.rank, full(2))
        if group.rank:
            watch(*watched(group, Waiting(group, batches)))
        else:
            for _ in watched(group, batches)[0]:
                raise LookupError("no such sample")

    broken, other = job(2, body, raw=True)
    assert isinstance(broken, LookupError)
    assert isinstance(other, errors.PeerError) and "no such sample" in str(other)


def test_a_rank_that_goes_on_alone_is_told(job: Job) -> None:
    def body(group: ug.Group) -> None:
        shuffled, events = watched(group, shard(group.rank, full(6)))
        if group.rank == 0:
            for _ in shuffled:
                return
        watch(shuffled, events)

    _, other = job(2, body, timeout=2.0, raw=True)
    assert isinstance(other, errors.ExchangeTimeoutError) and "rank 0" in str(other)


# --- where in the training -----------------------------------------------------------------------


def test_epoch_is_resumed(job: Job) -> None:
    shards = [shard(rank, full(5)) for rank in range(3)]

    def body(group: ug.Group) -> None:
        first, _ = watched(group, shards[group.rank])
        for _ in first:
            pass
        for _ in first:
            state = first.state_dict()  # in the second epoch: it is the one to repeat
            break
        resumed, events = watched(group, shards[group.rank])
        resumed.load_state_dict(state)
        assert resumed.epoch == 1
        assert watch(resumed, events) == expected(group.rank, 1, shards, 5)
        assert resumed.epoch == 2
        resumed.epoch = 4
        assert watch(resumed, events) == expected(group.rank, 4, shards, 5)

    job(3, body)


def test_an_epoch_set_in_the_loop_stays(job: Job) -> None:
    def body(group: ug.Group) -> None:
        shuffled = Shuffled(group, shard(group.rank, full(2)), lambda: None)
        for _ in shuffled:
            shuffled.epoch = 30
        assert shuffled.epoch == 30

    job(2, body)


@pytest.mark.parametrize("epoch", [-1, True, 1.0, "1", None])
def test_bad_epoch(store: Any, epoch: Any) -> None:
    with ug.join(0, 1, store) as group:
        shuffled = Shuffled(group, [], lambda: None)
        for state in ({"epoch": epoch}, {}):
            with pytest.raises(errors.ArgumentError, match="epoch"):
                shuffled.load_state_dict(state)
        assert shuffled.epoch == 0


def test_ranks_in_different_epochs(job: Job) -> None:
    def body(group: ug.Group) -> None:
        shuffled = Shuffled(group, shard(group.rank, full(2)), lambda: None)
        shuffled.epoch = 5 + (group.rank == 2)
        list(shuffled)

    messages = {str(error) for error in job(3, body, raw=True)}
    assert messages == {"shuffled: epoch: rank 0 has 5, rank 2 has 6"}


# --- one rank ------------------------------------------------------------------------------------


def test_one_rank_passes_batches_through(store: Any) -> None:
    with ug.join(0, 1, store) as group:
        batches = [object(), "text", (torch.ones(1), None)]
        shuffled = Shuffled(group, batches, lambda: pytest.fail("idle"))
        assert len(shuffled) == 3
        for epoch in range(2):
            assert shuffled.epoch == epoch
            assert all(a is b for a, b in zip(shuffled, batches, strict=True))
        for _ in shuffled:
            break
        assert shuffled.epoch == 3
        assert not group.engine.mailboxes


# --- bad input -----------------------------------------------------------------------------------

ONE = torch.ones(2, 3)
BAD_BATCHES: list[tuple[Any, str]] = [
    ((ONE, "a text"), r"leaf \[1\] is a str; .* collate_fn"),
    ({"x": ONE, "y": [ONE, None]}, r"leaf \['y'\]\[1\] is a NoneType"),
    ((ONE, 3), r"leaf \[1\] is a int"),
    (np.ones(3), "leaf is a ndarray"),
    ((ONE, ONE.to("meta")), r"leaf \[1\] is on meta"),
    ((ONE.to_sparse(),), r"leaf \[0\] has layout torch.sparse_coo"),
    ({(1, 2): ONE}, "other ranks cannot be told about"),
    ({ONE.dtype: ONE}, "other ranks cannot be told about"),
]


@pytest.mark.parametrize(("batch", "message"), BAD_BATCHES, ids=lambda x: str(x)[:30])
def test_batches_that_cannot_travel(job: Job, batch: Any, message: str) -> None:
    def body(group: ug.Group) -> None:
        with pytest.raises(errors.ArrayError, match=message):
            list(Shuffled(group, [batch], lambda: None))

    job(2, body)


FIRST = {"x": torch.ones(4, 3), "y": torch.tensor(1)}
LATER: list[tuple[Any, str]] = [
    (FIRST | {"x": torch.ones(5, 3)}, r"leaf \['x'\] has 5 rows, more than the 4"),
    (FIRST | {"x": torch.ones(4, 2)}, r"\['x'\] has shape \(4, 2\), but \(\*, 3\) in the first"),
    (FIRST | {"x": torch.ones(4, 3, 1)}, r"\['x'\] has shape \(4, 3, 1\), but \(\*, 3\)"),
    (FIRST | {"y": torch.ones(1, dtype=torch.int64)}, r"\['y'\] has shape \(1,\), but \(\)"),
    (FIRST | {"x": torch.ones(4, 3).half()}, r"\['x'\] is torch.float16, but torch.float32"),
    (FIRST | {"z": torch.ones(4)}, r"a batch is .*'z'.*; the first one was"),
    ([FIRST["x"], FIRST["y"]], "a batch is .*list"),
    (FIRST | {"x": 3}, r"leaf \['x'\] is a int"),
]


@pytest.mark.parametrize(("later", "message"), LATER, ids=lambda x: str(x)[:30])
@pytest.mark.parametrize("where", [2, 3])  # with two ranks, in one of these the batch stays
def test_later_batches_that_differ(job: Job, later: Any, message: str, where: int) -> None:
    def body(group: ug.Group) -> None:
        shuffled = Shuffled(group, [FIRST] * where + [later, FIRST], lambda: None)
        got = 0
        with pytest.raises(errors.ArrayError, match=message):
            for _ in shuffled:
                got += 1
        assert got == where - 1
        assert shuffled._ring is not None
        assert shuffled._ring.mailbox.round == where  # nothing of it was posted
        assert intact(group)

    job(2, body)


def test_one_rank_with_a_bad_batch_ends_the_others(job: Job) -> None:
    def body(group: ug.Group) -> None:
        list(Shuffled(group, [FIRST, {} if group.rank == 1 else FIRST], lambda: None))

    ends = job(3, body, raw=True)
    kinds = [errors.PeerError, errors.ArrayError, errors.PeerError]
    assert [type(end) for end in ends] == kinds, ends


DIFFERENT: list[tuple[Any, str]] = [
    (
        (ONE.double(), ONE),
        "leaves[0].dtype: rank 0 has 'torch.float32', rank 1 has 'torch.float64'",
    ),
    ((ONE, ONE[:, :1]), "leaves[1].shape: rank 0 has '(*, 3)', rank 1 has '(*, 1)'"),
    ((ONE, torch.tensor(1.0)), "leaves[1].shape: rank 0 has '(*, 3)', rank 1 has '()'"),
    ((ONE,), "batch: rank 0 has 'TreeSpec(tuple, None, [*, *])', rank 1 has"),
    ([ONE, ONE], "batch: rank 0 has 'TreeSpec(tuple, None, [*, *])', rank 1 has 'TreeSpec(list"),
]


@pytest.mark.parametrize(("other", "message"), DIFFERENT, ids=lambda x: str(x)[:30])
def test_ranks_with_different_batches(job: Job, other: Any, message: str) -> None:
    loaders: list[list[Any]] = [[], [other], [(ONE, ONE)]]
    loaders[0] = [(ONE, ONE)]

    def body(group: ug.Group) -> None:
        list(Shuffled(group, loaders[group.rank], lambda: None))

    ends = job(3, body, raw=True)
    assert all(isinstance(end, errors.MismatchError) for end in ends)
    assert len({str(end) for end in ends}) == 1
    assert f"batches of shuffled: {message}" in str(ends[0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: (x for x in [ONE]), r"is a generator, which ends .* not iter\(loader\)"),
        (lambda: iter([ONE]), "pass the loader itself"),
        (lambda: iter(DataLoader(TensorDataset(ONE))), "pass the loader itself"),
        (
            lambda: TensorDataset(ONE),
            "is a TensorDataset, not an iterable of .*DataLoader",
        ),
        (lambda: 3, "not an iterable of batches"),
    ],
)
def test_bad_loaders(store: Any, make: Callable[[], Any], message: str) -> None:
    with (
        ug.join(0, 1, store) as group,
        pytest.raises(errors.ArgumentError, match=message),
    ):
        Shuffled(group, make(), lambda: None)


# --- torch's own loader --------------------------------------------------------------------------


def test_a_data_loader_with_a_worker_process(job: Job) -> None:
    """Spawned: a fork of this process would share the engines' threads and memory."""
    data = [shard(rank, [count])[0] for rank, count in enumerate((7, 4))]

    def body(group: ug.Group) -> list[list[int]]:
        loader = DataLoader(
            TensorDataset(*data[group.rank]),
            batch_size=3,
            num_workers=1 if group.rank == 0 else 0,
            multiprocessing_context="spawn" if group.rank == 0 else None,
            timeout=LONG if group.rank == 0 else 0,
        )
        shuffled, events = watched(group, loader)
        return watch(shuffled, events)

    seen = job(2, body, timeout=LONG)
    assert [len(batch) for batch in seen[0] if batch != IDLE] == [3, 1, 1]
    assert_nothing_lost(seen, [[each] for each in data])


def test_a_data_loader_that_draws_its_samples(job: Job) -> None:
    data = [shard(rank, [10])[0] for rank in range(2)]

    def body(group: ug.Group) -> list[list[list[int]]]:
        generator = torch.Generator().manual_seed(group.rank)
        loader = DataLoader(
            TensorDataset(*data[group.rank]), batch_size=4, shuffle=True, generator=generator
        )
        shuffled, events = watched(group, loader)
        return [watch(shuffled, events) for _ in range(2)]

    results = job(2, body)
    for epoch in range(2):
        assert_nothing_lost([seen[epoch] for seen in results], [[each] for each in data])
    assert results[0][0] != results[0][1]
