# SPDX-License-Identifier: Apache-2.0
"""NVIDIA's compute-sanitizer over the kernels at small shapes: memcheck (out of bounds, misaligned), racecheck (shared
memory).

python benchmarks/sanitize.py                 both tools, where compute-sanitizer is found
python benchmarks/sanitize.py --kernels FILE  only the calls, as the tools start them; FILE gets a line for each
python benchmarks/sanitize.py --planted       only a kernel with the faults that the tools must report

A tool that does not report the planted faults, by the same options, is not believed where it reports nothing.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

if not __package__:  # as a script, which knows its own folder only
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

import gpu_rnn
from benchmarks.certifying.record import RECORD, Writer, read
from benchmarks.measuring import machine
from gpu_rnn.backends.group import nvrtc

TOOLS = ("memcheck", "racecheck")
MISSING = (
    "compute-sanitizer is not here; it comes with the CUDA toolkit (NVIDIA's Debian packages: "
    "cuda-sanitizer-<version>; "
    "conda: cuda-sanitizer-api). Put its folder on PATH"
)
FOUND = 86  # the exit status that we ask for where a tool reports something
NOTHING_RAN = 5  # pytest's, where nothing was selected
OPTIONS = (
    *("--error-exitcode", str(FOUND)),
    # Only ours: cuBLAS and torch are instrumented slowly, and not what is certified. As `kns=` it would be a literal
    # text.
    *("--kernel-name", "regex=(group|resident|step)_(forward|backward)"),
    *("--report-api-errors", "no"),  # torch asks the driver for what it may not have; what fails of ours raises
    *("--target-processes", "application-only", "--launch-timeout", "60"),  # no compiler; importing torch takes a while
)
PLANTED = """
extern "C" __global__ void step_forward_planted(float *p, int count) {
    __shared__ float shared[64];
    shared[threadIdx.x] = p[threadIdx.x];
    p[threadIdx.x] = shared[63 - threadIdx.x];  // of the other warp, which may not have written yet
    if (threadIdx.x == 0) p[count] = 1.0f;      // beyond the last
}
"""
SHAPES = {
    "resident": (5, 19, 24),
    "group": (5, 19, 200),
    "step": (5, 19, 24),
}  # T, B, H: odd, more than one block
CELLS, DTYPES = ("LSTM", "GRU"), (torch.bfloat16, torch.float32)
ENVIRONMENT = {
    "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",  # else tensors lie side by side in torch's blocks, and no end is seen
    "GPU_RNN_DEADLINE": "60",  # seconds; instrumented kernels take a hundred times as long
}


class Said(NamedTuple):
    """What became of a process under a tool: its exit status, the tool's report, and the kernels that it came to."""

    status: int
    report: str
    kernels: list[str]

    @property
    def first(self) -> str:
        """The line that says most."""
        lines = [line.strip("= ") for line in self.report.splitlines() if line.strip("= ")]
        about = (line for line in lines if line.startswith(("Invalid", "Error", "Misaligned")))
        return next(about, " ".join(lines[-1:]))


def compute_sanitizer() -> str | None:
    """Its path: on PATH, in a CUDA toolkit, or in a package of NVIDIA's."""
    toolkits = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    folders = [os.environ.get("PATH", ""), *(f"{root}/bin" for root in toolkits if root)]
    packages = Path(sysconfig.get_path("purelib"), "nvidia").glob("*/bin")
    return shutil.which("compute-sanitizer", path=os.pathsep.join([*folders, *map(str, packages)]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 if a tool reported something or a kernel failed, else 0; 2 where nothing can be run, 5 where no tool
    works."""
    options = _parser().parse_args(arguments)
    if options.planted:
        planted()
        return 0
    if options.kernels:
        kernels(Writer(options.kernels), options.backend or SHAPES)
        return 0
    machine.keep_caches()
    tool = compute_sanitizer()
    if tool is None or not torch.cuda.is_available():
        print(f"sanitize.py: {MISSING if tool is None else 'torch sees no GPU here'}", file=sys.stderr)
        return 2
    writer = Writer(os.environ.get(RECORD))
    with ThreadPoolExecutor() as pool:  # the tools side by side: most of their time is the host's
        built = [pool.submit(_build, backend) for backend in SHAPES]
        blind = [line for line in pool.map(lambda name: _blind(tool, name), TOOLS) if line]
        for each in built:
            each.result()
        for line in blind:
            writer.end(f"planted faults, {line}", "skipped", line)
        return NOTHING_RAN if blind else max(pool.map(lambda name: _check(tool, name, writer), TOOLS))


def kernels(writer: Writer, backends: Sequence[str]) -> None:
    """Every kernel of these backends once, with the options that add code to it."""
    for backend, cell, dtype in _calls(backends):
        steps, batch, hidden = SHAPES[backend]
        writer.begin(f"{backend} {cell} {str(dtype).removeprefix('torch.')}")
        options = {"zoneout": 0.2, "recurrent_dropout": 0.2, "backend": backend, "device": "cuda", "dtype": dtype}
        layer = getattr(gpu_rnn, cell)(13, hidden, **options)
        x = torch.randn(steps, batch, 13, device="cuda", dtype=dtype)
        mask, resets = torch.rand(2, steps, batch, device="cuda") < 0.7
        y, _ = layer(x, mask=mask, resets=resets)
        y.sum().backward()
        torch.cuda.synchronize()
        gpu_rnn.check()


def _calls(backends: Sequence[str]) -> Iterator[tuple[str, str, torch.dtype]]:
    yield from ((backend, cell, dtype) for backend in backends for cell in CELLS for dtype in DTYPES)


def planted() -> None:
    """Launches, through our loader, a kernel that writes beyond a tensor and reads shared memory too early."""
    device = torch.device("cuda", torch.cuda.current_device())
    x = torch.zeros(100, device=device)  # 400 bytes: no allocation begins right behind them
    arch = nvrtc.architecture(torch.cuda.get_device_capability(device))
    function = nvrtc.Function(PLANTED, "step_forward_planted", arch)
    function(1, 64, [x, x.numel()], device)
    torch.cuda.synchronize()


def _build(backend: str) -> None:
    """A backend's calls under no tool, so that its kernels are built before. What fails there fails under the tools
    too."""
    command = [sys.executable, __file__, "--kernels", os.devnull, "--backend", backend]
    subprocess.run(command, env=os.environ | ENVIRONMENT, check=False)


def _blind(tool: str, name: str) -> str:
    """Why a tool is not believed: it does not report what is planted. Empty if it does."""
    said = _under(tool, name, ["--planted"])
    if said.status == FOUND:
        return ""
    return f"{name} does not report them: exit status {said.status}, {said.first or 'nothing said'}"


def _check(tool: str, name: str, writer: Writer) -> int:
    """Runs the kernels under one tool; a line of the record for each kernel, or one for what the tool said."""
    said = _under(tool, name)
    if said.status or not said.kernels:
        print(said.report)
        during = f" in {said.kernels[-1]}" if said.kernels else ""
        detail = f"exit status {said.status}{during}: {said.first}"
        writer.end(name, "failed", detail, "python benchmarks/sanitize.py")
        return 1
    for kernel in said.kernels:
        writer.end(f"{name} {kernel}", "passed")
    return 0


def _under(tool: str, name: str, what: Sequence[str] = ()) -> Said:
    """This script under a tool: the kernels, or `what`."""
    with tempfile.TemporaryDirectory() as folder:
        log, done = Path(folder) / "log", Path(folder) / "done"
        command = [tool, "--tool", name, "--log-file", str(log), *OPTIONS]
        command += [sys.executable, __file__, *(what or ["--kernels", str(done)])]
        print(" ".join(command), flush=True)
        status = subprocess.run(command, env=os.environ | ENVIRONMENT, check=False).returncode
        return Said(status, log.read_text() if log.exists() else "", list(read(done).ends))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sanitize.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kernels", type=Path, metavar="FILE", help="run the kernels, under no tool")
    parser.add_argument("--backend", action="append", choices=SHAPES, help="with --kernels: only this one's")
    parser.add_argument("--planted", action="store_true", help="run the kernel with planted faults, under no tool")
    return parser


if __name__ == "__main__":
    sys.exit(main())
