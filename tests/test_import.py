# SPDX-License-Identifier: Apache-2.0
"""Importing gpu_rnn costs little and needs no optional package."""

import os
import statistics
import subprocess
import sys
from pathlib import Path

from tests.support.waiting import PATIENCE

LIMIT_S = 0.2  # of CPU time, which a busy machine does not lengthen, beside what importing torch takes

SECONDS_BESIDE_TORCH = """
import gc, time, torch
gc.freeze()  # a collection looks through all of torch's objects, and whether one is due just now is chance
start = time.process_time()
import gpu_rnn
print(time.process_time() - start)
"""

WITHOUT_OPTIONAL_PACKAGES = """
import sys

for name in ("triton", "cupy", "cupy_backends", "keras"):
    sys.modules[name] = None  # importing it raises, importlib.util.find_spec says that it is not there
import torch, gpu_rnn
layer = gpu_rnn.LSTM(3, 4, activation="relu")
y, _ = layer(torch.randn(5, 2, 3))
y.sum().backward()
assert "reference" in str(gpu_rnn.explain(layer))
print(tuple(y.shape))
"""


def python(program: str, environment: dict[str, str] | None = None) -> str:
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_is_quick(tmp_path: Path) -> None:
    """With byte code, as pip installs it; the first import of these makes it."""
    environment = os.environ | {"PYTHONPYCACHEPREFIX": str(tmp_path), "PYTHONDONTWRITEBYTECODE": ""}
    python("import gpu_rnn", environment)
    seconds = statistics.median(float(python(SECONDS_BESIDE_TORCH, environment)) for _ in range(5))
    assert seconds < LIMIT_S


def test_importing_brings_nothing_that_waits_for_its_first_use() -> None:
    program = "import sys, torch, numpy; before = set(sys.modules); import gpu_rnn; print(*(set(sys.modules) - before))"
    brought = {name.split(".")[0] for name in python(program).split()}
    assert brought.isdisjoint({"statistics", "decimal", "fractions", "triton", "cupy", "keras", "onnx", "numba"})


def test_importing_needs_no_optional_package() -> None:
    assert python(WITHOUT_OPTIONAL_PACKAGES) == "(5, 2, 4)"
