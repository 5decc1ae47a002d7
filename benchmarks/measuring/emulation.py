# SPDX-License-Identifier: Apache-2.0
"""The GPU's kernels on the CPU: calls go the way they would go on an H100, and nothing of it says how fast they are.

`resident` and `step` run in Triton's interpreter, `group` as C++ by the runtime of the tests (tests/support/cuda_cpu).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec

from gpu_rnn.backends import triton_interpreter


def unavailable() -> str:
    """What is missing here, empty if nothing is: kernels that run in the interpreter, and the tests' runtime for
    CUDA."""
    needed = {"triton": "Triton (Linux only)", "pytest": "pytest, which the tests' runtime is written for"}
    missing = [words for name, words in needed.items() if find_spec(name) is None]
    missing += [] if shutil.which("g++") else ["g++"]
    return f"--emulate needs {', '.join(missing)}" if missing else ""


def interpreting() -> bool:
    """Whether this process can emulate: Triton decides when it is imported."""
    return triton_interpreter.INTERPRETING


def again(script: str, arguments: Sequence[str]) -> int:
    """The same command in a process that can; its exit status."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    return subprocess.run([sys.executable, script, *arguments], env=environment, check=False).returncode


@contextmanager
def gpu() -> Iterator[None]:
    """Inside, what is on the CPU is taken to be on an H100."""
    import pytest

    from tests.support.group import pretend

    with pytest.MonkeyPatch.context() as patch:
        pretend(patch)
        yield
