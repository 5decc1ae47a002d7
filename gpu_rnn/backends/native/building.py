# SPDX-License-Identifier: Apache-2.0
"""From C text to a loaded library: the compiler at hand, the processor's instruction sets, the cache folder."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from gpu_rnn import cache, environment, memo
from gpu_rnn._version import __version__
from gpu_rnn.memo import memoize

log = logging.getLogger("gpu_rnn")

COMPILERS = ("cc", "gcc", "clang")
# Vectors wider than the target's are passed in memory (psabi); generated functions take what they do not need.
COMPILER_FLAGS = ("-std=gnu11", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared", "-pthread", "-w")
# Seconds after which a compiler hangs: far more than it takes where many processes share a core or it is stopped for
# a while, as whoever hung is not asked again.
SECONDS = 900.0  # for a build; the largest program that there may be takes 20 s of a processor
TO_ANSWER = 120.0  # to say what it is
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


_unanswered: dict[tuple[str, ...], str] = memo.hold(
    f"{__name__}: compilers that do not end", {}, None, stays="nobody waits for one twice"
)


def compiler() -> list[str]:
    """The command of the C compiler: what CC names, else the first of `COMPILERS` that is there.

    Raises:
        CompilerError: there is none, or it did not end when it was run before.
    """
    command = _compiler(environment.c_compiler())
    if command in _unanswered:
        raise CompilerError(_unanswered[command])
    return list(command)


@memoize(8)
def _compiler(named: str) -> tuple[str, ...]:
    for name, *options in _commands(named):
        path = shutil.which(name)
        if path:
            return (path, *options)
    raise CompilerError(
        f"needs a C compiler: CC is {named!r} in the environment, which is not found"
        if named
        else f"needs a C compiler: none of {', '.join(COMPILERS)} is found; install gcc, or name one in CC"
    )


def _commands(named: str) -> list[list[str]]:
    """CC is a command with its options, as "ccache gcc", or a path, in which there may be spaces."""
    import shlex  # where a compiler is looked for, and not with the package

    if not named:
        return [[name] for name in COMPILERS]
    try:
        return [[named], shlex.split(named)]
    except ValueError as error:
        raise CompilerError(f"needs a C compiler: CC is {named!r} in the environment: {error}") from error


def version() -> str:
    """What the compiler says it is, in a line.

    Raises:
        CompilerError: there is none, or it says nothing.
    """
    return _version(tuple(compiler()))


@memoize(8)
def _version(command: tuple[str, ...]) -> str:
    said = _run([*command, "--version"], "", TO_ANSWER, command).splitlines()
    return said[0].strip() if said else command[0]


def _run(command: list[str], text: str, seconds: float, compiler: tuple[str, ...]) -> str:
    """What a command says. It ends with its children when this does: after so many seconds, or by Ctrl-C."""
    pipe = subprocess.PIPE
    try:
        process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, errors="replace", start_new_session=True
        )
    except OSError as error:
        raise CompilerError(f"the C compiler {command[0]} cannot be run: {error}") from error
    with process:
        try:
            said, complaint = process.communicate(text, seconds)
        except subprocess.TimeoutExpired as error:
            _unanswered[compiler] = f"the C compiler {command[0]} does not end within {seconds:g} s"
            raise CompilerError(_unanswered[compiler]) from error
        finally:
            if process.returncode is None:
                _end(process)
    if process.returncode:
        complaint = complaint.strip()[:1000] or f"it ends with {process.returncode}"
        raise CompilerError(f"the C compiler {command[0]} fails: {complaint}")
    return said


def _end(process: subprocess.Popen[str]) -> None:
    """Ends a process, and its children with it where there are sessions."""
    with suppress(ProcessLookupError):
        if sys.platform == "win32":
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)


@memoize(256, stays="a library that was loaded stays so")
def library(text: str, flags: tuple[str, ...], entries: tuple[str, ...] = ("run",)) -> ctypes.CDLL:
    """The library of a C text with these functions, from the cache or built now.

    Raises:
        CompilerError: it cannot be built or loaded here.
    """
    words = "\0".join([__version__, version(), platform.machine(), *compiler(), *COMPILER_FLAGS, *flags, text])
    key = "native-" + hashlib.sha256(words.encode()).hexdigest()[:32]
    try:
        with cache.alone(key):  # who waited finds what the other built
            for path in cache.kept_files(key, SHARED_LIBRARY):
                with suppress(OSError):  # of another machine, whose C library is another
                    return _loaded(path, entries)
            path = cache.keep(key, SHARED_LIBRARY, _built(text, flags))
            return _loaded(path, entries)
    except OSError as error:
        raise CompilerError(
            f"a compiled library cannot be kept or loaded ({error}): set GPU_RNN_CACHE to a folder that can be "
            "written to and run from"
        ) from error


def _loaded(path: Path, entries: tuple[str, ...]) -> ctypes.CDLL:
    """Raises OSError where a file is no library, or not one with these functions."""
    found = ctypes.CDLL(str(path))
    missing = [name for name in entries if getattr(found, name, None) is None]
    if missing:
        raise OSError(f"{path} lacks {', '.join(missing)}")
    return found


@contextmanager
def _shown(words: str) -> Iterator[None]:
    """Meanwhile somebody at a terminal sees what is waited for; nothing of it stays, and nothing goes to a file."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield
        return
    print(words, end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        print("\r" + " " * len(words) + "\r", end="", file=sys.stderr, flush=True)


def _built(text: str, flags: tuple[str, ...]) -> bytes:
    command = compiler()
    log.info("native: builds a library with %s, which is kept for later calls", command[0])
    with TemporaryDirectory(prefix=cache.TEMPORARY) as folder:
        path = Path(folder) / "library.so"
        whole = [*command, *COMPILER_FLAGS, *flags, "-x", "c", "-", "-o", str(path), "-lm"]
        with _shown(f"gpu_rnn: {Path(command[0]).name} builds a time loop, once for this machine"):
            said = _run(whole, text, SECONDS, tuple(command))
        if not path.exists():
            said = said.strip()[:1000] or "it says nothing"
            raise CompilerError(f"the C compiler {command[0]} makes no library: {said}")
        return path.read_bytes()
