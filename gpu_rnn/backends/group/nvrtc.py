# SPDX-License-Identifier: Apache-2.0
"""CUDA C++ text to a running kernel: NVRTC through CuPy's binding, a cache on disk, CuPy's loader, torch's stream.

Compiling needs no driver, so tests build exactly what ships. CuPy's own `RawModule(code=...)` would force
``-ftz=true`` and a plain architecture on it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.resources import files
from typing import Any, NamedTuple

import numpy as np
import torch

from gpu_rnn import cache
from gpu_rnn._version import __version__
from gpu_rnn.backends.group import clusters, cubin
from gpu_rnn.memo import memoize

OPTIONS = ("--std=c++17",)
INSTALL = "pip install 'gpu-rnn[cuda12]' or 'gpu-rnn[cuda13]', by the CUDA version of the driver"
_INCLUDE = re.compile(r'^#include "([\w.]+)"$', re.M)


class CompileError(RuntimeError):
    """NVRTC is missing, or refuses the text, or the driver its machine code; the message says why."""


def architecture(capability: tuple[int, int]) -> str:
    """What NVRTC calls a device of that compute capability."""
    major, minor = capability
    return f"sm_{major}{minor}" + ("a" if capability == (9, 0) else "")


def unavailable() -> str:
    """Why nothing can be compiled here; empty where it can."""
    try:
        _binding()
    except CompileError as error:
        return str(error)
    return ""


def no_driver() -> str:
    """Why no kernel can be loaded here; empty where one can."""
    reason = unavailable()
    if reason:
        return reason
    import cupy

    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"CuPy finds no usable NVIDIA driver: {error}"
    return "" if count else "CuPy sees no NVIDIA GPU"


@memoize(1)
def _binding() -> Any:
    if importlib.util.find_spec("cupy_backends") is None:
        raise CompileError(f"CuPy is not installed: {INSTALL}")
    try:
        from cupy_backends.cuda.libs import nvrtc

        nvrtc.getVersion()  # the library itself is opened at the first call
    except (ImportError, RuntimeError, OSError) as error:
        raise CompileError(f"CuPy's NVRTC cannot be loaded ({error}): {INSTALL}") from error
    return nvrtc


def flatten(text: str) -> str:
    """The text with the includes of `kernels/cuda` put in place, each once, so that a hash of it covers them."""
    seen: set[str] = set()

    def insert(match: re.Match[str]) -> str:
        name = match[1]
        if name in seen:
            return ""
        seen.add(name)
        file = files("gpu_rnn.kernels.cuda") / name
        if not file.is_file():  # the CPU's half of device.cuh, which no GPU reads
            return match[0]
        body = file.read_text()
        return f'#line 1 "{name}"\n' + _INCLUDE.sub(insert, body.replace("#pragma once\n", ""))

    return _INCLUDE.sub(insert, text)


def compile_cubin(source: str, arch: str, options: Sequence[str] = OPTIONS) -> bytes:
    """The machine code of a CUDA C++ text, from the cache or from NVRTC.

    Args:
        source: the text; includes of `kernels/cuda` are found.
        arch: a real architecture, such as "sm_90a".
        options: NVRTC's options other than the architecture.

    Raises:
        CompileError: no CuPy, no NVRTC, an architecture that this NVRTC does not know, or an error in the text, with
            the compiler's log.

    Example::

        >>> code = compile_cubin('extern "C" __global__ void zero(float *p) { *p = 0; }', "sm_80")
    """

    text = flatten(source)
    words = "\0".join([__version__, repr(_binding().getVersion()), arch, *options, text])
    key = hashlib.sha256(words.encode()).hexdigest()[:32]
    code = cache.kept(key, ".cubin")
    if code is None:
        code = _compile(text, arch, options)
        with suppress(OSError):  # no folder takes it: it is compiled again where it is needed again
            cache.keep(key, ".cubin", code)
    return code


def version() -> str:
    """Of the NVRTC that compiles, as "12.9"."""
    return ".".join(map(str, _binding().getVersion()))


def _compile(text: str, arch: str, options: Sequence[str]) -> bytes:
    nvrtc = _binding()
    program = nvrtc.createProgram(text, "gpu_rnn.cu", (), ())
    try:
        nvrtc.compileProgram(program, (f"--gpu-architecture={arch}", *options))
        return cubin.completed(nvrtc.getCUBIN(program))
    except ValueError as error:
        raise CompileError(f"NVRTC {version()} gives no machine code for {arch} that can be used: {error}") from error
    except nvrtc.NVRTCError as error:
        log = nvrtc.getProgramLog(program).strip() or str(error)
        raise CompileError(f"NVRTC {version()} does not compile for {arch}:\n{log}") from error
    finally:
        nvrtc.destroyProgram(program)


@contextmanager
def _current(device: torch.device) -> Iterator[None]:
    """Inside, a device is the one that torch, CuPy and the driver work on; no other is touched, before or after.

    CuPy's own context manager would set device 0 at its end wherever nothing was set before: half a GB of memory there.
    """
    import cupy

    with torch.cuda.device(device):
        cupy.cuda.runtime.setDevice(torch.cuda.current_device())  # a thread may have no context yet
        yield


class _Stream(NamedTuple):
    """A stream by its handle, as CuPy's launcher takes it."""

    ptr: int


class Function:
    """A kernel of a compiled text, on every device that it is called on. `cluster` is what its text says."""

    def __init__(
        self, source: str, name: str, arch: str, shared_bytes: int = 0, cooperative: bool = False, cluster: int = 1
    ) -> None:
        self.name, self.arch = name, arch
        self.shared_bytes, self.cooperative, self.cluster = shared_bytes, cooperative, cluster
        self._code = compile_cubin(source, arch)
        self._kernels: dict[int, Any] = {}  # by the device's index: a module is loaded into one device's context

    def _kernel(self, device: torch.device) -> Any:
        """As loaded on the current device.

        Raises:
            CompileError: the driver does not load it.
        """
        import cupy

        index = torch.cuda.current_device()
        if index in self._kernels:
            return self._kernels[index]
        try:
            module = cupy.cuda.Module()
            module.load(self._code)
            kernel = module.get_function(self.name)
            attribute = cupy.cuda.driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            cupy.cuda.driver.funcSetAttribute(kernel.ptr, attribute, self.shared_bytes)
            if self.cluster > clusters.PORTABLE:
                cupy.cuda.driver.funcSetAttribute(kernel.ptr, clusters.NON_PORTABLE_ALLOWED, 1)
        except (cupy.cuda.driver.CUDADriverError, cupy.cuda.runtime.CUDARuntimeError) as error:
            raise CompileError(f"the driver does not load {self.name} for {self.arch} on {device}: {error}") from error
        self._kernels[index] = kernel
        return kernel

    def resident(self, device: torch.device, threads: int) -> int:
        """Blocks of the kernel that are on a device at once, by the driver's count.

        Raises:
            CompileError: the driver of that device does not take the kernel.
        """
        import cupy

        try:
            with _current(device):
                kernel = self._kernel(device)
                if self.cluster > 1:
                    return self.cluster * clusters.resident(kernel.ptr, self.cluster, threads, self.shared_bytes)
                count = cupy.cuda.driver.occupancyMaxActiveBlocksPerMultiprocessor(
                    kernel.ptr, threads, self.shared_bytes
                )
        except (cupy.cuda.driver.CUDADriverError, cupy.cuda.runtime.CUDARuntimeError, OSError) as error:
            raise CompileError(f"{device} does not take {self.name}: {error}") from error
        return count * torch.cuda.get_device_properties(device).multi_processor_count

    def __call__(self, grid: int, threads: int, arguments: Sequence[torch.Tensor | int], device: torch.device) -> None:
        """Launches on torch's current stream. Tensors go by pointer; of an integer the kernel takes what it needs."""
        values = [np.uint64(a.data_ptr() if isinstance(a, torch.Tensor) else a) for a in arguments]
        with _current(device):
            kernel = self._kernel(device)
            stream = _Stream(torch.cuda.current_stream(device).cuda_stream)
            kernel((grid,), (threads,), values, self.shared_bytes, stream, self.cooperative)
