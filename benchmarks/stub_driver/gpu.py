# SPDX-License-Identifier: Apache-2.0
"""What is on the CPU is taken to be on an H200 whose driver is the stub. Import it in a process that `process.run`
started.

Triton compiles, specialises and launches as on a GPU, up to the driver's call; then nothing runs, so results are
whatever the buffers held.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils
from triton.runtime.driver import driver as triton_driver

from gpu_rnn import devices
from gpu_rnn.backends.step import gpu
from gpu_rnn.call import run
from gpu_rnn.dispatch import choice


class Launch(NamedTuple):
    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int


class _Launch(ctypes.Structure):
    _fields_ = (
        ("kernel", ctypes.c_char * 256),
        ("grid", ctypes.c_uint * 3),
        ("threads", ctypes.c_uint),
        ("shared_bytes", ctypes.c_uint),
    )


MOST = 65536  # cuda.cpp


class Driver:
    """The stub driver's memory."""

    def __init__(self) -> None:
        path = Path(os.environ["TRITON_LIBCUDA_PATH"]) / "libcuda.so.1"
        self._library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        self.clear()

    def _number(self, name: str, kind: type = ctypes.c_long) -> ctypes.c_long:
        return kind.in_dll(self._library, name)

    def clear(self) -> None:
        """Forgets all launches and modules so far."""
        self._first = self._number("stub_launched").value
        self._first_module = self._number("stub_loaded").value

    @property
    def launches(self) -> list[Launch]:
        """Since the last `clear`."""
        kept = (_Launch * MOST).in_dll(self._library, "stub_launches")
        each = (kept[k % MOST] for k in range(self._first, self._number("stub_launched").value))
        return [Launch(e.kernel.decode(), tuple(e.grid), e.threads, e.shared_bytes) for e in each]

    @property
    def modules(self) -> list[str]:
        """The kernels whose machine code was loaded since the last `clear`: one for each variant that launches asked
        for."""
        kept = ((ctypes.c_char * 256) * MOST).in_dll(self._library, "stub_kernels")
        return [kept[k % MOST].value.decode() for k in range(self._first_module, self._number("stub_loaded").value)]

    def fail(self, modules: int = 0, launches: int = 0) -> None:
        """From now on loading a module, or a launch, gives that status of the driver (209: no kernel image); 0:
        none."""
        self._number("stub_module_status", ctypes.c_int).value = modules
        self._number("stub_launch_status", ctypes.c_int).value = launches


class _Triton(CudaDriver):
    """Triton's driver, without what it asks torch.cuda."""

    capability = (9, 0)

    def __init__(self) -> None:
        self.launcher_cls = CudaLauncher
        self.get_current_device = lambda: 0
        self.set_current_device = lambda device: None
        self.get_current_stream = lambda device: 0
        self.get_device_capability = lambda device=0: self.capability

    @property
    def utils(self) -> CudaUtils:  # built by the C compiler when it is first asked for, as in the driver proper
        return CudaUtils()

    def get_current_target(self) -> GPUTarget:
        major, minor = self.capability
        return GPUTarget("cuda", 10 * major + minor, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


driver = Driver()
triton_driver.set_active(_Triton())
H200 = replace(devices.describe("H200"), name="NVIDIA H200")  # as one that is here: what is not installed is missed
choice.device_of = lambda device: H200
torch.backends.cudnn.rnn.fp32_precision = "ieee"  # tensors on the CPU are never taken for tf32's
run._on_a_cpu = run._on_a_gpu  # whose short ways alone a tensor on a GPU takes
devices.at_hand = lambda described: [torch.device("cpu")]
gpu.triton_interpreter = SimpleNamespace(INTERPRETING=True)  # its kernels take tensors of the CPU, here as there
