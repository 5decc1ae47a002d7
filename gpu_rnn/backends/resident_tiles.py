# SPDX-License-Identifier: Apache-2.0
"""How the resident kernel cuts a problem: rows, padded units, warps, and steps whose loads are under way together.

Warps and steps of a build stand in `resident_tiles.csv`: those of the shortest time loop, by a simulation of machine
code. No GPU measured them. ``python -m benchmarks.simulating.resident`` writes that table and says how.
"""

from __future__ import annotations

from importlib.resources import files
from typing import NamedTuple

from gpu_rnn.backends.problem import Problem
from gpu_rnn.devices import DEVICES
from gpu_rnn.memo import memoize

SCHEDULES = "resident_tiles.csv"
ROWS = 16  # of the batch in a tile: what a tensor-core instruction takes; fewer would be computed all the same
WARP_BYTES = 128  # of a row of pre-activations, for each warp: 8 values of each of an LSTM's gates for a thread
MOST_WARPS = 8  # with 16 a thread has 128 registers, and a GRU in tf32 spills


class Tile(NamedTuple):
    """How a problem is cut: rows of the batch, padded units, warps, and steps whose loads are under way together."""

    rows: int
    width: int
    warps: int
    stages: int


class Build(NamedTuple):
    """What a row of the table is for. `kind`: "16-bit", "tf32" or "fp32"."""

    architecture: int
    gates: int
    kind: str
    direction: str
    width: int


class Schedule(NamedTuple):
    """`cycles` are simulated, of one step of one tile; `compiler`: the version of Triton that built it."""

    warps: int
    stages: int
    cycles: int
    compiler: str


def padded(hidden: int) -> int:
    """The width of a kernel's blocks: a power of two, and at least 16, the depth of a tensor-core instruction."""
    return max(16, 1 << (hidden - 1).bit_length())


def shared_memory(problem: Problem, stages: int) -> int:
    """Bytes of a block's shared memory, at most: W_hh, the loads under way, and fp32 blocks to exchange values: two,
    and a third where what comes back through the products is dropped."""
    gates, width, itemsize = problem.G, padded(problem.H), problem.dtype.itemsize
    exchanged = 3 if problem.drop and problem.direction == "backward" else 2
    return gates * width**2 * itemsize + ROWS * width * ((stages - 1) * _loaded(problem) + 4 * exchanged)


def _loaded(problem: Problem) -> int:
    """Bytes that are loaded in a step for each unit."""
    program, itemsize = problem.program, problem.dtype.itemsize
    states, loaded = len(program.states), len(program.gates) * itemsize
    if problem.direction == "backward":  # also products, d_y and y, the other states, and all initial ones
        loaded += (len(program.split) + 2) * itemsize + 4 * (2 * states - 1)
        loaded += 4 * (states - 1) * problem.all_states
    return loaded + states * problem.control_bytes


def available(problem: Problem) -> int:
    """Shared memory for a block; the interpreter plays an H100."""
    return (problem.device if problem.device.is_gpu else DEVICES["H100"]).shared_memory


def build_of(problem: Problem) -> Build:
    """The row for a problem, which the table need not have."""
    major, minor = problem.device.capability if problem.device.is_gpu else DEVICES["H100"].capability
    kind = "16-bit" if problem.dtype.itemsize == 2 else "fp32" if problem.precision == "ieee" else "tf32"
    return Build(10 * major + minor, problem.G, kind, problem.direction, padded(problem.H))


def tile(problem: Problem) -> Tile:
    """How a problem is cut on its device, with as many steps under way as its shared memory holds."""
    build = build_of(problem)
    simulated = schedules().get(build._replace(architecture=_nearest(build.architecture)))
    warps, stages = (simulated.warps, simulated.stages) if simulated else (usual_warps(problem), 2)
    while stages > 1 and shared_memory(problem, stages) > available(problem):
        stages -= 1
    return Tile(ROWS, build.width, warps, stages)


def usual_warps(problem: Problem) -> int:
    """Where the table has no row."""
    width = padded(problem.H)
    row = max(problem.G, 4) * width * problem.dtype.itemsize
    warps = min(MOST_WARPS, max(2 if width == 16 else 4, row // WARP_BYTES))
    return 1 << (warps - 1).bit_length()


@memoize(1, stays="it is read from a file of the package, which does not change")
def schedules() -> dict[Build, Schedule]:
    """The table."""
    import csv  # where a table is read, and not with the package

    rows = csv.DictReader((files(__package__) / SCHEDULES).read_text().splitlines())
    return {
        Build(int(row["architecture"]), int(row["gates"]), row["kind"], row["direction"], int(row["width"])): Schedule(
            int(row["warps"]), int(row["stages"]), int(row["cycles"]), row["compiler"]
        )
        for row in rows
    }


@memoize(64)
def _nearest(architecture: int) -> int:
    """Of the architectures in the table, the one whose number is nearest, of two the newer."""
    there = {build.architecture for build in schedules()}
    return min(there, key=lambda each: (abs(each - architecture), -each), default=architecture)
