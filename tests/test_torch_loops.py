"""What a training loop may hold: skipped steps, scalers, compiled modules, several models, logs."""

import io
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import ucxgossip as ug
from torch_jobs import (
    F,
    Fails,
    Job,
    Reference,
    batch,
    flat,
    make_optimizer,
    small_model,
    train_step,
)
from ucxgossip.schedule import Dissemination, Rotated


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
