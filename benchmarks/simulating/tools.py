# SPDX-License-Identifier: Apache-2.0
"""CUDA's own tools, from Triton's wheel or a toolkit on the PATH."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory


def tool(name: str) -> str | None:
    """The path of nvdisasm or cuobjdump."""
    triton = importlib.util.find_spec("triton")
    folders = [] if triton is None else triton.submodule_search_locations or []
    bundled = [Path(folder) / "backends" / "nvidia" / "bin" / name for folder in folders]
    return next((str(path) for path in bundled if path.is_file()), shutil.which(name))


def needed(name: str) -> str:
    """The path of a tool.

    Raises:
        FileNotFoundError: it is not there.
    """
    path = tool(name)
    if path is None:
        raise FileNotFoundError(f"not found: {name}, which is in Triton's wheel and in CUDA's toolkit")
    return path


@contextmanager
def written(cubin: bytes) -> Iterator[Path]:
    """A file of it, for as long as it is needed."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        yield file


def registers_of(cubin: Path) -> int:
    """Registers of a thread of its kernel.

    Raises:
        FileNotFoundError: cuobjdump is not there.
    """
    done = subprocess.run([needed("cuobjdump"), "-res-usage", str(cubin)], capture_output=True, text=True, check=True)
    match = re.search(r"REG:(\d+)", done.stdout + done.stderr)
    assert match is not None, done.stdout
    return int(match[1])
