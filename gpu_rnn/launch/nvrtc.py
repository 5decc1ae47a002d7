# SPDX-License-Identifier: Apache-2.0
"""CUDA C++ text to a running kernel: NVRTC through CuPy's binding, a cache on disk, CuPy's loader, torch's stream.

Compiling needs no driver, so tests build exactly what ships. CuPy's own `RawModule(code=...)` would force
``-ftz=true`` and a plain architecture on it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import struct
from collections.abc import Sequence
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from gpu_rnn import cache

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


@lru_cache(maxsize=1)
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

        >>> cubin = compile_cubin('extern "C" __global__ void zero(float *p) { *p = 0; }', "sm_80")
    """
    return cubin_path(source, arch, tuple(options)).read_bytes()


@lru_cache(maxsize=1024)
def cubin_path(source: str, arch: str, options: tuple[str, ...] = OPTIONS) -> Path:
    """As `compile_cubin`; the file that holds it, as CuPy's loader wants it."""
    from gpu_rnn import __version__

    text = flatten(source)
    version = _binding().getVersion()
    key = "\0".join([__version__, repr(version), arch, *options, text])
    name = f"{hashlib.sha256(key.encode()).hexdigest()}.cubin"
    found = cache.folder() / name
    if found.is_file():
        return found
    cubin = _compile(text, arch, options)
    try:
        return cache.write(name, cubin)
    except OSError as error:
        raise CompileError(f"no folder to write compiled kernels to: {error}; set GPU_RNN_CACHE") from error


def _compile(text: str, arch: str, options: tuple[str, ...]) -> bytes:
    nvrtc = _binding()
    program = nvrtc.createProgram(text, "gpu_rnn.cu", (), ())
    try:
        nvrtc.compileProgram(program, (f"--gpu-architecture={arch}", *options))
        return nvrtc.getCUBIN(program)
    except nvrtc.NVRTCError as error:
        log = nvrtc.getProgramLog(program).strip() or str(error)
        version = ".".join(map(str, nvrtc.getVersion()))
        raise CompileError(f"NVRTC {version} does not compile for {arch}:\n{log}") from error
    finally:
        nvrtc.destroyProgram(program)


class Usage(NamedTuple):
    """What a thread of a kernel takes: registers, and bytes of stack where those did not suffice."""

    registers: int
    stack: int


def usage(cubin: bytes) -> Usage:
    """The most that a thread of any kernel in a cubin takes.

    The ELF section .nv.info lists attributes as (format, number, size, value); those of format 4 hold a function and a
    figure, number 0x2f its registers and 0x11 its frame.
    """
    table = struct.unpack_from("<Q", cubin, 0x28)[0]
    entry, count, names = struct.unpack_from("<3H", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", cubin, table + entry * k) for k in range(count)]
    found = {0x2F: 0, 0x11: 0}
    for name, _, _, _, position, size in headers:
        if not cubin.startswith(b".nv.info\0", headers[names][4] + name):
            continue
        end = position + size
        while position < end:
            kind, attribute, length = struct.unpack_from("<BBH", cubin, position)
            if kind == 4 and attribute in found:
                found[attribute] = max(found[attribute], struct.unpack_from("<I", cubin, position + 8)[0])
            position += 4 + (length if kind == 4 else 0)  # else the value is `length` itself
    return Usage(found[0x2F], found[0x11])


class _Stream(NamedTuple):
    """A stream by its handle, as the CUDA stream protocol has it."""

    handle: int

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.handle


class Function:
    """A kernel of a compiled text, on every device that it is called on."""

    def __init__(self, source: str, name: str, arch: str, shared_bytes: int = 0, cooperative: bool = False) -> None:
        import cupy

        path = cubin_path(source, arch)
        try:
            module = cupy.RawModule(path=str(path), enable_cooperative_groups=cooperative)
            self.kernel = module.get_function(name)
        except (cupy.cuda.driver.CUDADriverError, cupy.cuda.runtime.CUDARuntimeError) as error:
            raise CompileError(f"the driver does not load {name} for {arch}: {error}") from error
        self.shared_bytes = shared_bytes

    def resident(self, device: torch.device, threads: int) -> int:
        """Blocks of the kernel that are on a device at once, by the driver's count.

        Raises:
            CompileError: the driver of that device does not take the kernel.
        """
        import cupy

        try:
            with cupy.cuda.Device(device.index):
                self.kernel.max_dynamic_shared_size_bytes = self.shared_bytes
                count = cupy.cuda.driver.occupancyMaxActiveBlocksPerMultiprocessor(
                    self.kernel.kernel.ptr, threads, self.shared_bytes
                )
        except (cupy.cuda.driver.CUDADriverError, cupy.cuda.runtime.CUDARuntimeError) as error:
            raise CompileError(f"{device} does not take {self.kernel.name}: {error}") from error
        return count * torch.cuda.get_device_properties(device).multi_processor_count

    def __call__(
        self, grid: int, threads: int, arguments: Sequence[torch.Tensor | int], device: torch.device
    ) -> None:
        """Launches on torch's current stream. Tensors go by pointer; of an integer the kernel takes what it needs."""
        import cupy

        stream = cupy.cuda.Stream.from_external(_Stream(torch.cuda.current_stream(device).cuda_stream))
        values = [np.uint64(a.data_ptr() if isinstance(a, torch.Tensor) else a) for a in arguments]
        with cupy.cuda.Device(device.index), stream:
            self.kernel.max_dynamic_shared_size_bytes = self.shared_bytes
            self.kernel((grid,), (threads,), values, shared_mem=self.shared_bytes)
