"""ucxgossip.bench.environment: what it tells, and what it must not."""

from __future__ import annotations

import getpass
import json
import runpy
import shutil
import socket
import subprocess
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from ucxgossip.bench import environment as environment_module
from ucxgossip.bench.environment import environment


def test_is_json_and_names_the_machine_and_its_software() -> None:
    told = json.loads(json.dumps(environment("1.22.0", "/somewhere/lib/libucp.so.0")))
    assert told["ucx"] == "1.22.0"
    assert told["cores"] >= 1
    assert told["memory"] > 0
    assert datetime.fromisoformat(told["date"]).utcoffset() == timedelta(0)
    assert told["numpy"] and told["kernel"].startswith("Linux")


def test_tells_neither_host_nor_user_nor_paths() -> None:
    text = json.dumps(environment("1.22.0", "/home/someone/.venv/lib/libucp.so.0"))
    assert "libucp.so.0" in text
    assert "/home" not in text and "someone" not in text
    values = {str(value) for value in environment("1.22.0", None).values()}
    assert socket.gethostname() not in values and getpass.getuser() not in values


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_is_that_of_this_source(tmp_path: Path) -> None:
    """And of no repository that an installed copy lies in."""

    def git(*command: str) -> str:
        found = subprocess.run(
            ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e", *command],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
        return found.stdout.strip()

    copy = tmp_path / "environment.py"
    shutil.copy(environment_module.__file__, copy)
    (tmp_path / "other").write_text("text")
    git("init", "-q")
    git("add", "other")
    git("commit", "-qm", "one")
    assert commit_told_by(copy) is None
    git("add", ".")
    git("commit", "-qm", "two")
    assert commit_told_by(copy) == git("rev-parse", "--short", "@")
    (tmp_path / "other").write_text("changed")
    assert commit_told_by(copy) == git("rev-parse", "--short", "@") + "+"


def commit_told_by(source: Path) -> object:
    return runpy.run_path(str(source))["environment"](None, None)["commit"]


def test_what_is_unknown_is_none() -> None:
    told = environment(None, None)
    assert told["ucx"] is None and told["ucx_library"] is None
