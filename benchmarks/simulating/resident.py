# SPDX-License-Identifier: Apache-2.0
"""Warps, stages and registers of the resident kernel's builds, by simulation: writes
gpu_rnn/backends/resident_tiles.csv.

python -m benchmarks.simulating.resident                                         all rows; needs Triton and no GPU
python -m benchmarks.simulating.resident --device H100 --kind bf16 --cell lstm   these rows; the others stay
python -m benchmarks.simulating.resident --cell lstm --projected half            with h projected to half of the units

Each plain build (no options, 16 rows of a batch) is compiled with three steps' loads under way, on some numbers of
warps, with its weights in shared memory and in registers; the shortest of these also with more and fewer steps and with
a limit of registers, with which the compiler orders a loop's loads otherwise. Its time loop runs eight times on the
model of a multiprocessor. What leaves something in local memory is left out, and of the others the shortest is chosen,
but for one before it that takes at most 3 % longer.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.simulating import builds, machines, paths
from benchmarks.simulating.multiprocessor import Multiprocessor
from gpu_rnn import cells, devices
from gpu_rnn.backends import resident, resident_launch, resident_tiles
from gpu_rnn.backends.problem import DIRECTIONS, Problem
from gpu_rnn.backends.resident_tiles import Build, Schedule

CELLS = ("lstm", "gru", "rnn", "gru_reset_before")
KINDS = {
    "bf16": (torch.bfloat16, "ieee"),
    "fp16": (torch.float16, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "fp32": (torch.float32, "ieee"),
}
WIDTHS = (16, 32, 64, 128, 256)
PROJECTED = {"no": lambda width: 0, "half": lambda width: width // 2, "most": lambda width: width - 8}  # units of h
STAGES = (2, 3, 4)
REGISTERS = 168  # the limit of a thread: room for 8 warps, or three blocks of 4
DEVICES = ("H100", "A100", "RTX 4090")  # whose constants are published
NEAR = 0.97  # times the cycles of a loop that is not worth another choice


class Choice(NamedTuple):
    """What a build is compiled with."""

    warps: int
    stages: int
    registers: int = 0
    held: int = 0


@dataclass(frozen=True)
class Simulated:
    """The time loop of one compiled kernel: cycles and instructions of a step, barriers, accesses to local memory."""

    cycles: float
    instructions: int
    barriers: int
    spills: int


def problem(cell: str, kind: str, direction: str, width: int, device: str = "H100", projected: str = "no") -> Problem:
    dtype, precision = KINDS[kind]
    return Problem(
        recurrence=cells.CELLS[cell](),
        T=1024,
        B=resident_tiles.ROWS,
        N=1,
        I=width,
        H=width,
        dtype=dtype,
        device_type="cuda",
        device=devices.describe(device),
        direction=direction,
        precision=precision,
        proj_size=PROJECTED[projected](width),
    )


def simulate(given: Problem, choice: Choice) -> Simulated:
    """What the launcher would launch, with other warps, stages and registers."""
    (launch,) = resident_launch.launches(given)
    changed = {"num_warps": choice.warps, "STAGES": choice.stages, "HELD": choice.held}
    changed |= {"maxnreg": choice.registers or None}
    code, _ = builds.compiled(launch._replace(arguments=launch.arguments | changed), given.device)
    path = paths.straight(code, paths.time_loop(code))
    names = [code[index].base for index in path]
    machine = machines.of(devices.known_as(given.device.name) or given.device.name)
    cycles = Multiprocessor(code, [path] * choice.warps, machine).run().cycles
    return Simulated(cycles, len(path), names.count("BAR"), names.count("LDL") + names.count("STL"))


def runs(given: Problem, choices: Iterable[Choice]) -> dict[Choice, Simulated]:
    """What the choices give that fit, without those that leave something in local memory."""
    results = {}
    for choice in choices:
        if resident_tiles.shared_memory(given, choice.stages, choice.held) > given.device.shared_memory:
            continue
        simulated = simulate(given, choice)
        print(f"  {choice}: {simulated}", flush=True)
        if not simulated.spills:
            results[choice] = simulated
    return results


def best(given: Problem) -> Schedule | None:
    """The first that is nearly the shortest; None where nothing may run."""
    import triton

    warps = dict.fromkeys((resident_tiles.usual_warps(given), resident_tiles.MOST_WARPS))
    helds = (0,) if given.precision == "ieee" and given.dtype == torch.float32 else (0, given.G)
    results = runs(given, (Choice(count, STAGES[1], held=held) for count, held in product(warps, helds)))
    if helds[-1] and not any(choice.held for choice in results):
        results |= runs(given, (Choice(count, STAGES[1], held=given.G - 1) for count in warps))
    first = min(results, key=lambda choice: results[choice].cycles) if results else Choice(next(iter(warps)), STAGES[1])
    others = [first._replace(stages=stages) for stages in STAGES if stages != first.stages]
    results |= runs(given, [*others, first._replace(registers=REGISTERS)])
    shortest = min((simulated.cycles for simulated in results.values()), default=0.0)
    for choice, simulated in results.items():
        if simulated.cycles * NEAR <= shortest:
            return Schedule(*choice, round(simulated.cycles), triton.__version__)
    return None


def write(rows: dict[Build, Schedule]) -> None:
    path = Path(str(files("gpu_rnn.backends") / resident_tiles.SCHEDULES))
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Build._fields + Schedule._fields)
        writer.writerows(build + rows[build] for build in sorted(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", nargs="*", choices=DEVICES, default=DEVICES)
    parser.add_argument("--cell", nargs="*", choices=CELLS, default=CELLS)
    parser.add_argument("--kind", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--width", nargs="*", type=int, choices=WIDTHS, default=WIDTHS)
    parser.add_argument("--projected", choices=PROJECTED, default="no")
    asked = parser.parse_args()
    for device, cell, kind, width in product(asked.device, asked.cell, asked.kind, asked.width):
        for direction in DIRECTIONS:
            given = problem(cell, kind, direction, width, device, asked.projected)
            if resident.unsupported(given):
                continue
            print(device, cell, kind, width, direction, flush=True)
            choice = best(given)
            if choice is not None:
                enter(resident_tiles.build_of(given), choice)


def enter(build: Build, choice: Schedule) -> None:
    """Adds a row to the table as it is on disk, which another process may be adding to."""
    resident_tiles.schedules.cache_clear()
    write({**resident_tiles.schedules(), build: choice})


if __name__ == "__main__":
    main()
