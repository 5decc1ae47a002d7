# SPDX-License-Identifier: Apache-2.0
"""CUDA C++ text to machine code and its cache, and what is said where that cannot be."""

import importlib.util
import random
import stat
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from gpu_rnn import cache
from gpu_rnn.backends.group import cubin, nvrtc
from tests.support.cuda.tools import opened

SOURCE = 'extern "C" __global__ void zero(float *p) { *p = 0.0f; }'
needs_nvrtc = pytest.mark.skipif(
    importlib.util.find_spec("cupy_backends") is None, reason="CuPy is not installed (gpu-rnn[cuda12] or [cuda13])"
)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty cache of its own for each test."""
    monkeypatch.setenv("GPU_RNN_CACHE", str(tmp_path / "kernels"))
    cached = (cache.folder, nvrtc._binding)
    for function in cached:
        function.cache_clear()
    yield tmp_path / "kernels"
    for function in cached:
        function.cache_clear()


def test_without_cupy_the_reason_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "CuPy is not installed: pip install" in nvrtc.unavailable()
    assert nvrtc.no_driver() == nvrtc.unavailable()
    with pytest.raises(nvrtc.CompileError, match="CuPy is not installed"):
        nvrtc.compile_cubin(SOURCE, "sm_80")


def test_a_binding_that_does_not_import_is_a_reason(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "cupy_backends.cuda.libs", None)
    assert "NVRTC cannot be loaded" in nvrtc.unavailable()


def test_includes_are_put_in_place_once():
    flat = nvrtc.flatten('#include "pointwise.cuh"\n#include "pointwise.cuh"\nint last;')
    assert flat.count("float sigmoidf(float x)") == 1
    assert '#include "' not in flat and flat.endswith("int last;")


def test_architectures():
    found = [nvrtc.architecture(c) for c in ((8, 0), (8, 6), (9, 0), (10, 0), (12, 0))]
    assert found == ["sm_80", "sm_86", "sm_90a", "sm_100", "sm_120"]


@needs_nvrtc
def test_a_text_is_compiled_once(folder: Path, monkeypatch):
    code = nvrtc.compile_cubin(SOURCE, "sm_90a")
    assert code[:4] == b"\x7fELF" and b"zero" in code
    (file,) = folder.iterdir()
    assert file.read_bytes() == code
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and stat.S_IMODE(folder.stat().st_mode) == 0o700
    monkeypatch.setattr(nvrtc, "_compile", None)  # a second compilation would call it
    assert nvrtc.compile_cubin(SOURCE, "sm_90a") == code


@needs_nvrtc
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_120"])
def test_a_cubin_ends_where_its_own_headers_say(arch: str, folder: Path):
    """CuPy's binding cuts the last byte off, and no tool opens what is left."""
    code = nvrtc.compile_cubin(SOURCE, arch)
    assert cubin.end(code) == len(code)
    (file,) = folder.iterdir()
    assert ".text.zero" in opened(file, "nvdisasm")
    with pytest.raises(ValueError, match=f"of {len(code)} bytes came as {len(code) - 2}"):
        cubin.completed(code[:-2])
    with pytest.raises(ValueError, match=f"of {len(code)} bytes came as {len(code) + 1}"):
        cubin.completed(code + b"\0")
    for cut in (code[:9], code[: len(code) // 2], b"", bytes(len(code))):
        with pytest.raises(ValueError, match="ELF file"):
            cubin.completed(cut)


@needs_nvrtc
@pytest.mark.parametrize("kind", ["empty", "half", "zeros", "garbage", "one byte less", "one bit"])
def test_a_torn_file_is_built_again(kind: str, folder: Path):
    code = nvrtc.compile_cubin(SOURCE, "sm_90a")
    (file,) = folder.iterdir()
    torn = {
        "empty": b"",
        "half": code[: len(code) // 2],
        "zeros": bytes(len(code)),
        "garbage": random.Random(0).randbytes(len(code)),
        "one byte less": code[:-1],
        "one bit": code[:500] + bytes([code[500] ^ 1]) + code[501:],
    }
    file.write_bytes(torn[kind])
    assert nvrtc.compile_cubin(SOURCE, "sm_90a") == code
    assert [path.read_bytes() for path in folder.iterdir()] == [code]


@needs_nvrtc
def test_registers_and_stack_are_read_from_the_machine_code():
    indexed = (
        'extern "C" __global__ void f(int *p, int k) '
        "{ int a[64] = {}; for (int i = 0; i < 64; i++) a[p[i] & 63] = i; *p = a[k]; }"
    )
    plain, local = (
        cubin.usage(nvrtc.compile_cubin(SOURCE, "sm_90a")),
        cubin.usage(nvrtc.compile_cubin(indexed, "sm_90a")),
    )
    assert 4 <= plain.registers <= 32 and plain.stack == 0
    assert local.stack == 256


@needs_nvrtc
def test_architecture_options_and_text_have_files_of_their_own(folder: Path):
    nvrtc.compile_cubin(SOURCE, "sm_80")
    nvrtc.compile_cubin(SOURCE, "sm_86")
    nvrtc.compile_cubin(SOURCE, "sm_80", ("--std=c++17", "--fmad=false"))
    nvrtc.compile_cubin(SOURCE + "\n", "sm_80")
    assert len(list(folder.iterdir())) == 4


@needs_nvrtc
def test_an_error_in_the_text_comes_with_the_log(folder: Path):
    with pytest.raises(nvrtc.CompileError, match='identifier "missing" is undefined'):
        nvrtc.compile_cubin('extern "C" __global__ void f() { missing(); }', "sm_80")
    with pytest.raises(nvrtc.CompileError, match="does not compile for sm_10"):
        nvrtc.compile_cubin(SOURCE, "sm_10")
    assert not list(folder.iterdir())


@needs_nvrtc
def test_where_nothing_can_be_written_it_is_compiled_all_the_same(tmp_path: Path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("GPU_RNN_CACHE", str(blocked / "kernels"))
    code = nvrtc.compile_cubin(SOURCE, "sm_80")
    monkeypatch.setattr(nvrtc, "_compile", lambda *what: code)  # from the temporary folder, or again
    assert nvrtc.compile_cubin(SOURCE, "sm_80") == code

    def full(name: str, content: bytes) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "write", full)
    assert nvrtc.compile_cubin(SOURCE, "sm_86") == code


@needs_nvrtc
@pytest.mark.skipif(torch.cuda.is_available(), reason="an NVIDIA GPU is here, whose driver loads it")
def test_a_kernel_that_no_driver_loads_is_a_reason(monkeypatch):
    function = nvrtc.Function(SOURCE, "zero", "sm_80")
    monkeypatch.setattr(nvrtc, "_current", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with pytest.raises(nvrtc.CompileError, match="the driver does not load zero for sm_80 on cuda:0"):
        function.resident(torch.device("cuda", 0), 32)
    assert "no usable NVIDIA driver" in nvrtc.no_driver()
