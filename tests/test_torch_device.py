"""`attach` for a model on a device, which is a fake one over CPU tensors (fake_device).

Its events complete late, and its copies and kernels when the clock moves: values that are right
here were waited for. What torch does on a real device is for the tests marked `gpu` (test_gpu.py).
"""

import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fake_device as fake
import test_torch_hook as hook
import ucxgossip as ug
from engine_pair import until
from ucxgossip import errors
from ucxgossip.engine import device_rounds as d
from ucxgossip.engine.staging import Staging
from ucxgossip.mixing import Modes
from ucxgossip.schedule import Dissemination, Rotated
from ucxgossip.torch_hook import device as device_module

attach_module = sys.modules["ucxgossip.torch_hook.attach"]  # `attach` itself hides it
F = nn.functional


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every model that is attached lives on a device of its own; those made so far."""
    made: list[Any] = []

    def device_of(_: object) -> Any:
        made.append(fake.FakeDevice(seed=len(made), pace=1 + len(made) % 3))
        return made[-1]

    monkeypatch.setattr(attach_module, "device_of", device_of)
    return made


def train(
    group: ug.Group, mix: str, combine: str, optimizer: str, steps: int, **more: Any
) -> np.ndarray:
    model = hook.small_model(group.rank)
    chosen = hook.make_optimizer(optimizer, model)
    schedule = Rotated(Dissemination(group.size), seed=5)
    with ug.attach(
        model, chosen, group, mix, combine, schedule=schedule, bucket_bytes=200, **more
    ) as gossip:
        for step in range(steps):
            train_step(model, chosen, group.rank, step)
        gossip.wait()
        stats = gossip.stats()
        assert stats["skipped"] == stats["broken"] == 0
        assert stats["rounds"] > 0 or group.size == 1
        weights = hook.flat(model)
    assert gossip.stats()["rounds"] == stats["rounds"]
    return weights


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, step: int) -> None:
    optimizer.zero_grad()
    x, y = hook.batch(rank, step)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


@pytest.mark.parametrize("transport", ["tcp", "shm"])
@pytest.mark.parametrize("combine", ["atc", "awc"])
@pytest.mark.parametrize("mix", ["both", "weights", "gradients"])
@pytest.mark.parametrize(("size", "optimizer"), [(1, "sgd"), (2, "adamw"), (4, "sgd")])
def test_training_equals_the_reference(
    job: Callable[..., list[Any]],
    devices: list[Any],
    size: int,
    optimizer: str,
    mix: str,
    combine: str,
    transport: str,
) -> None:
    ends = job(size, lambda group: train(group, mix, combine, optimizer, 5), transport)
    expected = hook.reference(size, 5, optimizer, mix, combine)
    for rank, weights in enumerate(ends):
        np.testing.assert_allclose(weights, expected[rank], rtol=1e-12, atol=1e-13)
    assert len(devices) == size
    for device in devices:
        device.check()
        assert device.idle() and not device.pinned and not device.live


@pytest.mark.parametrize("combine", ["atc", "awc"])
@pytest.mark.parametrize("exports", [True, False])
def test_ways_between_devices(
    job: Callable[..., list[Any]],
    devices: list[Any],
    exports: bool,
    combine: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Ranks of one host copy into each other's slots, where the devices let them; they tell."""
    caplog.set_level("INFO", "ucxgossip")

    def body(group: ug.Group) -> tuple[list[list[int]], int]:
        model = hook.small_model(group.rank)
        optimizer = hook.make_optimizer("sgd", model)
        with ug.attach(model, optimizer, group, combine=combine, bucket_bytes=200) as gossip:
            gossip.synchronize()  # begins once more
            streams: list[Any] = gossip._exchange._streams()
            ways = [staging.ways for each in streams for staging in each.stagings.values()]
            assert len(ways) == (3 if combine == "awc" else 2) * len(gossip._buckets)
            return ways, gossip.stats()["direct_ways"]

    if not exports:
        monkeypatch.setattr(fake.FakeDevice, "export", lambda *_: b"")
    for rank, (found, told) in enumerate(job(3, body)):
        others = [other for other in range(3) if other != rank]
        assert all(ways == (others if exports else []) for ways in found) and found
        assert told == (2 if exports else 0)
    assert ("rank 0: rank 1 has no slots on a device to offer" in caplog.text) != exports
    for device in devices:
        assert device.mapped == []


def test_no_slots_are_freed_that_another_rank_has_mapped(
    job: Callable[..., list[Any]], devices: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    mapped: list[list[int]] = []
    close = Staging.close

    def closing(staging: Staging, orderly: bool = True, settled: bool = True) -> None:
        mapped.extend(device.mapped for device in devices if device.mapped)
        assert orderly and settled
        close(staging, orderly, settled)

    monkeypatch.setattr(Staging, "close", closing)

    def body(group: ug.Group) -> list[int]:
        model = hook.small_model(group.rank)
        optimizer = hook.make_optimizer("sgd", model)
        with ug.attach(model, optimizer, group, "weights", "awc", bucket_bytes=200) as gossip:
            for step in range(2):
                optimizer.zero_grad()
                x, y = hook.batch(group.rank, step)
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
            stream: Any = gossip._buckets[0].weights_stream
            found: list[int] = stream.staging.ways
        return found

    assert job(2, body) == [[1], [0]]
    assert mapped == []


def test_slots_stay_allocated_where_a_rank_leaves_alone(
    job: Callable[..., list[Any]], devices: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others may still copy there."""
    closed: list[bool] = []
    close, left = Staging.close, threading.Event()

    def closing(staging: Staging, orderly: bool = True, settled: bool = True) -> None:
        closed.append(orderly)
        close(staging, orderly, settled)

    monkeypatch.setattr(Staging, "close", closing)

    def body(group: ug.Group) -> list[bool]:
        model = hook.small_model(group.rank)
        ug.attach(model, hook.make_optimizer("sgd", model), group)
        if group.rank == 0:
            assert left.wait(timeout=30.0)
            return []
        group.timeout = 0.2
        group.close()
        found = list(closed)
        left.set()
        return found

    found = job(2, body, raw=True)[1]
    assert found and not any(found)


def test_a_rank_whose_copies_have_not_ended_leaves_alone(
    job: Callable[..., list[Any]], devices: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the others would free the slots that it still writes to."""
    orderly: dict[int, bool] = {}
    close = Staging.close

    def closing(staging: Staging, in_order: bool = True, settled: bool = True) -> None:
        orderly[id(staging.device)] = in_order
        close(staging, in_order, settled)

    monkeypatch.setattr(Staging, "close", closing)

    def body(group: ug.Group) -> int:
        model = hook.small_model(group.rank)
        with ug.attach(model, hook.make_optimizer("sgd", model), group) as gossip:
            device = gossip._buckets[0].device
            train_step(model, gossip.optimizer, group.rank, 0)
        if group.rank == 1:
            monkeypatch.setattr(device, "settle", lambda *_: False)
        group.close()
        return id(device)

    first, second = job(2, body, raw=True)
    assert orderly == {first: False, second: False}


@pytest.mark.parametrize("combine", ["atc", "awc"])
def test_ranks_need_not_all_have_a_device(
    job: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch, combine: str
) -> None:
    made: list[Any] = []

    def device_of(tensors: Any) -> Any:
        if made:
            return None
        made.append(fake.FakeDevice(pace=2))
        return made[0]

    def body(group: ug.Group) -> np.ndarray:
        weights = train(group, "both", combine, "sgd", 4)
        boxes = group.engine.mailboxes
        assert {box.layout.chunk for box in boxes} == {group.tuning.device_chunk}
        with group.naming("another model"):
            assert group.mailbox(8).layout.chunk == group.tuning.chunk
        return weights

    monkeypatch.setattr(attach_module, "device_of", device_of)
    ends = job(2, body, "shm")
    for rank, weights in enumerate(ends):
        expected = hook.reference(2, 4, "sgd", "both", combine)[rank]
        np.testing.assert_allclose(weights, expected, rtol=1e-12, atol=1e-13)
    made[0].check()


@pytest.mark.parametrize("with_state", [False, True])
def test_a_rank_that_came_with_a_device_among_cpus_gives_its_mailboxes_back(
    job: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch, with_state: bool
) -> None:
    """As the others do, who had agreed before that no rank has one."""
    made: list[fake.FakeDevice] = []

    def device_of(_: object) -> Any:
        return made[-1] if here.device else None

    here = threading.local()
    monkeypatch.setattr(attach_module, "device_of", device_of)
    monkeypatch.setattr(ug.Group, "suit_devices", lambda *_: False)

    def body(group: ug.Group) -> tuple[list[np.ndarray], int]:
        here.device = group.rank == 1
        if here.device:
            made.append(fake.FakeDevice())
        more = {"optimizer_state": with_state}
        found = [train(group, "both", "awc", "sgd", 4, **more) for _ in range(3)]
        return found, len(group.engine.mailboxes)

    ends = job(2, body)
    assert ends[0][1] == ends[1][1]
    for weights, _ in ends:
        np.testing.assert_array_equal(weights[1], weights[0])
        np.testing.assert_array_equal(weights[2], weights[0])
    made[0].check()
    assert made[0].idle() and not made[0].pinned and not made[0].live


@pytest.mark.parametrize("combine", ["atc", "awc"])
@pytest.mark.parametrize("with_state", [False, True])
def test_a_model_of_which_some_copies_are_on_devices_is_attached_again(
    job: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch, with_state: bool, combine: str
) -> None:
    """Those on the CPU give no mailboxes back that the others keep."""
    here = threading.local()
    monkeypatch.setattr(
        attach_module, "device_of", lambda _: fake.FakeDevice() if here.device else None
    )

    def body(group: ug.Group) -> list[np.ndarray]:
        here.device = group.rank == 0
        more = {"optimizer_state": with_state}
        return [train(group, "both", combine, "sgd", 4, **more) for _ in range(3)]

    for rank, ends in enumerate(job(2, body)):
        if not with_state:
            expected = hook.reference(2, 4, "sgd", "both", combine)[rank]
            np.testing.assert_allclose(ends[0], expected, rtol=1e-12, atol=1e-13)
        for weights in ends[1:]:
            np.testing.assert_array_equal(weights, ends[0])


def test_the_host_does_not_wait_for_the_mixes(
    job: Callable[..., list[Any]], devices: list[Any]
) -> None:
    """After `wait` the mixes may still be under way: only the stream waits, not the engine."""

    def body(group: ug.Group) -> bool:
        model = hook.small_model(0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with ug.attach(model, optimizer, group, mix="weights") as gossip:
            stream: Any = gossip._buckets[0].weights_stream
            joined = []
            device = stream.array.device
            record, wait = device.record, device.wait

            def recording(event: int, on: int) -> None:
                device.stalled = {fake.IN}  # no copy from a slot, no kernel, no done event
                record(event, on)

            def waiting(on: int, event: int) -> None:
                joined.append((on, group.engine.active(stream.mailbox)))
                device.stalled = set()
                wait(on, event)

            device.record, device.wait = recording, waiting
            for step in range(3):
                x, y = hook.batch(group.rank, step)
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
                gossip.wait()
        return joined == [(fake.HOST, True)] * 3

    assert job(2, body) == [True, True]


@pytest.mark.parametrize("transport", ["tcp", "shm"])
def test_a_step_of_awc_is_posted_while_the_last_mixes_wait(
    job: Callable[..., list[Any]], devices: list[Any], transport: str
) -> None:
    """The device is still busy with backward, behind which the mixes come: the host goes on."""

    def body(group: ug.Group) -> list[tuple[bool, ...]]:
        model = hook.small_model(group.rank)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with ug.attach(model, optimizer, group, "weights", "awc", bucket_bytes=200) as gossip:
            streams: list[Any] = gossip._exchange._streams()
            device, found = streams[0].array.device, []
            wait = device.wait
            for step in range(4):
                device.stalled = {fake.IN}  # the mixes come behind something that has not ended
                device.wait = lambda *_: None  # torch's stream waits for them, and torch does not
                before = [stream.mailbox for stream in streams]
                train_step(model, optimizer, group.rank, step)
                found.append(tuple(group.engine.active(each) for each in before))
                assert all(stream.mailbox not in before for stream in streams)
                device.stalled, device.wait = set(), wait
                device.settle(30.0)
        return found

    for found in job(2, body, transport):
        assert len(found) == 4 and all(map(all, found)) and len(found[0]) > 1


def test_so_is_the_optimizers_state(job: Callable[..., list[Any]], devices: list[Any]) -> None:
    """Its mixes wait behind those of the weights: there is one stream for all that comes in."""

    def body(group: ug.Group) -> bool:
        model = hook.small_model(group.rank)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        with ug.attach(
            model, optimizer, group, "weights", "awc", bucket_bytes=200, optimizer_state=True
        ) as gossip:
            exchange: Any = gossip._exchange
            device = gossip._buckets[0].device
            assert isinstance(device, fake.FakeDevice)
            wait, post = device.wait, exchange.post
            ends = [int(each.staging.words[d.END_EVENT]) for each in exchange._streams()]

            def first_mixed() -> bool:
                device.tick(fake.IN)
                return all(map(device.completed, ends))

            def posting(stepped: bool) -> None:
                """Lets the first weights' mixes happen, and not the first state's behind them."""
                until(first_mixed)
                post(stepped)

            device.stalled, device.wait = {fake.IN}, lambda *_: None
            train_step(model, optimizer, group.rank, 0)
            exchange.post = posting
            states = [stream.mailbox for stream in exchange.state.streams]
            train_step(model, optimizer, group.rank, 1)
            pending = bool(states) and all(group.engine.active(box) for box in states)
            device.stalled, device.wait = set(), wait
            device.settle(30.0)
        return pending

    assert job(2, body) == [True, True]


@pytest.mark.parametrize("combine", ["atc", "awc"])
def test_optimizer_state_and_means(
    job: Callable[..., list[Any]], devices: list[Any], combine: str
) -> None:
    """As on the CPU, bit for bit, with momentum mixed and exact means between."""

    def body(group: ug.Group) -> np.ndarray:
        return train(group, "both", combine, "sgd", 6, optimizer_state=True, global_average_every=3)

    on_devices = job(2, body)
    assert len(devices) == 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attach_module, "device_of", lambda _: None)
        on_cpu = job(2, body)
    for mine, plain in zip(on_devices, on_cpu, strict=True):
        np.testing.assert_array_equal(mine, plain)


@pytest.mark.parametrize(("mix", "combine"), [("both", "atc"), ("weights", "awc")])
def test_a_resumed_run_goes_on_bit_for_bit(
    job: Callable[..., list[Any]], devices: list[Any], mix: str, combine: str
) -> None:
    def run(group: ug.Group, start: int, steps: int, saved: Any = None) -> Any:
        model = hook.small_model(group.rank)
        optimizer = hook.make_optimizer("sgd", model)
        with ug.attach(model, optimizer, group, mix, combine, bucket_bytes=200) as gossip:
            if saved is not None:
                model.load_state_dict(saved[1])
                optimizer.load_state_dict(saved[2])
                gossip.load_state_dict(saved[0])
            for step in range(start, start + steps):
                optimizer.zero_grad()
                x, y = hook.batch(group.rank, step)
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
            gossip.wait()
            state = gossip.state_dict(), model.state_dict(), optimizer.state_dict()
            return hook.flat(model), hook.copy.deepcopy(state)

    def body(group: ug.Group) -> Any:
        whole = run(group, 0, 6)[0]
        _, saved = run(group, 0, 3)
        return whole, run(group, 3, 3, saved)[0]

    for whole, resumed in job(2, body):
        np.testing.assert_array_equal(whole, resumed)


def test_values_that_are_not_finite_stay_on_their_rank(
    job: Callable[..., list[Any]], devices: list[Any]
) -> None:
    def body(group: ug.Group) -> dict[int, int]:
        model = hook.small_model(0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with ug.attach(model, optimizer, group, mix="weights") as gossip:
            for step in range(3):
                x, y = hook.batch(group.rank, step)
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                if step == 0 and group.rank == 1:
                    next(model.parameters()).grad[0, 0] = float("nan")
                optimizer.step()
            gossip.wait()
            gossip._exchange.finish()
            if group.rank == 0:
                assert all(p.isfinite().all() for p in model.parameters())
            counted: dict[int, int] = gossip.stats()["nonfinite"]
            return counted

    for counted in job(2, body):
        assert set(counted) == {1}


def test_an_error_of_the_device_is_named_on_its_rank(
    job: Callable[..., list[Any]], devices: list[Any]
) -> None:
    def body(group: ug.Group) -> None:
        model = hook.small_model(0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with ug.attach(model, optimizer, group, mix="weights") as gossip:
            if group.rank == 0:
                gossip._buckets[0].device.fails["launch"] = 719
            for step in range(2):
                x, y = hook.batch(group.rank, step)
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
                gossip.wait()

    ends = job(2, body, raw=True, timeout=5.0)
    found = next(end for end in ends if isinstance(end, errors.DeviceError))
    assert (found.status, found.name) == (719, "FAKE_ERROR_719")
    assert "fake:0, round 0" in str(found)


def test_exact_operations_read_the_device(
    job: Callable[..., list[Any]], devices: list[Any]
) -> None:
    def body(group: ug.Group) -> tuple[float, np.ndarray]:
        model = hook.small_model(0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with ug.attach(model, optimizer, group, mix="weights") as gossip:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.fill_(1.0 + group.rank)
            apart = gossip.consensus_distance()
            gossip.synchronize()
            assert gossip.consensus_distance() < 1e-12
            values = hook.flat(model)
        return apart, values

    for apart, values in job(2, body):
        assert apart == pytest.approx(1 / 3)
        np.testing.assert_allclose(values, 1.5)


# --- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "modes",
    [
        Modes(mix="push_sum"),
        Modes(staleness=1),
        Modes(outer=ug.Nesterov()),
        Modes(buffers=True),
        Modes(noise_correction=True),
    ],
)
def test_modes_that_want_the_cpu(modes: Modes) -> None:
    with pytest.raises(errors.ArgumentError, match="on the CPU only, and this one is on fake:0"):
        device_module.check_modes(modes, fake.FakeDevice())


def test_modes_that_work() -> None:
    for mix in ("both", "weights", "gradients"):
        for combine in ("atc", "awc"):
            device_module.check_modes(Modes(mix, combine), fake.FakeDevice())


class On:
    """What `device_of` asks of a tensor."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)


def test_devices_of_models(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []
    monkeypatch.setattr(device_module, "open_cuda", opened.append)

    def ask(*devices: str) -> Any:
        return device_module.device_of([(f"p{i}", On(each)) for i, each in enumerate(devices)])  # type: ignore[misc]

    assert ask() is None and ask("cpu", "cpu") is None
    assert ask("cuda:1", "cuda:1") is None and opened == [1]
    with pytest.raises(errors.ArrayError, match="p0 is on cuda:0 but p1 is on cuda:1"):
        ask("cuda:0", "cuda:1")
    with pytest.raises(errors.ArrayError, match="p0 is on cpu but p2 is on cuda:0"):
        ask("cpu", "cpu", "cuda:0")
    with pytest.raises(errors.ArrayError, match="p0 is on meta"):
        ask("meta")


def test_torch_gives_back_what_it_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(device_module, "open_device", lambda *_, **more: asked.update(more))
    device_module.open_cuda(0)
    assert asked == {"reclaim": torch.cuda.empty_cache}


def test_a_torch_for_the_cpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(errors.NoDeviceError, match="built for the CPU only"):
        device_module.open_cuda(0)
