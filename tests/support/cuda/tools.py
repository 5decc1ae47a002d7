# SPDX-License-Identifier: Apache-2.0
"""CUDA's own tools, which say whether a cubin is one."""

import subprocess
from pathlib import Path

import pytest

from benchmarks.simulating.tools import tool


def opened(cubin: Path, name: str, *options: str) -> str:
    """What a tool prints of a cubin; the test fails where it does not open it, and is skipped where the tool is not
    found."""
    path = tool(name)
    if path is None:
        pytest.skip(f"not found: {name}, which is in Triton's wheel and in CUDA's toolkit")
    done = subprocess.run([path, *options, str(cubin)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{name}: {done.stdout[-500:]}{done.stderr}"
    return done.stdout
