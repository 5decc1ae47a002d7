# SPDX-License-Identifier: Apache-2.0
"""How a library in C is built, kept and found again, and what is said where that fails."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import gpu_rnn
from gpu_rnn import cache, memo
from gpu_rnn.backends.native import building, launch
from gpu_rnn.diagnostics import doctor
from tests.support import native
from tests.support.paths import ROOT

TEXT = "int run(void) { return 7; }"
CALL = """
import torch, gpu_rnn
torch.set_num_threads(1)
torch.manual_seed(0)
with torch.no_grad():
    print(gpu_rnn.LSTM(2, 3, backend="native")(torch.ones(4, 1, 2))[0].sum().item())
"""


@pytest.fixture(autouse=True)
def forgotten(cache_folder: Path) -> Iterator[None]:
    """Nothing is built, kept or known to fail."""
    remembered = (building.library, building._compiler, building._version, launch._failures)

    def clear() -> None:
        for each in remembered:
            each.clear() if isinstance(each, dict) else each.cache_clear()
        memo.clear("gpu_rnn.dispatch")

    clear()
    yield
    clear()


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that says what it was asked, and does as the true one."""
    path, true = tmp_path / "compiler", needed()
    path.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\nexec {true} "$@"\n')
    path.chmod(0o700)
    monkeypatch.setenv("CC", str(path))
    return path


def needed() -> str:
    native.any_compiler()
    return building.compiler()[0]


def test_a_build_is_said_once(compiler: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "gpu_rnn"):
        for _ in range(2):
            building.library(TEXT, ())
            building.library.cache_clear()
    assert [record.getMessage() for record in caplog.records] == [
        f"native: builds a library with {compiler}, which is kept for later calls"
    ]


def builds(compiler: Path) -> int:
    asked = compiler.parent / "asked"
    return sum("-shared" in line for line in asked.read_text().splitlines()) if asked.exists() else 0


def test_a_text_is_built_once(compiler: Path, cache_folder: Path) -> None:
    for _ in range(2):
        building.library.cache_clear()
        assert building.library(TEXT, ()).run() == 7
    assert builds(compiler) == 1
    assert building.library(TEXT.replace("7", "8"), ()).run() == 8
    assert building.library(TEXT, ("-DWHATEVER",)).run() == 7
    assert builds(compiler) == 3


def test_nothing_is_built_before_it_is_taken(compiler: Path) -> None:
    layer = gpu_rnn.LSTM(2, 3)
    gpu_rnn.explain(layer, torch.zeros(3, 1, 2))
    layer(torch.zeros(3, 1, 2))
    assert builds(compiler) == 0
    layer.backend = "native"
    layer(torch.zeros(3, 1, 2))
    assert builds(compiler) == 2  # forward and backward
    layer(torch.zeros(5, 4, 2))
    assert builds(compiler) == 2


@pytest.mark.parametrize("content", [b"", b"\x7fELF torn"])
def test_a_library_that_was_changed_is_built_again(content: bytes, compiler: Path, cache_folder: Path) -> None:
    building.library(TEXT, ())
    (path,) = cache_folder.glob("native-*.so")
    path.unlink()
    path.write_bytes(content)
    building.library.cache_clear()
    assert building.library(TEXT, ()).run() == 7
    assert builds(compiler) == 2


def test_a_foreign_cache_is_not_used(compiler: Path, cache_folder: Path) -> None:
    cache_folder.mkdir(mode=0o777)
    cache_folder.chmod(0o777)
    cache.folder.cache_clear()
    assert building.library(TEXT, ()).run() == 7
    assert not list(cache_folder.iterdir())


def refused(words: str) -> None:
    """The layer says why; left to itself it runs on another backend."""
    layer, x = gpu_rnn.GRU(2, 3, reset_after=True, backend="native"), torch.zeros(3, 1, 2)
    with pytest.raises(ValueError, match=f"(?s)backend='native' cannot run this call:.*{words}"):
        layer(x)
    layer.backend = "auto"
    layer(x)[0].sum().backward()


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CC", "none-such")
    refused("needs a C compiler: CC is 'none-such'")
    monkeypatch.setenv("CC", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    building._compiler.cache_clear()
    memo.clear("gpu_rnn.dispatch")
    refused("none of cc, gcc, clang is found; install gcc, or name one in CC")
    assert any("C        needs a C compiler" in line for line in doctor._compilers(torch.device("cpu")))


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo it cannot >&2; exit 3", "fails: it cannot"),
        ('case "$*" in *--version*) exit 0;; esac; exit 3', "fails: it ends with 3"),
        ("exec /nowhere/at/all", "fails: "),
        ('for out; do [ "$last" = -o ] && echo nonsense > "$out"; last=$out; done', "cannot be kept or loaded"),
    ],
)
def test_a_compiler_that_fails(script: str, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "compiler"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o700)
    monkeypatch.setenv("CC", str(path))
    refused(words)


@pytest.mark.slow
def test_processes_that_build_at_once_give_the_same(compiler: Path, cache_folder: Path) -> None:
    given = os.environ | {"GPU_RNN_CACHE": str(cache_folder), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", CALL]
    each = [subprocess.Popen(command, cwd=ROOT, env=given, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=120)[0] for process in each]
    assert said[0] and said[0] == said[1] and not any(process.returncode for process in each)
    assert len(list(cache_folder.glob("native-*.so"))) == 1


def test_the_doctor_names_compiler_and_instruction_sets() -> None:
    path = needed()
    (line,) = [line for line in doctor._compilers(torch.device("cpu")) if line.startswith("C        ")]
    assert path in line and building.version() in line
    assert line.endswith(", ".join(each.name for each in building.instruction_sets()))
