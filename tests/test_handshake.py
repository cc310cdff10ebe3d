"""Ranks that do not fit together all fail soon, with one message that names the first difference.

Here through `join` and `attach`; tests/test_rendezvous.py has what lies below.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import nn

import ucxgossip as ug
from ucxgossip import errors, group, trust
from ucxgossip.bench import spawn
from ucxgossip.members import links
from ucxgossip.store import Bounded, Store

Ranks = Callable[..., list[Any]]
SOON = 10.0
"""Seconds within which all ranks must have failed."""
TIMEOUT = 60.0
"""What they would wait otherwise."""


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """What is compiled at first use is compiled before the deadlines count."""
    with ug.join(0, 1) as alone:
        alone.mailbox(8)


def one_message(ends: list[Any], kind: type[Exception]) -> str:
    assert [type(end) for end in ends] == [kind] * len(ends), ends
    (text,) = {str(end) for end in ends}
    return text


# --- join --------------------------------------------------------------------------------------


@pytest.mark.parametrize("odd", [0, 1, 2])
@pytest.mark.parametrize(
    ("fact", "value", "said"),
    [
        ("protocol", 99, r"join: protocol: rank 0 has (\d+|99), rank \d has (\d+|99)"),
        ("ucxgossip", "0.0.9", r"join: ucxgossip: rank 0 has '.+', rank \d has '.+'"),
        ("UCX", "1.13", r"join: UCX: rank 0 has '1\.\d+', rank \d has '1\.\d+'"),
        ("transport", "tcp", r"join: transport: rank 0 has '\w+', rank \d has '\w+'"),
        ("chunk", 8, r"join: chunk: rank 0 has \d+, rank \d has \d+"),
        ("device_chunk", 8, r"join: device_chunk: rank 0 has \d+, rank \d has \d+"),
        ("payload types", ["<f4", ">f8"], r"join: payload types\[1\]: rank 0 has '.f8', .*"),
        ("a new fact", 1, r"join: a new fact: rank \d has it, rank \d does not"),
    ],
)
def test_join(
    store: Store,
    as_ranks: Ranks,
    monkeypatch: pytest.MonkeyPatch,
    fact: str,
    value: object,
    said: str,
    odd: int,
) -> None:
    here = threading.local()
    facts = group._facts
    monkeypatch.setattr(
        group, "_facts", lambda *given: facts(*given) | ({fact: value} if here.rank == odd else {})
    )

    def body(rank: int) -> None:
        here.rank = rank
        ug.join(rank, 3, store, "shm", TIMEOUT)

    text = one_message(as_ranks(3, body, deadline=SOON), errors.MismatchError)
    assert re.fullmatch(said, text)
    assert f"rank {odd or 1} " in text or f"rank {odd or 2} " in text


@pytest.mark.parametrize("sizes", [(2, 3, 3), (3, 2, 3), (4, 4, 3)], ids=str)
def test_world_size(store: Store, as_ranks: Ranks, sizes: tuple[int, ...]) -> None:
    ends = as_ranks(3, lambda rank: ug.join(rank, sizes[rank], store, "shm", TIMEOUT), SOON)
    text = one_message(ends, errors.MismatchError)
    assert re.fullmatch(r"join: world size: rank \d has \d, rank \d has \d", text)


def test_tokens(store: Store, as_ranks: Ranks) -> None:
    def body(rank: int) -> None:
        token = "the token of all but one" if rank != 1 else "another token altogether"
        ug.join(rank, 3, store, "shm", TIMEOUT, token=token)

    ends = as_ranks(3, body, deadline=SOON)
    assert [type(end) for end in ends] == [errors.SignatureError] * 3
    assert str(ends[0]) == str(ends[2])
    assert "rank 1 has another token than this rank" in str(ends[0])
    assert "has another token than this rank" in str(ends[1])


def test_bad_token_is_refused_before_anything_else() -> None:
    for size in (1, 2):
        with pytest.raises(errors.TokenError, match="has 5 bytes"):
            ug.join(0, size, token="short")


def test_job_of_one_rank_looks_for_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(trust.TOKEN, "short")
    with ug.join(0, 1):
        pass


@pytest.mark.parametrize("name", ["warden/1", "wardens/0"])
@pytest.mark.parametrize("junk", [bytes(200), b"\xff" * 200, b""], ids=["zeros", "ones", "empty"])
def test_hostile_address_is_not_connected_to(
    store: Any, as_ranks: Ranks, monkeypatch: pytest.MonkeyPatch, name: str, junk: bytes
) -> None:
    """Somebody without the token replaces what a rank said of where it listens."""
    connected: list[object] = []
    monkeypatch.setattr(links.Outgoing, "__init__", lambda self, *rest: connected.append(rest))
    honest = store.set

    def spoilt(key: str, value: Any) -> None:
        honest(key, value[:4] + junk if key.endswith(f"/{name}") else value)

    monkeypatch.setattr(store, "set", spoilt)

    def body(rank: int) -> None:
        with ug.join(rank, 2, store, "shm", TIMEOUT):
            pass

    ends = as_ranks(2, body, deadline=SOON)
    told = [end for end in ends if isinstance(end, errors.SignatureError)]
    assert told and f"/{name}'" in str(told[0])
    assert all(isinstance(end, errors.GossipError) for end in ends)
    assert connected == []


# --- attach ------------------------------------------------------------------------------------


class Model(nn.Module):
    """Two layers and a buffer, made in the order given."""

    def __init__(self, what: str = "") -> None:
        super().__init__()
        layers = {
            "first": nn.Linear(4, 5 if what == "shape" else 3, bias=what != "missing"),
            "renamed" if what == "name" else "second": nn.Linear(3, 3),
        }
        for name in sorted(layers, reverse=what == "order"):
            self.add_module(name, layers[name])
        if what == "stride":
            self.first.weight.data = self.first.weight.data.t().contiguous().t()
        if what == "frozen":
            self.first.weight.requires_grad_(False)
        for name in ("a", "b") if what != "order of buffers" else ("b", "a"):
            size = 3 if what == "shape of a buffer" else 2
            dtype = torch.int32 if what == "dtype of a buffer" else torch.int64
            self.register_buffer(name, torch.zeros(size, dtype=dtype))
        if what == "dtype":
            self.double()


MODELS = {
    "shape": r"attach: parameters.first.weight.shape\[0\]: rank 0 has \d, rank \d has \d",
    "missing": r"attach: parameters.first.bias: rank \d has it, rank \d does not",
    "name": r"attach: parameters.(second|renamed).weight: rank \d has it, rank \d does not",
    "order": r"attach: order of parameters\[0\]: rank 0 has '.*', rank \d has '.*'",
    "dtype": r"attach: parameters.first.weight.dtype: rank 0 has 'torch.float..', rank .*",
    "stride": r"attach: parameters.first.weight.strides\[0\]: rank 0 has \d, rank \d has \d",
    "frozen": r"attach: parameters.first.weight.requires_grad: rank 0 has \w+, rank \d has \w+",
    "shape of a buffer": r"attach: model buffers.a.shape\[0\]: rank 0 has \d, rank \d has \d",
    "dtype of a buffer": r"attach: model buffers.a.dtype: rank 0 has 'torch.*', rank .*",
    "order of buffers": r"attach: order of model buffers\[0\]: rank 0 has '.', rank \d has '.'",
}

MODES: dict[str, tuple[dict[str, Any], str]] = {
    "mix": ({"mix": "weights"}, r"mix: rank 0 has '\w+', rank \d has '\w+'"),
    "combine": ({"combine": "awc"}, r"combine: rank 0 has 'a.c', rank \d has 'a.c'"),
    "optimizer state": (
        {"optimizer_state": True},
        r"optimizer state: rank 0 has \w+, rank \d has \w+",
    ),
    "buffers": ({"buffers": True}, r"buffers: rank 0 has \w+, rank \d has \w+"),
    "staleness": ({"staleness": 2}, r"staleness: rank 0 has \d, rank \d has \d"),
    "local steps": ({"local_steps": 3}, r"local steps: rank 0 has \d, rank \d has \d"),
    "global average": (
        {"global_average_every": 5},
        r"global average every: rank 0 has \w+, rank \d has \w+",
    ),
    "outer": ({"outer": ug.Nesterov()}, r"outer: rank 0 has .*, rank \d has .*"),
    "bucket bytes": ({"bucket_bytes": 64}, r"bucket bytes: rank 0 has \d+, rank \d has \d+"),
    "schedule": (
        {"schedule": ug.Rotated(ug.Ring(3), seed=0)},
        r"schedule: rank 0 has '.*', rank \d has '.*Ring.*'|schedule: rank 0 has '.*Ring.*', .*",
    ),
    "seed": (
        {"schedule": ug.Rotated(ug.Dissemination(3), seed=1)},
        r"schedule: rank 0 has '.*seed=\d\)', rank \d has '.*seed=\d\)'",
    ),
    "seed of matchings": (
        {"schedule": ug.RandomMatching(3, seed=7)},
        r"schedule: rank 0 has '.*', rank \d has '.*'",
    ),
}


def attach(job: Ranks, odd: int, what: str, options: dict[str, Any]) -> str:
    """What all ranks say where rank `odd` brings another model, or other options."""
    done = threading.Barrier(3, timeout=SOON)

    def body(ranks: ug.Group) -> str:
        model = Model(what if ranks.rank == odd else "")
        before = [parameter.data_ptr() for parameter in model.parameters()]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        try:
            with pytest.raises(errors.MismatchError) as raised:
                ug.attach(model, optimizer, ranks, **(options if ranks.rank == odd else {}))
            assert [parameter.data_ptr() for parameter in model.parameters()] == before
            return str(raised.value)
        finally:
            done.wait()

    (text,) = set(job(3, body, timeout=TIMEOUT))
    return str(text)


@pytest.mark.parametrize("odd", [0, 2])
@pytest.mark.parametrize("what", MODELS)
def test_models(job: Ranks, what: str, odd: int) -> None:
    assert re.fullmatch(MODELS[what], attach(job, odd, what, {}))


@pytest.mark.parametrize("odd", [0, 2])
@pytest.mark.parametrize("what", MODES)
def test_modes(job: Ranks, what: str, odd: int) -> None:
    options, said = MODES[what]
    assert re.fullmatch(f"attach: ({said})", attach(job, odd, "", options))


def test_the_first_of_several_differences_is_named(job: Ranks) -> None:
    options = {"bucket_bytes": 64, "local_steps": 2}
    said = attach(job, 1, "shape", options)
    assert said == "attach: local steps: rank 0 has 1, rank 1 has 2"


# --- processes, over torch's store -------------------------------------------------------------

PROLOGUE = """
import sys, torch, ucxgossip as ug
from torch import nn
rank, size, what = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
print("here", flush=True)
sys.stdin.readline()

def main():
    with ug.join(rank, size, transport="shm", timeout=60) as group:
        model = nn.Linear(4, 5 if what == "model" else 3)
        ug.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), group)

try:
    main()
except ug.errors.GossipError as error:
    print(type(error).__name__, error, flush=True)
"""


@contextmanager
def processes(
    commands: list[list[str]], variables: list[dict[str, str]]
) -> Iterator[list[subprocess.Popen[str]]]:
    port = str(spawn.free_port())
    started: list[subprocess.Popen[str]] = []
    try:
        for command, each in zip(commands, variables, strict=True):
            environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **each}
            started.append(
                subprocess.Popen(
                    [sys.executable, "-c", *command],
                    env=environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                )
            )
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


@pytest.mark.spawn
@pytest.mark.slow
@pytest.mark.parametrize(("what", "odd"), [("model", 2), ("size", 2), ("token", 0)])
def test_processes_end_with_one_message(what: str, odd: int) -> None:
    """Rank 0 holds the store, and keeps it until the others have read what went wrong."""
    commands, variables = [], []
    for rank in range(3):
        size = 4 if what == "size" and rank == odd else 3
        commands.append([PROLOGUE, str(rank), str(size), what if rank == odd else ""])
        other = what == "token" and rank == odd
        variables.append({trust.TOKEN: "another token altogether" if other else "x" * 32})
    with processes(commands, variables) as started:
        for process in started:  # who is seconds late finds the store gone
            assert process.stdout is not None and process.stdout.readline() == "here\n"
        for process in started:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        said = [process.communicate(timeout=120)[0].strip() for process in started]
    rest = {each for rank, each in enumerate(said) if rank != odd}
    assert len(rest) == 1, said
    (text,) = rest
    if what == "token":
        assert text.startswith(f"SignatureError rank {odd} has another token than this rank")
        assert said[odd].startswith("SignatureError rank")
    else:
        assert said[odd] == text
        assert text.startswith("MismatchError ")


STOPPED = """
import os, sys
from ucxgossip.errors import GossipError
from ucxgossip.rendezvous import Rendezvous
from ucxgossip.store import Place, open_store

rank, what = int(sys.argv[1]), sys.argv[2]
place = Place(rank, 2, os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), 2)
meeting = Rendezvous(open_store(place, 60.0), rank, 2, 60.0)
meeting.meet()
meeting.board.store._patience = 1.0
print("met", flush=True)
sys.stdin.readline()
try:
    meeting.agree("x", {}) if what == "agree" else meeting.raise_if_aborted()
except GossipError as error:
    print(type(error).__name__, error, flush=True)
    meeting.leave(1.0)
"""


@pytest.mark.spawn
@pytest.mark.slow
@pytest.mark.parametrize("what", ["agree", "look"])
def test_stopped_store_ends_the_wait(what: str) -> None:
    """torch's client would wait for ever for a server that is stopped."""
    commands = [[STOPPED, str(rank), what] for rank in range(2)]
    with processes(commands, [{}, {}]) as (host, guest):
        for process in (host, guest):
            assert process.stdout is not None
            assert process.stdout.readline() == "met\n"
        os.kill(host.pid, signal.SIGSTOP)
        said, _ = guest.communicate("\n", timeout=60)
    assert re.match(r"RendezvousError rank 1 lost the store .*no answer within \d.*stopped", said)


def test_bounded_store_answers_as_the_store_does(store: Store) -> None:
    bounded = Bounded(store, SOON)
    bounded.set("a", b"1")
    assert (bounded.get("a"), bounded.add("n", 2), bounded.check(["a", "b"])) == (b"1", 2, False)
    with pytest.raises(TimeoutError):
        bounded.wait(["b"], timedelta(seconds=0.01))
    with socket.socket() as closed, pytest.raises(OSError):
        Bounded(FailingStore(closed), SOON).get("a")


class FailingStore:
    """Whose calls raise what its socket does."""

    def __init__(self, closed: socket.socket) -> None:
        self._closed = closed

    def get(self, key: str) -> bytes:
        return self._closed.recv(1)

    set = add = check = wait = get  # type: ignore[assignment]
