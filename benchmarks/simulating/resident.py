# SPDX-License-Identifier: Apache-2.0
"""Warps and stages of the resident kernel's builds, by simulation: writes gpu_rnn/backends/resident_tiles.csv.

python -m benchmarks.simulating.resident                                    all rows; needs Triton and no GPU
python -m benchmarks.simulating.resident --kind 16-bit --cell lstm          these rows; the others stay

Each plain build (no options, 16 rows of a batch) is compiled with every number of warps and stages that its shared
memory holds and that leaves nothing in local memory. Its time loop runs eight times on the model of a multiprocessor,
and the shortest is chosen, but for one of fewer stages that takes at most 3 % longer.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from itertools import product
from pathlib import Path

import torch

from benchmarks.simulating import builds, machines, paths
from benchmarks.simulating.multiprocessor import Multiprocessor
from gpu_rnn import cells, devices
from gpu_rnn.backends import resident, resident_tiles
from gpu_rnn.backends.problem import DIRECTIONS, Problem
from gpu_rnn.backends.resident_tiles import Build, Schedule

CELLS = {"lstm": cells.lstm(), "gru": cells.gru(), "rnn": cells.rnn()}
KINDS = {"16-bit": (torch.bfloat16, "ieee"), "tf32": (torch.float32, "tf32")}
WIDTHS = (16, 32, 64, 128, 256)
STAGES = (2, 3, 4)
DEVICE = "H100"  # whose constants are published
NEAR = 0.97  # times the cycles of a loop that is not worth another choice


@dataclass(frozen=True)
class Simulated:
    """The time loop of one compiled kernel: cycles and instructions of a step, barriers, accesses to local memory."""

    cycles: float
    instructions: int
    barriers: int
    spills: int


def problem(cell: str, kind: str, direction: str, width: int) -> Problem:
    dtype, precision = KINDS[kind]
    return Problem(
        recurrence=CELLS[cell],
        T=1024,
        B=resident_tiles.ROWS,
        N=1,
        I=width,
        H=width,
        dtype=dtype,
        device_type="cuda",
        device=devices.describe(DEVICE),
        direction=direction,
        precision=precision,
    )


def simulate(given: Problem, warps: int, stages: int) -> Simulated:
    """What the launcher would launch, with other warps and stages."""
    (launch,) = resident._launches(given)
    launch = launch._replace(arguments=launch.arguments | {"num_warps": warps, "STAGES": stages})
    code, _ = builds.compiled(launch, given.device)
    path = paths.straight(code, paths.time_loop(code))
    names = [code[index].base for index in path]
    cycles = Multiprocessor(code, [path] * warps, machines.of(DEVICE)).run().cycles
    return Simulated(cycles, len(path), names.count("BAR"), names.count("LDL") + names.count("STL"))


def simulations(given: Problem) -> Iterator[tuple[int, int, Simulated]]:
    """Warps, stages and what they give: first those without a table, then the fewest stages and the most warps."""
    usual = resident_tiles.usual_warps(given)
    choices = product(STAGES, sorted({usual, resident_tiles.MOST_WARPS}, reverse=True))
    for stages, warps in sorted(choices, key=lambda choice: choice != (STAGES[0], usual)):
        if resident_tiles.shared_memory(given, stages) > given.device.shared_memory:
            continue
        simulated = simulate(given, warps, stages)
        print(f"  {warps} warps, {stages} stages: {simulated}", flush=True)
        if not simulated.spills:
            yield warps, stages, simulated


def best(given: Problem) -> Schedule | None:
    """The first that is nearly the shortest; None where nothing may run."""
    import triton

    runs = list(simulations(given))
    shortest = min((simulated.cycles for *_, simulated in runs), default=0.0)
    near = [run for run in runs if run[2].cycles * NEAR <= shortest]
    if not near:
        return None
    warps, stages, simulated = near[0]
    return Schedule(warps, stages, round(simulated.cycles), triton.__version__)


def write(rows: dict[Build, Schedule]) -> None:
    path = Path(str(files("gpu_rnn.backends") / resident_tiles.SCHEDULES))
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Build._fields + Schedule._fields)
        writer.writerows(build + rows[build] for build in sorted(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cell", nargs="*", choices=CELLS, default=list(CELLS))
    parser.add_argument("--kind", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--width", nargs="*", type=int, choices=WIDTHS, default=WIDTHS)
    asked = parser.parse_args()
    rows = dict(resident_tiles.schedules())
    for cell, kind, width, direction in product(asked.cell, asked.kind, asked.width, DIRECTIONS):
        given = problem(cell, kind, direction, width)
        if resident.unsupported(given):
            continue
        print(cell, kind, width, direction, flush=True)
        choice = best(given)
        if choice is not None:
            rows[resident_tiles.build_of(given)] = choice
        write(rows)


if __name__ == "__main__":
    main()
