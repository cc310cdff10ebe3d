"""bench.simulate: equal to torch and to the rules written out, for small models and few steps."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from ucxgossip.bench import tasks
from ucxgossip.bench.methods import parse
from ucxgossip.bench.models import loss
from ucxgossip.bench.setting import Setting, consensus, make_optimizer
from ucxgossip.bench.simulate import Mixer, average, simulate
from ucxgossip.errors import ArgumentError
from ucxgossip.schedule import Dissemination, Rotated

STEPS = 6


@pytest.fixture(scope="module")
def task() -> tasks.Task:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, 5, generator=generator)
    targets = torch.randint(3, (200,), generator=generator)
    return tasks.Task(
        "tiny",
        inputs,
        targets,
        targets.numpy(),
        inputs[:50],
        targets[:50],
        lambda: nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)),
    )


def small(ranks: int, optimizer: str = "sgd", **fields: object) -> Setting:
    return Setting(ranks, optimizer, rate=0.1, steps=STEPS, batch=4, **fields)  # type: ignore[arg-type]


def weights(task: tasks.Task, method: str, setting: Setting) -> np.ndarray:
    found = simulate(task, parse(method), setting).weights
    assert found is not None
    return found


def flat(model: nn.Module) -> np.ndarray:
    return torch.cat([p.detach().flatten() for p in model.parameters()]).numpy()


Rule = Callable[[list[nn.Module], list[torch.optim.Optimizer], int], None]


def by_hand(
    task: tasks.Task, setting: Setting, on_gradients: Rule | None, after_step: Rule | None
) -> np.ndarray:
    """The same training without the simulation: a model and an optimizer for each rank."""
    models = [task.model(setting.seed) for _ in range(setting.ranks)]
    optimizers = [
        make_optimizer(setting.optimizer, model.parameters(), setting.rate) for model in models
    ]
    shards = task.shards(setting.ranks, setting.shards, setting.seed)
    for step in range(setting.steps):
        for rank, model in enumerate(models):
            chosen = tasks.batch(shards[rank], setting.batch, setting.seed, rank, step)
            model.zero_grad()
            made = loss(model(task.inputs[chosen]), task.targets[chosen])
            made.backward()  # type: ignore[no-untyped-call]
        for rule in (on_gradients, lambda *_: [each.step() for each in optimizers], after_step):
            if rule is not None:
                rule(models, optimizers, step)  # type: ignore[operator]
    return np.stack([flat(model) for model in models])


def mixed(tensors: list[torch.Tensor], step: int) -> None:
    schedule = Rotated(Dissemination(len(tensors)), seed=0)
    before = [tensor.clone() for tensor in tensors]
    for rank, tensor in enumerate(tensors):
        sender = schedule.round(rank, step).sender
        if sender is not None:
            tensor.copy_((before[rank] + before[sender]) / 2)


def mix_gradients(models: list[nn.Module], _: object, step: int) -> None:
    for group in zip(*(model.parameters() for model in models), strict=True):
        mixed([p.grad for p in group], step)


def mix_weights(models: list[nn.Module], _: object, step: int) -> None:
    for group in zip(*(model.parameters() for model in models), strict=True):
        mixed([p.data for p in group], step)


def mix_weights_and_state(
    models: list[nn.Module], optimizers: list[torch.optim.Optimizer], step: int
) -> None:
    mix_weights(models, optimizers, step)
    for group in zip(*(model.parameters() for model in models), strict=True):
        states = [each.state[p] for each, p in zip(optimizers, group, strict=True)]
        for key in ("momentum_buffer", "exp_avg", "exp_avg_sq"):
            if key in states[0]:
                mixed([state[key] for state in states], step)


def mean_gradients(models: list[nn.Module], _: object, step: int) -> None:
    for group in zip(*(model.parameters() for model in models), strict=True):
        mean = torch.stack([p.grad for p in group]).mean(dim=0)
        for parameter in group:
            parameter.grad.copy_(mean)


def mix_shifted(models: list[nn.Module], optimizers: object, step: int) -> None:
    mix_weights(models, optimizers, step + 1)


RULES: dict[str, tuple[Rule | None, Rule | None]] = {
    "local": (None, None),
    "allreduce": (mean_gradients, None),
    "gossip-gradients": (mix_gradients, None),
    "gossip-weights-atc": (None, mix_weights),
    "gossip-weights-awc": (mix_weights, None),
    "gossip-both-atc+shift0": (mix_gradients, mix_weights),
    "gossip-both-atc+shift1": (mix_gradients, mix_shifted),
    "gossip-both-atc+state+shift0": (mix_gradients, mix_weights_and_state),
    "gossip-weights-atc+state": (None, mix_weights_and_state),
}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("ranks", [1, 3, 4])
@pytest.mark.parametrize("method", RULES)
def test_equals_torch_and_the_rule(
    task: tasks.Task, method: str, ranks: int, optimizer: str
) -> None:
    setting = small(ranks, optimizer)
    np.testing.assert_allclose(
        weights(task, method, setting), by_hand(task, setting, *RULES[method]), atol=2e-5
    )


def test_authors_rule(task: tasks.Task) -> None:
    """``(w_i(t+1) + w_j(t)) / 2``: what is received is from before the step."""
    setting = small(4)
    before: list[list[torch.Tensor]] = []

    def keep(models: list[nn.Module], _: object, step: int) -> None:
        before[:] = [[p.detach().clone() for p in model.parameters()] for model in models]

    def combine(models: list[nn.Module], _: object, step: int) -> None:
        schedule = Rotated(Dissemination(4), seed=0)
        for rank, model in enumerate(models):
            sender = schedule.round(rank, step).sender
            assert sender is not None
            for parameter, old in zip(model.parameters(), before[sender], strict=True):
                parameter.data.add_(old).div_(2)

    expected = by_hand(task, setting, keep, combine)
    np.testing.assert_allclose(weights(task, "gossip-deferred", setting), expected, atol=1e-5)


def test_late_rounds_are_differences_of_then() -> None:
    """On values that nothing else changes, by hand: two rounds under way at weight 1/4."""
    schedule = Dissemination(4)
    mixer = Mixer(parse("gossip-weights-atc+stale2"), schedule, 0)
    rows = np.array([[0.0], [4.0], [8.0], [20.0]], np.float32)
    mixer.mix_late(rows, 0)
    mixer.mix_late(rows, 1)
    np.testing.assert_array_equal(rows[:, 0], [0, 4, 8, 20])
    mixer.mix_late(rows, 2)  # round 0: each receives from the one before it
    np.testing.assert_allclose(rows[:, 0], [5, 3, 7, 17])
    mixer.mix_late(rows, 3)  # round 1, of the values at that time: from two before it
    np.testing.assert_allclose(rows[:, 0], [7, 7, 5, 13])


def test_late_rounds_keep_the_mean(task: tasks.Task) -> None:
    for method in ("gossip-weights-atc+stale1", "gossip-both-atc+stale3"):
        found = weights(task, method, small(4))
        assert 0 < consensus(torch.from_numpy(found)) < 1
        assert not np.array_equal(found, weights(task, "gossip-weights-atc", small(4)))


@pytest.mark.parametrize("drop", [0.0, 0.4])
@pytest.mark.parametrize("ranks", [3, 4, 8])
def test_push_sum_keeps_mass_and_ends_at_the_mean(ranks: int, drop: float) -> None:
    method = parse(f"gossip-push_sum+drop{drop}" if drop else "gossip-push_sum")
    mixer = Mixer(method, Rotated(Dissemination(ranks), seed=0), seed=1)
    rows = np.random.default_rng(0).standard_normal((ranks, 3)).astype(np.float32)
    mean = rows.mean(axis=0)
    for number in range(80):
        mixer.begin_step()
        mixer.push_sum([rows], number)
        assert mixer.mass.sum() == pytest.approx(ranks)
        np.testing.assert_allclose((mixer.mass @ rows) / ranks, mean, atol=1e-5)
    np.testing.assert_allclose(rows, np.tile(mean, (ranks, 1)), atol=1e-4)
    assert (mixer.mass == 1).all() == (drop == 0)


def test_push_sum_without_losses_is_weights_atc(task: tasks.Task) -> None:
    setting, schedule = small(4, "adamw"), Dissemination(4)
    found, expected = (
        simulate(task, parse(method), setting, schedule).weights
        for method in ("gossip-push_sum", "gossip-weights-atc")
    )
    assert np.array_equal(found, expected)  # type: ignore[arg-type]


def test_shuffle_gives_a_rank_what_comes_from_further_back_each_step(task: tasks.Task) -> None:
    setting = small(3, "sgd", shards="skewed")
    shards = task.shards(3, "skewed", setting.seed)
    model = task.model(setting.seed)
    optimizer = make_optimizer("sgd", model.parameters(), setting.rate)
    for step in range(STEPS):
        sender = (1 - step) % 3
        chosen = tasks.batch(shards[sender], setting.batch, setting.seed, sender, step)
        optimizer.zero_grad()
        loss(model(task.inputs[chosen]), task.targets[chosen]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    # Gradients alone with nobody: what is left is each rank by itself.
    found = simulate(task, replace(parse("local"), shuffle=True), setting).weights
    assert found is not None
    np.testing.assert_allclose(found[1], flat(model), atol=1e-5)


def test_local_steps_do_rounds_in_every_kth_step(task: tasks.Task) -> None:
    setting = small(4)

    def every_second(models: list[nn.Module], optimizers: object, step: int) -> None:
        if step % 2 == 1:
            mix_weights(models, optimizers, step // 2)

    expected = by_hand(task, setting, None, every_second)
    found = weights(task, "gossip-weights-atc+local2", setting)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("ranks", [3, 4])
def test_global_average(task: tasks.Task, ranks: int) -> None:
    found = weights(task, f"gossip-weights-atc+global{STEPS}", small(ranks))
    assert consensus(torch.from_numpy(found)) < 1e-6  # and the round after it changes nothing
    found = weights(task, f"gossip-weights-atc+global{STEPS - 1}", small(ranks))
    assert consensus(torch.from_numpy(found)) > 1e-4


def test_average_is_the_mean() -> None:
    rows = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    mean = rows.mean(axis=0)
    average(rows)
    np.testing.assert_allclose(rows, np.tile(mean, (6, 1)), atol=1e-6)


def test_same_seed_same_outcome_and_other_seed_another(task: tasks.Task) -> None:
    first, again, other = (
        weights(task, "gossip-both-atc", small(4, seed=seed)) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_outcome(task: tasks.Task) -> None:
    outcome = simulate(task, parse("local"), small(3, evaluations=3))
    assert outcome.steps == [2, 4, 6]
    assert [len(each) for each in outcome.accuracies] == [3, 3, 3]
    assert all(0 <= each <= 100 for row in outcome.accuracies for each in row)
    assert outcome.consensus == sorted(outcome.consensus)
    model = task.model(0).requires_grad_(False)
    assert outcome.weights is not None
    torch.nn.utils.vector_to_parameters(
        torch.from_numpy(outcome.weights[1].copy()), model.parameters()
    )
    right = (model(task.test_inputs).argmax(dim=1) == task.test_targets).float().mean()
    assert outcome.accuracies[-1][1] == pytest.approx(100 * float(right))
    assert outcome.losses[-1][1] == pytest.approx(
        float(loss(model(task.test_inputs), task.test_targets)), rel=1e-5
    )


def test_setting() -> None:
    setting = Setting(2, rate=0.4, decay="cosine", steps=10, evaluations=4)
    assert setting.rate_at(0) == 0.4
    assert setting.rate_at(5) == pytest.approx(0.2)
    assert Setting(2, rate=0.4, steps=10).rate_at(9) == 0.4
    assert setting.evaluated_after() == {2, 5, 8, 10}
    assert Setting(2, steps=3).evaluated_after() == {1, 2, 3}
    with pytest.raises(ArgumentError, match="choose one of sgd, adamw"):
        make_optimizer("lion", [torch.zeros(1)], 0.1)


def test_consensus() -> None:
    rows = torch.tensor([[3.0, 0.0], [5.0, 0.0]])
    assert consensus(rows) == pytest.approx(1 / 4)
    assert math.isnan(consensus(torch.tensor([[math.nan], [1.0]])))
