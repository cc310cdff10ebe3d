"""Checkpoints: a resumed run goes on bit for bit; others are refused."""

import copy
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import ucxgossip as ug
from torch_jobs import Job, flat, make_optimizer, small_model, train_step
from ucxgossip import errors


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
