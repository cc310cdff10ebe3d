"""`attach` on ranks that are threads: equal to a plain torch reference, and torch's corners."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import ucxgossip as ug
from torch_jobs import F, Fails, batch, flat, make_optimizer, small_model
from ucxgossip import errors
from ucxgossip.schedule import Dissemination, Rotated

Ranks = Callable[..., list[Any]]
TIMEOUT = 30.0


def check(results: list[Any]) -> list[Any]:
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def reference(size: int, steps: int, optimizer: str, mix: str, combine: str) -> list[np.ndarray]:
    """The same training without ucxgossip: all ranks in turn, averages by hand."""
    models = [small_model(0) for _ in range(size)]
    optimizers = [make_optimizer(optimizer, model) for model in models]
    schedule = Rotated(Dissemination(size), seed=5)

    def average(tensors: list[torch.Tensor], step: int) -> None:
        before = [tensor.clone() for tensor in tensors]
        for rank in range(size):
            sender = schedule.round(rank, step).sender
            if sender is not None:
                tensors[rank].add_(0.5 * (before[sender] - before[rank]))

    def average_weights(step: int) -> None:
        # With both, weights go to another partner than the gradients: that of the next period.
        ahead = schedule.period if mix == "both" else 0
        for tensors in zip(*(model.parameters() for model in models), strict=True):
            average([tensor.data for tensor in tensors], step + ahead)

    for step in range(steps):
        for rank, model in enumerate(models):
            optimizers[rank].zero_grad()
            x, y = batch(rank, step)
            F.cross_entropy(model(x), y).backward()
        if mix in ("both", "gradients"):
            for tensors in zip(*(model.parameters() for model in models), strict=True):
                average([tensor.grad for tensor in tensors], step)  # type: ignore[misc]
        if mix in ("both", "weights") and combine == "awc":
            average_weights(step)
        for each in optimizers:
            each.step()
        if mix in ("both", "weights") and combine == "atc":
            average_weights(step)
    return [flat(model) for model in models]


@pytest.mark.parametrize("transport", ["tcp", "shm"])
@pytest.mark.parametrize("combine", ["atc", "awc"])
@pytest.mark.parametrize("mix", ["both", "weights", "gradients"])
@pytest.mark.parametrize(("size", "optimizer"), [(1, "sgd"), (2, "adamw"), (3, "sgd"), (4, "sgd")])
def test_training_equals_the_reference(
    job: Callable[..., list[Any]],
    size: int,
    optimizer: str,
    mix: str,
    combine: str,
    transport: str,
) -> None:
    steps = 7

    def body(group: ug.Group) -> np.ndarray:
        model = small_model(group.rank)  # rank 0's weights must win
        chosen = make_optimizer(optimizer, model)
        with ug.attach(
            model,
            chosen,
            group,
            mix=mix,
            combine=combine,
            schedule=Rotated(Dissemination(size), seed=5),
            bucket_bytes=200,  # several buckets
        ) as gossip:
            for step in range(steps):
                chosen.zero_grad()
                x, y = batch(group.rank, step)
                F.cross_entropy(model(x), y).backward()
                chosen.step()
            gossip.wait()
            assert gossip.stats()["skipped"] == 0
            weights = flat(model)
        return weights

    expected = reference(size, steps, optimizer, mix, combine)
    for rank, weights in enumerate(job(size, body, transport)):
        np.testing.assert_allclose(weights, expected[rank], rtol=1e-12, atol=1e-13)


class Odd(nn.Module):
    """Frozen, unused, tied and buffered parts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.norm = nn.BatchNorm1d(4)
        self.frozen = nn.Linear(4, 4)
        self.frozen.requires_grad_(False)
        self.unused = nn.Linear(4, 2)
        self.sometimes = nn.Linear(4, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor, sometimes: bool = False) -> torch.Tensor:
        h = self.norm(self.frozen(self.embed(x)))
        return self.head(self.sometimes(h) if sometimes else h)


def odd_model(seed: int) -> Odd:
    torch.manual_seed(seed)
    model = Odd()
    model.norm.running_mean.fill_(seed)
    model.norm.num_batches_tracked.fill_(seed)
    return model


def test_everything_starts_from_rank_0(job: Callable[..., list[Any]]) -> None:
    models = [odd_model(seed) for seed in range(3)]
    expected = copy.deepcopy(models[0].state_dict())

    def body(group: ug.Group) -> None:
        model = models[group.rank]
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        with ug.attach(model, optimizer, group):
            for name, value in model.state_dict().items():
                assert torch.equal(value, expected[name]), name

    job(3, body)


def test_unused_frozen_and_tied(job: Callable[..., list[Any]]) -> None:
    models = [odd_model(0) for _ in range(2)]  # here: the threads share torch's generator

    def body(group: ug.Group) -> dict[str, torch.Tensor]:
        model = models[group.rank]
        start = copy.deepcopy(model.state_dict())
        optimizer = torch.optim.SGD(
            [p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5
        )
        with ug.attach(model, optimizer, group):
            optimizer.zero_grad()
            x = torch.arange(6)
            F.cross_entropy(model(x, sometimes=group.rank == 0), x).backward()
            # Used by nobody: no gradient, so no weight decay either. Used by rank 0: half of it.
            assert model.unused.weight.grad is None
            assert model.sometimes.weight.grad is not None
            seen = {"sometimes": model.sometimes.weight.grad.clone()}
            optimizer.step()
            seen |= {name: value.clone() for name, value in model.state_dict().items()}
        assert torch.equal(seen["unused.weight"], start["unused.weight"])
        assert torch.equal(seen["frozen.weight"], start["frozen.weight"])
        assert seen["head.weight"].data_ptr() != 0
        assert torch.equal(seen["head.weight"], seen["embed.weight"])
        assert not torch.equal(seen["head.weight"], start["head.weight"])
        assert model.head.weight is model.embed.weight
        return seen

    left, right = job(2, body)
    assert left["sometimes"].abs().sum() > 0
    torch.testing.assert_close(left["sometimes"], right["sometimes"])


def test_parameters_and_gradients_live_in_the_buckets(store: Any) -> None:
    with ug.join(0, 1, store) as group:
        model = small_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with ug.attach(model, optimizer, group) as gossip:
            for step in range(3):
                optimizer.zero_grad()
                F.cross_entropy(model(batch(0, step)[0]), batch(0, step)[1]).backward()
                optimizer.step()
                for bucket in gossip._buckets:
                    assert bucket.gradients is not None
                    for flat_part, tensors in (
                        (bucket.weights, [p.data for p in bucket.parameters]),
                        (bucket.gradients, [p.grad for p in bucket.parameters]),
                    ):
                        first = flat_part.array.ctypes.data
                        for tensor in tensors:
                            assert tensor is not None
                            assert first <= tensor.data_ptr() < first + flat_part.array.nbytes


def test_gradients_from_elsewhere_are_taken_in(job: Callable[..., list[Any]]) -> None:
    """``model.zero_grad()`` drops gradients behind the optimizer's back."""

    def train(model: nn.Module, rank: int, zero: Callable[[], None], steps: int) -> None:
        for step in range(steps):
            zero()
            x, y = batch(rank, step)
            F.cross_entropy(model(x), y).backward()

    def body(group: ug.Group) -> list[torch.Tensor]:
        gradients = []
        for how in ("model", "optimizer", "keep"):
            model = small_model()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            zero = {
                "model": model.zero_grad,
                "optimizer": optimizer.zero_grad,
                "keep": lambda: optimizer.zero_grad(set_to_none=False),  # noqa: B023
            }[how]
            with ug.attach(model, optimizer, group, mix="gradients"):
                zero = optimizer.zero_grad if how == "optimizer" else zero
                train(model, group.rank, zero, 2)
                gradients.append(torch.cat([p.grad.reshape(-1) for p in model.parameters()]))
        return gradients

    for gradients in job(2, body):
        assert torch.equal(gradients[0], gradients[1])
        assert torch.equal(gradients[0], gradients[2])


def test_accumulation_under_no_sync(job: Callable[..., list[Any]]) -> None:
    def body(group: ug.Group) -> np.ndarray:
        model = small_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with ug.attach(model, optimizer, group, mix="gradients") as gossip:
            optimizer.zero_grad()
            with gossip.no_sync():
                F.cross_entropy(model(batch(group.rank, 0)[0]), batch(group.rank, 0)[1]).backward()
            F.cross_entropy(model(batch(group.rank, 1)[0]), batch(group.rank, 1)[1]).backward()
            return torch.cat([p.grad.reshape(-1) for p in model.parameters()]).numpy().copy()

    total = 0.0
    for rank in range(2):
        model = small_model()
        for step in range(2):
            F.cross_entropy(model(batch(rank, step)[0]), batch(rank, step)[1]).backward()
        total = total + torch.cat([p.grad.reshape(-1) for p in model.parameters()]).numpy() / 2
    for gradients in job(2, body):
        np.testing.assert_allclose(gradients, total, rtol=1e-12)


def test_modules_used_without_a_call_are_waited_for(job: Callable[..., list[Any]]) -> None:
    """MultiheadAttention reads out_proj.weight without calling out_proj."""

    def body(group: ug.Group) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoderLayer(8, 2, 16, 0.0))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        attention = model[1].self_attn
        with ug.attach(model, optimizer, group, mix="weights", bucket_bytes=64) as gossip:
            for step in range(4):
                optimizer.zero_grad()
                model(torch.randn(3, 2, 8)).square().mean().backward()
                optimizer.step()
                if step == 2:
                    served = gossip._forward._needs[attention]
                    names = {id(p) for bucket in served for p in bucket.parameters}
                    assert id(attention.out_proj.weight) in names
                    assert id(attention.in_proj_weight) in names

    job(2, body)


def test_state_dict_and_eval_see_whole_rounds(job: Callable[..., list[Any]]) -> None:
    def body(group: ug.Group) -> None:
        model = small_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with ug.attach(model, optimizer, group, bucket_bytes=64) as gossip:
            for step in range(5):
                optimizer.zero_grad()
                F.cross_entropy(model(batch(group.rank, step)[0]), batch(0, step)[1]).backward()
                optimizer.step()
                model.state_dict()
                boxes = [bucket.weights_stream.mailbox for bucket in gossip._buckets]
                assert not any(group.engine.active(box) for box in boxes if box)

    job(3, body)


def test_synchronize_makes_one_model(job: Callable[..., list[Any]]) -> None:
    def body(group: ug.Group) -> tuple[float, float, np.ndarray]:
        model = small_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with ug.attach(model, optimizer, group, mix="weights", combine="awc") as gossip:
            for step in range(3):
                optimizer.zero_grad()
                F.cross_entropy(model(batch(group.rank, step)[0]), batch(0, step)[1]).backward()
                optimizer.step()
            before = gossip.consensus_distance()
            gossip.synchronize()
            return before, gossip.consensus_distance(), flat(model)

    results = job(3, body)
    for before, after, weights in results:
        assert before == results[0][0] > 1e-4
        assert after < 1e-15
        np.testing.assert_allclose(weights, results[0][2], rtol=0, atol=1e-15)


def hooks_of(model: nn.Module) -> int:
    total = 0
    for module in model.modules():
        total += len(module._forward_pre_hooks) + len(module._state_dict_pre_hooks)
    for parameter in model.parameters():
        total += len(parameter._post_accumulate_grad_hooks or ())
    return total


def test_detach_leaves_the_model_as_found(job: Callable[..., list[Any]]) -> None:
    models = [odd_model(0) for _ in range(2)]

    def body(group: ug.Group) -> None:
        model = models[group.rank]
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        keys = set(vars(optimizer)), {n: set(vars(p)) for n, p in model.named_parameters()}
        gossip = ug.attach(model, optimizer, group)
        assert hooks_of(model) > 0
        optimizer.zero_grad()
        F.cross_entropy(model(torch.arange(6)), torch.arange(6)).backward()
        optimizer.step()
        gossip.detach()
        gossip.detach()
        values = copy.deepcopy(model.state_dict())
        assert hooks_of(model) == 0
        assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
        assert (
            set(vars(optimizer)),
            {n: set(vars(p)) for n, p in model.named_parameters()},
        ) == keys
        for bucket in gossip._buckets:
            bucket.weights.tensor.zero_()  # the model must not live there any more
        for name, value in model.state_dict().items():
            assert torch.equal(value, values[name]), name
        with pytest.raises(errors.ClosedError):
            gossip.wait()
        again = ug.attach(model, optimizer, group)
        again.detach()

    job(2, body)


def test_model_survives_an_error_and_a_group_closed_under_it(job: Callable[..., list[Any]]) -> None:
    kept: dict[int, nn.Module] = {}

    def body(group: ug.Group) -> None:
        model = kept[group.rank] = small_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with ug.attach(model, optimizer, group):
            optimizer.zero_grad()
            F.cross_entropy(model(batch(0, 0)[0]), batch(0, 0)[1]).backward()
            optimizer.step()
            raise ZeroDivisionError("on purpose")

    for result in job(2, body, raw=True):
        assert isinstance(result, ZeroDivisionError | errors.PeerError), result
    for model in kept.values():
        assert np.isfinite(flat(model)).all()
        assert hooks_of(model) == 0


def test_model_outlives_its_group(store: Any) -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with ug.join(0, 1, store) as group:
        ug.attach(model, optimizer, group)
        before = flat(model)
    np.testing.assert_array_equal(flat(model), before)


def bad_models() -> list[tuple[str, Callable[[], nn.Module], type[Exception], str]]:
    return [
        ("none", lambda: nn.ReLU(), errors.ModelError, "no parameter"),
        (
            "frozen",
            lambda: nn.Linear(2, 2).requires_grad_(False),
            errors.ModelError,
            "no parameter",
        ),
        ("half", lambda: nn.Linear(2, 2).half(), errors.ArrayError, "float16"),
        ("meta", lambda: nn.Linear(2, 2, device="meta"), errors.ArrayError, "on meta"),
        (
            "sparse",
            lambda: nn.Sequential(nn.Embedding(4, 2, sparse=True)),
            errors.SparseGradientError,
            "sparse=False",
        ),
    ]


@pytest.mark.parametrize(
    ("make", "kind", "word"),
    [case[1:] for case in bad_models()],
    ids=[case[0] for case in bad_models()],
)
def test_bad_model_changes_nothing(
    store: Any, make: Callable[[], nn.Module], kind: type[Exception], word: str
) -> None:
    model = make()
    places = [p.data_ptr() for p in model.parameters() if p.device.type == "cpu"]
    optimizer = torch.optim.SGD([*model.parameters(), nn.Parameter(torch.zeros(1))], lr=0.1)
    with ug.join(0, 1, store) as group, pytest.raises(kind, match=word):
        ug.attach(model, optimizer, group)
    assert places == [p.data_ptr() for p in model.parameters() if p.device.type == "cpu"]
    assert hooks_of(model) == 0


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"mix": "everything"}, "unknown mix 'everything'; choose one of 'both'"),
        ({"combine": "later"}, "unknown combine"),
        ({"schedule": Dissemination(2)}, "is for 2 ranks"),
        ({"schedule": "ring"}, "not a schedule"),
        ({"bucket_bytes": 0}, "bucket_bytes"),
        ({"mix": "push_sum", "staleness": 1}, "waits for nobody already"),
        ({"staleness": 0.5}, "staleness is 0.5"),
        ({"schedule": ug.Broadcast(1)}, "ends after 1 step"),
        ({"schedule": Rotated(Dissemination(1)), "mix": "push_sum"}, "keeps a slot for each"),
    ],
)
def test_bad_arguments(store: Any, arguments: dict[str, Any], word: str) -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with ug.join(0, 1, store) as group, pytest.raises(errors.ArgumentError, match=word):
        ug.attach(model, optimizer, group, **arguments)
    assert hooks_of(model) == 0


def test_wrong_kinds(store: Any) -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with ug.join(0, 1, store) as group:
        with pytest.raises(errors.ModelError, match=r"torch\.nn\.Module"):
            ug.attach("model", optimizer, group)  # type: ignore[arg-type]
        with pytest.raises(errors.ModelError, match=r"torch\.optim\.Optimizer"):
            ug.attach(model, None, group)  # type: ignore[arg-type]


def test_attach_twice(store: Any) -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    other = torch.optim.SGD(model.parameters(), lr=0.1)
    with ug.join(0, 1, store) as group, ug.attach(model, optimizer, group):
        for second in (optimizer, other):
            with pytest.raises(errors.AlreadyAttachedError, match="detach"):
                ug.attach(model, second, group)
        with pytest.raises(errors.AlreadyAttachedError):
            ug.attach(small_model(), optimizer, group)


def test_sparse_gradient_at_backward(store: Any) -> None:
    """A functional sparse embedding cannot be seen at attach."""

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.zeros(4, 2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.embedding(x, self.table, sparse=True)

    model = Hidden()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with ug.join(0, 1, store) as group, ug.attach(model, optimizer, group):
        model.zero_grad()
        with pytest.raises(errors.SparseGradientError, match="sparse"):
            model(torch.arange(4)).sum().backward()


@pytest.mark.parametrize("what", ["shape", "mix", "dtype", "name", "schedule"])
def test_mismatch_is_one_message_and_changes_nothing(
    job: Callable[..., list[Any]], what: str
) -> None:
    def body(group: ug.Group) -> None:
        odd = group.rank == 2
        model: nn.Module = nn.Linear(4, 5 if odd and what == "shape" else 3)
        if odd and what == "dtype":
            model = model.double()
        if odd and what == "name":
            model = nn.Sequential(model)
        places = [p.data_ptr() for p in model.parameters()]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        try:
            ug.attach(
                model,
                optimizer,
                group,
                mix="weights" if odd and what == "mix" else "both",
                schedule=Rotated(Dissemination(3), seed=int(odd and what == "schedule")),
            )
        finally:
            assert places == [p.data_ptr() for p in model.parameters()]
            assert hooks_of(model) == 0

    results = job(3, body, raw=True)
    assert all(isinstance(result, errors.MismatchError) for result in results), results
    assert len(set(map(str, results))) == 1
    assert "rank 2" in str(results[0])


def test_second_backward_without_no_sync_exchanges_again(job: Callable[..., list[Any]]) -> None:
    def body(group: ug.Group) -> None:
        model = small_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with ug.attach(model, optimizer, group, mix="gradients") as gossip:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(batch(group.rank, 0)[0]), batch(group.rank, 0)[1])
            loss.backward(retain_graph=True)
            once = gossip.stats()["rounds"]
            loss.backward()
            assert gossip.stats()["rounds"] == 2 * once > 0

    job(2, body)


def test_submodules_called_by_themselves_are_waited_for(job: Callable[..., list[Any]]) -> None:
    """The root is never called: every module waits for all."""

    def body(group: ug.Group) -> None:
        model = small_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with ug.attach(model, optimizer, group, mix="weights", bucket_bytes=64) as gossip:
            boxes = [bucket.weights_stream.mailbox for bucket in gossip._buckets]
            for step in range(4):
                optimizer.zero_grad()
                x, y = batch(group.rank, step)
                h = model[0](x)
                assert not any(group.engine.active(box) for box in boxes if box)
                F.cross_entropy(model[2](torch.tanh(h)), y).backward()
                optimizer.step()

    job(2, body)


def test_copy_of_an_attached_model_is_a_plain_model(store: Any) -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with ug.join(0, 1, store) as group:
        with ug.attach(model, optimizer, group):
            average = torch.optim.swa_utils.AveragedModel(model)
            average.update_parameters(model)
        x = batch(0, 0)[0]
        torch.testing.assert_close(average(x), model(x))
        average.state_dict()


@pytest.mark.parametrize("how", ["double", "data"])
def test_parameter_moved_out_of_its_bucket(store: Any, how: str) -> None:
    model = small_model().float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with ug.join(0, 1, store) as group:
        gossip = ug.attach(model, optimizer, group)
        if how == "double":
            model.double()
        else:
            model[0].weight.data = model[0].weight.data.clone()
        with pytest.raises(errors.ModelError, match=r"detach\(\) before"):
            optimizer.step()
        gossip.detach()


def test_exception_in_backward_is_told_at_the_next(store: Any) -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with ug.join(0, 1, store) as group:
        gossip = ug.attach(model, optimizer, group, bucket_bytes=64)
        x, y = batch(0, 0)
        with pytest.raises(ZeroDivisionError):
            F.cross_entropy(model[2](Fails.apply(model[0](x))), y).backward()
        with pytest.raises(errors.ExchangeError, match="out of step"):
            optimizer.step()
        with pytest.raises(errors.ExchangeError, match="out of step"):
            F.cross_entropy(model(x), y).backward()
        gossip.detach()
    assert hooks_of(model) == 0


def test_detach_and_checkpoint_after_a_failure(as_ranks: Ranks, store: Any) -> None:
    def rank(number: int) -> None:
        group = ug.join(number, 2, store, "tcp", TIMEOUT)
        model = small_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        gossip = ug.attach(model, optimizer, group)
        if number == 1:
            group.abort("on purpose")
            group.close()
            return
        optimizer.zero_grad()
        with pytest.raises(errors.PeerError, match="on purpose"):
            F.cross_entropy(model(batch(0, 0)[0]), batch(0, 0)[1]).backward()
        model.state_dict()
        with pytest.raises(errors.GossipError):
            gossip.wait()
            optimizer.step()
        gossip.detach()
        assert hooks_of(model) == 0
        group.close()

    check(as_ranks(2, rank))


def test_two_optimizers_keep_their_own_gradients(store: Any) -> None:
    model = small_model()
    first = torch.optim.SGD(model[0].parameters(), lr=0.1)
    second = torch.optim.SGD(model[2].parameters(), lr=0.1)
    with ug.join(0, 1, store) as group, ug.attach(model, first, group):
        F.cross_entropy(model(batch(0, 0)[0]), batch(0, 0)[1]).backward()
        kept = model[2].weight.grad.clone()
        first.zero_grad()
        assert not model[0].weight.grad.any()
        assert torch.equal(model[2].weight.grad, kept)
        second.zero_grad()
        assert model[2].weight.grad is None


def test_optimizer_of_another_model(store: Any) -> None:
    other = torch.optim.SGD(small_model().parameters(), lr=0.1)
    with ug.join(0, 1, store) as group, pytest.raises(errors.ModelError, match="no parameter of"):
        ug.attach(small_model(), other, group)


def test_lazy_and_misplaced_parts(store: Any) -> None:
    lazy = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3))
    buffered = nn.Linear(2, 2)
    buffered.register_buffer("elsewhere", torch.zeros(2, device="meta"))
    with ug.join(0, 1, store) as group:
        for model, kind, word in (
            (lazy, errors.ModelError, "not initialised"),
            (buffered, errors.ArrayError, "elsewhere is on meta"),
        ):
            optimizer = torch.optim.SGD([next(model.parameters())], lr=0.1)
            with pytest.raises(kind, match=word):
                ug.attach(model, optimizer, group)
