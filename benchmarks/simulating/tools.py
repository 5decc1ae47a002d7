# SPDX-License-Identifier: Apache-2.0
"""CUDA's own tools, from Triton's wheel or a toolkit on the PATH."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path


def tool(name: str) -> str | None:
    """The path of nvdisasm or cuobjdump."""
    triton = importlib.util.find_spec("triton")
    folders = [] if triton is None else triton.submodule_search_locations or []
    bundled = [Path(folder) / "backends" / "nvidia" / "bin" / name for folder in folders]
    return next((str(path) for path in bundled if path.is_file()), shutil.which(name))
