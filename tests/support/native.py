# SPDX-License-Identifier: Apache-2.0
"""C for the CPU, built with the compilers at hand."""

from __future__ import annotations

import ctypes
import platform
import shutil
import subprocess
from functools import cache
from importlib.resources import files
from pathlib import Path
from tempfile import mkdtemp

import pytest

from gpu_rnn.backends.native import building

HEADER = files("gpu_rnn.kernels.native").joinpath("functions.h").read_text()
COMPILERS = ("gcc", "clang")
# Generated functions take what they do not need; a vector wider than the target's is passed in memory (psabi).
FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra", "-Werror"]
FLAGS += ["-Wno-unused-variable", "-Wno-unused-function", "-Wno-unused-parameter", "-Wno-psabi"]
# Of each target the flags of the compiler and the bytes of its vectors.
TARGETS = {"plain": ([], 16), "avx2": (["-mavx2", "-mfma"], 32), "avx512": (["-mavx512f", "-mavx512dq"], 64)}


def _missing() -> str:
    try:
        building.compiler()
    except building.CompilerError as error:
        return str(error)
    return ""


NEEDS_C = pytest.mark.skipif(bool(_missing()), reason=_missing() or "a C compiler is here")
BACKEND = pytest.param("native", marks=NEEDS_C)
SLOW_BACKEND = pytest.param("native", marks=[NEEDS_C, pytest.mark.slow])


def any_compiler() -> None:
    """Skips a test of the time loop in C on a machine that cannot build it."""
    try:
        building.compiler()
    except building.CompilerError as error:
        pytest.skip(str(error))


def needs(compiler: str, target: str) -> None:
    """Skips a test that this machine cannot run."""
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    if target != "plain" and not _features(target) <= _processor():
        pytest.skip(f"this processor has no {target}")


def _features(target: str) -> set[str]:
    return {flag.removeprefix("-m") for flag in TARGETS[target][0]}


@cache
def _processor() -> set[str]:
    path = Path("/proc/cpuinfo")
    if platform.machine() not in ("x86_64", "AMD64") or not path.exists():
        return set()
    return set(next(line for line in path.read_text().splitlines() if line.startswith("flags")).split())


def build(text: str, scalar: str, compiler: str, target: str, *options: str) -> ctypes.CDLL:
    """A library of C text that comes after the header of functions; of two options that differ the last one holds."""
    needs(compiler, target)
    flags, width = TARGETS[target]
    folder = Path(mkdtemp())
    (folder / "text.c").write_text(f"{HEADER}\n{text}")
    lanes = width // {"float": 4, "double": 8}[scalar]
    command = [compiler, "-std=gnu11", *FLAGS, *options, f"-DSCALAR={scalar}", f"-DLANES={lanes}", *flags]
    built = subprocess.run(
        [*command, "-shared", "-fPIC", "-o", "text.so", "text.c", "-lm"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    library = ctypes.CDLL(str(folder / "text.so"))
    shutil.rmtree(folder)
    return library
