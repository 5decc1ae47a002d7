# SPDX-License-Identifier: Apache-2.0
"""A Python of its own in which Triton's real launcher meets the stub driver; README.md beside this says what that
shows.

    run("gpu_rnn.LSTM(4, 8, backend='resident')(torch.randn(3, 2, 4)); print(len(driver.launches))")
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

from benchmarks.emulating.build import build

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LIBRARIES = ROOT / "build" / "stub_driver"
FLAGS = ("-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1")
PRELUDE = "import torch, gpu_rnn\nfrom benchmarks.stub_driver.gpu import driver\n"


def missing() -> str:
    """What a run needs and this machine lacks; empty where all is there."""
    lacks = {
        "Triton (it exists for Linux only)": importlib.util.find_spec("triton") is None,
        "g++, which builds the stub driver": shutil.which("g++") is None,
    }
    return ", ".join(words for words, absent in lacks.items() if absent)


@cache
def folder() -> Path:
    """The folder that holds the stub as libcuda.so.1."""
    triton = importlib.util.find_spec("triton")
    assert triton is not None and triton.submodule_search_locations is not None
    include = Path(triton.submodule_search_locations[0]) / "backends" / "nvidia" / "include"
    built = build((HERE / "cuda.cpp").read_text(), FLAGS, ".so", include)
    target = LIBRARIES / built.stem
    target.mkdir(parents=True, exist_ok=True)
    library = target / "libcuda.so.1"
    if not library.exists():
        part = target / f"{os.getpid()}.part"
        shutil.copy(built, part)
        part.replace(library)
    return target


def run(code: str, **environment: str) -> str:
    """What a program prints, without the last line's end; `torch`, `gpu_rnn` and `driver` (`gpu.Driver`) are there.

    Compiled kernels are kept in build/ from run to run, unless `environment` names another TRITON_CACHE_DIR.

    Raises:
        AssertionError: it failed; all that it printed is in the message.
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PRELUDE + code],
        env=_environment() | environment, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.rstrip("\n")


def _environment() -> dict[str, str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    own = {
        "TRITON_LIBCUDA_PATH": str(folder()),
        "TRITON_CACHE_DIR": str(LIBRARIES / "triton"),
        "TRITON_INTERPRET": "0",
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
    }
    return os.environ | own
