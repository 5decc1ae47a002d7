# SPDX-License-Identifier: Apache-2.0
"""How near simulated steps come to published ones: another library's kernels, from its released package.

    python benchmarks/simulate.py --validate         # prints the table
    python -m benchmarks.simulating.published        # writes the simulated figures of validation.csv too

pip fetches the package into a folder that is deleted at the end; nothing of it is kept. Its Triton kernel is compiled
for the H100 on which its authors timed it, and simulated like ours, with the same figures.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.cases.names import FLASHRNN
from benchmarks.simulating import machines, paths, report, validation
from benchmarks.simulating.builds import Kernel, compiled
from benchmarks.simulating.validation import SOURCE
from gpu_rnn import devices
from gpu_rnn.backends.building import TritonLaunch

PACKAGES = (f"{FLASHRNN}==1.0.8", "einops")
BATCH, STEPS, WARPS = 16, 1024, 4  # as its authors launch it
GATES, STATES = 4, 2


PUBLISHED = tuple(row for row in validation.read() if row.library == validation.TRITON)


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
        for row in PUBLISHED:
            found = simulated(module, row.hidden, row.heads)
            said = f"{found.us:.2f}" + (f" ({found.spills} spills: not predicted)" if found.spills else "")
            yield f"| {row.hidden} | {row.heads} | {said} | {row.us:.2f} | {found.us / row.us:.2f} |"


def renew() -> None:
    """Simulates them again, and writes that into validation.csv. A kernel that spills gets no figure."""
    with TemporaryDirectory() as folder:
        module = fetch(Path(folder))
        found = {row: simulated(module, row.hidden, row.heads) for row in PUBLISHED}
    times = {row: None if each.spills else each.us for row, each in found.items()}
    validation.write([row._replace(simulated=times.get(row, row.simulated)) for row in validation.read()])


def main() -> None:
    _or_exit(lambda: [print(line) for line in table()])


def _or_exit(do: Callable[[], object]) -> None:
    try:
        do()
    except subprocess.CalledProcessError:
        sys.exit(f"pip does not install {' and '.join(PACKAGES)} here, which this needs")


if __name__ == "__main__":
    _or_exit(renew)
