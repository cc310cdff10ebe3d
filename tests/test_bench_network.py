"""bench.network: hosts on links of one rate, of which nothing is left, however they end."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ucxgossip.bench import network
from ucxgossip.bench.network import DEVICE, Network, bits_per_second
from ucxgossip.bench.spawn import run_ranks
from ucxgossip.errors import ArgumentError, BenchError


@pytest.fixture
def allowed() -> Iterator[None]:
    """Where networks can be made; afterwards none of this test's own are there."""
    try:
        with Network(1):
            pass
    except BenchError as error:
        pytest.skip(str(error))
    before = names()
    yield
    assert names() <= before


def names() -> set[str]:
    told = subprocess.run(
        ["ip", "netns", "list"], capture_output=True, text=True, timeout=30, check=True
    )
    return {line.split()[0] for line in told.stdout.splitlines() if line}


def test_rates() -> None:
    assert bits_per_second("200mbit") == 2e8
    assert bits_per_second("1.5gbit") == 1.5e9


@pytest.mark.parametrize("rate", ["", "200", "200mbps", "-1mbit", "0mbit", "200 mbit", "200Mbit"])
def test_rates_that_cannot_be_read(rate: str) -> None:
    with pytest.raises(ArgumentError, match="rate"):
        Network(2, rate)


@pytest.mark.parametrize("ranks", [0, 251])
def test_as_many_ranks_as_there_are_addresses(ranks: int) -> None:
    with pytest.raises(ArgumentError, match="ranks"):
        Network(ranks)


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(BenchError, match="root"), Network(2):
        pass
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(network.shutil, "which", lambda command: None)
    with pytest.raises(BenchError, match="iproute2"), Network(2):
        pass


RANK = f"""
import os, socket, sys
rank, host, port = int(os.environ["RANK"]), os.environ["MASTER_ADDR"], 7000
assert sorted(os.listdir("/sys/class/net")) == sorted(["lo", "{DEVICE}"])
if rank == 0:
    with socket.create_server((host, port)) as listener:
        listener.settimeout(30)
        accepted, (address, _) = listener.accept()
        print(address, accepted.recv(5).decode())
else:
    while True:
        try:
            with socket.create_connection((host, port), 30) as connection:
                connection.send(b"hello")
            break
        except ConnectionRefusedError:
            continue
"""


@pytest.mark.spawn
@pytest.mark.parametrize("rate", [None, "100mbit"])
def test_ranks_reach_each_other(allowed: None, rate: str | None) -> None:
    said: list[str] = []
    with Network(2, rate) as made:
        run_ranks(
            ["-c", RANK],
            2,
            on_line=said.append,
            deadline_s=60,
            variables=made.variables,
            through=made.command,
        )
    assert said == [f"{made.address(1)} hello"]


def test_links_have_the_rate_in_both_directions(allowed: None) -> None:
    with Network(2, "100mbit") as made:
        for place, devices in ((made.names[1], [DEVICE]), (made.hub, ["port0", "port1"])):
            for device in devices:
                told = subprocess.run(
                    ["tc", "-n", place, "qdisc", "show", "dev", device],
                    capture_output=True,
                    text=True,
                    timeout=30,
                    check=True,
                )
                assert "tbf" in told.stdout and "rate 100Mbit" in told.stdout


def test_the_congestion_control_is_that_of_the_namespaces(allowed: None) -> None:
    known = network._CONTROLS.read_text().split()
    before = Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text()
    chosen = next((each for each in known if each != before.strip()), known[0])
    with Network(1, keep_windows=True, congestion=chosen) as made:
        names = ("tcp_congestion_control", "tcp_slow_start_after_idle")
        told = subprocess.run(
            [*made.command(0), "sysctl", "-n", *(f"net.ipv4.{name}" for name in names)],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
    assert told.stdout.split() == [chosen, "0"]
    assert Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text() == before


def test_an_unknown_congestion_control_makes_nothing(allowed: None) -> None:
    before = names()
    with pytest.raises(ArgumentError, match="'swift'.*reno"):
        network.check("swift")
    with pytest.raises(ArgumentError, match="'swift'.*reno"), Network(1, congestion="swift"):
        pass
    assert names() == before


def test_nothing_is_left_after_an_error(allowed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt), Network(2) as made:
        assert {made.hub, *made.names} <= names()
        raise KeyboardInterrupt
    assert not {made.hub, *made.names} & names()

    called = network._call

    def broken(*command: str) -> str:
        if "address" in command:
            raise BenchError("no more addresses")
        return called(*command)

    monkeypatch.setattr(network, "_call", broken)
    with pytest.raises(BenchError, match="addresses"), Network(2):
        pass


STAYS = """
import sys
from ucxgossip.bench.network import Network
with Network(2) as made:
    print(*made.names, made.hub, flush=True)
    sys.stdin.read()
"""


@pytest.mark.spawn
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_after_a_signal(allowed: None, number: signal.Signals) -> None:
    """What a process leaves that was killed, the next network removes."""
    process = subprocess.Popen(
        [sys.executable, "-c", STAYS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        made = set(process.stdout.readline().split())
        assert len(made) == 3 and made <= names()
        assert not made & set(network.remove_left())
        process.send_signal(number)
        assert process.wait(timeout=60) != 0
        if number == signal.SIGKILL:
            assert made <= names()
            with Network(1):
                pass
    finally:
        process.kill()
        process.communicate(timeout=30)
    assert not made & names()
