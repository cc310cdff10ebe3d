"""The noise correction, against its formula."""

import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import ucxgossip as ug
from torch_jobs import F, Job, batch, flat, small_model
from ucxgossip import errors
from ucxgossip.schedule import Dissemination, Rotated


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
