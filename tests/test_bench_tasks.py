"""bench.tasks and bench.models: drawn from seeds alone, disjoint shards, pure models."""

import sys

import numpy as np
import pytest
import torch
from torch.func import functional_call, grad, vmap

from ucxgossip.bench import tasks
from ucxgossip.bench.models import CONTEXT, loss
from ucxgossip.errors import ArgumentError, BenchError

pytest.importorskip("sklearn")

MODELS = ("lenet", "convnet", "resnet20", "gpt", "gpt4")


@pytest.fixture(scope="module")
def loaded() -> dict[str, tasks.Task]:
    return {name: tasks.load(name) for name in MODELS}


@pytest.mark.parametrize("name", MODELS)
def test_same_seed_same_weights(loaded: dict[str, tasks.Task], name: str) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first, again, other = (loaded[name].model(seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(1), expected)  # torch's generator stayed as it was
    for left, right in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(left, right)
        assert left.dtype == torch.float32
    pairs = zip(first.parameters(), other.parameters(), strict=True)
    assert any(not torch.equal(left, right) for left, right in pairs)
    assert not list(first.buffers())


@pytest.mark.parametrize("name", MODELS)
def test_loading_twice_gives_the_same_data(loaded: dict[str, tasks.Task], name: str) -> None:
    again = tasks.load(name)
    assert torch.equal(loaded[name].inputs, again.inputs)
    assert torch.equal(loaded[name].test_targets, again.test_targets)


def test_digits_are_standardised(loaded: dict[str, tasks.Task]) -> None:
    task = loaded["lenet"]
    assert task.inputs.shape == (1347, 1, 8, 8) and task.test_inputs.shape == (450, 1, 8, 8)
    assert abs(float(task.inputs.mean())) < 1e-5
    assert float(task.inputs.std()) == pytest.approx(1, abs=1e-3)
    assert set(task.labels) == set(range(10))


def test_text_predicts_the_next_character(loaded: dict[str, tasks.Task]) -> None:
    task = loaded["gpt"]
    assert task.inputs.shape[1] == CONTEXT
    assert torch.equal(task.inputs[:, 1:], task.targets[:, :-1])
    assert len(task.inputs) > 10_000
    assert len(task.test_inputs) == 256


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("ranks", [1, 3, 8])
@pytest.mark.parametrize("kind", tasks.SHARDS)
def test_shards_are_disjoint_and_equal(
    loaded: dict[str, tasks.Task], name: str, ranks: int, kind: str
) -> None:
    task = loaded[name]
    shards = task.shards(ranks, kind, 5)
    assert len(shards) == ranks
    assert len({len(shard) for shard in shards}) == 1
    together = np.concatenate(shards)
    assert len(set(together.tolist())) == len(together) > len(task.labels) - 2 * ranks
    for shard, again in zip(shards, task.shards(ranks, kind, 5), strict=True):
        np.testing.assert_array_equal(shard, again)
    assert not np.array_equal(shards[0], task.shards(ranks, kind, 6)[0])


def test_skewed_shards_hold_few_labels(loaded: dict[str, tasks.Task]) -> None:
    task = loaded["lenet"]
    for shard in task.shards(10, "skewed", 0):
        assert len(set(task.labels[shard])) <= 4
    for shard in task.shards(10, "iid", 0):
        assert len(set(task.labels[shard])) == 10


def test_batches_are_different_samples_of_the_shard() -> None:
    shard = np.arange(100, 120)
    first = tasks.batch(shard, 8, seed=0, rank=1, step=2)
    assert len(set(first.tolist())) == 8 and set(first) <= set(shard)
    np.testing.assert_array_equal(first, tasks.batch(shard, 8, seed=0, rank=1, step=2))
    for seed, rank, step in ((1, 1, 2), (0, 2, 2), (0, 1, 3)):
        assert not np.array_equal(first, tasks.batch(shard, 8, seed, rank, step))


@pytest.mark.parametrize("name", MODELS)
def test_models_work_under_torch_func(loaded: dict[str, tasks.Task], name: str) -> None:
    task = loaded[name]
    model = task.model(0)
    x, y = task.inputs[:6].unflatten(0, (2, 3)), task.targets[:6].unflatten(0, (2, 3))
    stacked = {key: torch.stack([p.detach()] * 2) for key, p in model.named_parameters()}

    def of(named: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return loss(functional_call(model, named, (x,)), y)

    both = vmap(grad(of))(stacked, x, y)
    for replica in range(2):
        model.zero_grad()
        loss(model(x[replica]), y[replica]).backward()  # type: ignore[no-untyped-call]
        for key, parameter in model.named_parameters():
            torch.testing.assert_close(both[key][replica], parameter.grad, rtol=1e-4, atol=1e-6)


def test_gpt_does_not_see_the_future(loaded: dict[str, tasks.Task]) -> None:
    model, codes = loaded["gpt"].model(0), loaded["gpt"].inputs[:1].clone()
    before = model(codes)
    codes[0, 20] = (codes[0, 20] + 1) % 50
    after = model(codes)
    assert torch.equal(before[0, :20], after[0, :20])
    assert not torch.equal(before[0, 20:], after[0, 20:])


def test_bad_names(loaded: dict[str, tasks.Task]) -> None:
    with pytest.raises(ArgumentError, match=f"'alexnet'; choose one of {', '.join(tasks.TASKS)}"):
        tasks.load("alexnet")
    with pytest.raises(ArgumentError, match="choose one of iid, skewed"):
        loaded["lenet"].shards(2, "striped", 0)
    with pytest.raises(ArgumentError, match="too few for 5000 ranks"):
        loaded["lenet"].shards(5000, "iid", 0)


def test_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(BenchError, match="pip install scikit-learn"):
        tasks.load("lenet")


def test_resnet50_sees_images_of_its_size() -> None:
    """224 pixels a side, three colours; a logit for each of 1000 classes, a gradient for each."""
    task = tasks.load("resnet50")
    model = task.model(0)
    seen: list[torch.Size] = []
    first = next(each for each in model.modules() if isinstance(each, torch.nn.Conv2d))
    first.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape))
    made = model(task.inputs[:1])
    loss(made, task.targets[:1]).backward()
    assert seen == [torch.Size([1, 3, 224, 224])] and made.shape == (1, 1000)
    assert all(each.grad is not None and each.grad.any() for each in model.parameters())
