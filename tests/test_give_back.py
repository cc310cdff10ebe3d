"""What a detached model gives back is what the next one takes: mailboxes, and registered memory."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import ucxgossip as ug
from ucxgossip import errors
from ucxgossip.buffer import Buffer
from ucxgossip.ucp.memory import MemoryRegion

torch = pytest.importorskip("torch")

Job = Callable[..., list[Any]]

MODES: dict[str, dict[str, Any]] = {
    "both": {},
    "awc": {"combine": "awc"},
    "stale": {"mix": "weights", "staleness": 1},
    "outer": {"outer": ug.Nesterov(0.7, 0.5)},
    "state and buffers": {"optimizer_state": True, "buffers": True},
}


FIRST = torch.nn.Sequential(
    torch.nn.Linear(6, 40), torch.nn.BatchNorm1d(40), torch.nn.Tanh(), torch.nn.Linear(40, 2)
).double()


def train(group: ug.Group, modes: dict[str, Any], steps: int) -> tuple[np.ndarray, Any]:
    """Weights after `steps` steps of a model that is attached for them, and the weights' views."""
    model = copy.deepcopy(FIRST)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    with ug.attach(model, optimizer, group, bucket_bytes=1024, **modes):
        for step in range(steps):
            x = np.random.default_rng([group.rank, step]).standard_normal((8, 6))
            optimizer.zero_grad()
            model(torch.from_numpy(x)).square().mean().backward()
            optimizer.step()
        views = [parameter.data for parameter in model.parameters()]
    return np.concatenate([p.detach().numpy().ravel() for p in model.parameters()]), views


def registered(group: ug.Group) -> tuple[int, int]:
    """Mailboxes, and bytes of registered memory."""
    regions = [each for each in group.context._children if isinstance(each, MemoryRegion)]
    return len(group.engine.mailboxes), sum(region.nbytes for region in regions)


@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize(("size", "transport"), [(1, "shm"), (2, "tcp"), (3, "shm")])
def test_attached_again_a_model_takes_no_more(
    job: Job, size: int, transport: str, name: str
) -> None:
    """And trains bit for bit as the first one did, odd numbers of rounds before it or not."""

    def body(group: ug.Group) -> None:
        first, views = train(group, MODES[name], 7)
        kept = [view.clone() for view in views]
        taken = registered(group)
        train(group, MODES[name], 4)
        again, _ = train(group, MODES[name], 7)
        assert registered(group) == taken
        np.testing.assert_array_equal(again, first)
        for view, before in zip(views, kept, strict=True):  # whoever kept one keeps its values
            assert torch.equal(view, before)

    job(size, body, transport)


def test_mailboxes_are_taken_by_layout(job: Job) -> None:
    def body(group: ug.Group) -> None:
        boxes = [group.mailbox(nbytes, ring=True) for nbytes in (64, 4096, 64)]
        for rounds, box in enumerate(boxes):
            for _ in range(rounds):
                group.exchange(np.zeros(box.layout.nbytes // 4, np.float32), mailbox=box)
        for box in reversed(boxes):
            group.give_back(box)
        with pytest.raises(errors.ArgumentError, match="not one of this group"):
            group.give_back(boxes[0])
        with pytest.raises(errors.ArgumentError, match="was given back"):
            group.exchange(np.zeros(16, np.float32), mailbox=boxes[0])
        found = [group.mailbox(nbytes, ring=True) for nbytes in (64, 4096, 64, 64)]
        assert [box.index for box in found] == [0, 1, 2, 3]
        assert found[:3] == boxes
        values = np.full(8, float(group.rank))  # of another dtype than before
        for box in found[::2]:
            group.exchange(values, mailbox=box)
        assert (values == 0.5).all()

    job(2, body)


def test_a_mailbox_under_way_is_not_given_back(job: Job) -> None:
    def body(group: ug.Group) -> None:
        box = group.mailbox(64)
        buffer = Buffer.of(np.zeros(8))
        schedule = ug.Dissemination(2)
        if group.rank == 0:
            group.post_step(box, buffer, buffer, schedule, 0)
            with pytest.raises(errors.ArgumentError, match="under way"):
                group.give_back(box)
        group.agree("rank 1 posts", {})
        if group.rank == 1:
            group.post_step(box, buffer, buffer, schedule, 0)
        group.wait(box)
        group.give_back(box)

    job(2, body)
