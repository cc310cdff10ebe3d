"""Every mode of `attach` on ranks that are threads, against plain torch that averages by hand."""

import copy
import functools
import io
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import ucxgossip as ug
from ucxgossip import errors
from ucxgossip.schedule import BaseTwo, Dissemination, Hypercube, Ring, Rotated, Schedule

Job = Callable[..., list[Any]]
F = nn.functional
STEPS = 9


def small_model(seed: int = 0) -> nn.Sequential:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def batch(rank: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * rank + step)
    x = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (4,), generator=generator)


def flat(model: nn.Module) -> np.ndarray:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]).numpy().copy()


def make_optimizer(name: str, model: nn.Module) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, step: int
) -> torch.Tensor:
    optimizer.zero_grad()
    x, y = batch(rank, step)
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.detach()


class Reference:
    """All ranks in turn in plain torch: what `attach` should do, written down once more."""

    def __init__(self, size: int, optimizer: str, schedule: Schedule, **modes: Any) -> None:
        self.size, self.schedule = size, schedule
        self.mix, self.combine = modes.pop("mix", "both"), modes.pop("combine", "atc")
        self.with_state = modes.pop("optimizer_state", False)
        self.stale = modes.pop("staleness", 0)
        self.local = modes.pop("local_steps", 1)
        self.every = modes.pop("global_average_every", None)
        self.outer = modes.pop("outer", None)
        assert not modes
        self.models = [small_model(0) for _ in range(size)]
        self.optimizers = [make_optimizer(optimizer, model) for model in self.models]
        # With both, weights go to another partner than the step's gradients.
        ahead = 1 if isinstance(schedule, Dissemination | Hypercube | BaseTwo | Ring) else None
        self.ahead = (schedule.period if ahead is None else ahead) if self.mix == "both" else 0
        self.gradient_round, self.weight_round = 0, self.ahead
        self.corrections: list[list[torch.Tensor]] = []
        self.slow = [[p.detach().clone() for p in m.parameters()] for m in self.models]
        self.velocity = [[torch.zeros_like(p) for p in m.parameters()] for m in self.models]

    def weights(self) -> list[list[torch.Tensor]]:
        return [[p.data for p in model.parameters()] for model in self.models]

    def deltas(self, tensors: list[torch.Tensor], step: int) -> list[torch.Tensor]:
        parts = [self.schedule.round(rank, step) for rank in range(self.size)]
        return [
            torch.zeros_like(own)
            if part.sender is None
            else part.weight * (tensors[part.sender] - own)
            for own, part in zip(tensors, parts, strict=True)
        ]

    def average(self, rows: list[list[torch.Tensor]], step: int) -> None:
        for tensors in zip(*rows, strict=True):
            for own, delta in zip(tensors, self.deltas(list(tensors), step), strict=True):
                own.add_(delta)

    def states(self) -> list[list[torch.Tensor]]:
        return [
            [
                value
                for p in model.parameters()
                for value in optimizer.state[p].values()
                if torch.is_tensor(value) and value.shape == p.shape
            ]
            for model, optimizer in zip(self.models, self.optimizers, strict=True)
        ]

    def step(self, number: int) -> None:
        due = (number + 1) % self.local == 0
        for rank, model in enumerate(self.models):
            self.optimizers[rank].zero_grad()
            x, y = batch(rank, number)
            F.cross_entropy(model(x), y).backward()
        if self.mix in ("both", "gradients") and due:
            self.average(
                [[p.grad for p in model.parameters()] for model in self.models],  # type: ignore[misc]
                self.gradient_round,
            )
            self.gradient_round += 1
        weights_travel = self.mix != "gradients"
        if weights_travel and self.combine == "awc":
            self.average(self.weights(), self.weight_round)
        for each in self.optimizers:
            each.step()
        if weights_travel and self.combine == "awc":
            self.weight_round += 1
        else:
            if self.every and (number + 1) % self.every == 0:
                self.average_all()
            if weights_travel and due:
                self.exchange_weights()

    def average_all(self) -> None:
        for tensors in zip(*self.weights(), strict=True):
            mean = torch.stack(tensors).mean(0)
            for each in tensors:
                each.copy_(mean)

    def exchange_weights(self) -> None:
        if self.outer:
            self.outer_step()
        elif self.stale:
            assert self.stale == 1  # the only lateness that does not hang on timing
            self.apply_corrections()
            self.corrections = [
                self.deltas(list(tensors), self.weight_round)
                for tensors in zip(*self.weights(), strict=True)
            ]
        else:
            self.average(self.weights(), self.weight_round)
        if self.with_state:
            self.average(self.states(), self.weight_round)
        self.weight_round += 1

    def apply_corrections(self) -> None:
        for tensors, deltas in zip(
            zip(*self.weights(), strict=True), self.corrections, strict=False
        ):
            for own, delta in zip(tensors, deltas, strict=True):
                own.add_(delta)
        self.corrections = []

    def outer_step(self) -> None:
        change = [
            [w - s for w, s in zip(own, slow, strict=True)]
            for own, slow in zip(self.weights(), self.slow, strict=True)
        ]
        self.average(change, self.weight_round)
        self.average(self.slow, self.weight_round)
        rate, momentum = self.outer.rate, self.outer.momentum
        for own, slow, d, v in zip(self.weights(), self.slow, change, self.velocity, strict=True):
            for i, each in enumerate(own):
                v[i].mul_(momentum).add_(d[i])
                slow[i].add_(rate * (d[i] + momentum * v[i]))
                each.copy_(slow[i])

    def run(self, steps: int) -> list[np.ndarray]:
        for number in range(steps):
            self.step(number)
        if self.stale:
            self.apply_corrections()
        return [flat(model) for model in self.models]


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
    "make", [Hypercube, BaseTwo, Ring, lambda p: Rotated(BaseTwo(p), seed=2)], ids=str
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


# --- steps that a rank leaves out --------------------------------------------------------------


@pytest.mark.parametrize("mix", ["both", "weights"])
@pytest.mark.parametrize("when", [0, 3, 7])
def test_grad_scaler_that_skips_on_one_rank(job: Job, when: int, mix: str) -> None:
    """Rank 0 overflows once, at the first or last step too; all end in step, whole and close."""

    def body(group: ug.Group) -> tuple[np.ndarray, float, list[float], int]:
        model = small_model().float()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
        scales = []
        own = scaler.step
        with ug.attach(model, optimizer, group, mix=mix, scaler=scaler) as gossip:
            for step in range(8):
                optimizer.zero_grad()
                x, y = batch(group.rank, step)
                loss = F.cross_entropy(model(x.float()), y)
                if group.rank == 0 and step == when:
                    loss = loss * float("inf")
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                scales.append(scaler.get_scale())
            steps = gossip.stats()["steps"]
            distance = gossip.consensus_distance()
            weights = flat(model)
        assert scaler.step == own
        return weights, distance, scales, steps

    ends = job(4, body)
    assert any(scales[-1] == 512.0 for _, _, scales, _ in ends)
    assert any(scales[-1] == 1024.0 for _, _, scales, _ in ends)
    assert all(np.isfinite(weights).all() for weights, *_ in ends)
    assert {steps for *_, steps in ends} == {8}
    assert ends[0][1] < 0.1


def test_scaled_gradients_are_averaged_unscaled(job: Job) -> None:
    def body(group: ug.Group) -> np.ndarray:
        model = small_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** (5 + group.rank))
        with ug.attach(model, optimizer, group, mix="gradients", scaler=scaler):
            optimizer.zero_grad()
            x, y = batch(group.rank, 0)
            scaler.scale(F.cross_entropy(model(x), y)).backward()
            scaler.unscale_(optimizer)
            return torch.cat([p.grad.reshape(-1) for p in model.parameters()]).numpy().copy()

    reference = Reference(2, "sgd", Dissemination(2), mix="gradients")
    for rank, model in enumerate(reference.models):
        F.cross_entropy(model(batch(rank, 0)[0]), batch(rank, 0)[1]).backward()
    expected = sum(
        torch.cat([p.grad.reshape(-1) for p in model.parameters()]).numpy() / 2  # type: ignore[union-attr]
        for model in reference.models
    )
    for gradients in job(2, body):
        np.testing.assert_allclose(gradients, expected, rtol=1e-12)


@pytest.mark.parametrize("mix", ["both", "weights", "gradients"])
def test_skipped_steps_keep_ranks_in_step(job: Job, mix: str) -> None:
    def body(group: ug.Group) -> tuple[int, np.ndarray]:
        model = small_model()
        optimizer = make_optimizer("sgd", model)
        with ug.attach(model, optimizer, group, mix=mix) as gossip:
            for step in range(6):
                if group.rank == 1 and step in (2, 5):
                    gossip.skip_step()
                else:
                    train_step(model, optimizer, group.rank, step)
            gossip.wait()
            rounds = gossip.stats()["rounds"]
            return rounds, flat(model)

    ends = job(3, body)
    assert len({rounds for rounds, _ in ends}) == 1
    assert all(np.isfinite(weights).all() for _, weights in ends)


def test_lbfgs_calls_its_closure_many_times(job: Job) -> None:
    def body(group: ug.Group) -> float:
        model = small_model()
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
        with ug.attach(model, optimizer, group, mix="weights") as gossip:
            for step in range(4):
                x, y = batch(group.rank, step)

                def closure() -> torch.Tensor:
                    optimizer.zero_grad()
                    loss = F.cross_entropy(model(x), y)  # noqa: B023
                    loss.backward()
                    return loss

                optimizer.step(closure)
            assert gossip.stats()["steps"] == 4
            return gossip.consensus_distance()

    assert all(np.isfinite(job(2, body)))


# --- checkpoints -------------------------------------------------------------------------------


def resumable() -> Iterator[tuple[str, dict[str, Any]]]:
    yield "both", {}
    yield "weights", {"mix": "weights"}
    yield "gradients", {"mix": "gradients"}
    yield "awc", {"combine": "awc"}
    yield "stale", {"mix": "weights", "staleness": 1}
    yield "stale-buffers", {"mix": "weights", "staleness": 1, "buffers": True}
    yield "state", {"optimizer_state": True}
    yield "awc-state", {"optimizer_state": True, "combine": "awc"}
    yield "local", {"local_steps": 2, "optimizer_state": True}
    yield "outer", {"outer": ug.Nesterov(), "local_steps": 2}
    yield "global", {"global_average_every": 3}
    yield "noise", {"noise_correction": True, "optimizer_state": True}


@pytest.mark.parametrize(("name", "modes"), list(resumable()))
def test_resumed_run_goes_on_bit_for_bit(job: Job, name: str, modes: dict[str, Any]) -> None:
    size, half, steps = 3, 5, 11
    files: list[list[bytes]] = [[] for _ in range(size)]

    def start(group: ug.Group) -> tuple[nn.Module, torch.optim.Optimizer, ug.Gossip]:
        model = small_model(group.rank)
        optimizer = make_optimizer("adamw", model)
        return model, optimizer, ug.attach(model, optimizer, group, bucket_bytes=200, **modes)

    def whole(group: ug.Group) -> np.ndarray:
        model, optimizer, gossip = start(group)
        with gossip:
            for step in range(steps):
                if step == half:
                    file = io.BytesIO()
                    torch.save(
                        [gossip.state_dict(), model.state_dict(), optimizer.state_dict()], file
                    )
                    files[group.rank].append(file.getvalue())
                train_step(model, optimizer, group.rank, step)
        return flat(model)

    def resumed(group: ug.Group) -> np.ndarray:
        model, optimizer, gossip = start(group)
        with gossip:
            saved = torch.load(io.BytesIO(files[group.rank][0]))
            model.load_state_dict(saved[1])
            optimizer.load_state_dict(saved[2])
            gossip.load_state_dict(saved[0])
            for step in range(half, steps):
                train_step(model, optimizer, group.rank, step)
        return flat(model)

    first = job(size, whole)
    for weights in files:
        assert len(weights) == 1
    second = job(size, resumed)
    for left, right in zip(first, second, strict=True):
        assert np.array_equal(left, right)


def test_resumed_within_one_attachment(job: Job) -> None:
    """Going back to an earlier state of the same run, rounds under way or not."""

    def body(group: ug.Group) -> tuple[np.ndarray, np.ndarray]:
        model = small_model()
        optimizer = make_optimizer("adamw", model)
        ends = []
        with ug.attach(model, optimizer, group, optimizer_state=True) as gossip:
            early = gossip.state_dict()
            for step in range(3):
                train_step(model, optimizer, group.rank, step)
            saved = copy.deepcopy([model.state_dict(), optimizer.state_dict(), gossip.state_dict()])
            assert len(early["optimizer"]) == 0
            for _ in range(2):
                for step in range(3, 7):
                    train_step(model, optimizer, group.rank, step)
                ends.append(flat(model) if gossip.wait() is None else None)
                model.load_state_dict(saved[0])
                optimizer.load_state_dict(copy.deepcopy(saved[1]))
                gossip.load_state_dict(saved[2])
            gossip.load_state_dict(early)  # from before the state's first round
            train_step(model, optimizer, group.rank, 0)
        return ends[0], ends[1]  # type: ignore[return-value]

    for first, second in job(3, body):
        assert np.array_equal(first, second)


def test_checkpoint_of_other_modes_is_refused(store: Any) -> None:
    with ug.join(0, 1, store) as group:
        model = small_model()
        optimizer = make_optimizer("sgd", model)
        with ug.attach(model, optimizer, group) as gossip:
            saved = gossip.state_dict()
        with ug.attach(model, optimizer, group, mix="weights") as gossip:
            with pytest.raises(errors.ArgumentError, match="has mix: 'both', this run has 'wei"):
                gossip.load_state_dict(saved)
            with pytest.raises(errors.ArgumentError, match=r"what gossip.state_dict\(\) returned"):
                gossip.load_state_dict({"epoch": 3})


# --- push-sum ----------------------------------------------------------------------------------


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


# --- torch.compile and several models ----------------------------------------------------------


@pytest.mark.parametrize("how", ["whole", "inner", "in-place", "after"])
def test_compiled_modules(job: Job, how: str) -> None:
    models = {}
    for rank in range(2):
        model: Any = small_model()
        if how == "inner":
            model[0] = torch.compile(model[0], backend="eager")
        elif how == "in-place":
            model.compile(backend="eager")
        elif how == "whole":
            model = torch.compile(model, backend="eager")
        models[rank] = model

    def body(group: ug.Group) -> np.ndarray:
        model = models[group.rank]
        optimizer = make_optimizer("sgd", model)
        with ug.attach(model, optimizer, group, bucket_bytes=200) as gossip:
            called = torch.compile(model, backend="eager") if how == "after" else model
            for step in range(4):
                train_step(called, optimizer, group.rank, step)
            gossip.wait()
            return flat(model)

    # One rank at a time would hang, two threads may not compile at once: ahead of the ranks.
    for rank, model in models.items():
        called = torch.compile(model, backend="eager") if how == "after" else model
        called(batch(rank, 0)[0])
    expected = Reference(2, "sgd", Rotated(Dissemination(2), seed=0)).run(4)
    for rank, weights in enumerate(job(2, body)):
        np.testing.assert_allclose(weights, expected[rank], rtol=1e-9, atol=1e-12)
    torch.compiler.reset()


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


def test_unused_parameters_do_not_decay_in_steps_without_a_round(store: Any) -> None:
    model = nn.ModuleDict({"used": small_model(), "idle": nn.Linear(2, 2).double()})
    before = model["idle"].weight.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    with ug.join(0, 1, store) as group, ug.attach(model, optimizer, group, local_steps=2):
        for step in range(4):
            train_step(model["used"], optimizer, 0, step)
    assert torch.equal(model["idle"].weight, before)


def test_masks_of_minus_infinity_stay(job: Job) -> None:
    def body(group: ug.Group) -> torch.Tensor:
        model = nn.Sequential(small_model())
        model.register_buffer("mask", torch.tensor([0.0, float("-inf"), 2.0 + 0 * group.rank]))
        model.register_buffer("count", torch.zeros(1))
        optimizer = make_optimizer("sgd", model)
        with ug.attach(model, optimizer, group, buffers=True) as gossip:
            for step in range(3):
                train_step(model, optimizer, group.rank, step)
                model.count += group.rank
            gossip.synchronize()
        assert float(model.count) > 0
        return model.mask.clone()

    for mask in job(2, body):
        assert mask.tolist() == [0.0, float("-inf"), 2.0]


def test_modules_shared_by_two_parents_are_served_by_both(job: Job) -> None:
    class Uses(nn.Module):
        def __init__(self, inner: nn.Linear) -> None:
            super().__init__()
            self.inner = inner
            self.bias = nn.Parameter(torch.zeros(5, dtype=torch.float64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(x, self.inner.weight, self.bias)

    def body(group: ug.Group) -> None:
        inner = nn.Linear(5, 5, bias=False).double()
        model = nn.Sequential(Uses(inner), nn.Linear(5, 5).double(), Uses(inner))
        optimizer = make_optimizer("sgd", model)
        with ug.attach(model, optimizer, group, mix="weights", bucket_bytes=64) as gossip:
            for _ in range(3):
                optimizer.zero_grad()
                model(batch(0, 0)[0]).square().mean().backward()
                optimizer.step()
            needs = gossip._forward._needs
            owner = next(b for b in gossip._buckets if any(p is inner.weight for p in b.parameters))
            assert owner in needs[model[0]] and owner in needs[model[2]]

    job(2, body)


def test_attached_model_can_be_pickled(store: Any) -> None:
    model = small_model()
    optimizer = make_optimizer("sgd", model)
    with ug.join(0, 1, store) as group, ug.attach(model, optimizer, group):
        file = io.BytesIO()
        torch.save(model, file)
    file.seek(0)
    copied = torch.load(file, weights_only=False)
    x = batch(0, 0)[0]
    torch.testing.assert_close(copied(x), model(x))


def test_two_models_of_one_job(job: Job) -> None:
    """As a GAN: the second's loss goes through the first, whose gradients are then dropped."""

    def body(group: ug.Group) -> tuple[float, float]:
        torch.manual_seed(0)
        makes = nn.Linear(5, 5).double()
        judges = small_model()
        first = torch.optim.Adam(judges.parameters(), lr=0.01)
        second = torch.optim.Adam(makes.parameters(), lr=0.01)
        with (
            ug.attach(judges, first, group) as one,
            ug.attach(makes, second, group, mix="weights") as two,
        ):
            for step in range(4):
                x, y = batch(group.rank, step)
                first.zero_grad()
                F.cross_entropy(judges(makes(x).detach()), y).backward()
                first.step()
                second.zero_grad()
                (-F.cross_entropy(judges(makes(x)), y)).backward()
                second.step()
            return one.consensus_distance(), two.consensus_distance()

    for distances in job(2, body):
        assert max(distances) < 1e-9  # two ranks: the mean after each step


# --- what a user sees --------------------------------------------------------------------------


class Recorder:
    def __init__(self) -> None:
        self.lines: dict[str, tuple[float, int | None]] = {}

    def add_scalar(self, tag: str, scalar_value: float, global_step: int | None = None) -> None:
        self.lines[tag] = (float(scalar_value), global_step)


def test_stats_and_writer(job: Job) -> None:
    def body(group: ug.Group) -> tuple[dict[str, Any], Recorder]:
        model = small_model(0)
        optimizer = make_optimizer("sgd", model)
        writer = Recorder()
        with ug.attach(model, optimizer, group, mix="weights", staleness=1) as gossip:
            for step in range(6):
                train_step(model, optimizer, group.rank, step)
            gossip.write(writer)
            stats = gossip.stats()
        return stats, writer

    for rank, (stats, writer) in enumerate(job(3, body)):
        assert stats["steps"] == 6 and stats["rounds"] == 6
        assert stats["bytes"] == 6 * 8 * 80  # 66 weights in four tensors, each in steps of 64 bytes
        assert stats["distance"] > 0 and stats["disagreement"] == pytest.approx(
            stats["distance"] ** 0.5
        )
        assert set(stats["staleness"]) <= {0, 1, 2} - {rank}
        assert set(stats["staleness"].values()) == {1.0}
        assert writer.lines["gossip/rounds"] == (6.0, 6)
        assert writer.lines["gossip/staleness_mean"] == (1.0, 6)
        assert set(writer.lines) >= {"gossip/bytes", "gossip/disagreement", "gossip/hidden"}


def test_summary_writer_of_torch(store: Any, tmp_path: Any) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    with ug.join(0, 1, store) as group:
        model = small_model()
        optimizer = make_optimizer("sgd", model)
        with (
            ug.attach(model, optimizer, group) as gossip,
            tensorboard.SummaryWriter(str(tmp_path)) as writer,
        ):
            gossip.write(writer, step=7)
    assert list(tmp_path.iterdir())


# --- the noise correction ----------------------------------------------------------------------


def test_noise_correction_equals_the_formula(job: Job) -> None:
    """Adam written down by hand, with the corrected second moment in the denominator."""
    size, steps, rate, betas, eps, decay = 4, 8, 0.01, (0.9, 0.95), 1e-8, 0.02
    schedule = Rotated(Dissemination(size), seed=3)

    def body(group: ug.Group) -> tuple[np.ndarray, dict[str, Any]]:
        model = small_model()
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=rate, betas=betas, eps=eps, weight_decay=decay
        )
        with ug.attach(
            model, optimizer, group, schedule=schedule, bucket_bytes=200, noise_correction=True
        ) as gossip:
            for step in range(steps):
                optimizer.zero_grad()
                x, y = batch(group.rank, step)
                F.cross_entropy(model(x), y).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
                optimizer.step()
            gossip.wait()
            return flat(model), optimizer.state_dict()

    models = [small_model() for _ in range(size)]
    count = len(flat(models[0]))
    w = np.tile(flat(models[0]), (size, 1))
    m, v, n = np.zeros((3, size, count))
    for step in range(steps):
        g = np.empty_like(w)
        for rank, model in enumerate(models):
            torch.nn.utils.vector_to_parameters(torch.from_numpy(w[rank]), model.parameters())
            model.zero_grad()
            x, y = batch(rank, step)
            F.cross_entropy(model(x), y).backward()
            g[rank] = torch.cat([p.grad.reshape(-1) for p in model.parameters()]).numpy()  # type: ignore[union-attr]
        senders = [schedule.round(rank, step).sender for rank in range(size)]
        d, g = (g[senders] - g) / 2, (g[senders] + g) / 2
        clip = np.minimum(1.0, 0.05 / (np.linalg.norm(g, axis=1, keepdims=True) + 1e-6))
        d, g = clip * d, clip * g
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        n = betas[1] * n + (1 - betas[1]) * (1 - 2 / size) * d * d
        # Adam makes its state in its first step, which is as it always is.
        corrected = np.maximum(v - n, 2 / size * v) if step else v
        unbiased = corrected / (1 - betas[1] ** (step + 1))
        w = w * (1 - rate * decay)
        w -= rate / (1 - betas[0] ** (step + 1)) * m / (np.sqrt(unbiased) + eps)
        ahead = schedule.period  # rotated: another partner than the gradients'
        senders = [schedule.round(rank, step + ahead).sender for rank in range(size)]
        w = (w + w[senders]) / 2
    for rank, (weights, state) in enumerate(job(size, body)):
        np.testing.assert_allclose(weights, w[rank], rtol=1e-8, atol=1e-11)
        saved = state["state"]
        found = np.concatenate([saved[i]["exp_avg_sq"].reshape(-1).numpy() for i in range(4)])
        np.testing.assert_allclose(found, v[rank], rtol=1e-8, atol=1e-15)
        found = np.concatenate([saved[i]["exp_avg_noise"].reshape(-1).numpy() for i in range(4)])
        np.testing.assert_allclose(found, n[rank], rtol=1e-8, atol=1e-15)


@pytest.mark.parametrize(
    ("optimizer", "changes", "word"),
    [
        (functools.partial(torch.optim.AdamW, fused=True), {}, "does not serve AdamW.fused=True"),
        (functools.partial(torch.optim.Adam, betas=(0.9, 0.0)), {}, "second beta above 0"),
        (torch.optim.SGD, {}, "is for Adam and AdamW, not SGD"),
        (torch.optim.AdamW, {"mix": "weights"}, "needs mix='both'"),
        (torch.optim.AdamW, {"staleness": 1}, "staleness=0"),
        (torch.optim.AdamW, {"local_steps": 2}, "local_steps=1"),
    ],
)
def test_noise_correction_where_there_is_nothing_to_correct(
    store: Any, optimizer: Any, changes: dict[str, Any], word: str
) -> None:
    model = small_model()
    with ug.join(0, 1, store) as group, pytest.raises(errors.GossipError, match=word):
        chosen = optimizer(model.parameters(), lr=0.1)
        ug.attach(model, chosen, group, noise_correction=True, **changes)


def test_optimizer_without_state_to_mix(store: Any) -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with ug.join(0, 1, store) as group, pytest.raises(errors.ModelError, match="leave it False"):
        ug.attach(model, optimizer, group, optimizer_state=True)


def test_noise_correction_needs_gradients_before_the_step(job: Job) -> None:
    def body(group: ug.Group) -> None:
        model = small_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        gossip = ug.attach(model, optimizer, group, noise_correction=True)
        with pytest.raises(errors.ArgumentError, match="without a closure"):
            optimizer.step(lambda: torch.zeros(()))
        gossip.detach()

    job(3, body)


def test_noise_correction_of_what_the_optimizer_holds(job: Job) -> None:
    """A trainable parameter that another optimizer holds, and one that is never used."""

    def body(group: ug.Group) -> float:
        model = nn.ModuleDict({"used": small_model(), "idle": nn.Linear(2, 2).double()})
        optimizer = torch.optim.AdamW(
            [*model["used"][0].parameters(), *model["idle"].parameters()], lr=0.01
        )
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        with ug.attach(model, optimizer, group, noise_correction=True, scaler=scaler):
            for step in range(5):
                optimizer.zero_grad()
                model["used"][2].zero_grad()
                x, y = batch(group.rank, step)
                scaler.scale(F.cross_entropy(model["used"](x), y)).backward()
                scaler.step(optimizer)
                scaler.update()
        state = optimizer.state[model["used"][0].weight]
        assert model["idle"].weight not in optimizer.state
        return float((state["exp_avg_noise"] / state["exp_avg_sq"]).max())

    # n is of the gradients' own size: at a factor of 1024 left in, it would be a million times v.
    assert all(ratio < 1000 for ratio in job(4, body))


# --- samples -----------------------------------------------------------------------------------


def test_shuffled_trains_on_everybodys_samples(job: Job) -> None:
    """Loaders of different lengths: nothing is lost, and ranks stay in step all the same."""
    lengths = (5, 2, 0)

    def body(group: ug.Group) -> tuple[list[list[float]], int, int]:
        model = small_model()
        optimizer = make_optimizer("sgd", model)
        loader = [
            (torch.full((2, 5), 10.0 * group.rank + b).double(), torch.tensor([0, 1]))
            for b in range(lengths[group.rank])
        ]
        seen: list[list[float]] = []
        with ug.attach(model, optimizer, group) as gossip:
            for _ in range(2):
                seen.append([])
                for x, y in gossip.shuffled(loader):
                    optimizer.zero_grad()
                    F.cross_entropy(model(x), y).backward()
                    optimizer.step()
                    seen[-1].append(float(x[0, 0]))
            assert gossip.shuffled(loader) is gossip.shuffled(loader)
            epochs = gossip.state_dict()["epochs"]
            return seen, gossip.stats()["steps"], epochs[0]

    ends = job(3, body)
    for epoch in range(2):
        everything = sorted(value for seen, _, _ in ends for value in seen[epoch])
        assert everything == [0, 1, 2, 3, 4, 10, 11]
    assert {steps for _, steps, _ in ends} == {10}
    assert {epoch for _, _, epoch in ends} == {2}
    assert any(value < 10 for value in ends[2][0][0])  # whose own loader is empty


def test_resumed_shuffle_goes_on_with_its_epoch(store: Any) -> None:
    loader = [torch.zeros(1)]
    with ug.join(0, 1, store) as group:
        model = small_model()
        optimizer = make_optimizer("sgd", model)
        with ug.attach(model, optimizer, group) as gossip:
            for _ in range(3):
                assert len(list(gossip.shuffled(loader))) == 1
            saved = gossip.state_dict()
        with ug.attach(model, optimizer, group) as gossip:
            gossip.load_state_dict(saved)
            assert gossip.shuffled(loader).epoch == 3


# --- what else a loop may hold -----------------------------------------------------------------


def test_schedulers_parameter_groups_and_clipping(job: Job) -> None:
    """Two groups with rates of their own, decayed; gradients clipped after the exchange."""
    size, steps = 3, 6
    schedule = Rotated(Dissemination(size), seed=5)

    def make(model: Any) -> tuple[torch.optim.Optimizer, Any]:
        optimizer = torch.optim.SGD(
            [
                {"params": list(model[0].parameters()), "lr": 0.2},
                {"params": list(model[2].parameters()), "momentum": 0.5},
            ],
            lr=0.05,
        )
        return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)

    def clip(model: nn.Module) -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)

    def body(group: ug.Group) -> np.ndarray:
        model = small_model()
        optimizer, rates = make(model)
        with ug.attach(model, optimizer, group, schedule=schedule, bucket_bytes=200) as gossip:
            for step in range(steps):
                optimizer.zero_grad()
                x, y = batch(group.rank, step)
                F.cross_entropy(model(x), y).backward()
                clip(model)
                optimizer.step()
                rates.step()
            gossip.wait()
            return flat(model)

    reference = Reference(size, "sgd", schedule)
    optimizers, rates = zip(*(make(model) for model in reference.models), strict=True)
    for step in range(steps):
        for rank, model in enumerate(reference.models):
            optimizers[rank].zero_grad()
            x, y = batch(rank, step)
            F.cross_entropy(model(x), y).backward()
        gradients = [[p.grad for p in model.parameters()] for model in reference.models]
        reference.average(gradients, step)  # type: ignore[arg-type]
        for model, optimizer, rate in zip(reference.models, optimizers, rates, strict=True):
            clip(model)
            optimizer.step()
            rate.step()
        reference.average(reference.weights(), step + reference.ahead)
    for rank, weights in enumerate(job(size, body)):
        np.testing.assert_allclose(weights, flat(reference.models[rank]), rtol=1e-9, atol=1e-12)


def test_autocast(job: Job) -> None:
    def body(group: ug.Group) -> list[float]:
        model = small_model().float()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses = []
        with ug.attach(model, optimizer, group) as gossip:
            for _ in range(20):
                optimizer.zero_grad()
                x, y = batch(group.rank, 0)
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    loss = F.cross_entropy(model(x.float()), y)
                loss.backward()
                optimizer.step()
                losses.append(float(loss.detach()))
            assert gossip.consensus_distance() < 1e-6  # two ranks
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())
        return losses

    assert all(losses[-1] < losses[0] for losses in job(2, body))


def test_detach_and_attach_again_leaves_no_hook(job: Job) -> None:
    def hooks(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        modules = sum(
            len(m._forward_pre_hooks) + len(m._state_dict_pre_hooks)
            + len(m._load_state_dict_pre_hooks) for m in model.modules()
        )  # fmt: skip
        tensors = sum(len(p._post_accumulate_grad_hooks or {}) for p in model.parameters())
        steps = [
            optimizer._optimizer_step_pre_hooks,
            optimizer._optimizer_step_post_hooks,
            optimizer._optimizer_state_dict_pre_hooks,
            optimizer._optimizer_load_state_dict_pre_hooks,
        ]
        return modules + tensors + sum(map(len, steps)) + ("zero_grad" in vars(optimizer))

    def body(group: ug.Group) -> None:
        model = small_model()
        optimizer = make_optimizer("adamw", model)
        for modes in ({}, {"mix": "push_sum"}, {"optimizer_state": True, "combine": "awc"}):
            with ug.attach(model, optimizer, group, **modes):
                assert hooks(model, optimizer) > 0
                train_step(model, optimizer, group.rank, 0)
            assert hooks(model, optimizer) == 0
            before = flat(model)
            train_step(model, optimizer, group.rank, 1)
            assert not np.array_equal(before, flat(model))

    job(2, body)


def test_local_backward_that_broke_is_forgotten(store: Any) -> None:
    """In a step without a round an exception in backward leaves nobody out of step."""

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
            raise ZeroDivisionError("on purpose")

    model = nn.ModuleDict({"used": small_model(), "idle": nn.Linear(2, 2).double()})
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    before = model["idle"].weight.detach().clone()
    with ug.join(0, 1, store) as group, ug.attach(model, optimizer, group, local_steps=2):
        x, y = batch(0, 0)
        used = model["used"]
        with pytest.raises(ZeroDivisionError):
            F.cross_entropy(used[2](Fails.apply(used[0](x))), y).backward()
        for step in range(2):
            train_step(used, optimizer, 0, step)
    assert torch.equal(model["idle"].weight, before)


def test_checkpoint_of_another_optimizer_is_refused(store: Any) -> None:
    model = small_model()
    with ug.join(0, 1, store) as group:
        adam = torch.optim.AdamW(model.parameters(), lr=0.1)
        with ug.attach(model, adam, group, optimizer_state=True) as gossip:
            train_step(model, adam, 0, 0)
            saved = gossip.state_dict()
        sgd = make_optimizer("sgd", model)
        gossip = ug.attach(model, sgd, group, optimizer_state=True)
        gossip.load_state_dict(saved)
        with pytest.raises(errors.ArgumentError, match="has 2 arrays of optimizer state"):
            train_step(model, sgd, 0, 0)
        gossip.detach()


# --- values that are not finite ----------------------------------------------------------------


@pytest.mark.parametrize("mix", ["both", "weights", "push_sum"])
@pytest.mark.parametrize("transport", ["tcp", "shm"])
def test_a_replica_that_broke_poisons_nobody(job: Job, mix: str, transport: str) -> None:
    """Rank 1's loss is NaN once, and its weights with it; the others train on, and together."""
    size = 4

    def body(group: ug.Group) -> tuple[np.ndarray, dict[int, int], float]:
        model = small_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with ug.attach(model, optimizer, group, mix=mix) as gossip:
            for step in range(12):
                optimizer.zero_grad()
                x, y = batch(group.rank, step)
                loss = F.cross_entropy(model(x), y)
                if group.rank == 1 and step == 3:
                    loss = loss * float("nan")
                loss.backward()
                optimizer.step()
                if mix == "push_sum":
                    group.agree(f"step {step}", {})
            gossip.wait()
            assert np.isfinite(gossip.stats()["distance"])
            broken = flat(model)
            assert np.isnan(gossip.consensus_distance())
            counts = gossip.stats()["nonfinite"]
            gossip.synchronize()
            healed = gossip.consensus_distance()
            assert np.isfinite(flat(model)).all()
        return broken, counts, healed

    ends = job(size, body, transport)
    for rank, (weights, counts, healed) in enumerate(ends):
        assert np.isfinite(weights).all() == (rank != 1)
        assert set(counts) <= {1}
        assert healed < 1e-12
    never = [0] if mix == "push_sum" else []  # without rotation rank 0 gets nothing of rank 1
    assert [rank for rank, (_, counts, _) in enumerate(ends) if not counts] == never


@pytest.mark.parametrize("modes", [{"combine": "awc"}, {"staleness": 1}, {"staleness": 2}], ids=str)
@pytest.mark.parametrize("optimizer_state", [False, True])
def test_no_manner_of_mixing_takes_it_in(
    job: Job, modes: dict[str, Any], optimizer_state: bool
) -> None:
    def body(group: ug.Group) -> tuple[np.ndarray, dict[int, int]]:
        model = small_model()
        optimizer = make_optimizer("sgd", model)
        with ug.attach(model, optimizer, group, optimizer_state=optimizer_state, **modes) as gossip:
            for step in range(9):
                if group.rank == 1 and step == 2:
                    with torch.no_grad():
                        model[0].weight.grad = None
                    x, y = batch(1, step)
                    optimizer.zero_grad()
                    (F.cross_entropy(model(x), y) * float("nan")).backward()
                    optimizer.step()
                else:
                    train_step(model, optimizer, group.rank, step)
            counts = gossip.stats()["nonfinite"]
        return flat(model), counts

    ends = job(4, body)
    for rank, (weights, counts) in enumerate(ends):
        assert np.isfinite(weights).all() == (rank != 1)
        assert 1 in counts


def test_raise_names_rank_and_payload(job: Job) -> None:
    def body(group: ug.Group) -> None:
        model = small_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with ug.attach(model, optimizer, group, nonfinite="raise"):
            for step in range(5):
                optimizer.zero_grad()
                x, y = batch(group.rank, step)
                loss = F.cross_entropy(model(x), y)
                (loss * float("nan") if group.rank == 1 and step == 3 else loss).backward()
                optimizer.step()

    ends = job(2, body, raw=True)
    told = [end for end in ends if isinstance(end, errors.NonFiniteError)]
    assert told, ends
    assert all(isinstance(end, errors.NonFiniteError | errors.PeerError) for end in ends), ends
    for error in told:
        assert (error.rank, error.what, error.step) == (1, "gradients", 3)


def test_allow_mixes_it(job: Job) -> None:
    def body(group: ug.Group) -> tuple[bool, dict[int, int]]:
        model = small_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with ug.attach(model, optimizer, group, mix="weights", nonfinite="allow") as gossip:
            if group.rank == 1:
                with torch.no_grad():
                    model[0].bias[0] = float("inf")
            train_step(model, optimizer, group.rank, 0)
            gossip.wait()
            return bool(np.isfinite(flat(model)).all()), gossip.stats()["nonfinite"]

    assert job(2, body) == [(False, {}), (False, {})]


@pytest.mark.parametrize("policy", ["ignore", None, True])
def test_unknown_policy_is_refused(store: Any, policy: Any) -> None:
    model = small_model()
    optimizer = make_optimizer("sgd", model)
    with (
        ug.join(0, 1, store) as group,
        pytest.raises(errors.ArgumentError, match="unknown nonfinite"),
    ):
        ug.attach(model, optimizer, group, nonfinite=policy)


def test_policies_must_be_the_same(job: Job) -> None:
    def body(group: ug.Group) -> None:
        model = small_model()
        with pytest.raises(errors.MismatchError, match="nonfinite"):
            ug.attach(
                model,
                make_optimizer("sgd", model),
                group,
                nonfinite="raise" if group.rank else "skip",
            )

    job(2, body, raw=True)


def test_policy_is_no_part_of_a_checkpoint(store: Any) -> None:
    model = small_model()
    optimizer = make_optimizer("sgd", model)
    with ug.join(0, 1, store) as group:
        with ug.attach(model, optimizer, group) as gossip:
            train_step(model, optimizer, 0, 0)
            saved = gossip.state_dict()
        with ug.attach(model, optimizer, group, nonfinite="raise") as gossip:
            gossip.load_state_dict(saved)
            assert gossip.stats()["steps"] == 1


@pytest.mark.parametrize("noise_correction", [False, True])
def test_overflow_of_one_scaler_is_that_ranks_own(job: Job, noise_correction: bool) -> None:
    """The partner of a rank whose gradients overflow keeps its scale, and takes its step."""
    size, when = 4, 3

    def body(group: ug.Group) -> tuple[np.ndarray, list[float], list[bool], dict[int, int]]:
        model = small_model().float()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
        scales, finite = [], []
        with ug.attach(
            model, optimizer, group, scaler=scaler, noise_correction=noise_correction
        ) as gossip:
            for step in range(8):
                optimizer.zero_grad()
                x, y = batch(group.rank, step)
                loss = F.cross_entropy(model(x.float()), y)
                if group.rank == 0 and step == when:
                    loss = loss * float("inf")
                scaler.scale(loss).backward()
                finite.append(all(bool(p.grad.isfinite().all()) for p in model.parameters()))  # type: ignore[union-attr]
                scaler.step(optimizer)
                scaler.update()
                scales.append(scaler.get_scale())
            counts = gossip.stats()["nonfinite"]
        return flat(model), scales, finite, counts

    schedule = Rotated(Dissemination(size), seed=0)
    ends = job(size, body)
    for rank, (weights, scales, finite, counts) in enumerate(ends):
        assert np.isfinite(weights).all()
        assert scales[-1] == (512.0 if rank == 0 else 1024.0)
        assert finite == [rank != 0 or step != when for step in range(8)]
        receives = rank == 0 or schedule.round(rank, when).sender == 0
        assert counts == ({0: 1} if receives else {})


def test_damaged_statistics_stay_and_masks_do_not_matter(job: Job) -> None:
    """A mask of infinities is no damage; a statistic that became NaN is, until `synchronize`."""

    def body(group: ug.Group) -> dict[str, torch.Tensor]:
        model = nn.Sequential(small_model())
        model.register_buffer("mask", torch.tensor([0.0, float("-inf"), 2.0]))
        model.register_buffer("count", torch.zeros(2))
        optimizer = make_optimizer("sgd", model)
        with ug.attach(model, optimizer, group, buffers=True) as gossip:
            for step in range(4):
                train_step(model, optimizer, group.rank, step)
                model.count += 1.0 + group.rank
            assert gossip.stats()["nonfinite"] == {}
            if group.rank == 1:
                model.count[0] = float("nan")
            for step in range(4, 8):
                train_step(model, optimizer, group.rank, step)
            before = model.count.clone()
            assert 1 in gossip.stats()["nonfinite"]
            gossip.synchronize()
            return {"before": before, "count": model.count.clone(), "mask": model.mask.clone()}

    ends = job(2, body)
    assert bool(ends[0]["before"].isfinite().all())
    assert ends[1]["before"].isnan().tolist() == [True, False]
    for end in ends:
        assert end["mask"].tolist() == [0.0, float("-inf"), 2.0]
        assert float(end["count"][0]) == float(ends[0]["before"][0])
        torch.testing.assert_close(
            end["count"][1], (ends[0]["before"][1] + ends[1]["before"][1]) / 2
        )
