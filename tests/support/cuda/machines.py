# SPDX-License-Identifier: Apache-2.0
"""Where a test's CUDA source runs: under the runtime of benchmarks/emulating, or on a GPU through CuPy."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np
import pytest
import torch

from benchmarks.emulating.build import Argument, load, run
from gpu_rnn.backends.group import nvrtc


class Machine(Protocol):
    """Launches a kernel of a source and comes back when it has ended; tensors are changed in place."""

    def __call__(
        self, source: Path, kernel: str, grid: int, block: int, shared_bytes: int, args: Iterable[Argument]
    ) -> None: ...


def on_cpu(source: Path, kernel: str, grid: int, block: int, shared_bytes: int, args: Iterable[Argument]) -> None:
    run(load(source), kernel, grid, block, shared_bytes, args)


def on_gpu(source: Path, kernel: str, grid: int, block: int, shared_bytes: int, args: Iterable[Argument]) -> None:
    if nvrtc.no_driver():
        pytest.skip(nvrtc.no_driver())
    arch = nvrtc.architecture(torch.cuda.get_device_capability())
    function = nvrtc.Function(source.read_text(), kernel, arch, shared_bytes)
    values = list(args)
    copies = [value.cuda() if isinstance(value, torch.Tensor) else value for value in values]
    function(grid, block, [sized(value) for value in copies], torch.device("cuda", torch.cuda.current_device()))
    for value, copy in zip(values, copies, strict=True):
        if isinstance(value, torch.Tensor):
            value.copy_(copy)


def sized(value: Argument) -> torch.Tensor | np.generic:
    """A number in the width of the parameters of this folder's kernels."""
    if isinstance(value, torch.Tensor):
        return value
    return np.float32(value) if isinstance(value, float) else np.int32(value)


NEEDS_COMPILER = pytest.mark.skipif(
    shutil.which("g++") is None, reason="g++ is not installed; it builds the CUDA sources for the CPU"
)
