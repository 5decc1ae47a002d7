# SPDX-License-Identifier: Apache-2.0
"""What the doctor says of what kernels are built with."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from gpu_rnn.backends import building
from gpu_rnn.backends.group import nvrtc
from gpu_rnn.diagnostics import doctor

GPU = torch.device("cuda", 0)
NEEDS_TRITON = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed (Linux only)"
)


def compilers(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> str:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    return "\n".join(doctor._compilers(GPU))


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))


@pytest.mark.compile
@pytest.mark.compile("nvrtc")
def test_all_is_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CC", "sh")
    said = compilers(monkeypatch, (9, 0))
    assert f"NVRTC    {nvrtc.version()}, builds for sm_90a" in said
    assert "C compiler /" in said and f"its cache {tmp_path / 'triton'}; its ptxas knows sm_90" in said


@pytest.mark.compile
@pytest.mark.compile("nvrtc")
def test_an_architecture_that_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    said = compilers(monkeypatch, (9, 9))
    assert "'sm_99a' is not defined for option 'gpu-name'" in said and "does not compile for sm_99" in said
    building.ptxas_refusal.cache_clear()


@NEEDS_TRITON
@pytest.mark.parametrize(
    ("cc", "words"), [("none-such", "C compiler not found: CC is 'none-such'"), ("", "or name one in CC")]
)
def test_no_c_compiler(cc: str, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CC", cc)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert words in "\n".join(doctor._compilers(torch.device("cpu")))


@NEEDS_TRITON
def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "cache"))
    said = "\n".join(doctor._compilers(torch.device("cpu")))
    assert "its cache cannot be written (" in said and "set TRITON_CACHE_DIR" in said


def test_dtypes_that_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """No call on a CPU asks in which the hardware's tanh may be taken."""
    monkeypatch.setenv("GPU_RNN_APPROXIMATE", "fp8")
    assert "settings GPU_RNN_APPROXIMATE is 'fp8' in the environment" in doctor.report(torch.device("cpu"))


def test_a_deadline_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """No call on a CPU reads it."""
    assert "GPU_RNN_DEADLINE" not in doctor.report(torch.device("cpu"))
    monkeypatch.setenv("GPU_RNN_DEADLINE", "abc")
    assert "settings GPU_RNN_DEADLINE is 'abc' in the environment" in doctor.report(torch.device("cpu"))
