# SPDX-License-Identifier: Apache-2.0
"""What a measurement was made on: the columns that every row of a results file carries."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

import gpu_rnn
from benchmarks.cases.names import LIBRARIES
from gpu_rnn import devices, environment
from gpu_rnn.backends.native import building
from gpu_rnn.diagnostics import doctor
from gpu_rnn.dispatch import choice, measured

ROOT = Path(__file__).resolve().parents[2]
# What a measurement or a certificate depends on; git's * crosses folders.
SOURCES = ("gpu_rnn", "kernels", "benchmarks/*.py", "tests")


def columns(device: torch.device, commit: str | None, emulated: bool = False) -> dict[str, str]:
    """Device, versions, commit and date; empty where there is none. `commit` names one where git does not know it.

    Raises:
        ValueError: it is not this checkout's package that is imported, so that the commit would name other code.
    """
    imported = Path(gpu_rnn.__file__).resolve().parent.parent
    if imported != ROOT:
        raise ValueError(f"gpu_rnn is imported from {imported}, not from this checkout: pip install -e {ROOT}")
    gpu = device.type == "cuda"
    found, dirty = _commit()
    return {
        "device": f"{'emulated GPU on ' * emulated}{_name(device)}",
        "driver": doctor._driver() if gpu else "",
        "cuda": torch.version.cuda or "" if gpu else "",
        "cudnn": str(torch.backends.cudnn.version()) if gpu else "",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cupy": _version("cupy-cuda13x") or _version("cupy-cuda12x"),
        **{name: _version(name) for name in LIBRARIES},
        "compiler": "" if gpu else _compiler(),
        "gpu_rnn": gpu_rnn.__version__,
        "commit": found or commit or "",
        "dirty": dirty,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def check_nothing_chooses(device: torch.device) -> None:
    """What this machine's user prefers or has tuned must not stand for what a layer takes by itself.

    Raises:
        ValueError: GPU_RNN_BACKEND names a backend, or `gpu_rnn.tune` has kept choices for the device.
    """
    if environment.backend(choice.BACKENDS):
        raise ValueError("GPU_RNN_BACKEND chooses the backend here, and the models are to: unset it")
    if count := measured.held(devices.of(device)).here:
        raise ValueError(
            f"what gpu_rnn.tune kept here ({count} choices) would stand for what a layer takes by itself: set "
            "GPU_RNN_CACHE "
            "to another folder, or gpu_rnn.tuning.forget()"
        )


def _name(device: torch.device) -> str:
    """Of a CPU without its threads, which are a case's."""
    return doctor.device_name(device) if device.type == "cuda" else devices.cpu_model()


def _compiler() -> str:
    """The C compiler's version, as it says it, with the instructions that it is asked for."""
    try:
        return f"{building.version()}, {building.instruction_sets()[0].name}"
    except building.CompilerError:
        return ""


def folder(device: torch.device, meant_for_it: bool = False) -> Path:
    """Where results go: beside the code, but where git ignores them if a CPU only tries what is meant for a GPU."""
    if device.type != "cuda" and not meant_for_it:
        return ROOT / "build" / "benchmarks"
    return ROOT / "benchmarks" / "results" / re.sub(r"[^a-z0-9]+", "-", _name(device).lower()).strip("-")


# What builds kernels keeps them below the user's home unless it is told otherwise.
CACHES = {
    "GPU_RNN_CACHE": "gpu_rnn",
    "TRITON_CACHE_DIR": "triton",
    "CUPY_CACHE_DIR": "cupy",
    "CUDA_CACHE_PATH": "cuda",
}


def keep_caches() -> None:
    """Where the home cannot be written, compiled kernels are kept in build/, here and in the processes started from
    here."""
    try:
        if os.access(Path.home(), os.W_OK):
            return
    except RuntimeError:  # as in containers: a user without a home
        pass
    for name, folder in CACHES.items():
        os.environ.setdefault(name, str(ROOT / "build" / "caches" / folder))


def _version(package: str) -> str:
    return next((found.version for found in metadata.distributions(name=package)), "")


def _commit() -> tuple[str, str]:
    """The commit, and whether the sources differ from it ("yes", "no"); empty where git does not say."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        return "", ""
    try:
        return _git("rev-parse", "HEAD"), "yes" if _git("status", "--porcelain", "--", *SOURCES) else "no"
    except subprocess.CalledProcessError as error:
        print(f"git does not say which commit this is: {error.stderr.strip()}", file=sys.stderr)
        return "", ""


def _git(*arguments: str) -> str:
    """What git answers, of another user's checkout too: its code runs here anyway."""
    command = ["git", "-c", f"safe.directory={ROOT}", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
