"""ucxgossip.bench.spawn: ranks are heard, and always ended."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ucxgossip.bench import spawn
from ucxgossip.bench.spawn import ended, free_port, lines, run_ranks
from ucxgossip.errors import ArgumentError, BenchError

pytestmark = pytest.mark.spawn

# Every rank writes its process id to the folder it is given, then does as it is told.
PROLOGUE = "import os, pathlib, sys, time; rank = int(os.environ['RANK'])\n"
RECORD = "pathlib.Path(os.environ['FOLDER'], str(rank)).write_text(str(os.getpid()))\n"
FOREVER = "import signal; signal.pause()\n"


def run(code: str, ranks: int, tmp_path: Path, deadline_s: float = 30) -> list[str]:
    printed: list[str] = []
    run_ranks(
        ["-c", PROLOGUE + code],
        ranks,
        on_line=printed.append,
        deadline_s=deadline_s,
        variables=lambda rank: {"FOLDER": str(tmp_path)},
    )
    return printed


def is_alive(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    return True


def recorded(tmp_path: Path) -> list[int]:
    return [int(path.read_text()) for path in tmp_path.iterdir() if path.read_text()]


def test_ranks_get_the_variables_of_torchrun(tmp_path: Path) -> None:
    code = (
        "names = ['WORLD_SIZE', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE', 'MASTER_ADDR',"
        " 'OMP_NUM_THREADS']\n"
        "print(rank, *(os.environ[name] for name in names))\n"
        "assert int(os.environ['MASTER_PORT']) > 0 and rank == int(os.environ['LOCAL_RANK'])\n"
    )
    assert run(code, 3, tmp_path) == ["0 3 0 3 127.0.0.1 1"]


def test_lines_of_rank_0_come_while_it_runs(tmp_path: Path) -> None:
    # Rank 0 waits for what only the callback does: without streaming this would not end.
    answer = tmp_path / "answer"
    os.mkfifo(answer)
    code = f"print('question'); print('got', open({str(answer)!r}).read())"
    printed: list[str] = []

    def on_line(line: str) -> None:
        printed.append(line)
        if line == "question":
            answer.write_text("it")

    run_ranks(["-c", code], 1, on_line=on_line, deadline_s=30)
    assert printed == ["question", "got it"]


def test_a_last_line_without_its_end_is_heard(tmp_path: Path) -> None:
    assert run("sys.stdout.write('a\\nb')", 1, tmp_path) == ["a", "b"]


def test_failing_rank_is_named_with_its_last_lines_and_the_others_are_ended(tmp_path: Path) -> None:
    code = RECORD + "if rank == 1: sys.exit('no memory left')\n" + FOREVER
    with pytest.raises(BenchError, match=r"rank 1 of 3 ended with status 1(.|\n)*no memory left"):
        run(code, 3, tmp_path)
    assert not any(map(is_alive, recorded(tmp_path)))


def test_rank_ended_by_a_signal_is_named(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="rank 0 of 1 ended on SIGSEGV"):
        run("import signal; os.kill(os.getpid(), signal.SIGSEGV)", 1, tmp_path)


def test_deadline_ends_all_even_those_that_ignore_sigterm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spawn, "_GRACE_S", 0.2)
    code = (
        "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        + RECORD
        + "print('still here', file=sys.stderr)\n"
        + FOREVER
    )
    with pytest.raises(BenchError, match=r"after 6 s(.|\n)*rank 0(.|\n)*still here(.|\n)*rank 1"):
        run(code, 2, tmp_path, deadline_s=6)
    assert len(recorded(tmp_path)) == 2
    assert not any(map(is_alive, recorded(tmp_path)))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_bench_leaves_no_rank(tmp_path: Path, number: int) -> None:
    # The callback interrupts the bench as a user or a job scheduler would.
    code = PROLOGUE + RECORD + "print('up')\n" + FOREVER
    bench = (
        "import os\n"
        "from ucxgossip.bench.spawn import run_ranks\n"
        f"run_ranks(['-c', {code!r}], 1, deadline_s=30,\n"
        f"          on_line=lambda line: os.kill(os.getpid(), {int(number)}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", bench],
        env={**os.environ, "FOLDER": str(tmp_path)},
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == (-number if number == signal.SIGINT else 128 + number)
    (process_id,) = recorded(tmp_path)
    assert not is_alive(process_id)


def test_failing_callback_ends_the_ranks(tmp_path: Path) -> None:
    def fail(line: str) -> None:
        raise ValueError(line)

    with pytest.raises(ValueError, match="up"):
        run_ranks(
            ["-c", PROLOGUE + RECORD + "print('up')\n" + FOREVER],
            1,
            on_line=fail,
            deadline_s=30,
            variables=lambda rank: {"FOLDER": str(tmp_path)},
        )
    (process_id,) = recorded(tmp_path)
    assert not is_alive(process_id)


def test_no_ranks() -> None:
    with pytest.raises(ArgumentError, match="at least one"):
        run_ranks(["-c", ""], 0, on_line=print, deadline_s=1)


def test_free_port_can_be_bound() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", free_port()))


def test_works_outside_the_main_thread(tmp_path: Path) -> None:
    printed: list[str] = []
    thread = threading.Thread(target=lambda: printed.extend(run("print('up')", 1, tmp_path)))
    thread.start()
    thread.join(timeout=30)
    assert printed == ["up"]


def test_lines_of_several_streams_and_their_deadline() -> None:
    read, write = os.pipe()
    try:
        os.write(write, b"one\ntw")
        heard = lines({"a": read}, time.monotonic() + 0.2)
        assert next(heard) == ("a", "one")
        with pytest.raises(TimeoutError):
            next(heard)
    finally:
        os.close(write)
        os.close(read)


def test_ended_ends_what_the_block_started() -> None:
    processes: list[subprocess.Popen[bytes]] = []
    with ended(processes):
        processes.append(subprocess.Popen([sys.executable, "-c", FOREVER]))
    assert processes[0].returncode == -signal.SIGTERM
