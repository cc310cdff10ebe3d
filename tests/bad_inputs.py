"""Bad inputs and what is said to each: the list behind docs/errors.md and test_bad_inputs.py.

    python tests/bad_inputs.py            # write docs/errors.md

Each case is Python that is really run: `before`, if any, then `code`, which must raise. Nothing
may have changed then (`Scene.facts`), but for the cases in which time runs out or a rank fails.
"""

from __future__ import annotations

import contextlib
import copy
import io
import os
import re
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

import fake_driver
import ucxgossip as ug
from fake_device import FakeDevice
from torch_jobs import Fails
from ucxgossip import errors, kernels
from ucxgossip.buffer import Buffer
from ucxgossip.channel import Channel
from ucxgossip.cli import main
from ucxgossip.device import driver
from ucxgossip.errors import GossipError
from ucxgossip.mailbox import Layout, parse_description
from ucxgossip.mixing import Modes
from ucxgossip.torch_hook.device import check_modes, device_of
from ucxgossip.torch_hook.gossip import MARK

DOCUMENT = Path(__file__).parents[1] / "docs" / "errors.md"
DEADLINE_S = 60.0


@dataclass(frozen=True)
class Case:
    """One bad input. breaks: whether it may leave the group unusable."""

    area: str
    code: str
    error: str
    before: str = ""
    breaks: bool = False

    @property
    def text(self) -> str:
        """What is run, as the table shows it."""
        return "; ".join(filter(None, (self.before, self.code)))


@dataclass(frozen=True)
class Found:
    """What came of a case: class and message of the error, and what it changed."""

    error: str
    message: str
    changed: list[str]


class Scene:
    """What the cases find: a group of this rank alone, a model, an optimizer, a put to itself."""

    def __init__(self, group: ug.Group) -> None:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2))
        context = group.context
        worker = ug.ucp.Worker(context)
        region = ug.ucp.MemoryRegion(context, nbytes=64)
        self.own = [worker, region]
        endpoint = ug.ucp.Endpoint(worker, worker.address)
        key = ug.ucp.RemoteKey(endpoint, region.pack())
        self.names: dict[str, Any] = {
            "ug": ug,
            "kernels": kernels,
            "np": np,
            "torch": torch,
            "copy": copy,
            "os": os,
            "mock": mock,
            "Buffer": Buffer,
            "Channel": Channel,
            "Layout": Layout,
            "parse_description": parse_description,
            "group": group,
            "array": np.zeros(4, np.float32),
            "model": model,
            "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
            "x": torch.ones(2, 4),
            "context": context,
            "worker": worker,
            "region": region,
            "endpoint": endpoint,
            "key": key,
            "command": command,
            "ranks": ranks,
            "Sparse": Sparse,
            "Fails": Fails,
            "suppressed": suppressed,
            "forked": forked,
            "installed": installed,
            "cuda": cuda,
            "on": on,
            "OnGpu": OnGpu,
            "device_of": device_of,
            "check_modes": check_modes,
            "Modes": Modes,
            "fake": FakeDevice(),
        }

    def facts(self, breaks: bool) -> dict[str, object]:
        """What a bad input may not change."""
        group, model = self.names["group"], self.names["model"]
        optimizer = self.names["optimizer"]
        found: dict[str, object] = {}
        if not breaks and not group.closed:
            found |= {
                "mailboxes": [box.round for box in group.engine.mailboxes],
                "failed": group.failed,
                "children": [type(child).__name__ for child in group.context._children],
            }
        if isinstance(model, torch.nn.Module):
            found |= {
                "weights": [
                    p.detach().numpy().tobytes()
                    for p in model.parameters()
                    if p.device.type == "cpu" and p.layout == torch.strided
                    if not torch.nn.parameter.is_lazy(p)
                ],
                "hooks": [
                    (len(each._forward_pre_hooks), len(each._state_dict_pre_hooks))
                    for each in model.modules()
                ],
                "marks": [hasattr(p, MARK) for p in model.parameters()],
            }
        if isinstance(optimizer, torch.optim.Optimizer):
            found["optimizer"] = sorted(vars(optimizer)), len(optimizer.state)
        return found

    def close(self) -> None:
        """Detach what a case attached, and release the scene's own resources."""
        for each in list(self.names.values()):
            if isinstance(each, ug.Gossip):
                with contextlib.suppress(GossipError):
                    each.detach()
        for resource in self.own:
            resource.close()


def command(line: str) -> None:
    """Run the command line; its error is raised again, as printed."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        status = main(line.split())
    match = re.fullmatch(r"ucxgossip: (\w+): (.*)\n", said.getvalue(), re.DOTALL)
    assert status == 2 and match, (status, said.getvalue())
    raise vars(errors)[match[1]](match[2])


def ranks(size: int, code: str) -> None:
    """Run `code` with `rank` and `store` in a thread a rank; the error of the first that fails."""
    store = dist.HashStore()
    failures: dict[int, BaseException] = {}

    def body(rank: int) -> None:
        try:
            exec(code, {"ug": ug, "np": np, "torch": torch, "rank": rank, "store": store})
        except BaseException as error:
            failures[rank] = error

    threads = [threading.Thread(target=body, args=(r,), daemon=True) for r in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
        assert not thread.is_alive(), f"{code} hangs"
    if failures:
        raise failures[min(failures)]


def forked(use: Any) -> None:
    """Run `use` in a forked child; what it raised there is raised here."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            use()
            text = "nothing"
        except BaseException as error:
            text = f"{type(error).__name__}\n{error}"
        os.write(writing, text.encode())
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        name, _, message = pipe.read().decode().partition("\n")
    os.waitpid(child, 0)
    raise vars(errors)[name](message)


class Sparse(torch.nn.Module):
    """A layer whose gradient is sparse without its saying so."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(5, 2))

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.embedding(index, self.weight, sparse=True)


def suppressed(use: Any) -> None:
    """Run what fails on purpose."""
    with contextlib.suppress(ZeroDivisionError):
        use()


A, R, S = "ArgumentError", "ArrayError", "ScheduleError"
M, C, F = "ModelError", "ClosedError", "ForkError"
ATTACH = "ug.attach(model, optimizer, group{})"
DETACHED = f"gossip = {ATTACH.format('')}; gossip.detach()"
CLOSED = "other = ug.join(0, 1); other.close()"
HALF = (
    f"gossip = {ATTACH.format('')}; broken = lambda: model[2](Fails.apply(model[0](x))).sum()"
    ".backward(); suppressed(broken)"
)


@contextlib.contextmanager
def cuda(version: int, *packages: str, refused: str = "") -> Iterator[None]:
    """On a machine whose driver serves CUDA `version` (12080: 12.8), with these packages installed.

    The driver is a stand-in. refused: what it says of every pointer ("managed", "no IPC", "host").
    """
    library = fake_driver.FakeLibrary(version)
    attribute = {"managed": (8, 1), "no IPC": (10, 0), "host": (2, 1)}.get(refused)
    if attribute:
        library.attributes[attribute[0]] = attribute[1]
    found = driver.Driver(library)
    where = "ucxgossip.device.admission"
    with (
        mock.patch(f"{where}._installed", lambda name: name in packages),
        mock.patch(f"{where}.util.find_spec", lambda name: name in packages or None),
        mock.patch("ucxgossip.device.driver.load", lambda: found),
        mock.patch("ucxgossip.torch_hook.device.lib.load", lambda: SimpleNamespace(origin="wheel")),
        mock.patch.object(torch.version, "cuda", "12.8"),
    ):
        yield


def on(*devices: str) -> list[tuple[str, Any]]:
    """The named tensors of a model on these devices."""
    return [(f"p{i}", SimpleNamespace(device=torch.device(d))) for i, d in enumerate(devices)]


class OnGpu:
    """An array on a CUDA device."""

    def __init__(self) -> None:
        data = {"shape": (4,), "typestr": "<f4", "data": (1 << 20, False), "version": 3}
        self.__cuda_array_interface__ = data


@contextlib.contextmanager
def installed(*backends: str) -> Iterator[None]:
    """On a machine without a GPU, where of the backends for CUDA only these are installed."""
    where = "ucxgossip.kernels.selection"
    with (
        mock.patch(f"{where}._is_installed", lambda backend: backend in backends),
        mock.patch(f"{where}._has", lambda distribution: False),
        mock.patch("numba.cuda.is_available", lambda: False),
    ):
        yield


def attach(arguments: str) -> str:
    return ATTACH.format(f", {arguments}" if arguments else "")


CASES: tuple[Case, ...] = (
    # --- join
    Case("join", "ug.join(0, 1, transport='pigeon')", A),
    Case("join", "ug.join(0, 2, min_size=3)", A),
    Case("join", "ug.join(0, 2, min_size=True)", A),
    Case("Tuning", "ug.Tuning(endpoints=3)", A),
    Case("join", "ug.join(0, 1, transport=None)", A),
    Case("join", "ug.join(0, 1, timeout=0)", A),
    Case("join", "ug.join(0, 1, timeout=float('nan'))", A),
    Case("join", "ug.join(0, 1, timeout='300')", A),
    Case("join", "ug.join(2, 2)", A),
    Case("join", "ug.join(-1, 2)", A),
    Case("join", "ug.join(0, 0)", A),
    Case("join", "ug.join(0.0, 1)", A),
    Case("join", "ug.join(0, True)", A),
    Case("join", "ug.join(0, 1, settings={'NO_SUCH': '1'})", A),
    Case("join", "ug.join(0, 1, settings={'TLS': 1})", A),
    Case("join", "ug.join(0, 1, settings='TLS=tcp')", A),
    Case("join", "ug.join(0, 1, tuning=4096)", A),
    Case("join", "ug.join()", A, before="os.environ['RANK'] = 'first'"),
    Case("join", "ug.join()", A, before="os.environ['WORLD_SIZE'] = '2.0'"),
    Case("join", "ranks(1, 'ug.join(0, 2, store, timeout=2)')", "RankMissingError", breaks=True),
    Case("join", "ranks(2, 'ug.join(rank, 2 + rank, store, timeout=30)')", "MismatchError"),
    Case(
        "join",
        'ranks(2, \'ug.join(rank, 2, store, ("tcp", "shm")[rank], timeout=30)\')',
        "MismatchError",
    ),
    # --- tuning
    Case("Tuning", "ug.Tuning(chunk=12)", A),
    Case("Tuning", "ug.Tuning(chunk=4096, eager=8192)", A),
    Case("Tuning", "ug.Tuning(device_chunk=12)", A),
    Case("Tuning", "ug.Tuning(window=0)", A),
    Case("Tuning", "ug.Tuning(spins=-1)", A),
    Case("Tuning", "ug.Tuning(answers=1)", A),
    Case("Tuning", "ug.Tuning(yields=1.5)", A),
    # --- schedules
    Case("schedules", "ug.Dissemination(0)", S),
    Case("schedules", "ug.Dissemination('4')", S),
    Case("schedules", "ug.Hypercube(6)", S),
    Case("schedules", "ug.Rotated('ring')", S),
    Case("schedules", "ug.Rotated(ug.Ring(4), seed=-1)", S),
    Case("schedules", "ug.RandomMatching(4, seed=0.5)", S),
    Case("schedules", "ug.Broadcast(4, root=4)", S),
    Case("schedules", "ug.Hierarchical(8, 0)", S),
    Case("schedules", "ug.Ring(4).round(4, 0)", S),
    Case("schedules", "ug.Ring(4).round(0, -1)", S),
    # --- exchange
    Case("exchange", "group.exchange([1.0, 2.0])", R),
    Case("exchange", "group.exchange(torch.zeros(4))", R),
    Case("exchange", "group.exchange(np.zeros((2, 2)))", R),
    Case("exchange", "group.exchange(np.zeros(8)[::2])", R),
    Case("exchange", "group.exchange(np.zeros(0))", R),
    Case("exchange", "group.exchange(np.zeros(4, np.int64))", R),
    Case("exchange", "group.exchange(np.zeros(4, np.float16))", R),
    Case("exchange", "group.exchange(np.array([None]))", R),
    Case("exchange", "group.exchange(np.broadcast_to(1.0, 3))", R),
    Case("exchange", "group.exchange(np.zeros(5))", R, before="group.exchange(np.zeros(4))"),
    Case("exchange", "group.exchange([])", R),
    Case("exchange", "group.exchange([array, array[1:]])", R),
    Case("exchange", "group.exchange([np.zeros(4), np.zeros(4, np.float32)])", R),
    Case("exchange", "group.exchange({'weight': array})", R),
    Case(
        "exchange",
        "group.exchange(np.zeros(8, np.float32))",
        R,
        before="group.exchange(np.zeros(4))",
    ),
    Case("exchange", "group.exchange(array, schedule=ug.Dissemination(2))", S),
    Case("exchange", "group.exchange(array, schedule='ring')", S),
    Case("exchange", "group.exchange(array, mailbox=group)", A),
    Case(
        "exchange",
        "ranks(2, 'ug.join(rank, 2, store, timeout=30).exchange(np.zeros(4 + rank))')",
        "MismatchError",
    ),
    Case(
        "exchange",
        "ranks(2, 'g = ug.join(rank, 2, store, timeout=30); a = np.zeros(4); g.exchange(a); "
        "g.timeout = 0.3; rank or g.exchange(a); g.close()')",
        "ExchangeTimeoutError",
        breaks=True,
    ),
    # --- mailboxes and channels
    Case("mailboxes", "group.mailbox(0)", A),
    Case("mailboxes", "group.mailbox(2.5)", A),
    Case("mailboxes", "group.mailbox(64, depth=0)", A),
    Case("mailboxes", "group.mailbox(64, ring=1)", A),
    Case("mailboxes", "group.mailbox(1 << 17, depth=2, ring=True)", A),
    Case("mailboxes", "group.mailbox(64, depth=5000)", A),
    Case("mailboxes", "group.allocate(-1)", A),
    Case("mailboxes", "group.allocate('64')", A),
    Case("mailboxes", "Layout(64, 2, 12)", A),
    Case("mailboxes", "parse_description(b'short', Layout(64, 2, 8), rank=1)", A),
    Case("channels", "Channel(group, 64, to=7, sender=None)", A),
    Case("channels", "Channel(group, 64, to=None, sender=0)", A),
    Case("channels", "Channel(group, 0, to=None, sender=None)", A),
    Case(
        "channels",
        "channel.put(Buffer.of(array))",
        A,
        before="channel = Channel(group, 16, None, None)",
    ),
    Case("channels", "channel.release()", A, before="channel = Channel(group, 16, None, None)"),
    # --- attach
    Case("attach", "ug.attach(np.zeros(4), optimizer, group)", M),
    Case("attach", "ug.attach(model, 'sgd', group)", M),
    Case("attach", "ug.attach(model, optimizer, None)", A),
    Case("attach", "ug.attach(copy.deepcopy(model), optimizer, group)", M),
    Case("attach", attach(""), "AlreadyAttachedError", before=f"gossip = {attach('')}"),
    Case("attach", attach(""), M, before="model.requires_grad_(False)"),
    Case("attach", attach("scaler=torch.amp.GradScaler"), A),
    Case(
        "attach",
        "optimizer.step()",
        M,
        before=f"model[2].requires_grad_(False); gossip = {attach('')}; "
        "model[2].requires_grad_(True)",
    ),
    Case("attach", attach(""), R, before="model.half()"),
    Case(
        "attach",
        attach(""),
        R,
        before="model.to_empty(device='meta'); optimizer.param_groups[0]['params'] = "
        "list(model.parameters())",
    ),
    Case(
        "attach",
        attach(""),
        M,
        before="model.append(torch.nn.LazyLinear(2))",
    ),
    Case(
        "attach",
        attach(""),
        "SparseGradientError",
        before="model.append(torch.nn.Embedding(4, 2, sparse=True))",
    ),
    Case("attach", attach("mix='all'"), A),
    Case("attach", attach("combine='later'"), A),
    Case("attach", attach("staleness=-1"), A),
    Case("attach", attach("staleness=1.0"), A),
    Case("attach", attach("local_steps=0"), A),
    Case("attach", attach("global_average_every=0"), A),
    Case("attach", attach("bucket_bytes=0"), A),
    Case("attach", attach("buffers=1"), A),
    Case("attach", attach("schedule=ug.Ring(3)"), S),
    Case("attach", attach("schedule=ug.GlobalAverage(1)"), S),
    Case("attach", attach("mix='push_sum', schedule=ug.Rotated(ug.Ring(1))"), S),
    Case("attach", attach("mix='push_sum', staleness=1"), A),
    Case("attach", attach("mix='push_sum', optimizer_state=True"), A),
    Case("attach", attach("mix='gradients', optimizer_state=True"), A),
    Case("attach", attach("staleness=1, combine='awc'"), A),
    Case("attach", attach("optimizer_state=True"), M),
    Case("attach", attach("noise_correction=True"), M),
    Case("attach", attach("mix='weights', noise_correction=True"), A),
    Case("attach", attach("outer='nesterov'"), A),
    Case("attach", attach("outer=ug.Nesterov(), staleness=1"), A),
    Case("attach", attach("mix='gradients', outer=ug.Nesterov()"), A),
    Case("attach", "ug.Nesterov(rate=0)", A),
    Case("attach", "ug.Nesterov(momentum=1)", A),
    Case("attach", "ug.Nesterov(rate='fast')", A),
    # --- training
    Case("training", "optimizer.step()", "ExchangeError", before=HALF, breaks=True),
    Case("training", "model(x).sum().backward()", "ExchangeError", before=HALF, breaks=True),
    Case(
        "training",
        "model(torch.arange(3)).sum().backward()",
        "SparseGradientError",
        before="model = Sparse(); optimizer = torch.optim.SGD(model.parameters(), lr=0.1); "
        f"gossip = {attach('')}",
    ),
    Case(
        "training",
        "optimizer.step()",
        M,
        before=f"gossip = {attach('')}; model(x).sum().backward(); model.double()",
    ),
    # --- checkpoints
    Case("checkpoints", "gossip.load_state_dict({})", A, before=f"gossip = {attach('')}"),
    Case(
        "checkpoints",
        "gossip.load_state_dict(state)",
        A,
        before=f"gossip = {attach('')}; state = gossip.state_dict(); gossip.detach(); "
        f"gossip = {attach('staleness=1')}",
    ),
    Case(
        "checkpoints",
        "gossip.load_state_dict(state)",
        A,
        before=f"gossip = {attach('')}; state = gossip.state_dict(); gossip.detach(); "
        f"gossip = {attach('bucket_bytes=8')}",
    ),
    # --- shuffled
    Case("shuffled", "gossip.shuffled(iter([x]))", A, before=f"gossip = {attach('')}"),
    Case("shuffled", "gossip.shuffled(7)", A, before=f"gossip = {attach('')}"),
    Case(
        "shuffled",
        "gossip.shuffled([x]).load_state_dict({})",
        A,
        before=f"gossip = {attach('')}",
    ),
    Case(
        "shuffled",
        "setattr(gossip.shuffled([x]), 'epoch', -1)",
        A,
        before=f"gossip = {attach('')}",
    ),
    # --- the ucp layer
    Case("ucp", "ug.ucp.Context('udp')", A),
    Case("ucp", "ug.ucp.Context('tcp', {'FENCE_MODE': 'never'})", A),
    Case("ucp", "ug.ucp.Context('tcp', {'TLS': 'no_such'})", "UCXError"),
    Case("ucp", "ug.ucp.MemoryRegion(context)", A),
    Case("ucp", "ug.ucp.MemoryRegion(context, nbytes=0)", A),
    Case("ucp", "ug.ucp.MemoryRegion(context, array=np.zeros(0))", R),
    Case("ucp", "ug.ucp.MemoryRegion(context, array=np.zeros(8)[::2])", R),
    Case("ucp", "region.view(np.float64, 9)", A),
    Case("ucp", "region.view(np.float64, 1, -8)", A),
    Case("ucp", "endpoint.put(region, region.address, key, nbytes=65)", A),
    Case("ucp", "endpoint.put(region, region.address, key, nbytes=-1)", A),
    Case("ucp", "endpoint.put(region, 0, key)", C, before="region.close()"),
    Case("ucp", "worker.progress()", C, before="worker.close()"),
    Case(
        "ucp",
        "ug.ucp.load.__wrapped__()",
        "LibraryNotFoundError",
        before="os.environ['UCXGOSSIP_LIBUCP'] = '/no/such/libucp.so.0'",
    ),
    Case(
        "ucp",
        "ug.ucp.load.__wrapped__()",
        "LibrarySymbolError",
        before="os.environ['UCXGOSSIP_LIBUCP'] = 'libm.so.6'",
    ),
    # --- after the end
    Case("after the end", "gossip.wait()", C, before=DETACHED),
    Case("after the end", "gossip.synchronize()", C, before=DETACHED),
    Case("after the end", "other.exchange(array)", C, before=CLOSED),
    Case("after the end", "other.mailbox(64)", C, before=CLOSED),
    Case(
        "after the end",
        "ug.attach(model, optimizer, other)",
        C,
        before=CLOSED,
    ),
    Case(
        "after the end",
        "other.exchange(array)",
        "ExchangeError",
        before="other = ug.join(0, 1); other.abort('out of memory')",
    ),
    Case("forked child", "forked(lambda: group.exchange(array))", F),
    Case("forked child", "forked(lambda: ug.join(0, 1))", F),
    Case("forked child", "forked(lambda: worker.progress())", F),
    Case("forked child", "forked(lambda: group.mailbox(64))", F),
    Case("forked child", "forked(lambda: ug.attach(model, optimizer, group))", F),
    # --- CUDA
    Case("CUDA", "device_of(on('cuda:0', 'cuda:1'))", R),
    Case("CUDA", "device_of(on('cuda:0', 'cpu'))", R),
    Case("CUDA", "device_of(on('mps'))", R),
    Case(
        "CUDA",
        "with mock.patch.object(torch.version, 'cuda', None): device_of(on('cuda:0'))",
        "NoDeviceError",
    ),
    Case("CUDA", "with cuda(12080, 'cupy'): device_of(on('cuda:2'))", "NoDeviceError"),
    Case("CUDA", "with cuda(12080): device_of(on('cuda:0'))", "MissingExtraError"),
    Case(
        "CUDA",
        "with cuda(12080, 'cupy', 'libucx-cu13'): device_of(on('cuda:0'))",
        "CudaVersionError",
    ),
    Case("CUDA", "check_modes(Modes('push_sum'), fake)", A),
    Case("CUDA", "check_modes(Modes(staleness=2), fake)", A),
    Case("CUDA", "check_modes(Modes(outer=ug.Nesterov()), fake)", A),
    Case("CUDA", "check_modes(Modes(buffers=True), fake)", A),
    Case("CUDA", "check_modes(Modes(noise_correction=True), fake)", A),
    Case(
        "CUDA",
        "with cuda(12080, refused='no IPC'): ug.ucp.MemoryRegion(context, array=OnGpu())",
        R,
    ),
    Case(
        "CUDA",
        "with cuda(12080, refused='no IPC'), mock.patch.dict(os.environ, PYTORCH_ALLOC_CONF="
        "'expandable_segments:True'): ug.ucp.MemoryRegion(context, array=OnGpu())",
        R,
    ),
    Case(
        "CUDA",
        "with cuda(12080, refused='managed'): ug.ucp.MemoryRegion(context, array=OnGpu())",
        R,
    ),
    Case(
        "CUDA",
        "with cuda(12080, refused='host'): ug.ucp.MemoryRegion(context, array=OnGpu())",
        R,
    ),
    # --- mixing kernels
    Case("mixing kernels", "kernels.select('tpu')", A),
    Case("mixing kernels", "kernels.select('cpu', 'cupy')", A),
    Case(
        "mixing kernels",
        "with installed(): kernels.select('cuda')",
        "MissingExtraError",
    ),
    Case(
        "mixing kernels",
        "with installed('numba_cuda'): kernels.select('cuda')",
        "NoDeviceError",
    ),
    Case("mixing kernels", "kernels.mix_(array, array, 0.5)", "ArrayError"),
    Case("mixing kernels", "kernels.mix_(array, np.ones(5, np.float32), 0.5)", "ArrayError"),
    Case("mixing kernels", "kernels.mix_(array, np.ones(4), 0.5)", "ArrayError"),
    Case("mixing kernels", "kernels.mix_(array, [1.0, 2.0, 3.0, 4.0], 0.5)", "ArrayError"),
    Case("mixing kernels", "kernels.mix_(array, np.ones(4, np.float32), 1.5)", A),
    Case("mixing kernels", "kernels.mix_(array, np.ones(4, np.float32), 0.5, threads=0)", A),
    # --- the command line
    Case("command line", "command('doctor --transport pigeon')", A),
    Case("command line", "command('schedules --ranks two')", A),
    Case("command line", "command('bench put --sizes 8x')", A),
    Case("command line", "command('bench put --sizes 0.5')", A),
    Case("command line", "command('bench exchange --ranks 2;4')", A),
    Case("command line", "command('bench exchange --against mpi')", A),
    Case("command line", "command('bench exchange --sizes alexnet')", A),
    Case("command line", "command('bench train --model resnet')", A),
    Case("command line", "command('bench train --methods gossip')", A),
    Case("command line", "command('bench train --methods gossip-deferred')", A),
    Case("command line", "command('bench train --methods gossip-both-atc+stale')", A),
    Case("command line", "command('bench train --rates fast')", A),
    Case("command line", "command('bench train --rate 0')", A),
    Case("command line", "command('bench train --steps 0')", A),
    Case("command line", "command('bench train --shards odd')", A),
    Case("command line", "command('bench stragglers --ranks 1')", A),
    Case("command line", "command('bench stragglers --slow 0.5')", A),
    Case("command line", "command('bench stragglers --methods gossip-deferred')", A),
    Case("command line", "command('bench kernels --device tpu')", A),
    Case("command line", "command('bench kernels --pairs bfloat16/float32')", A),
    Case("command line", "command('bench kernels --sizes 10')", A),
    Case("command line", "command('bench kernels --threads two')", A),
    Case("command line", "command('schedules --ranks 2 --json /no/such/folder/rows.json')", A),
)

_STABLE = (
    (r"\b\d+\.\d s\b", "N s"),
    (r"UCX \d+\.\d+\.\d+", "UCX N"),
    (r"0x[0-9a-f]+", "0x..."),
)


def stable(message: str) -> str:
    """A message without what differs from run to run and machine to machine."""
    for pattern, replacement in _STABLE:
        message = re.sub(pattern, replacement, message)
    return message


def run(case: Case, group: ug.Group) -> Found:
    """What one case raises, on a scene of its own."""
    scene = Scene(group)
    out = io.StringIO()
    try:
        with mock.patch.dict(os.environ), contextlib.redirect_stdout(out):
            exec(case.before, scene.names)
            before = scene.facts(case.breaks)
            try:
                exec(case.code, scene.names)
            except Exception as error:
                after = scene.facts(case.breaks)
                changed = [name for name in before if before[name] != after[name]]
                return Found(type(error).__name__, stable(str(error)), changed)
        return Found("nothing", "", [])
    finally:
        scene.close()


def find() -> dict[Case, Found]:
    """What each case raises; ranks are this process's own."""
    variables = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE")
    with mock.patch.dict(os.environ):
        for name in variables:
            os.environ.pop(name, None)
        found = {}
        for case in CASES:
            with ug.join(0, 1, transport="shm") as group:
                found[case] = run(case, group)
        return found


def markdown(found: dict[Case, Found]) -> str:
    """The document."""
    lines = [
        "# Bad inputs, and what is said to each",
        "",
        "Made by `python tests/bad_inputs.py`; `tests/test_bad_inputs.py` runs every row, and "
        "checks class and message, and that nothing was changed.",
        "",
        "Each row is what was run, in a job of one rank: `group` is what `ug.join()` returned, "
        "`model` and `optimizer` a small network and its SGD, `x` a batch. `ranks(n, code)` runs "
        "code on n ranks, `forked(use)` in a forked child, `command(line)` as "
        "`ucxgossip line` in a shell, which ends with status 2, `with installed(...)` on a machine "
        "without a GPU where of the packages for CUDA only those are, `with cuda(...)` with a "
        "stand-in for the driver of that CUDA. Every class derives from "
        "`ucxgossip.errors.GossipError`; the tree stands at the top of `ucxgossip/errors.py`.",
    ]
    area = ""
    for case, each in found.items():
        if case.area != area:
            area = case.area
            lines += ["", f"## {area}", "", "| input | error | message |", "|---|---|---|"]
        cells = (f"`{case.text}`", f"`{each.error}`", each.message)
        lines.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return re.sub(r"\s*\n\s*", " ", text).replace("|", "\\|").strip()


if __name__ == "__main__":
    results = find()
    DOCUMENT.write_text(markdown(results), encoding="utf-8")
    wrong = [case for case, each in results.items() if each.error != case.error or each.changed]
    for case in wrong:
        print(f"{case.text}: {results[case]}", file=sys.stderr)
    print(f"{len(results)} rows, {len(wrong)} wrong")
    sys.exit(bool(wrong))
