# SPDX-License-Identifier: Apache-2.0
"""How the resident kernel cuts a problem: rows, padded units, warps, and steps whose loads are under way together.

Warps, steps, registers and what they hold of W_hh stand in `resident_tiles.csv`: for each build those of the shortest
time loop, by a simulation of machine code. No GPU measured them. ``python -m benchmarks.simulating.resident`` writes
that table and says how.
"""

from __future__ import annotations

from importlib.resources import files
from typing import NamedTuple

import torch

from gpu_rnn.backends.problem import Problem
from gpu_rnn.devices import DEVICES
from gpu_rnn.memo import memoize

SCHEDULES = "resident_tiles.csv"
ROWS = 16  # of the batch in a tile: what a tensor-core instruction takes; fewer would be computed all the same
WARP_BYTES = 128  # of a row of pre-activations, for each warp: 8 values of each of an LSTM's gates for a thread
WARP_THREADS = 32
MOST_WARPS = 8  # with 16 a thread has 128 registers, and a GRU in tf32 spills
MOST_VALUES = 56  # of gates, states and parameters in a thread of a backward pass: 64 spill, on 4 warps
ROW_BYTES = 16  # bytes: rows that begin at a multiple of them are addressed together
HALVES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


class Tile(NamedTuple):
    """How a problem is cut: rows of the batch, padded units, warps, steps whose loads are under way together, the most
    registers of a thread (0: what the compiler takes by itself), and gates whose weights stay in registers."""

    rows: int
    width: int
    warps: int
    stages: int
    registers: int = 0
    held: int = 0


class Build(NamedTuple):
    """What a row of the table is for. `kind`: "bf16", "fp16", "tf32" or "fp32"; `products`: of a step; `entering`: the
    padded units that enter them where h is projected, else 0."""

    architecture: int
    gates: int
    states: int
    products: int
    kind: str
    direction: str
    width: int
    entering: int = 0


class Schedule(NamedTuple):
    """`cycles` are simulated, of one step of one tile; `compiler`: the version of Triton that built it."""

    warps: int
    stages: int
    registers: int
    held: int
    cycles: int
    compiler: str


def padded(hidden: int) -> int:
    """The width of a kernel's blocks: a power of two, and at least 16, the depth of a tensor-core instruction."""
    return max(16, 1 << (hidden - 1).bit_length())


def widths(problem: Problem) -> tuple[int, int]:
    """The padded units, and those of what enters the products: fewer where h is projected. Triton gives all warps of a
    kernel whose products follow each other to the rows of the first that is no wider than a tile is high."""
    if not problem.proj_size:
        return padded(problem.H), padded(problem.H)
    return max(2 * ROWS, padded(problem.H)), max(2 * ROWS, padded(problem.proj_size))


def matrices(problem: Problem) -> int:
    """Those of all that is multiplied in a step: W_hh of each gate, and what projects h, which is as large."""
    return problem.G + bool(problem.proj_size)


def shared_memory(problem: Problem, stages: int, held: int = 0) -> int:
    """Bytes of a block's shared memory, at most: what registers do not hold of W_hh, the loads under way, and fp32
    blocks to exchange values: two, and a third where what comes back through the products is dropped. What registers
    hold goes through it once, before the loop."""
    width, entering = widths(problem)
    matrix = width * entering * problem.dtype.itemsize
    exchanged = 3 if problem.drop and problem.direction == "backward" else 2
    loop = ROWS * width * ((stages - 1) * _loaded(problem) + 4 * exchanged)
    return (matrices(problem) - held) * matrix + max(loop, matrix if held else 0)


def _loaded(problem: Problem) -> int:
    """Bytes that are loaded in a step for each unit."""
    program, itemsize = problem.program, problem.dtype.itemsize
    states, loaded = len(program.states), len(program.gates) * itemsize
    if problem.direction == "backward":  # also products, d_y and y, the other states, and all initial ones
        loaded += (len(program.split) + 2 + states) * itemsize + 4 * (states - 1)
        loaded += 4 * (states - 1) * problem.all_states
    return loaded + states * problem.control_bytes


def available(problem: Problem) -> int:
    """Shared memory for a block; the interpreter plays an H100."""
    return (problem.device if problem.device.is_gpu else DEVICES["H100"]).shared_memory


def build_of(problem: Problem) -> Build:
    """The row for a problem, which the table need not have."""
    major, minor = problem.device.capability if problem.device.is_gpu else DEVICES["H100"].capability
    kind = HALVES.get(problem.dtype) or ("fp32" if problem.precision == "ieee" else "tf32")
    program = problem.program
    sizes = problem.G, len(program.states), len(program.stages)
    width, entering = widths(problem)
    return Build(10 * major + minor, *sizes, kind, problem.direction, width, entering if problem.proj_size else 0)


def tile(problem: Problem) -> Tile:
    """How a problem is cut on its device, with as many steps under way as its shared memory holds."""
    build = build_of(problem)
    alike = _nearest(build)
    warps, stages, registers, held, *_ = schedules()[alike] if alike else (usual_warps(problem), 2, 0, 0)
    if alike != build or not _is_plain(problem):
        warps, registers, held = _enough(warps, problem), 0, 0
    while stages > 1 and shared_memory(problem, stages, held) > available(problem):
        stages -= 1
    return Tile(ROWS, build.width, warps, stages, registers, held)


def _is_plain(problem: Problem) -> bool:
    """Whether a problem's build takes no more registers than the one that was simulated."""
    more = problem.options or problem.lengths or problem.program.params
    sizes = problem.H, problem.proj_size
    return not more and all(size * problem.dtype.itemsize % ROW_BYTES == 0 for size in sizes)


def _enough(warps: int, problem: Problem) -> int:
    """So many warps, or as many more as leave a thread of a backward pass its values in registers: pre-activations of
    the gates, and what it carries from step to step of the gradients of states and parameters."""
    program, (width, _) = problem.program, widths(problem)
    values = ROWS * width * (problem.G + len(program.states) + len(program.params)) // WARP_THREADS
    while problem.direction == "backward" and warps < MOST_WARPS and values > warps * MOST_VALUES:
        warps *= 2
    return warps


def usual_warps(problem: Problem) -> int:
    """Where the table has no row."""
    width, _ = widths(problem)
    row = max(problem.G, 4) * width * problem.dtype.itemsize
    warps = min(MOST_WARPS, max(2 if width == 16 else 4, row // WARP_BYTES))
    return 1 << (warps - 1).bit_length()


@memoize(1, stays="it is read from a file of the package, which does not change")
def schedules() -> dict[Build, Schedule]:
    """The table."""
    import csv  # where a table is read, and not with the package

    rows = csv.reader((files(__package__) / SCHEDULES).read_text().splitlines()[1:])
    return dict(map(_entry, rows))


def _entry(row: list[str]) -> tuple[Build, Schedule]:
    fields = [int(field) if field.isdecimal() else field for field in row]
    parts = len(Build._fields)
    return Build(*fields[:parts]), Schedule(*fields[parts:])  # type: ignore[arg-type]


@memoize(256)
def _nearest(build: Build) -> Build | None:
    """The row that is like a build: of as many gates and units, of another 16-bit dtype, without its projection, of
    another cell or architecture if need be, of two architectures as near the newer."""

    def likeness(each: Build) -> tuple[bool, bool, int, int, int]:
        apart = abs(each.states - build.states) + abs(each.products - build.products)
        return (
            each.kind != build.kind,
            each.entering != build.entering,
            apart,
            abs(each.architecture - build.architecture),
            -each.architecture,
        )

    def cut(each: Build) -> tuple[object, ...]:
        return each.gates, each.direction, each.width, "16-bit" if each.kind in HALVES.values() else each.kind

    able = (each for each in schedules() if cut(each) == cut(build) and each.entering in (0, build.entering))
    return min(able, key=likeness, default=None)
