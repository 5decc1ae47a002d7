# SPDX-License-Identifier: Apache-2.0
"""How near simulated steps come to published ones: another library's kernels, from its released package.

    python benchmarks/simulate.py --validate

pip fetches the package into a folder that is deleted at the end; nothing of it is kept. Its Triton kernel is compiled
for the H100 on which its authors timed it, and simulated like ours, with the same figures.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch

from benchmarks.cases.names import FLASHRNN
from benchmarks.simulating import machines, paths, report
from benchmarks.simulating.builds import Kernel, compiled
from gpu_rnn import devices
from gpu_rnn.backends.building import TritonLaunch

PACKAGES = (f"{FLASHRNN}==1.0.8", "einops")
SOURCE = "Pöppel, Beck, Hochreiter: FlashRNN, arXiv:2412.07752, on an H100: forward pass, bf16, batch 16, 1,024 steps"
BATCH, STEPS, WARPS = 16, 1024, 4  # as its authors launch it
GATES, STATES = 4, 2


class Published(NamedTuple):
    """Head dimension, heads, and µs a step."""

    hidden: int
    heads: int
    us: float


PUBLISHED = (Published(32, 24, 1.41), Published(64, 12, 1.94), Published(128, 6, 3.15))


def fetch(folder: Path) -> types.ModuleType:
    """The module of the peer's Triton kernels for an LSTM's forward pass, installed into a folder.

    Raises:
        subprocess.CalledProcessError: pip does not find it.
    """
    command = [sys.executable, "-m", "pip", "install", "-q", "-q", "--no-deps", "--target", str(folder), *PACKAGES]
    subprocess.run(command, check=True)
    sys.path.insert(0, str(folder))
    package = types.ModuleType("peer")  # the folder of its Triton kernels only: the rest needs nvcc
    package.__path__ = [str(folder / FLASHRNN / FLASHRNN / "triton_fused")]
    sys.modules["peer"] = package
    return importlib.import_module("peer.lstm_fw")


def launch(module: Any, hidden: int, heads: int) -> TritonLaunch:
    """Its kernel with tensors that have no memory."""

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    arguments = {
        "states_initial": empty(heads, STATES, BATCH, hidden),
        "Wx": empty(heads, STEPS, GATES, BATCH, hidden),
        "R": empty(heads, GATES, hidden, hidden),
        "b": empty(heads, GATES, hidden),
        "states_all": empty(heads, STEPS + 1, STATES, BATCH, hidden),
        "gates_all": empty(heads, STEPS, GATES, BATCH, hidden),
        "T": STEPS,
        "NS": STATES,
        "B": BATCH,
        "NH": heads,
        "DH": hidden,
        "NGI": GATES,
        "NGR": GATES,
        "siz_B": BATCH,
        "OUTPUT_GATES": True,
        "DTYPE": module.torch2triton_dtype(torch.bfloat16),
        "num_warps": WARPS,
        "num_stages": 1,
    }
    return TritonLaunch(module._forward_sequence_kernel.fn, (heads, 1), arguments)


def simulated(module: Any, hidden: int, heads: int) -> report.Simulation:
    """Raises paths.Lost where the simulator cannot follow."""
    code, warps = compiled(launch(module, hidden, heads), devices.describe("H100"))
    path = paths.straight(code, paths.time_loop(code))
    return report.simulate(Kernel("forward", code, [path] * warps), machines.of("H100"))


def table() -> Iterator[str]:
    """Simulated beside published."""
    yield f"{FLASHRNN}'s Triton kernel, µs a step; published: {SOURCE}"
    yield "| H | heads | simulated from machine code | published | simulated by published |"
    yield "|--:|--:|--:|--:|--:|"
    with TemporaryDirectory() as folder:
        module = fetch(Path(folder))
        for hidden, heads, us in PUBLISHED:
            found = simulated(module, hidden, heads)
            said = f"{found.us:.2f}" + (f" ({found.spills} spills: not predicted)" if found.spills else "")
            yield f"| {hidden} | {heads} | {said} | {us:.2f} | {found.us / us:.2f} |"


def main() -> None:
    try:
        for line in table():
            print(line)
    except subprocess.CalledProcessError:
        sys.exit(f"pip does not install {' and '.join(PACKAGES)} here, which this needs")


if __name__ == "__main__":
    main()
