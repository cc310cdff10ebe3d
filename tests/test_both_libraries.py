"""The layers that touch UCX, once more with the system's libucp.

Skipped, with the reason, where only one of the two is installed.
"""

import ctypes.util
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ucxgossip.ucp import lib

FILES = {
    "test_ucp.py": "",
    "test_engine.py": "",
    "test_rounds.py": "",
    "test_messages.py": "",
    "test_group.py": "",
    "test_spawn.py": "rounds_are_exact and not 8",  # processes take seconds to start here
}
INNER = "UCXGOSSIP_TEST_INNER"


@pytest.mark.spawn
@pytest.mark.skipif(INNER in os.environ, reason="this is the inner run")
@pytest.mark.parametrize("name", FILES)
def test_with_the_systems_libucp(name: str) -> None:
    system = ctypes.util.find_library("ucp")
    if system is None or importlib.util.find_spec("libucx") is None:
        pytest.skip("needs both the system's libucp (apt install libucx0) and the wheel's")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib"]
        + [str(Path(__file__).with_name(name)), "-k", FILES[name]],
        env={**os.environ, lib.ENVIRONMENT_VARIABLE: system, INNER: "1"},
        capture_output=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout.decode()[-4000:]
