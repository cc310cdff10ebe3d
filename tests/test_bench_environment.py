"""ucxgossip.bench.environment: what it tells, and what it must not."""

from __future__ import annotations

import getpass
import json
import socket
from datetime import datetime, timedelta

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


def test_what_is_unknown_is_none() -> None:
    told = environment(None, None)
    assert told["ucx"] is None and told["ucx_library"] is None
