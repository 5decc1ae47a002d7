# SPDX-License-Identifier: Apache-2.0
"""NVIDIA's compute-sanitizer over the kernels at small shapes: memcheck (out of bounds, misaligned), racecheck (shared memory).

python benchmarks/sanitize.py                 both tools, where compute-sanitizer is found
python benchmarks/sanitize.py --kernels FILE  only the calls, as the tools start them; FILE gets a line for each
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from certifying.record import RECORD, Writer, read

import gpu_rnn

TOOLS = ("memcheck", "racecheck")
MISSING = (
    "compute-sanitizer is not here; it comes with the CUDA toolkit (NVIDIA's Debian packages: cuda-sanitizer-<version>; "
    "conda: cuda-sanitizer-api). Put its folder on PATH"
)
FOUND = 86  # the exit status that we ask for where a tool reports something
# Only ours: cuBLAS and torch are instrumented slowly, and not what is certified.
KERNELS = "kns=(group|resident|step)_(forward|backward)"
SHAPES = {
    "resident": (5, 19, 24),
    "group": (5, 19, 200),
    "step": (5, 19, 24),
}  # T, B, H: odd, more than one block
ENVIRONMENT = {
    "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",  # else tensors lie side by side in torch's blocks, and no end is seen
    "GPU_RNN_DEADLINE": "60",  # seconds; instrumented kernels take a hundred times as long
}


def compute_sanitizer() -> str | None:
    """Its path: on PATH, in a CUDA toolkit, or in a package of NVIDIA's."""
    toolkits = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    folders = [os.environ.get("PATH", ""), *(f"{root}/bin" for root in toolkits if root)]
    packages = Path(sysconfig.get_path("purelib"), "nvidia").glob("*/bin")
    return shutil.which("compute-sanitizer", path=os.pathsep.join([*folders, *map(str, packages)]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 if a tool reported something or a kernel failed, else 0; 2 where nothing can be run."""
    parser = argparse.ArgumentParser(
        prog="sanitize.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kernels", type=Path, metavar="FILE", help="run the kernels, under no tool")
    options = parser.parse_args(arguments)
    if options.kernels:
        kernels(Writer(options.kernels))
        return 0
    tool = compute_sanitizer()
    if tool is None or not torch.cuda.is_available():
        print(f"sanitize.py: {MISSING if tool is None else 'torch sees no GPU here'}", file=sys.stderr)
        return 2
    writer = Writer(os.environ.get(RECORD))
    return max([_under(tool, name, writer) for name in TOOLS])


def kernels(writer: Writer) -> None:
    """Every kernel once, with the options that add code to it."""
    for backend, (steps, batch, hidden) in SHAPES.items():
        for cell in ("LSTM", "GRU"):
            for dtype in (torch.bfloat16, torch.float32):
                writer.begin(f"{backend} {cell} {str(dtype).removeprefix('torch.')}")
                layer = getattr(gpu_rnn, cell)(
                    13,
                    hidden,
                    zoneout=0.2,
                    recurrent_dropout=0.2,
                    backend=backend,
                    device="cuda",
                    dtype=dtype,
                )
                x = torch.randn(steps, batch, 13, device="cuda", dtype=dtype)
                mask, resets = torch.rand(2, steps, batch, device="cuda") < 0.7
                y, _ = layer(x, mask=mask, resets=resets)
                y.sum().backward()
                torch.cuda.synchronize()
                gpu_rnn.check()


def _under(tool: str, name: str, writer: Writer) -> int:
    """Runs the kernels under one tool; a line of the record for each kernel, or one for what the tool said."""
    with tempfile.TemporaryDirectory() as folder:
        log, done = Path(folder) / "log", Path(folder) / "done"
        command = [
            tool,
            "--tool",
            name,
            "--error-exitcode",
            str(FOUND),
            "--log-file",
            str(log),
            "--kernel-regex",
            KERNELS,
        ]
        command += [sys.executable, __file__, "--kernels", str(done)]
        print(" ".join(command), flush=True)
        status = subprocess.run(command, env=os.environ | ENVIRONMENT, check=False).returncode
        text = log.read_text() if log.exists() else ""
        ran = list(read(done).ends)
    if status or not ran:
        said = [line.strip("= ") for line in text.splitlines() if line.strip("= ")]
        about = next(
            (line for line in said if line.startswith(("Invalid", "Error", "Misaligned"))),
            " ".join(said[-1:]),
        )
        print(text)
        writer.end(name, "failed", f"exit status {status}: {about}", "python benchmarks/sanitize.py")
        return 1
    for kernel in ran:
        writer.end(f"{name} {kernel}", "passed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
