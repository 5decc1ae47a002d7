# SPDX-License-Identifier: Apache-2.0
"""The GPU's kernels on the CPU: calls go the way they would go on an H100, and nothing of it says how fast they are.

`resident` and `step` run in Triton's interpreter, `group` as C++ by the runtime beside this file.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from typing import Any
from unittest import mock

from benchmarks.emulating import build
from gpu_rnn import devices
from gpu_rnn.backends import triton_interpreter
from gpu_rnn.backends.group import launch as group
from gpu_rnn.backends.group import nvrtc
from gpu_rnn.backends.group.layout import source
from gpu_rnn.dispatch import choice


def unavailable() -> str:
    """What is missing here, empty if nothing is: Triton, which interprets kernels, and a compiler for the runtime."""
    missing = [] if find_spec("triton") else ["Triton (Linux only)"]
    missing += [] if shutil.which("g++") else ["g++"]
    return f"--emulate needs {', '.join(missing)}" if missing else ""


def interpreting() -> bool:
    """Whether this process can emulate: Triton decides when it is imported."""
    return triton_interpreter.INTERPRETING


def again(script: str, arguments: Sequence[str]) -> int:
    """The same command in a process that can; its exit status."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    return subprocess.run([sys.executable, script, *arguments], env=environment, check=False).returncode


def run_on_cpu(launches: list[group.Launch], reached: set[int] | None = None, **options: Any) -> None:
    """Runs launches under the CPU runtime; `options` are those of its `load` and `run`. Adds the sites `reached`."""
    sanitizer = options.pop("sanitizer", None)
    for launch in launches:
        layout = launch.layout
        program = build.load(source(layout), sanitizer=sanitizer)
        size = {"grid": launch.grid, "block": layout.threads, "shared_bytes": layout.shared_bytes}
        size["cluster"] = layout.members if layout.cluster else 1
        found = build.run(program, layout.kernel, args=launch.ordered, **(size | options))
        if reached is not None:
            reached |= found


def replacements() -> list[tuple[Any, str, Any]]:
    """Objects, their attributes, and what stands for these while calls go as on an H100: the driver's call and what
    leads to it."""
    return [
        (group.Launch, "run", lambda launch, device: run_on_cpu([launch])),
        (group, "prepare", lambda problem: None),
        (nvrtc, "unavailable", lambda: ""),
        (choice, "device_of", lambda device: devices.describe("H100")),
    ]


@contextmanager
def emulated() -> Iterator[None]:
    """Inside, what is on the CPU is taken to be on an H100."""
    with ExitStack() as stack:
        for replaced in replacements():
            stack.enter_context(mock.patch.object(*replaced))
        yield
