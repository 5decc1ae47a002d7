# SPDX-License-Identifier: Apache-2.0
"""From C text to a loaded library: the compiler at hand, the processor's instruction sets, the cache folder."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import platform
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from gpu_rnn import cache, environment
from gpu_rnn._version import __version__
from gpu_rnn.memo import memoize

log = logging.getLogger("gpu_rnn")

COMPILERS = ("cc", "gcc", "clang")
# Vectors wider than the target's are passed in memory (psabi); generated functions take what they do not need.
COMPILER_FLAGS = ("-std=gnu11", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared", "-pthread", "-w")
SECONDS = 60.0  # for a build; the largest program that there may be takes a third
SHARED_LIBRARY = ".so"


class CompilerError(RuntimeError):
    """There is no C compiler, or it fails, or what it made cannot be loaded; the message says why."""


class InstructionSet(NamedTuple):
    """What a processor computes with."""

    name: str
    flags: tuple[str, ...]  # of the compiler
    bytes: int  # of a vector
    sums: int  # accumulators of a product that stay in registers beside what is multiplied
    across: int  # of these in one row: twice as many hide the latency of a sum


# The widest first. x86 has 32 vector registers with AVX-512 and 16 without, 64-bit ARM has 32.
BASELINE = InstructionSet("plain", (), 16, 12, 4)
NEON = InstructionSet("neon", (), 16, 24, 4)
OF_X86 = (
    InstructionSet("avx512", ("-mavx512f", "-mavx512dq", "-mfma"), 64, 24, 4),
    InstructionSet("avx2", ("-mavx2", "-mfma"), 32, 12, 4),
)


@memoize(1)
def instruction_sets() -> tuple[InstructionSet, ...]:
    """Those that this processor has, the best first."""
    if platform.machine() in ("aarch64", "arm64"):
        return (NEON,)
    words = _processor_flags()
    return (*(each for each in OF_X86 if {flag.removeprefix("-m") for flag in each.flags} <= words), BASELINE)


def _processor_flags() -> set[str]:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return set(line.split())
    return set()


def compiler() -> list[str]:
    """The command of the C compiler: what CC names, else the first of `COMPILERS` that is there.

    Raises:
        CompilerError: there is none.
    """
    return list(_compiler(environment.c_compiler()))


@memoize(8)
def _compiler(named: str) -> tuple[str, ...]:
    import shlex  # where a compiler is looked for, and not with the package

    commands = [shlex.split(named)] if named else [[name] for name in COMPILERS]
    for name, *options in commands:
        path = shutil.which(name)
        if path:
            return (path, *options)
    raise CompilerError(
        f"needs a C compiler: CC is {named!r} in the environment, which is not found"
        if named
        else f"needs a C compiler: none of {', '.join(COMPILERS)} is found; install gcc, or name one in CC"
    )


def version() -> str:
    """What the compiler says it is, in a line.

    Raises:
        CompilerError: there is none, or it says nothing.
    """
    return _version(tuple(compiler()))


@memoize(8)
def _version(command: tuple[str, ...]) -> str:
    said = _run([*command, "--version"], "").splitlines()
    return said[0].strip() if said else command[0]


def _run(command: list[str], text: str) -> str:
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=SECONDS, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        raise CompilerError(f"the C compiler {command[0]} cannot be run: {error}") from error
    if done.returncode:
        said = done.stderr.strip()[:1000] or f"it ends with {done.returncode}"
        raise CompilerError(f"the C compiler {command[0]} fails: {said}")
    return done.stdout


@memoize(256, stays="a library that was loaded stays so")
def library(text: str, flags: tuple[str, ...]) -> ctypes.CDLL:
    """The library of a C text, from the cache or built now.

    Raises:
        CompilerError: it cannot be built or loaded here.
    """
    words = "\0".join([__version__, version(), platform.machine(), *compiler(), *COMPILER_FLAGS, *flags, text])
    key = "native-" + hashlib.sha256(words.encode()).hexdigest()[:32]
    try:
        with cache.alone(key):  # who waited finds what the other built
            path = cache.kept_file(key, SHARED_LIBRARY) or cache.keep(key, SHARED_LIBRARY, _built(text, flags))
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise CompilerError(
            f"a compiled library cannot be kept or loaded ({error}): set GPU_RNN_CACHE to a folder that can be "
            "written to and run from"
        ) from error


def _built(text: str, flags: tuple[str, ...]) -> bytes:
    log.info("native: builds a library with %s, which is kept for later calls", compiler()[0])
    with TemporaryDirectory(prefix=cache.TEMPORARY) as folder:
        path = Path(folder) / "library.so"
        _run([*compiler(), *COMPILER_FLAGS, *flags, "-x", "c", "-", "-o", str(path), "-lm"], text)
        return path.read_bytes()
