"""Every mode of `attach` on ranks that are threads, against plain torch that averages by hand."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import ucxgossip as ug
from torch_jobs import (
    STEPS,
    F,
    Job,
    Reference,
    batch,
    flat,
    make_optimizer,
    small_model,
    train_step,
)
from ucxgossip import errors
from ucxgossip.schedule import BaseTwo, Dissemination, Hypercube, Ring, Rotated, Schedule

MODES: dict[str, dict[str, Any]] = {
    "state": {"optimizer_state": True},
    "weights-state": {"mix": "weights", "optimizer_state": True},
    "awc-state": {"combine": "awc", "optimizer_state": True},
    "stale": {"mix": "weights", "staleness": 1},
    "local": {"local_steps": 3},
    "local-state": {"local_steps": 2, "optimizer_state": True, "mix": "weights"},
    "global": {"global_average_every": 4},
    "outer": {"mix": "weights", "outer": ug.Nesterov(0.7, 0.5), "local_steps": 2},
    "outer-both": {"outer": ug.Nesterov(0.9, 0.3)},
}


@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize(
    ("size", "optimizer", "transport"),
    [(2, "sgd", "shm"), (3, "adamw", "shm"), (4, "sgd", "tcp")],
)
def test_mode_equals_the_reference(
    job: Job, size: int, name: str, optimizer: str, transport: str
) -> None:
    modes, schedule = MODES[name], Rotated(Dissemination(size), seed=5)

    def body(group: ug.Group) -> np.ndarray:
        model = small_model(group.rank)
        chosen = make_optimizer(optimizer, model)
        with ug.attach(
            model, chosen, group, schedule=schedule, bucket_bytes=200, **modes
        ) as gossip:
            for step in range(STEPS):
                train_step(model, chosen, group.rank, step)
            gossip.wait()
            found = flat(model)
        return flat(model) if modes.get("staleness") else found

    if modes.get("combine") == "awc":
        expected = reference_awc_state(size, optimizer, schedule)
    else:
        expected = Reference(size, optimizer, schedule, **modes).run(STEPS)
    for rank, weights in enumerate(job(size, body, transport)):
        np.testing.assert_allclose(weights, expected[rank], rtol=1e-9, atol=1e-12)


def reference_awc_state(size: int, optimizer: str, schedule: Schedule) -> list[np.ndarray]:
    """awc: weights and state that the last step left are averaged at this one, by one round."""
    reference = Reference(size, optimizer, schedule, combine="awc")
    for number in range(STEPS):
        if number:
            reference.average(reference.states(), number + reference.ahead)
        reference_step_awc(reference, number)
    return [flat(model) for model in reference.models]


def reference_step_awc(reference: Reference, number: int) -> None:
    for rank, model in enumerate(reference.models):
        reference.optimizers[rank].zero_grad()
        x, y = batch(rank, number)
        F.cross_entropy(model(x), y).backward()
    gradients = [[p.grad for p in model.parameters()] for model in reference.models]
    reference.average(gradients, number)  # type: ignore[arg-type]
    reference.average(reference.weights(), number + reference.ahead)
    for each in reference.optimizers:
        each.step()


@pytest.mark.parametrize(
    "make",
    [Hypercube, BaseTwo, Ring, lambda p: Rotated(BaseTwo(p), seed=2)],
    ids=["Hypercube", "BaseTwo", "Ring", "Rotated"],
)
def test_other_schedules(job: Job, make: Callable[[int], Schedule]) -> None:
    schedule = make(4)

    def body(group: ug.Group) -> np.ndarray:
        model = small_model(group.rank)
        optimizer = make_optimizer("sgd", model)
        with ug.attach(model, optimizer, group, schedule=schedule) as gossip:
            for step in range(STEPS):
                train_step(model, optimizer, group.rank, step)
            gossip.wait()
            return flat(model)

    expected = Reference(4, "sgd", schedule).run(STEPS)
    for rank, weights in enumerate(job(4, body)):
        np.testing.assert_allclose(weights, expected[rank], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["both", "weights", "awc", "stale2", "push_sum", "state", "outer"])
def test_mean_over_ranks_is_kept(job: Job, name: str) -> None:
    """Steps that change nothing (rate 0): whatever is exchanged, the mean of the replicas stays."""
    modes: dict[str, Any] = {
        "both": {},
        "weights": {"mix": "weights"},
        "awc": {"combine": "awc"},
        "stale2": {"staleness": 2, "mix": "weights"},
        "push_sum": {"mix": "push_sum"},
        "state": {"optimizer_state": True},
        "outer": {"outer": ug.Nesterov(1.0, 0.0), "mix": "weights"},
    }[name]
    starts = [small_model(rank) for rank in range(4)]

    def body(group: ug.Group) -> tuple[np.ndarray, float]:
        model = small_model(0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.5)
        with ug.attach(model, optimizer, group, bucket_bytes=200, **modes) as gossip:
            state = gossip.state_dict()
            model.load_state_dict(starts[group.rank].state_dict())
            gossip.load_state_dict(state)
            for step in range(12):
                train_step(model, optimizer, group.rank, step)
            if name == "push_sum":  # each weighs by its mass
                gossip.synchronize()
            distance = gossip.consensus_distance()
        return flat(model), distance

    ends = job(4, body)
    mean = np.mean([flat(model) for model in starts], axis=0)
    np.testing.assert_allclose(np.mean([end for end, _ in ends], axis=0), mean, rtol=1e-12)
    assert ends[0][1] < 0.5  # and they came closer: at first it is above 0.8


def test_awc_is_the_authors_deferred_rule_at_twice_the_rate(job: Job) -> None:
    """``(w_i(t+1) + w_j(t)) / 2`` with rate 2r, by hand, against awc with rate r."""
    size, steps, rate = 4, 10, 0.05
    schedule = Rotated(Dissemination(size), seed=1)

    def body(group: ug.Group) -> np.ndarray:
        model = small_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)
        with ug.attach(
            model, optimizer, group, mix="weights", combine="awc", schedule=schedule
        ) as gossip:
            for step in range(steps):
                train_step(model, optimizer, group.rank, step)
            gossip.wait()
            return flat(model)

    models = [small_model() for _ in range(size)]
    for step in range(steps):
        before = [[p.detach().clone() for p in model.parameters()] for model in models]
        for rank, model in enumerate(models):
            train_step(model, torch.optim.SGD(model.parameters(), lr=2 * rate), rank, step)
            sender = schedule.round(rank, step).sender
            assert sender is not None
            with torch.no_grad():
                for own, old in zip(model.parameters(), before[sender], strict=True):
                    own.copy_((own + old) / 2)
    for rank, weights in enumerate(job(size, body)):
        np.testing.assert_allclose(weights, flat(models[rank]), rtol=1e-11, atol=1e-13)


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(5)
        self.out = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.norm(x))


def test_buffers_are_mixed_one_step_late(job: Job) -> None:
    torch.manual_seed(0)
    first = Normed()
    schedule = Dissemination(2)

    def body(group: ug.Group) -> dict[str, torch.Tensor]:
        model = copy.deepcopy(first)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with ug.attach(model, optimizer, group, schedule=schedule, buffers=True):
            for step in range(3):
                optimizer.zero_grad()
                x, y = batch(group.rank, step)
                F.cross_entropy(model(x.float()), y).backward()
                optimizer.step()
            assert int(model.norm.num_batches_tracked) == 3
        return {name: each.clone() for name, each in model.named_buffers()}

    norms = [copy.deepcopy(first.norm) for _ in range(2)]
    late = [torch.zeros(5), torch.zeros(5)]
    for step in range(3):
        for rank, norm in enumerate(norms):
            norm(batch(rank, step)[0].float())
        for rank, norm in enumerate(norms):
            norm.running_mean += late[rank]  # type: ignore[operator]
        means = [norm.running_mean.clone() for norm in norms]  # type: ignore[operator]
        late = [(means[1] - means[0]) / 2, (means[0] - means[1]) / 2]
    for rank, found in enumerate(job(2, body)):
        expected = norms[rank].running_mean + late[rank]  # type: ignore[operator]
        torch.testing.assert_close(found["norm.running_mean"], expected)


@pytest.mark.parametrize("transport", ["tcp", "shm"])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_push_sum_trains_and_conserves(job: Job, size: int, transport: str) -> None:
    """Ranks at their own pace: one does half the steps of the others."""

    def body(group: ug.Group) -> tuple[float, float, dict[str, Any]]:
        model = small_model(group.rank)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        with ug.attach(model, optimizer, group, mix="push_sum", bucket_bytes=200) as gossip:
            for step in range(20 if group.rank else 40):
                train_step(model, optimizer, group.rank, step)
            gossip._exchange.finish()
            masses = [bucket.weights_stream.mass for bucket in gossip._buckets]  # type: ignore[union-attr]
            stats = gossip.stats()
            distance = gossip.consensus_distance()
            group.agree("over", {})
            return masses[0], distance, stats

    ends = job(size, body, transport)
    assert sum(mass for mass, _, _ in ends) == size  # halves and sums of few powers of two: exact
    assert ends[0][1] < 0.3
    assert sum(stats["rounds"] for _, _, stats in ends) > 0
    assert all(set(stats["staleness"]) <= set(range(size)) for _, _, stats in ends)


def test_optimizer_state_waits_for_the_last_rank_to_step(job: Job) -> None:
    """The first step of one rank overflows: its missing state is no zeros to be mixed."""

    def body(group: ug.Group) -> tuple[float, float]:
        model = small_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
        modes: dict[str, Any] = {"mix": "weights", "optimizer_state": True}
        with ug.attach(model, optimizer, group, schedule=Dissemination(2), **modes) as gossip:
            if group.rank == 0:
                gossip.skip_step()
            else:
                train_step(model, optimizer, 1, 0)
                alone = float(optimizer.state[model[0].weight]["momentum_buffer"].norm())
            mixed = [train_step(model, optimizer, group.rank, step) for step in (1, 2)]
            assert all(torch.isfinite(loss) for loss in mixed)
        return alone if group.rank else 0.0, float(gossip.stats()["rounds"])

    ends = job(2, body)
    assert ends[1][0] > 0
    assert [rounds for _, rounds in ends] == [5.0, 5.0]  # 3 of weights, 2 of the state


def test_optimizer_without_state_to_mix(store: Any) -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with ug.join(0, 1, store) as group, pytest.raises(errors.ModelError, match="leave it False"):
        ug.attach(model, optimizer, group, optimizer_state=True)
