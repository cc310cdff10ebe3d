"""The command line: each command measures, writes its rows and exits as it should."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import ucxgossip
from ucxgossip import doctor, trust
from ucxgossip.cli import main
from ucxgossip.doctor import advise, parse_protocols
from ucxgossip.tuning import CONSTANTS

pytestmark = [pytest.mark.spawn, pytest.mark.usefixtures("forked_ranks")]

PUT_KEYS = {
    "bench",
    "transport",
    "bytes",
    "latency_us",
    "bandwidth_MBps",
    "peer",
    "peer_latency_us",
    "peer_bandwidth_MBps",
    "latency_ratio",
    "bandwidth_ratio",
    "latency_p99_us",
}
EXCHANGE_KEYS = {
    "bench",
    "transport",
    "ranks",
    "bytes",
    "ours_us",
    "ours_p99_us",
    "peer",
    "peer_us",
    "speedup",
}


def rows(path: Path) -> list[dict[str, Any]]:
    document = json.loads(path.read_text())
    assert document["environment"]["ucx"]
    found: list[dict[str, Any]] = document["rows"]
    return found


@pytest.mark.parametrize("transport", ["tcp", "shm"])
def test_bench_put(transport: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    path, figure = tmp_path / "put.json", tmp_path / "put.png"
    sizes = ["--sizes", "8,64K", "--repeats", "2", "--seconds", "0.02"]
    command = ["bench", "put", "--transport", transport, *sizes, "--json", str(path)]
    assert main([*command, "--against", "ucx_perftest", "--plot", str(figure)]) == 0
    assert figure.read_bytes().startswith(b"\x89PNG")
    found = rows(path)
    assert [row["bytes"] for row in found] == [8, 65536]
    for row in found:
        assert set(row) >= PUT_KEYS
        assert row["latency_us"] > 0 < row["bandwidth_MBps"]
        assert row["latency_p99_us"] > 0
        assert row["latency_ratio"] == pytest.approx(row["latency_us"] / row["peer_latency_us"])
    assert len([line for line in capsys.readouterr().out.splitlines() if line[0] != "#"]) == 2


def test_bench_exchange(tmp_path: Path) -> None:
    path = tmp_path / "exchange.json"
    sizes = ["--sizes", "8,64K", "--ranks", "2,3", "--repeats", "2", "--seconds", "0.02"]
    command = ["bench", "exchange", "--transport", "tcp", *sizes, "--json", str(path)]
    assert main([*command, "--against", "gloo_allreduce,gloo_gossip"]) == 0
    found = rows(path)
    assert len(found) == 8
    assert {row["peer"] for row in found} == {"gloo_allreduce", "gloo_gossip"}
    for row in found:
        assert set(row) >= EXCHANGE_KEYS
        assert row["speedup"] == pytest.approx(row["peer_us"] / row["ours_us"])


@pytest.mark.parametrize("transport", ["tcp", "shm"])
def test_doctor(transport: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "doctor.json"
    assert main(["doctor", "--transport", transport, "--json", str(path)]) == 0
    facts = json.loads(path.read_text())["environment"]
    assert facts["target_must_progress"] is (transport == "tcp")
    assert facts["ucx_origin"] in ("wheel", "system", "environment")
    assert "chunk=" in facts["tuning"] and facts["slots"].endswith("more: 2")
    assert ("one message" in facts["rounds"]) is (transport == "tcp")
    for row in rows(path):
        assert row["latency_us"] > 0 < row["bandwidth_MBps"]
    assert "# " in capsys.readouterr().out


def test_doctor_tells_what_several_hosts_change() -> None:
    assert "tuning, several hosts" not in doctor._tuning("shm")
    told = doctor._tuning("auto")
    ring, far = CONSTANTS["shm"].ring, CONSTANTS["auto"].ring
    assert f"ring={ring}" in str(told["tuning"]).split()
    assert f"ring={far}" in str(told["tuning, several hosts"]).split()


def test_schedules(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "schedules.json"
    assert main(["schedules", "--ranks", "3,8", "--json", str(path)]) == 0
    found = json.loads(path.read_text())["rows"]
    assert {row["ranks"] for row in found} == {3, 8}
    assert {row["bench"] for row in found} == {"schedules"}
    lines = [line for line in capsys.readouterr().out.splitlines() if line[0] != "#"]
    assert len(lines) == len(found)


@pytest.mark.parametrize(
    "command",
    [
        ["doctor", "--transport", "pigeon"],
        ["bench", "put", "--sizes", "8,many"],
        ["bench", "put", "--sizes", "0"],
        ["bench", "exchange", "--ranks", "two"],
        ["bench", "exchange", "--ranks", "1"],
        ["schedules", "--ranks", "two"],
        ["schedules", "--ranks", "4,1"],
        ["bench", "exchange", "--sizes", "6"],
        ["bench", "exchange", "--sizes", "alexnet"],
        ["bench", "exchange", "--sizes", "8", "--plot", "/nowhere/at/all.png"],
        ["bench", "put", "--plot", "/nowhere/at/all.png"],
        ["bench", "put", "--repeats", "0"],
        ["bench", "put", "--seconds", "0"],
        ["bench", "exchange", "--repeats", "0"],
        ["bench", "exchange", "--seconds", "nan"],
        ["bench", "exchange", "--against", "carrier_pigeon"],
    ],
    ids=" ".join,
)
def test_bad_arguments_exit_with_2(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "none.json"
    assert main([*command, "--json", str(path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("ucxgossip: ArgumentError: ")
    assert not path.exists()


@pytest.mark.parametrize("path", ["/nowhere/at/all.json", "."])
def test_nothing_is_measured_for_a_file_that_cannot_be(
    path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["schedules", "--ranks", "3", "--json", path]) == 2
    told = capsys.readouterr()
    assert told.err.startswith(f"ucxgossip: ArgumentError: cannot write {path}")
    assert not told.out


@pytest.mark.parametrize(
    "command",
    [
        ["--help"],
        ["doctor", "--help"],
        ["schedules", "--help"],
        ["bench", "put", "--help"],
        ["bench", "step", "--help"],
        ["bench", "idle", "--help"],
        ["bench", "flat", "--help"],
        ["bench", "startup", "--help"],
        ["bench", "exchange", "--help"],
        ["run", "--help"],
        ["token", "--help"],
    ],
)
def test_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 0
    assert "usage: ucxgossip" in capsys.readouterr().out


def test_version_and_nothing_at_all(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"ucxgossip {ucxgossip.__version__}\n"
    assert main([]) == 2
    assert "COMMAND" in capsys.readouterr().err


def test_token(capsys: pytest.CaptureFixture[str]) -> None:
    printed = []
    for _ in range(2):
        assert main(["token"]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] != printed[1]
    assert all(len(bytes.fromhex(each)) == 32 for each in printed)


@pytest.mark.parametrize(
    ("options", "variables", "fresh"),
    [
        ([], {}, True),
        (["--"], {}, True),
        (["--nnodes", "1"], {}, True),
        (["--nnodes=2"], {}, False),
        (["--nnodes", "1:4"], {}, False),
        ([], {trust.TOKEN: "set by the user"}, False),
        ([], {trust.TOKEN_FILE: "/set/by/the/user"}, False),
    ],
    ids=str,
)
def test_run_gives_a_job_of_one_host_a_token(
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    variables: dict[str, str],
    fresh: bool,
) -> None:
    import torch.distributed.run as torchrun

    script = ["train.py", "--nnodes", "3"]
    monkeypatch.setenv(trust.TOKEN, "restored when the test ends")
    monkeypatch.delenv(trust.TOKEN)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    started: list[list[str]] = []
    monkeypatch.setattr(torchrun, "main", started.append)
    assert main(["run", *options, *script]) == 0
    assert started == [[*(each for each in options if each != "--"), *script]]
    token = os.environ.get(trust.TOKEN)
    if fresh:
        assert token is not None and len(bytes.fromhex(token)) == 32
    else:
        assert token == variables.get(trust.TOKEN)


def test_run_without_a_script(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["run"], ["run", "--standalone"]):
        with pytest.raises(SystemExit) as ended:
            main(command)
        assert ended.value.code == 2
    assert "usage" in capsys.readouterr().err


RANK = """
import hashlib, os, sys
import ucxgossip as ug

with ug.join(timeout=60) as group:
    group.agree("end", {})
    digest = hashlib.sha256(os.environ["UCXGOSSIP_TOKEN"].encode()).hexdigest()
    print(f"rank {group.rank} of {group.size} {digest} {sys.argv[1:]}", flush=True)
"""


@pytest.mark.slow
def test_run_starts_ranks_that_join(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(RANK)
    kept = {name: value for name, value in os.environ.items() if name != trust.TOKEN}
    ended = subprocess.run(
        [sys.executable, "-m", "ucxgossip", "run", "--standalone", "--nproc-per-node", "2"]
        + [str(script), "--standalone", "x"],
        env=kept | {"XDG_CONFIG_HOME": str(tmp_path), "UCX_TLS": "tcp"},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    said = sorted(ended.stdout.split("rank ")[1:])
    assert [each[0] for each in said] == ["0", "1"]
    assert said[0].strip()[1:] == said[1].strip()[1:]
    assert "['--standalone', 'x']" in said[0]
    assert not (tmp_path / "ucxgossip").exists(), "a token file was made"


PROTO_INFO = """\
[1.2] [vm:1 :0]   +--------+-------------+--------+
[1.2] [vm:1 :0]   | ucxgossip inter-node cfg#1      |
[1.2] [vm:1 :0]   | remote memory write by ucp_put* from host memory to host |
[1.2] [vm:1 :0]   +--------+-------------+--------+
[1.2] [vm:1 :0]   | Range  | Description | Config |
[1.2] [vm:1 :0]   +--------+-------------+--------+
[1.2] [vm:1 :0]   | 0..2047 | short | rc_mlx5/mlx5_0:1 |
[1.2] [vm:1 :0]   | 2K..inf | software emulation | tcp/lo |
[1.2] [vm:1 :0]   +--------+-------------+--------+
[1.2] [vm:1 :0]   | active message by ucp_am_send* from host memory |
[1.2] [vm:1 :0]   | 0..inf | copy-in | tcp/lo |
"""


def test_protocol_table_is_read() -> None:
    assert parse_protocols(PROTO_INFO) == [
        (0, 2047, "short rc_mlx5/mlx5_0:1"),
        (2048, float("inf"), "software emulation tcp/lo"),
    ]
    assert parse_protocols("nothing") == []


def test_advice() -> None:
    facts = {"target_must_progress": True, "rdma_devices": "mlx5_0", "ucx_origin": "wheel"}
    said = " ".join(advise(facts, [{"emulated": True}]))
    assert "emulated" in said and "verbs" in said and "engine thread" in said
    facts = {"target_must_progress": False, "rdma_devices": "none", "ucx_origin": "wheel"}
    assert len(advise(facts, [{"emulated": False}])) == 1
