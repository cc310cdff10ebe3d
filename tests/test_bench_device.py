"""`--device cuda` of doctor and the benches: refused by name, and what can be shown without one."""

import ctypes
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

import fake_device as fake
import fake_driver
import ucxgossip as ug
from ucxgossip import doctor
from ucxgossip.bench import exchange, pair_device, payloads
from ucxgossip.bench.exchange_device import Checked, OursOnDevice
from ucxgossip.bench.exchange_rank import check
from ucxgossip.bench.pair import Side
from ucxgossip.bench.peer import Arrays
from ucxgossip.cli import main
from ucxgossip.device import driver
from ucxgossip.device.driver import Driver
from ucxgossip.errors import BenchError
from ucxgossip.torch_hook import device as device_module


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize(
    "command",
    ["doctor", "bench put --sizes 8", "bench exchange --sizes 8", "bench kernels", "bench step"],
)
def test_no_device_is_said_by_name(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command.split(), "--device", "cuda"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "NoDeviceError" in said.err or "MissingExtraError" in said.err


@pytest.mark.parametrize("command", ["put", "exchange"])
def test_no_peers_on_a_device(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    peer = {"put": "ucx_perftest", "exchange": "gloo_gossip"}[command]
    assert main(["bench", command, "--device", "cuda", "--against", peer]) == 2
    assert "leave --against out" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", ["doctor", "bench put", "bench exchange", "bench step", "bench kernels"]
)
def test_help_says_that_it_is_untested(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    assert "UNTESTED ON HARDWARE" in " ".join(capsys.readouterr().out.split())


def test_rounds_on_a_device_are_checked(job: Callable[..., list[Any]]) -> None:
    meet = threading.Barrier(2)

    def body(group: ug.Group) -> float:
        device = fake.FakeDevice(seed=group.rank, pace=3)
        arrays = [np.zeros(count, np.float32) for count in (2, 5000)]
        data = Arrays(group.rank, group.size, arrays)
        ours = OursOnDevice(group, data, device)
        check("ours", Checked(ours), data, lambda: meet.wait(30.0))
        for _ in range(3):
            ours.once()
        ours.fetch()
        device.check()
        return float(arrays[1][1])

    assert job(2, body) == [1.5, 1.5]


class HostMemory:
    """`PairMemory` in host memory, which UCX takes for what it is."""

    describes = "host"

    def __init__(self, nbytes: int) -> None:
        self.source, self.inbox = (np.zeros(nbytes, np.uint8) for _ in range(2))


def test_two_sides_put_between_memories_of_their_own() -> None:
    memories = [HostMemory(4096) for _ in range(2)]
    sides = [Side("tcp", 4096, {"NET_DEVICES": "lo"}, each) for each in memories]  # type: ignore[arg-type]
    try:
        for side, other in (sides, sides[::-1]):
            side.connect(other.describe())
        memories[0].source[:] = np.arange(4096) % 251
        served = threading.Thread(target=sides[1].serve, args=(9,))
        served.start()
        assert sides[0].stream(4096, 3) > 0
        sides[0].raise_flag(9)
        served.join(30.0)
        assert not served.is_alive()
        assert np.array_equal(memories[1].inbox, memories[0].source)
    finally:
        for side in sides:
            side.close()


def test_memory_of_a_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    library = fake_driver.FakeLibrary()
    found = Driver(library)
    monkeypatch.setattr(driver, "load", lambda: found)
    memory = pair_device.PairMemory(64, 3)
    assert memory.device.name == "cuda:1" and library.contexts == [fake_driver.CONTEXT + 1]
    assert memory.describes == "Stand-in, CUDA (12, 8), 2 seen"
    memory.fill(np.arange(64, dtype=np.uint8))
    interface: Any = memory.source
    address, _ = interface.__cuda_array_interface__["data"]
    assert bytes((ctypes.c_uint8 * 64).from_address(address)) == bytes(range(64))
    assert not memory.came().any()


def test_who_starts_the_ranks_makes_no_context(monkeypatch: pytest.MonkeyPatch) -> None:
    library = fake_driver.FakeLibrary()
    found = Driver(library)
    monkeypatch.setattr(driver, "load", lambda: found)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(device_module, "check_installed", lambda *_: None)
    monkeypatch.setattr(exchange, "run_ranks", mock.Mock(side_effect=BenchError("started")))
    with pytest.raises(BenchError, match="started"):
        exchange.run("shm", [2], [payloads.parse("64K")[0]], [], device="cuda")
    assert "cuDevicePrimaryCtxRetain" not in library.names()


TABLE = """
+---------------------------+-------------------------------------------------------------+
| ucp_context_0 self cfg#1  | remote memory write by ucp_put* from cuda/GPU0 memory to cuda |
+---------------------------+--------------------------------+----------------------------+
|                     0..inf | zero-copy                     | cuda_ipc/cuda              |
+---------------------------+--------------------------------+----------------------------+
"""


def test_the_protocol_of_device_memory() -> None:
    assert doctor.parse_protocols(TABLE) == []
    assert doctor.parse_protocols(TABLE, "cuda") == [(0, float("inf"), "zero-copy cuda_ipc/cuda")]


def test_advice_about_devices() -> None:
    facts = {"device": "cuda", "verified": False, "target_must_progress": False}
    facts |= SimpleNamespace(rdma_devices="none", ucx_origin="wheel").__dict__
    lines = doctor.advise(facts, [])
    assert any(line.startswith("WRONG BYTES") for line in lines)
    assert any("between processes of one host" in line for line in lines)
