# SPDX-License-Identifier: Apache-2.0
"""Cycles of a step of the kernels that ship, by simulation: writes gpu_rnn/backends/chains.csv.

python -m benchmarks.simulating.chains                                    all of an H100; needs Triton, CuPy, no GPU
python -m benchmarks.simulating.chains --backend group --cell lstm        these rows; the others stay
python -m benchmarks.simulating.chains --device A100

A row is what dispatch would launch for so many units and rows of a batch: compiled, and its time loop run on the model
of a multiprocessor. What the simulator does not follow, and builds that reach local memory, have no row.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator
from importlib.resources import files
from itertools import product
from pathlib import Path
from typing import NamedTuple

from benchmarks.simulating import builds, machines, report
from benchmarks.simulating.paths import Lost
from gpu_rnn import cells, devices
from gpu_rnn.backends import BACKENDS, chains
from gpu_rnn.backends.chains import Chain, Simulated
from gpu_rnn.backends.problem import DIRECTIONS, Problem

STEPS = 1024  # of the sequence, which no chain depends on


class Sizes(NamedTuple):
    """What is simulated of a backend."""

    kinds: tuple[str, ...]
    cells: tuple[str, ...]
    hidden: tuple[int, ...]
    batches: tuple[int, ...]


SIZES = {
    "resident": Sizes(("bf16", "fp16", "tf32"), ("lstm", "gru", "rnn"), (16, 32, 64, 128, 256), (16,)),
    "group": Sizes(("16-bit",), ("lstm", "gru"), (64, 128, 256, 384, 512, 768, 1024, 2048), (1, 16, 64, 128)),
    "step": Sizes(("16-bit", "tf32"), ("lstm", "gru", "rnn"), (64,), (16,)),
}
MORE = {"group": Sizes(("tf32",), ("lstm",), (64, 256, 512, 1024), (1, 16, 64))}


def builds_of(device: str, backend: str) -> Iterator[tuple[Chain, Sizes]]:
    for sizes in (SIZES[backend], *([MORE[backend]] if backend in MORE else [])):
        for cell, kind, direction in product(sizes.cells, sizes.kinds, DIRECTIONS):
            yield Chain(device, backend, cell, kind, direction), sizes


def problem(build: Chain, hidden: int, batch: int) -> Problem:
    """What a row is about."""
    return Problem(
        recurrence=cells.CELLS[build.cell](),
        T=STEPS,
        B=batch,
        N=1,
        I=hidden,
        H=hidden,
        dtype=chains.KINDS[build.kind][0],
        device_type="cuda",
        device=devices.describe(build.device),
        direction=build.direction,
        precision="tf32" if build.kind == "tf32" else "ieee",
    )


def simulate(build: Chain, hidden: int, batch: int) -> Simulated | None:
    """A row; None where there can be none.

    Raises:
        ValueError: there are no figures of that device.
    """
    machine, asked = machines.of(build.device), problem(build, hidden, batch)
    if BACKENDS[build.backend].unsupported(asked):
        return None
    try:
        found = [report.simulate(kernel, machine) for kernel in builds.kernels(asked, build.backend)]
    except Lost as lost:
        print(f"  {lost}")
        return None
    if any(each.spills for each in found):
        return None
    return Simulated(hidden, batch, round(sum(each.cycles for each in found)), machine.clock)


def write(rows: dict[tuple[Chain, int, int], Simulated]) -> None:
    path = Path(str(files("gpu_rnn.backends") / chains.CHAINS))
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Chain._fields + Simulated._fields)
        writer.writerows((*key[0], *rows[key]) for key in sorted(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=list(machines.MACHINES), default="H100")
    parser.add_argument("--backend", nargs="*", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--cell", nargs="*")
    parser.add_argument("--kind", nargs="*", choices=list(chains.KINDS))
    asked = parser.parse_args()
    rows = {(build, row.hidden, row.batch): row for build, row in chains.rows()}
    for backend in asked.backend:
        for build, sizes in builds_of(asked.device, backend):
            if (asked.cell and build.cell not in asked.cell) or (asked.kind and build.kind not in asked.kind):
                continue
            print(*build, flush=True)
            for hidden, batch in product(sizes.hidden, sizes.batches):
                rows.pop((build, hidden, batch), None)
                row = simulate(build, hidden, batch)
                if row is not None:
                    rows[build, hidden, batch] = row
            write(rows)


if __name__ == "__main__":
    main()
