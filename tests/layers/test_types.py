# SPDX-License-Identifier: Apache-2.0
"""Type checkers know what a call takes and returns; mypy reads the same file in `make lint`."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

from tests.support.paths import ROOT
from tests.support.waiting import PATIENCE


@pytest.mark.slow
@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_calls_have_the_right_types(checker: str) -> None:
    if importlib.util.find_spec(checker) is None:
        pytest.skip(f"needs {checker}: pip install {checker}")
    python = ["--pythonpath", sys.executable] if checker == "pyright" else []
    command = [sys.executable, "-m", checker, *python, "tests/support/typed_calls.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout[-3000:]
