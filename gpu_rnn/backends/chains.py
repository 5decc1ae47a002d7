# SPDX-License-Identifier: Apache-2.0
"""How long a step of a kernel takes, by simulation of its machine code: what the cost models start from.

A step waits for the one before it, so a time loop takes as long as its longest chain of instructions. `chains.csv` has
the cycles of a step for some cells, sizes and devices; ``python -m benchmarks.simulating.chains`` writes it. Between
two sizes time follows a straight line in logarithms. Other cells, options, devices and sizes beyond the table are in
proportion to the kernel's own model of what its units have to do. No GPU measured any of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from importlib.resources import files
from typing import NamedTuple

import torch

from gpu_rnn import cells
from gpu_rnn.backends.problem import Problem
from gpu_rnn.devices import DEVICES, Device
from gpu_rnn.memo import memoize
from gpu_rnn.recurrence import Recurrence

CHAINS = "chains.csv"
KINDS = {
    "16-bit": (torch.float16, torch.bfloat16),
    "fp16": (torch.float16,),
    "bf16": (torch.bfloat16,),
    "tf32": (torch.float32,),
    "fp32": (torch.float32,),
}
PLAIN, NORM = "", "layer_norm"  # what `Chain.option` may be
TO_HALF = "proj_size"  # likewise: h is projected to half of the units


class Chain(NamedTuple):
    """What some rows of the table are for; `device` is a key of `devices.DEVICES`, `kind` one of `KINDS`."""

    device: str
    backend: str
    cell: str
    option: str
    kind: str
    direction: str

    @property
    def precision(self) -> str:
        return "tf32" if self.kind == "tf32" else "ieee"

    def takes(self, problem: Problem) -> bool:
        alike = problem.dtype.itemsize == 2 or problem.precision == self.precision
        return problem.dtype in KINDS[self.kind] and alike

    def recurrence(self) -> Recurrence:
        return cells.CELLS[self.cell]()


class Simulated(NamedTuple):
    """Units, rows of a batch, cycles of a step of them all, and GHz."""

    hidden: int
    batch: int
    cycles: int
    clock: float


Points = Mapping[float, float]


def line(points: Points, x: float) -> float:
    """What lies between two points, as a straight line in logarithms; beyond the first and the last as there."""
    known = sorted(points)
    x = min(max(x, known[0]), known[-1])
    if x in points:
        return points[x]
    after = next(each for each in known if each > x)
    before = known[known.index(after) - 1]
    share = math.log(x / before) / math.log(after / before)
    return points[before] * (points[after] / points[before]) ** share


class Grid(NamedTuple):
    """The rows of a build: for each number of units the seconds of a step by the rows of a batch."""

    seconds: Mapping[int, Points]

    def at(self, hidden: float, batch: float) -> float:
        return line({each: line(points, batch) for each, points in self.seconds.items()}, hidden)

    def nearest(self, hidden: int, batch: int) -> tuple[int, int]:
        """The nearest size within the rows."""
        hidden = min(max(hidden, min(self.seconds)), max(self.seconds))
        batches = self.seconds[next(each for each in sorted(self.seconds) if each >= hidden)]
        return hidden, int(min(max(batch, min(batches)), max(batches)))


def step(problem: Problem, backend: str, model: Callable[[Problem], float]) -> float:
    """Seconds of a step: those of the most alike that the table has, times what `model` says of this problem by what it
    says of that one; by `model` alone where there is none."""
    near = _near(_plain(problem), backend)
    if near is None:
        return model(problem)
    return near.seconds if near.same else near.seconds * model(problem) / model(near.problem)


def simulated(problem: Problem, backend: str) -> bool:
    """Whether `step` comes from the table alone."""
    near = _near(_plain(problem), backend)
    return near is not None and near.same


class _Near(NamedTuple):
    problem: Problem
    seconds: float  # of a step
    same: bool  # as was asked for


def _plain(problem: Problem) -> Problem:
    """What no step depends on made equal."""
    return problem.but(T=1, I=1, layers=1, bias=True, reverse="0" * problem.N)


@memoize(1024)
def _near(problem: Problem, backend: str) -> _Near | None:
    """Of what the table has, the most alike."""
    able = [build for build in table() if build.backend == backend and build.direction == problem.direction]
    build = min(able, key=lambda each: _unlike(each, problem), default=None)
    if build is None:
        return None
    hidden, batch = table()[build].nearest(problem.H, problem.B)
    dtype = problem.dtype if build.takes(problem) else KINDS[build.kind][0]
    alike = Problem(
        recurrence=build.recurrence(),
        T=1, B=batch, N=1, I=1, H=hidden, device_type="cuda", direction=build.direction,
        dtype=dtype, precision=build.precision if dtype == torch.float32 else problem.precision,
        norm=build.option == NORM, proj_size=hidden // 2 if build.option == TO_HALF else 0,
        device=problem.device if chip(problem.device) == chip(DEVICES[build.device]) else DEVICES[build.device],
    )  # fmt: skip
    return _Near(alike, table()[build].at(hidden, batch), alike == problem)


def _unlike(build: Chain, problem: Problem) -> tuple[int, ...]:
    """In what a build differs from a problem: first the chip, then the dtype, the option and the cell."""
    device, gates = DEVICES[build.device], len(build.recurrence().gates)
    older = [10 * major + minor for major, minor in (device.capability, problem.device.capability)]
    option = NORM if problem.norm else TO_HALF if problem.proj_size else PLAIN
    return (
        chip(device) != chip(problem.device), abs(older[0] - older[1]),
        problem.dtype.itemsize not in {dtype.itemsize for dtype in KINDS[build.kind]}, not build.takes(problem),
        build.option != option, build.recurrence() != problem.recurrence, abs(gates - problem.G),
    )  # fmt: skip


def chip(device: Device) -> tuple[object, ...]:
    """What a step depends on: devices with other memories are alike."""
    return device.capability, device.sms, device.clock, device.shared_memory


@memoize(1, stays="it is read from a file of the package, which does not change")
def table() -> dict[Chain, Grid]:
    """What `chains.csv` says, in seconds."""
    found: dict[Chain, dict[int, dict[float, float]]] = {}
    for build, row in rows():
        found.setdefault(build, {}).setdefault(row.hidden, {})[row.batch] = row.cycles / (row.clock * 1e9)
    return {build: Grid(seconds) for build, seconds in found.items()}


def rows() -> Iterator[tuple[Chain, Simulated]]:
    """The rows of `chains.csv`."""
    import csv  # where a table is read, and not with the package

    for row in csv.DictReader((files(__package__) / CHAINS).read_text().splitlines()):
        sizes = Simulated(int(row["hidden"]), int(row["batch"]), int(row["cycles"]), float(row["clock"]))
        yield Chain(*(row[name] for name in Chain._fields)), sizes
