"""The engine's tests once more without compilation: the two versions must do the same."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.spawn
@pytest.mark.parametrize(
    "names", ["test_engine test_rounds test_messages", "test_device_rounds test_device_ways"]
)
def test_engine_interpreted(names: str) -> None:
    folder = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib"]
        + [str(folder / f"{name}.py") for name in names.split()],
        env={**os.environ, "NUMBA_DISABLE_JIT": "1"},
        capture_output=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout.decode()[-4000:]
