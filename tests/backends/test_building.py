# SPDX-License-Identifier: Apache-2.0
"""Triton without what it needs (a compiler, a folder, a ptxas that knows the device, a driver that loads): said, and
passed on.

Triton's real compiler and launcher, over the stub driver.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.stub_driver import NEEDS_STUB, run

pytestmark = [pytest.mark.compile, NEEDS_STUB]

# What "auto" takes, what it says of the Triton backends, and what they say when they are asked for by name.
VERDICTS = """
import logging
logging.basicConfig(level=logging.INFO, format="%(message)s")
layer = gpu_rnn.LSTM(4, 8, activation="relu", {options}).requires_grad_(False)
x = torch.randn(3, 2, 4)
assert layer(x)[0].shape == (3, 2, 8)
found = gpu_rnn.explain(layer, x)
print("chosen", found.chosen)
for row in found.rows:
    if row.backend in ("resident", "step"):
        print(row.backend, row.runs, *row.reasons)
for backend in ("resident", "step"):
    layer.backend = backend
    try:
        layer(x)
        print(backend, "runs")
    except ValueError as error:
        print(backend, "refused", str(error).splitlines()[1])
"""
NO_GROUP = "from gpu_rnn.backends.group import nvrtc\nnvrtc.unavailable = lambda: 'no CuPy'\n"


def verdicts(before: str = "", options: str = "", **environment: str) -> list[str]:
    return run(NO_GROUP + before + VERDICTS.format(options=options), **environment).splitlines()


def test_where_all_is_there_a_triton_kernel_is_taken() -> None:
    assert verdicts() == ["chosen resident", "resident True", "step True", "resident runs", "step runs"]


def assert_passed_on(said: list[str], why: str) -> None:
    """ "auto" took the reference, and both kernels say the same in `explain` and where they are named."""
    assert said[0] == "chosen reference"
    for line, start in zip(said[1:], ("resident False", "step False", "resident refused", "step refused"), strict=True):
        assert line.startswith(start) and "Triton cannot build its kernel here" in line and why in line, line
        assert "`gpu-rnn doctor` shows what Triton needs" in line


def test_no_c_compiler(tmp_path: Path) -> None:
    said = verdicts(
        "import os; os.environ.pop('CC', None)\n", PATH=str(tmp_path), TRITON_CACHE_DIR=str(tmp_path / "cache")
    )
    assert_passed_on(said, "Failed to find C compiler")


@pytest.mark.slow
def test_a_c_compiler_that_fails(tmp_path: Path) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\nexit 3\n")
    compiler.chmod(0o700)
    said = verdicts(CC=str(compiler), TRITON_CACHE_DIR=str(tmp_path / "cache"))
    assert_passed_on(said, "returned non-zero exit status 3")


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    assert_passed_on(verdicts(TRITON_CACHE_DIR=str(tmp_path / "file" / "cache")), "Not a directory")


FULL = """
import os
from triton.runtime import cache
def full(self, *arguments, **named):
    raise OSError(28, "No space left on device")
cache.FileCacheManager.put = full
"""


@pytest.mark.slow
def test_a_full_disk(tmp_path: Path) -> None:
    assert_passed_on(verdicts(FULL, TRITON_CACHE_DIR=str(tmp_path / "cache")), "No space left on device")


def test_an_architecture_that_ptxas_does_not_know(tmp_path: Path) -> None:
    """LLVM would end the process."""
    before = "from triton.runtime.driver import driver as d\ntype(d.active).capability = (9, 9)\n"
    assert_passed_on(verdicts(before, TRITON_CACHE_DIR=str(tmp_path / "cache")), "'sm_99a' is not defined")


def test_a_driver_that_does_not_load() -> None:
    """Where aten can run, it is next."""
    aten = (
        "found = gpu_rnn.explain(gpu_rnn.LSTM(4, 8).requires_grad_(False), torch.empty(3, 2, 4))\n"
        "assert found.chosen == 'aten'\n"
    )
    assert_passed_on(verdicts("driver.fail(modules=209)\n" + aten), "status 209 of the stub driver")


OPTIONS = {
    "plain": ("", "x"),
    "no biases": ("bias=False", "x"),
    "both directions": ("bidirectional=True", "x"),
    "two layers": ("num_layers=2", "x"),
    "dropout and zoneout": ("recurrent_dropout=0.5, zoneout=0.1", "x"),
    "steered": ("", "x, mask=torch.ones(3, 2, dtype=torch.bool), resets=torch.zeros(3, 2, dtype=torch.bool)"),
}


EACH = """
from triton.runtime.jit import JITFunction
compile_, tried = JITFunction._do_compile, []  # of each kernel that is compiled: whether it was before its launch
def watched(self, *arguments):
    tried.append(arguments[-1])
    return compile_(self, *arguments)
JITFunction._do_compile = watched
for name, (given, arguments) in OPTIONS.items():
    layer = eval(f"gpu_rnn.LSTM(4, 8, activation='relu', backend=BACKEND, {given})")
    x = torch.randn(3, 2, 4)
    eval(f"layer({arguments})")[0].sum().backward()
    print(name, all(tried), len(driver.launches) > 0, sep="; ")
    tried.clear()
    driver.clear()
"""


@pytest.mark.parametrize("backend", ["resident", "step"])
def test_what_is_launched_was_built_before(backend: str) -> None:
    """Nothing is compiled at a launch."""
    said = run(f"OPTIONS, BACKEND = {OPTIONS!r}, {backend!r}\n" + EACH).splitlines()
    assert said == [f"{name}; True; True" for name in OPTIONS]
