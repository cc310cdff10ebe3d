"""One rank of test_gpu.py: ``python gpu_ranks.py JOB DEVICE TRANSPORT``; rank 0 prints findings.

DEVICE is ``cuda`` (ranks share what devices there are, all of them one if need be) or ``fake``: the
fake device of the other tests, which shows that these jobs themselves are right.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

import ucxgossip as ug
from fake_device import FakeDevice
from ucxgossip.device import Device
from ucxgossip.mixing import DeviceArray, DeviceInPlace, Meter
from ucxgossip.torch_hook import device as device_module

attach_module = sys.modules["ucxgossip.torch_hook.attach"]
CANARY = 7.5
ROUNDS = 12
DEADLINE_S = 60.0


def place(kind: str) -> torch.device:
    if kind == "fake":
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())


def open_device(kind: str) -> Device:
    if kind == "fake":
        found: Device = FakeDevice(pace=3)
        return found
    return device_module.open_cuda(place(kind).index)


def rounds(group: ug.Group, kind: str) -> dict[str, object]:
    """Rounds of several sizes against a simulation of all ranks, with canaries around."""
    device, schedule = open_device(kind), ug.Rotated(ug.Dissemination(group.size), seed=1)
    wrong = 0
    for dtype in (np.float32, np.float64):
        for count in (1, 1000, 700_001, 3_000_000)[: 3 if kind == "fake" else 4]:
            values = np.random.default_rng(count).standard_normal((group.size, count)).astype(dtype)
            memory = device.allocate(2 * 64 * np.dtype(dtype).itemsize + values[0].nbytes)
            whole = DeviceArray(device, memory, np.dtype(dtype), count + 128)
            around = np.full(count + 128, CANARY, dtype)
            around[:count] = values[group.rank]
            whole.write(around)
            array = DeviceArray(device, memory, np.dtype(dtype), count)
            stream = DeviceInPlace(group, array, schedule, Meter())
            stream.begin()
            for step in range(ROUNDS):
                stream.post()
                stream.wait()
                senders = [schedule.round(rank, step).sender for rank in range(group.size)]
                values = values + dtype(0.5) * (values[senders] - values)
            stream.finish()
            found = whole.read()
            wrong += not np.array_equal(found[:count], values[group.rank])
            wrong += not (found[count:] == CANARY).all()
            wrong += not stream.mailbox.intact()
    return {"wrong": int(wrong)}


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 256), nn.Linear(256, 8))


def train(group: ug.Group, kind: str, where: torch.device, mix: str, combine: str) -> np.ndarray:
    model = network(group.rank).double().to(where)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    options: dict[str, Any] = {"mix": mix, "combine": combine, "bucket_bytes": 1 << 17}
    if mix != "gradients":
        options["optimizer_state"] = True
    with ug.attach(model, optimizer, group, **options) as gossip:
        for step in range(8):
            generator = torch.Generator().manual_seed(100 * group.rank + step)
            x = torch.randn(16, 64, generator=generator, dtype=torch.float64).to(where)
            y = torch.randint(8, (16,), generator=generator).to(where)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        gossip.wait()
        return torch.cat([p.detach().reshape(-1).cpu() for p in model.parameters()]).numpy()


def attach(group: ug.Group, kind: str) -> dict[str, object]:
    """Training on the device and the same on the CPU end with the same weights, but for rounding
    in the network's own kernels."""
    plain, worst = attach_module.device_of, 0.0
    modes = (("both", "awc"), ("weights", "atc"), ("both", "atc"), ("gradients", "atc"))
    for mix, combine in modes[: 2 if kind == "fake" else 4]:
        if kind == "fake":
            attach_module.device_of = lambda _: open_device(kind)
        there = train(group, kind, place(kind), mix, combine)
        attach_module.device_of = plain
        here = train(group, kind, torch.device("cpu"), mix, combine)
        worst = max(worst, float(np.abs(here - there).max()))
    return {"same": worst < 1e-8}


def poison(group: ug.Group, kind: str) -> dict[str, object]:
    """A NaN of rank 1 is left out by all others."""
    device, schedule = open_device(kind), ug.Dissemination(group.size)
    values = np.full(500_000, float(group.rank), np.float32)
    if group.rank == 1:
        values[300_000] = np.nan
    memory = device.allocate(values.nbytes)
    array = DeviceArray(device, memory, values.dtype, len(values))
    array.write(values)
    meter = Meter()
    stream = DeviceInPlace(group, array, schedule, meter)
    for _ in range(4):
        stream.post()
        stream.wait()
    stream.finish()
    found = array.read()
    finite = bool(np.isfinite(found).all())
    counts = meter.quarantine.counts
    right = finite == (group.rank != 1) and set(counts) <= {1} and np.isfinite(stream.distance)
    group.agree("poison", {"right": bool(right)})
    return {"right": bool(right)}


def queued(group: ug.Group, kind: str) -> dict[str, object]:
    """The host hands out a round behind a long queue of work and goes on at once; the values are
    those that the queue leaves."""
    if kind == "fake":
        return {"right": True, "ahead": True}
    where, device = place(kind), open_device(kind)
    count = 1 << 20
    memory = device.allocate(4 * count)
    array = DeviceArray(device, memory, np.dtype(np.float32), count)
    tensor = torch.as_tensor(memory.view(np.dtype(np.float32), count), device=where)
    stream = DeviceInPlace(group, array, ug.Dissemination(group.size), Meter())
    ahead = True
    for step in range(5):
        work = torch.randn(4096, 4096, device=where)
        torch.cuda.synchronize(where)
        for _ in range(20):
            work = work @ work
            work /= work.norm()
        tensor.fill_(float(group.rank))
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(where))
        stream.post()
        ahead &= step == 0 or not done.query()  # the first one connects
        stream.wait()
        tensor.add_(1.0)  # behind the mix, on this stream
        stream.finish()
        torch.cuda.synchronize(where)
    mean = (group.rank + (group.rank - 1) % group.size) / 2 + 1.0
    return {"right": group.size != 2 or bool((tensor == mean).all()), "ahead": bool(ahead)}


def killed(group: ug.Group, kind: str) -> dict[str, object]:
    """Until a rank is lost, and a while longer; each says how it ended."""
    device = open_device(kind)
    memory = device.allocate(4 << 20)
    array = DeviceArray(device, memory, np.dtype(np.float32), 1 << 20)
    stream = DeviceInPlace(group, array, ug.Dissemination(group.size), Meter())
    stream.begin()
    deadline, left, number = time.monotonic() + DEADLINE_S, 40, 0
    while left:
        stream.post()
        stream.wait()
        number += 1
        left -= bool(group.losses)
        if number == 10:
            print("going", flush=True)
        if time.monotonic() > deadline:
            raise AssertionError(f"no rank was lost within {DEADLINE_S} s")
    stream.finish()
    print(json.dumps({"rank": group.rank, "ended": "went on"}), flush=True)
    os._exit(0)  # the others may be rounds behind


def ways(group: ug.Group, kind: str) -> dict[str, object]:
    """To how many others' devices this rank found a way; the driver may refuse any."""
    device = open_device(kind)
    memory = device.allocate(1 << 20)
    array = DeviceArray(device, memory, np.dtype(np.float32), 1 << 18)
    stream = DeviceInPlace(group, array, ug.Dissemination(group.size), Meter())
    group.agree("equipped", {})
    stream.begin()
    return {"ways": len(stream.staging.ways)}


JOBS: dict[str, Callable[[ug.Group, str], dict[str, object]]] = {
    each.__name__: each for each in (rounds, attach, poison, queued, killed, ways)
}


def main() -> None:
    job, kind, transport = sys.argv[1:4]
    with ug.join(transport=transport, timeout=100.0) as group:
        found = JOBS[job](group, kind)
    if os.environ["RANK"] == "0":
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
