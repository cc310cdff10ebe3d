"""ucxgossip.bench.perftest: the peer measures, on our library, and leaves nothing running."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from ucxgossip.bench import perftest
from ucxgossip.bench.perftest import Perftest, find_perftest
from ucxgossip.errors import ArgumentError, BenchError
from ucxgossip.ucp import TRANSPORTS

pytestmark = pytest.mark.spawn


@pytest.fixture(scope="module")
def peer() -> Perftest:
    try:
        return find_perftest()
    except BenchError as error:
        pytest.skip(str(error))


def script(folder: Path, text: str) -> Path:
    """Make an executable that stands in for ucx_perftest; the client has an address argument."""
    path = folder / "ucx_perftest"
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return path


def children() -> set[int]:
    text = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
    return {int(process_id) for process_id in text.split()}


@pytest.mark.parametrize("transport", ["tcp", "shm"])
def test_measures_latency_and_bandwidth(peer: Perftest, transport: str) -> None:
    before = children()
    assert 0.01 < peer.latency(transport, 8, seconds=0.01) < 1e6
    assert 0.01 < peer.bandwidth(transport, 1 << 20, seconds=0.01) < 1e6
    assert children() == before


def test_runs_on_the_library_it_was_found_for(peer: Perftest) -> None:
    assert peer.library is not None
    assert find_perftest(peer.library) == peer
    # The other name of the wheel's library, which is the one that our own process loads.
    peer = find_perftest(peer.library.with_name("libucp.so"))
    assert peer.latency("tcp", 8, seconds=0.01) > 0


def test_another_library_than_ours_is_refused(peer: Perftest, tmp_path: Path) -> None:
    other = tmp_path / "libucp.so.0"
    other.touch()
    with pytest.raises(BenchError, match="not be fair|ended before"):
        Perftest(peer.binary, other).latency("tcp", 8, seconds=0.01)


def test_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BenchError, match="install it"):
        find_perftest(tmp_path / "lib" / "libucp.so.0")


def test_found_on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binary = script(tmp_path, "exit 0\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_perftest("libucp.so.0") == Perftest(binary, None)


def test_megabytes_become_decimal(tmp_path: Path) -> None:
    binary = script(
        tmp_path,
        'case "$*" in *127.0.0.1*) echo "  32,1.500,2.000,2.000,1.00,100.00,7,7";;'
        " *) echo Waiting for connection...;; esac\n",
    )
    stand_in = Perftest(binary, None)
    assert stand_in.latency("tcp", 8) == 1.5
    assert stand_in.bandwidth("tcp", 8) == pytest.approx(104.8576)


def test_a_run_too_short_to_tell_is_repeated_with_more(tmp_path: Path) -> None:
    log = tmp_path / "log"
    binary = script(
        tmp_path,
        f'case "$*" in *127.0.0.1*) echo "$*" >> {log}; echo "9,1.000,1.000,1.000,1.00,1.00,7,7";;'
        " *) echo Waiting for connection...;; esac\n",
    )
    assert Perftest(binary, None).latency("tcp", 8, seconds=0.24) == 1.0
    runs = [line.split() for line in log.read_text().splitlines()]
    # Round trips are guessed at 24 us and found to take 2 us.
    assert [int(run[run.index("-n") + 1]) for run in runs] == [9998, 120000]


def test_what_it_says_when_it_fails_is_told_without_the_host(tmp_path: Path) -> None:
    failing = "[1783.5] [myhost:12:0]  perftest.c:1 UCX  ERROR no such transport"
    binary = script(
        tmp_path,
        f'case "$*" in *127.0.0.1*) echo "{failing}"; exit 1;;'
        " *) echo Waiting for connection...;; esac\n",
    )
    with pytest.raises(BenchError, match="no such transport") as caught:
        Perftest(binary, None).latency("tcp", 8)
    assert "myhost" not in str(caught.value)


def test_server_that_cannot_listen(tmp_path: Path) -> None:
    binary = script(tmp_path, "echo bind failed; exit 1\n")
    with pytest.raises(BenchError, match="before it listened(.|\n)*bind failed"):
        Perftest(binary, None).latency("tcp", 8)


@pytest.mark.parametrize("stuck", ["server", "client"])
def test_deadline_ends_both(tmp_path: Path, stuck: str) -> None:
    says = "" if stuck == "server" else "*127.0.0.1*) ;; *) echo Waiting for connection...;;"
    binary = script(tmp_path, f'case "$*" in {says} esac\nexec tail -f /dev/null\n')
    before, start = children(), time.monotonic()
    with pytest.raises(BenchError, match=r"had not ended after 0.5 s"):
        Perftest(binary, None).latency("tcp", 8, deadline_s=0.5)
    assert time.monotonic() - start < 10
    assert children() == before


def test_arguments_that_cannot_be_served() -> None:
    stand_in = Perftest(Path("/bin/false"), None)
    with pytest.raises(ArgumentError, match="choose one of tcp, shm, auto"):
        stand_in.latency("rdma", 8)
    with pytest.raises(ArgumentError, match="at least 1"):
        stand_in.bandwidth("tcp", 0)


def test_the_environment_of_the_user_stays_except_for_the_transport(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("UCX_TLS", "all")
    monkeypatch.setenv("UCX_ZCOPY_THRESH", "1024")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/opt/lib")
    given = Perftest(Path("x"), Path("/ucx/lib/libucp.so.0"))._environment("tcp")
    assert given["UCX_TLS"] == "tcp" and given["UCX_NET_DEVICES"] == "lo"
    assert given["UCX_ZCOPY_THRESH"] == "1024"
    assert given["LD_LIBRARY_PATH"] == "/ucx/lib:/opt/lib"
    assert set(perftest.TRANSPORTS) == set(perftest._COSTS) == set(TRANSPORTS)
