"""torch_hook.oversight, and what else is said of a training loop that would go wrong unseen."""

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ucxgossip as ug
from torch_jobs import batch, flat, small_model, train_step
from ucxgossip import errors
from ucxgossip.torch_hook.oversight import MANY

Job = Callable[..., list[Any]]
F = nn.functional


def make_sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1)


# --- parameters ---------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["unfrozen", "added", "unfrozen and added"])
def test_what_trains_and_is_not_averaged_is_refused(job: Job, how: str) -> None:
    def body(group: ug.Group) -> str:
        model = small_model(group.rank)
        if "unfrozen" in how:
            model[0].requires_grad_(False)
        optimizer = make_sgd(model)
        with ug.attach(model, optimizer, group, "weights") as gossip:
            train_step(model, optimizer, group.rank, 0)
            if "unfrozen" in how:
                model[0].requires_grad_(True)
            if "added" in how:
                model.append(nn.Linear(3, 3).double())
                optimizer.add_param_group({"params": model[3].parameters()})
            gossip.wait()
            before = flat(model)
            with pytest.raises(errors.ModelError) as caught:
                train_step(model, optimizer, group.rank, 1)
            np.testing.assert_array_equal(flat(model), before)
            assert gossip.steps == 1
        with ug.attach(model, optimizer, group, "weights") as gossip:
            train_step(model, optimizer, group.rank, 1)
            gossip.synchronize()
            found = flat(model)
        group.exchange(found.copy())
        return str(caught.value)

    for said in job(2, body):
        names = {"unfrozen": "0.weight, 0.bias: ", "added": "3.weight, 3.bias: "}
        expected = names.get(how, "0.weight, 0.bias, 3.weight and 1 more: ")
        assert said.startswith(expected + "unfrozen or added after attach"), said


def test_parameters_of_another_model_are_the_optimizers_own_business(job: Job) -> None:
    def body(group: ug.Group) -> int:
        model, other = small_model(group.rank), small_model(5)
        optimizer = torch.optim.SGD([*model.parameters(), *other.parameters()], lr=0.1)
        with ug.attach(model, optimizer, group) as gossip:
            for step in range(3):
                train_step(model, optimizer, group.rank, step)
            return gossip.steps

    assert job(2, body) == [3, 3]


def test_what_was_moved_is_named(job: Job) -> None:
    def body(group: ug.Group) -> None:
        model = small_model()
        optimizer = make_sgd(model)
        with ug.attach(model, optimizer, group) as gossip:
            gossip.wait()
            model[2].bias.data = model[2].bias.data.clone()
            with pytest.raises(errors.ModelError, match=r"^2\.bias was given other memory"):
                train_step(model, optimizer, group.rank, 0)

    job(1, body)


def test_what_differs_between_ranks_is_named(job: Job) -> None:
    def body(group: ug.Group) -> None:
        model = small_model()
        model[0].bias.requires_grad_(group.rank == 0)
        ug.attach(model, make_sgd(model), group)

    for error in job(2, body, raw=True):
        assert isinstance(error, errors.MismatchError)
        assert "0.bias.requires_grad: rank 0 has True, rank 1 has False" in str(error)


# --- optimizers ---------------------------------------------------------------------------------


def test_two_optimizers_in_turn_go_on_from_whole_weights(
    job: Job, caplog: pytest.LogCaptureFixture
) -> None:
    """The other one's step comes while the attached one's round is under way."""

    def body(group: ug.Group) -> tuple[np.ndarray, int]:
        model = small_model(group.rank)
        attached, other = make_sgd(model), make_sgd(model)
        with ug.attach(model, attached, group, "weights") as gossip:
            for step in range(4):
                train_step(model, attached, group.rank, step)
                other.step()
                assert not any(group.engine.active(box) for box in group.engine.mailboxes)
            gossip.wait()
            return flat(model), gossip.stats()["rounds"]

    caplog.set_level(logging.WARNING)
    ends = job(2, body)
    models, gradients = [small_model(0), small_model(0)], []
    for step in range(4):
        gradients = []
        for rank, model in enumerate(models):
            model.zero_grad()
            x, y = batch(rank, step)
            F.cross_entropy(model(x), y).backward()
            gradients.append([p.grad.clone() for p in model.parameters()])
            make_sgd(model).step()
        with torch.no_grad():
            for pair in zip(*(model.parameters() for model in models), strict=True):
                pair[0].copy_((pair[0] + pair[1]) / 2)
                pair[1].copy_(pair[0])
            for model, found in zip(models, gradients, strict=True):
                for parameter, gradient in zip(model.parameters(), found, strict=True):
                    parameter -= 0.1 * gradient
    for (weights, rounds), model in zip(ends, models, strict=True):
        np.testing.assert_allclose(weights, flat(model), rtol=1e-12, atol=1e-13)
        assert rounds == 4
    assert "it was attached with" not in caplog.text


def test_an_optimizer_in_place_of_the_attached_one_is_told(
    job: Job, caplog: pytest.LogCaptureFixture
) -> None:
    def body(group: ug.Group) -> None:
        model, unrelated = small_model(), small_model()
        attached, other = make_sgd(model), torch.optim.AdamW(model.parameters())
        with ug.attach(model, attached, group):
            for step in range(2 * MANY):
                train_step(unrelated, make_sgd(unrelated), group.rank, step)
                train_step(model, other, group.rank, step)
        train_step(model, other, group.rank, 9)

    caplog.set_level(logging.WARNING)
    job(1, body)
    told = [each.getMessage() for each in caplog.records if "stepped the" in each.getMessage()]
    assert len(told) == 1
    expected = f"AdamW stepped the model {MANY} times, and the optimizer it was attached with (SGD)"
    assert expected in told[0]


def test_optimizers_that_take_turns_are_not_told_of(
    job: Job, caplog: pytest.LogCaptureFixture
) -> None:
    def body(group: ug.Group) -> None:
        model = small_model()
        attached = make_sgd(model)
        with ug.attach(model, attached, group):
            for step in range(2 * MANY):
                optimizer = attached if step % 5 == 4 else torch.optim.SGD(model.parameters(), 0.1)
                train_step(model, optimizer, group.rank, step)

    caplog.set_level(logging.WARNING)
    job(1, body)
    assert "it was attached with" not in caplog.text


@pytest.mark.parametrize("scaler", [3, torch.amp.GradScaler, "scaler", object()])
def test_what_is_no_scaler_is_refused_before_anything_changes(job: Job, scaler: Any) -> None:
    def body(group: ug.Group) -> None:
        model = small_model()
        optimizer = make_sgd(model)
        with pytest.raises(errors.ArgumentError, match="scaler is "):
            ug.attach(model, optimizer, group, scaler=scaler)
        with ug.attach(model, optimizer, group) as gossip:
            train_step(model, optimizer, group.rank, 0)
            assert gossip.steps == 1

    job(1, body)


# --- the end, and sums --------------------------------------------------------------------------


def test_weights_can_be_saved_after_a_close_without_detach(job: Job) -> None:
    def body(group: ug.Group) -> tuple[np.ndarray, np.ndarray]:
        model = small_model(group.rank)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        gossip = ug.attach(model, optimizer, group, optimizer_state=True)
        train_step(model, optimizer, group.rank, 0)
        gossip.wait()
        group.close()
        saved = torch.cat([each.reshape(-1) for each in model.state_dict().values()]).numpy()
        assert optimizer.state_dict()["state"]
        with pytest.raises(errors.ClosedError, match=r"detach\(\) gives an attached model back"):
            train_step(model, optimizer, group.rank, 1)
        gossip.detach()
        train_step(model, optimizer, group.rank, 1)
        return saved, flat(model)

    first, second = job(2, body)
    np.testing.assert_allclose(first[0], second[0], rtol=1e-12)
    assert not np.array_equal(first[1], first[0])


def test_another_loader_is_told_once(job: Job, caplog: pytest.LogCaptureFixture) -> None:
    def body(group: ug.Group) -> None:
        model = small_model()
        data = TensorDataset(torch.zeros(4, 5), torch.zeros(4, dtype=torch.int64))
        loaders = [DataLoader(data, batch_size=2) for _ in range(3)]
        with ug.attach(model, make_sgd(model), group) as gossip:
            for each in (loaders[0], loaders[0]):
                gossip.shuffled(each)
            assert "another loader" not in caplog.text
            for each in loaders:
                gossip.shuffled(each)

    caplog.set_level(logging.WARNING)
    job(1, body)
    assert caplog.text.count("another loader") == 1


@pytest.mark.parametrize("size", [1, 3])
def test_average_of_a_few_numbers(job: Job, size: int) -> None:
    def body(group: ug.Group) -> list[Any]:
        model = small_model()
        with ug.attach(model, make_sgd(model), group) as gossip:
            rank = group.rank
            given = torch.full((2, 2), float(rank), requires_grad=True)
            found = gossip.average(given)
            assert found.shape == (2, 2) and found.dtype == np.float64
            assert (given == rank).all()
            turned = np.asfortranarray([[0.0, rank], [10.0, 0.0]])
            assert gossip.average(turned)[0, 1] == (size - 1) / 2
            counts = np.array([rank, 10])
            means = gossip.average(counts)
            assert counts[0] == rank
            broken = gossip.average([np.nan if rank == 0 else 1.0, 2.0])
            assert np.isnan(broken[0]) and broken[1] == 2.0
            return [float(found[1, 1]), *means, *gossip.average([rank, 1.5])]

    mean = (size - 1) / 2
    for found in job(size, body):
        assert found == pytest.approx([mean, mean, 10.0, mean, 1.5])


def test_average_of_a_list_with_tensors_in_it(job: Job) -> None:
    def body(group: ug.Group) -> list[float]:
        model = small_model()
        with ug.attach(model, make_sgd(model), group) as gossip:
            loss = torch.tensor(float(group.rank), requires_grad=True)
            half = torch.tensor([3.0], dtype=torch.bfloat16)
            return gossip.average([loss, 2, half.sum()]).tolist() + gossip.average(half).tolist()

    assert job(2, body) == [[0.5, 2.0, 3.0, 3.0]] * 2


@pytest.mark.parametrize("counts", [(1, 2), (1, 2, 3), (2, 2, 70_000)])
def test_average_of_unequally_many_numbers_is_an_error_on_all_ranks(
    job: Job, counts: tuple[int, ...]
) -> None:
    def body(group: ug.Group) -> float:
        model = small_model()
        with ug.attach(model, make_sgd(model), group) as gossip:
            with pytest.raises(errors.MismatchError, match="each must bring equally many"):
                gossip.average(np.zeros(counts[group.rank]))
            return float(gossip.average([1.0])[0])

    assert job(len(counts), body) == [1.0] * len(counts)


@pytest.mark.parametrize("mix", ["both", "weights"])
@pytest.mark.parametrize(("size", "taken"), [(2, 2), (3, 2), (2, 0)])
def test_a_rank_that_ended_earlier_is_no_rank_to_wait_for(
    job: Job, mix: str, size: int, taken: int
) -> None:
    """Long before the timeout, on all ranks."""

    def body(group: ug.Group) -> None:
        model = small_model(group.rank)
        optimizer = make_sgd(model)
        with ug.attach(model, optimizer, group, mix) as gossip:
            for step in range(taken + 1 if group.rank else taken):
                train_step(model, optimizer, group.rank, step)
            gossip.wait()

    ends = job(size, body, raw=True, timeout=120.0)
    assert any(isinstance(end, errors.OutOfStepError) for end in ends)
    for end in ends:
        assert isinstance(end, errors.OutOfStepError | errors.PeerError), ends
        assert "rank 0 has ended its training (model 0), and rank" in str(end)


def test_a_rank_that_lives_and_does_not_come_is_told_of_as_such(job: Job) -> None:
    """Not asked after: the wardens know that it lives."""

    def body(group: ug.Group) -> Any:
        model = small_model()
        optimizer = make_sgd(model)
        with ug.attach(model, optimizer, group) as gossip:
            train_step(model, optimizer, group.rank, 0)
            gossip.wait()
            group._dead_after = 0.1
            group.timeout = 1.0 if group.rank == 0 else 30.0
            if group.rank == 0:
                train_step(model, optimizer, group.rank, 1)
            else:
                gossip.group.exchange(np.zeros(8))  # something else than rank 0 does

    first = job(2, body, raw=True)[0]
    assert isinstance(first, errors.ExchangeTimeoutError)
    assert "gradients" in str(first) and "Rank 1 is alive, and has not come as far" in str(first)
    assert first.__notes__ == ["This rank has taken 1 optimizer steps."]
