"""NaN and infinity on one rank: what each manner of mixing makes of them."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import ucxgossip as ug
from torch_jobs import F, Job, batch, flat, make_optimizer, small_model, train_step
from ucxgossip import errors
from ucxgossip.schedule import Dissemination, Rotated


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
