# SPDX-License-Identifier: Apache-2.0
"""Cycles of a step of the kernels that ship, by simulation: writes gpu_rnn/backends/chains.csv.

python -m benchmarks.simulating.chains                                          all; needs Triton, CuPy, no GPU
python -m benchmarks.simulating.chains --device H100 --backend group --cell lstm   these rows; the others stay
python -m benchmarks.simulating.chains --option layer_norm

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
    """What is simulated of a backend on some devices."""

    kinds: tuple[str, ...]
    cells: tuple[str, ...]
    hidden: tuple[int, ...]
    batches: tuple[int, ...]
    devices: tuple[str, ...] = ("H100", "A100", "RTX 4090")
    options: tuple[str, ...] = (chains.PLAIN,)


CELLS = ("lstm", "gru", "rnn", "gru_reset_before")
FEW = (64, 256, 512, 1024)
OTHERS = ("A100", "RTX 4090")
SIZES = {
    "resident": [
        Sizes(("bf16", "fp16", "tf32", "fp32"), CELLS, (16, 32, 64, 128, 256), (16,)),
        Sizes(("bf16",), ("lstm",), (32, 64, 128), (16,), ("H100",), (chains.TO_HALF,)),
    ],
    "group": [
        Sizes(
            ("16-bit",), ("lstm", "gru"), (64, 128, 256, 384, 512, 768, 1024, 2048), (1, 16, 64, 128), ("H100",),
        ),
        Sizes(("16-bit",), ("lstm", "gru"), FEW, (1, 16, 64), OTHERS),
        Sizes(("16-bit",), ("lstm", "gru"), FEW, (1, 16, 64), ("H100",), (chains.NORM,)),
        Sizes(("16-bit",), ("gru_reset_before",), FEW, (1, 16, 64), ("H100",)),
        Sizes(("tf32",), ("lstm",), FEW, (1, 16, 64)),
        Sizes(("fp32",), ("lstm",), (64, 256, 512), (1, 16, 64), ("H100",)),
    ],
    "step": [Sizes(("16-bit", "tf32"), CELLS, (64,), (16,))],
}  # fmt: skip


def builds_of(backend: str) -> Iterator[tuple[Chain, Sizes]]:
    for sizes in SIZES[backend]:
        for device, cell, option, kind, direction in product(
            sizes.devices, sizes.cells, sizes.options, sizes.kinds, DIRECTIONS
        ):
            yield Chain(device, backend, cell, option, kind, direction), sizes


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
        precision=build.precision,
        norm=build.option == chains.NORM,
        proj_size=hidden // 2 if build.option == chains.TO_HALF else 0,
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
    every = {build for backend in SIZES for build, _ in builds_of(backend)}
    for name in Chain._fields:
        parser.add_argument(f"--{name}", nargs="*", choices=sorted({getattr(build, name) for build in every}))
    asked = parser.parse_args()
    wanted = {name: chosen for name, chosen in vars(asked).items() if chosen is not None}
    for backend in SIZES:
        for build, sizes in builds_of(backend):
            if all(getattr(build, name) in chosen for name, chosen in wanted.items()):
                print(*build, flush=True)
                enter(build, [simulate(build, hidden, batch) for hidden, batch in product(sizes.hidden, sizes.batches)])


def enter(build: Chain, found: list[Simulated | None]) -> None:
    """Puts a build's rows into the table as it is on disk, which another process may be adding to."""
    rows = {(other, row.hidden, row.batch): row for other, row in chains.rows() if other != build}
    write(rows | {(build, row.hidden, row.batch): row for row in found if row is not None})


if __name__ == "__main__":
    main()
