# SPDX-License-Identifier: Apache-2.0
"""Where a test's CUDA source runs: on the CPU under the runtime beside this file, or on a GPU through CuPy."""

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np
import pytest
import torch
from cuda_cpu.build import CUDA, Argument, load, run


class Machine(Protocol):
    def __call__(
        self, source: Path, kernel: str, grid: int, block: int, shared_bytes: int, args: Iterable[Argument]
    ) -> None: ...


def on_cpu(source: Path, kernel: str, grid: int, block: int, shared_bytes: int, args: Iterable[Argument]) -> None:
    run(load(source), kernel, grid, block, shared_bytes, args)


def on_gpu(source: Path, kernel: str, grid: int, block: int, shared_bytes: int, args: Iterable[Argument]) -> None:
    """The same launch on the current device; results come back into the same CPU tensors."""
    cupy = pytest.importorskip("cupy", reason="CuPy, which launches CUDA on a GPU, is not installed")
    from gpu_rnn.launch.nvrtc import compile_cubin

    major, minor = torch.cuda.get_device_capability()
    cubin = compile_cubin(source.read_text(), 10 * major + minor, [f"-I{CUDA}"])
    function = cupy.RawModule(path=str(cubin)).get_function(kernel)
    args = list(args)
    copies = [value.cuda() if isinstance(value, torch.Tensor) else value for value in args]
    function((grid,), (block,), [native(value) for value in copies], shared_mem=shared_bytes)
    torch.cuda.synchronize()
    for value, copy in zip(args, copies, strict=True):
        if isinstance(value, torch.Tensor):
            value.copy_(copy)


def native(value: Argument) -> np.generic:
    if isinstance(value, torch.Tensor):
        return np.uintp(value.data_ptr())
    return np.float32(value) if isinstance(value, float) else np.int32(value)


ON_BOTH = pytest.mark.parametrize(
    "machine", [pytest.param(on_cpu, marks=pytest.mark.cuda_cpu), pytest.param(on_gpu, marks=pytest.mark.gpu)]
)
