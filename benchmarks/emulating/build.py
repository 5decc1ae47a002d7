# SPDX-License-Identifier: Apache-2.0
"""Builds CUDA sources for the CPU and runs their kernels there; README.md beside this says what that shows.

    program = load(CUDA / "group_forward.cu", {"HIDDEN": 64}, sanitizer="thread")
    run(program, "group_forward", grid=4, block=128, shared_bytes=4096, args=[x, y, 64], schedule=starve(1))

A launch is a process of its own: ThreadSanitizer cannot be loaded into a Python that runs already, and a
kernel that hangs or crashes takes nothing with it.
"""

import hashlib
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CUDA = ROOT / "kernels" / "cuda"
RUNTIME = ("runtime.cpp", "memory.cpp", "clusters.cpp", "warp.cpp", "main.cpp")
SOURCES = {".cpp", ".h", ".cu", ".cuh"}
KERNEL = re.compile(
    r"__global__\s+(?:void\s+|LAUNCH_BOUNDS\s+|__(?:launch_bounds|cluster_dims)__\s*\([^()]*\)\s*)+(\w+)\s*\("
)
MOST_SITES = 1024  # internal.h

Sanitizer = Literal["thread", "address"] | None
Argument = int | float | torch.Tensor

# CUDA's words; a define can say all that is left of them here.
WORDS = ("__device__=", "__global__=", "__forceinline__=inline", "__launch_bounds__(...)=", "__cluster_dims__(...)=")
COMMON = ("-std=c++17", "-g1", "-Wno-unknown-pragmas", "-ffp-contract=off")
FLAGS = {
    None: ("-O1",),
    "thread": ("-O1", "-fsanitize=thread"),
    "address": ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
}
# A report ends the run: the first is the one to read. Nobody joins the fibers, or frees the buffers.
OPTIONS = {
    "TSAN_OPTIONS": "halt_on_error=1 exitcode=66 report_thread_leaks=0 history_size=0",
    "ASAN_OPTIONS": "exitcode=67 detect_leaks=0 detect_stack_use_after_return=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}


class Failure(AssertionError):
    """A run that broke a rule. `kind`: race, address, rule (deadlock, alignment, masks, …), crash, timeout."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind = kind


@dataclass(frozen=True)
class Schedule:
    """Which thread runs next whenever one waits, and how late other blocks see relaxed stores."""

    order: Literal["round_robin", "random", "starve"] = "round_robin"
    seed: int = 0
    starved: int = 0  # the block that runs only when nobody else can go on
    patience: int = 2  # polls in vain of every other thread until then
    ns_per_poll: int = 1000  # virtual time that one poll of any thread takes
    latest: int = 0  # most thread switches that a relaxed store takes; 0: none, in order; -1: see hoarding()

    def __str__(self) -> str:
        return self.order + {0: "", -1: " hoarding stores"}.get(self.latest, " with late stores")


ROUND_ROBIN = Schedule()


def shuffled(seed: int, latest: int = 4096) -> Schedule:
    """Any thread may be next, and relaxed stores leave their block late and out of order."""
    return Schedule("random", seed, latest=latest)


def hoarding(seed: int) -> Schedule:
    """As `shuffled`, but relaxed stores stay until a release or fence, or until all wait and one for them."""
    return Schedule("random", seed, latest=-1)


def starve(block: int, patience: int = 2) -> Schedule:
    """Block `block` always comes too late: after `patience` polls in vain of every other thread."""
    return Schedule("starve", starved=block, patience=patience)


@dataclass(frozen=True)
class Program:
    path: Path
    sanitizer: Sanitizer


@cache
def compiler() -> str:
    """The compiler's path; RuntimeError where there is none."""
    path = shutil.which("g++")
    if path is None:
        raise RuntimeError("g++ is not installed; it builds the CUDA sources for the CPU")
    return path


@cache
def cache_folder() -> Path:
    folder = Path(tempfile.gettempdir()) / f"gpu-rnn-cuda-cpu-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise RuntimeError(f"{folder} belongs to someone else, and programs are run from it; set TMPDIR")
    return folder


@cache
def included(*folders: Path) -> str:
    """Every text that one of these folders can add to a build, and the compiler's version."""
    files = sorted(file for folder in folders for file in folder.iterdir() if file.suffix in SOURCES)
    version = subprocess.run([compiler(), "--version"], capture_output=True, text=True, check=True).stdout
    return "".join([version, *(file.read_text() for file in files)])


def build(text: str, flags: Sequence[str], suffix: str, *folders: Path) -> Path:
    """Compile `text` once for these flags; later calls, of other processes too, find the file."""
    key = hashlib.sha256("\0".join([included(*folders), text, *flags]).encode()).hexdigest()[:24]
    target = cache_folder() / f"{key}{suffix}"
    if target.exists():
        return target
    with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch:
        source, output = Path(scratch) / "kernel.cpp", Path(scratch) / "output"
        source.write_text(text)
        command = [compiler(), *COMMON, *(f"-I{folder}" for folder in folders)]
        command += [str(source), *flags, "-o", str(output)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"g++ refused:\n{done.stderr[:8000]}")
        output.rename(target)
    return target


def runtime(sanitizer: Sanitizer) -> list[str]:
    """The runtime's objects. They only know that ThreadSanitizer is there; they are not watched."""
    flags = ["-O2", "-c"] + ["-DGPU_RNN_THREAD_SANITIZER"] * (sanitizer == "thread")
    return [str(build(f'#include "{name}"\n', flags, ".o", HERE)) for name in RUNTIME]


def load(
    source: str | Path,  # a .cu file, or the text of one
    defines: Mapping[str, object] | None = None,
    sanitizer: Sanitizer = None,
) -> Program:
    """Build a source for the CPU, once.

    Raises:
        RuntimeError: g++ is missing, or refuses the text.
    """
    text = source.read_text() if isinstance(source, Path) else source
    name = source.name if isinstance(source, Path) else "kernel.cu"
    entries = "".join(f"CPU_KERNEL({kernel})\n" for kernel in KERNEL.findall(text))
    words = [*WORDS, "GPU_RNN_CPU=1", *(f"{key}={value}" for key, value in (defines or {}).items())]
    flags = [*(f"-D{word}" for word in words), *FLAGS[sanitizer]]
    text = f'#line 1 "{name}"\n{text}\n{entries}'
    return Program(build(text, [*flags, *runtime(sanitizer)], "", HERE, CUDA), sanitizer)


def run(
    program: Program,
    kernel: str,
    grid: int,
    block: int,
    shared_bytes: int,
    args: Iterable[Argument],  # a float is passed as float, not double; tensors are changed in place
    schedule: Schedule = ROUND_ROBIN,
    disabled_sites: Iterable[int] = (),
    timeout: float = 60,  # seconds
    cluster: int = 1,  # blocks of a cluster
) -> set[int]:
    """Run one launch to its end; the sites that it reached.

    Raises:
        Failure: a sanitizer's report, a broken rule, a deadlock, a crash, or no end within `timeout`.
    """
    buffers = Buffers()
    arguments = [buffers.argument(value) for value in args]
    orders = ("round_robin", "random", "starve")
    head = [
        grid,
        block,
        cluster,
        shared_bytes,
        orders.index(schedule.order),
        schedule.seed,
        schedule.starved,
        schedule.patience,
        schedule.ns_per_poll,
        schedule.latest,
    ]
    disabled = list(disabled_sites)
    numbers = [*head, len(disabled), *disabled, len(arguments)]
    with tempfile.NamedTemporaryFile(dir=cache_folder()) as request:
        request.write(struct.pack(f"<{len(numbers)}q", *numbers) + b"".join(arguments) + buffers.contents())
        request.flush()
        execute(program, [kernel, request.name], timeout)
        contents = Path(request.name).read_bytes()
    buffers.take(contents[:-MOST_SITES])
    return {site for site, reached in enumerate(contents[-MOST_SITES:]) if reached}


def execute(program: Program, arguments: Sequence[str], timeout: float) -> None:
    command = [str(program.path), *arguments]
    try:
        done = subprocess.run(command, env=os.environ | OPTIONS, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        raise Failure("timeout", f"no end in {timeout} s: a wait without poll_pause, or a deadline") from None
    if done.returncode == 0:
        return
    if "unexpected memory mapping" in done.stderr:
        raise RuntimeError("ThreadSanitizer finds no room in this address space: sysctl vm.mmap_rnd_bits=28")
    kind = {66: "race", 67: "address", 70: "rule"}.get(done.returncode, "crash")
    if "runtime error:" in done.stderr:
        kind = "address"
    raise Failure(kind, done.stderr[:6000] or f"exit status {done.returncode}")


class Buffers:
    """The storages behind a launch's tensors, each carried once: views of one storage still overlap."""

    def __init__(self) -> None:
        self.storages: dict[int, tuple[int, torch.UntypedStorage]] = {}

    def argument(self, value: Argument) -> bytes:
        """The number of its buffer (-1: none), then eight bytes: the value, or the offset into the buffer."""
        if isinstance(value, float):
            return struct.pack("<qf4x", -1, value)
        if not isinstance(value, torch.Tensor):
            return struct.pack("<qq", -1, value)
        storage = value.untyped_storage()
        index, _ = self.storages.setdefault(storage.data_ptr(), (len(self.storages), storage))
        return struct.pack("<qq", index, value.data_ptr() - storage.data_ptr())

    def bytes_of(self, storage: torch.UntypedStorage) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8).set_(storage)

    def contents(self) -> bytes:
        storages = [storage for _, storage in self.storages.values()]
        head = struct.pack(f"<{1 + len(storages)}q", len(storages), *(storage.nbytes() for storage in storages))
        return head + b"".join(self.bytes_of(storage).numpy().tobytes() for storage in storages)

    def take(self, contents: bytes) -> None:
        """Copy back from the end of a request: the buffers are its last part."""
        end = len(contents)
        for _, storage in reversed(self.storages.values()):
            if storage.nbytes():
                start = end - storage.nbytes()
                self.bytes_of(storage).copy_(torch.frombuffer(bytearray(contents[start:end]), dtype=torch.uint8))
                end = start
