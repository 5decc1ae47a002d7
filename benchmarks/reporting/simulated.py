# SPDX-License-Identifier: Apache-2.0
"""What is simulated of a device: steps from gpu_rnn/backends/chains.csv, bounds, options, and what dispatch takes.

No GPU measured any of it. A step is that of the time loop alone: products over all steps and launches come on top.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import NamedTuple

from benchmarks.cases.variants import DTYPES
from benchmarks.reporting.results import Case, per_step, timed
from benchmarks.simulating import chains as builds
from benchmarks.simulating import machines, validation
from benchmarks.simulating.validation import Published
from gpu_rnn import cells, devices
from gpu_rnn.backends import BACKENDS, chains
from gpu_rnn.backends.chains import NORM, PLAIN, TO_HALF, Chain
from gpu_rnn.backends.group.choice import floor
from gpu_rnn.backends.problem import Problem
from gpu_rnn.dispatch import choice

STEPS_PAGE = Path(__file__).resolve().parents[2] / "kernels" / "simulated.md"
KINDS = {"bf16": ("bf16", "16-bit"), "fp16": ("fp16", "16-bit"), "fp32": ("tf32",), "ieee": ("fp32",)}  # by dtype
PASSES = {"inference": "inference", "training": "forward in training", "backward": "backward"}
OF_CALL = {"forward": ("inference",), "training": ("training", "backward")}  # the passes of a measured direction
LOOPS = ("resident", "group")  # whose step is the whole of a time loop's
NAMES = {"lstm": "LSTM", "gru": "GRU", "rnn": "RNN", "gru_reset_before": "GRU, reset before the product"}
OPTIONS = {NORM: "layer_norm", TO_HALF: "proj_size, to half"}
OTHER_CELLS = {"gru_reset_before": ("gru", "reset_after=False")}  # a cell that is an option of another
STEPS = 1000  # of a sequence, over which dispatch spreads what a call takes once
TAKEN_HIDDEN, TAKEN_BATCH = (32, 64, 128, 256, 512, 1024, 2048), (1, 64, 256)


class Step(NamedTuple):
    """A row of the table of chains; times in microseconds."""

    build: Chain
    hidden: int
    batch: int
    cycles: int
    us: float
    bound: float | None  # that of loops with W_hh on chip; None where it does not fit, or its rates are not published

    @property
    def size(self) -> tuple[int, int]:
        return self.hidden, self.batch


class Cost(NamedTuple):
    """The time of a step with an option by that without."""

    option: str
    cell: str
    direction: str
    hidden: int
    batch: int
    times: float


class Compared(NamedTuple):
    """What others published of a step, and what ours is simulated to take at that size."""

    published: Published
    ours: float | None  # µs; None where none is simulated


class Beside(NamedTuple):
    """A measured case beside the simulated step of its time loop, in microseconds a step."""

    case: Case
    simulated: float

    @property
    def measured(self) -> float:
        assert self.case.ours is not None
        return per_step(self.case.ours)


def known() -> tuple[str, ...]:
    """The devices that something is simulated of, the newest first."""
    found = {build.device for build, _ in chains.rows()}
    return tuple(sorted(found, key=lambda name: devices.DEVICES[name].capability, reverse=True))


def device_of(driver: str) -> str | None:
    """Of what chips like that of a driver's name were simulated as; None where none was."""
    name = devices.known_as(driver)
    alike = (each for each in known() if name and _same_chip(each, name))
    return next(alike, None)


def _same_chip(one: str, other: str) -> bool:
    return chains.chip(devices.DEVICES[one]) == chains.chip(devices.DEVICES[other])


@cache
def steps(device: str) -> tuple[Step, ...]:
    """Every row of a device that is a whole step of a time loop."""
    return tuple(
        Step(build, row.hidden, row.batch, row.cycles, row.cycles / row.clock / 1e3, _bound(build, row))
        for build, row in chains.rows()
        if build.device == device and build.backend in LOOPS
    )


def _bound(build: Chain, row: chains.Simulated) -> float | None:
    if machines.of(build.device).predicted:  # the bound's rates are published of an H100 only
        return None
    found = floor(builds.problem(build, row.hidden, row.batch))
    return None if found is None else 1e6 * found


def of_dtype(device: str, cell: str, dtype: str, direction: str, option: str = PLAIN) -> list[Step]:
    """The steps of a cell in a dtype and pass."""
    wanted = (cell, option, direction)
    return [
        step
        for step in steps(device)
        if (step.build.cell, step.build.option, step.build.direction) == wanted and step.build.kind in KINDS[dtype]
    ]


def costs(device: str) -> list[Cost]:
    """What options cost, of rows that are simulated with and without."""
    every = {(step.build, step.size): step.us for step in steps(device)}
    found = []
    for (build, size), us in every.items():
        cell, option = OTHER_CELLS.get(build.cell, (build.cell, OPTIONS.get(build.option, "")))
        plain = every.get((build._replace(cell=cell, option=PLAIN), size))
        if option and plain and build.kind in KINDS["bf16"]:
            found.append(Cost(option, NAMES[cell], build.direction, *size, us / plain))
    return found


def compared(device: str) -> list[Compared]:
    """The published figures of a device."""
    return [Compared(each, _same_size(each)) for each in validation.read() if each.device == device]


def _same_size(each: Published) -> float | None:
    """Ours at the size of a published LSTM: of one head from the chains, of several from kernels/simulated.md."""
    if each.heads == 1:
        found = of_dtype(each.device, "lstm", each.dtype, each.direction)
        return min((step.us for step in found if step.size == (each.hidden, each.batch)), default=None)
    wanted = ["group", "lstm", each.dtype, each.direction, *map(str, (each.hidden, each.batch, each.heads))]
    for line in STEPS_PAGE.read_text().splitlines():
        row = [cell.strip() for cell in line.strip("|").split("|")]
        if row[: len(wanted)] == wanted:
            return float(row[len(wanted) + 1])  # after the cycles
    return None


@cache
def taken(device: str, cell: str, direction: str, dtype: str = "bf16") -> Mapping[tuple[int, int], str]:
    """The backend that dispatch takes on a device, by H and B; direction "inference" or "training", which is both
    passes. Cost models are asked and nothing is built: what a compiler refuses is another's turn in a call."""
    sizes = product(TAKEN_HIDDEN, TAKEN_BATCH)
    return {size: cheapest(problem(device, cell, dtype, direction, *size)) for size in sizes}


def cheapest(problem: Problem) -> str:
    able = [name for name, backend in BACKENDS.items() if not backend.unsupported(problem)]
    return min(able, key=lambda name: choice.total_cost(problem, name))


def problem(device: str, cell: str, dtype: str, direction: str, hidden: int, batch: int) -> Problem:
    """A plain layer of one direction, with as many input features as units."""
    return Problem(
        recurrence=cells.CELLS[cell](),
        T=STEPS,
        B=batch,
        N=1,
        I=hidden,
        H=hidden,
        dtype=DTYPES[dtype],
        device_type="cuda",
        device=devices.DEVICES[device],
        direction=direction,
        precision="tf32" if dtype == "fp32" else "ieee",
    )


def beside(cases: Sequence[Case], device: str) -> list[Beside]:
    """The measured cases whose time loop is in the table: plain layers, one of them, on a backend that holds the
    loop."""
    found = []
    for case in cases:
        us = _loop(case, device) if _plain(case) else None
        if us is not None:
            found.append(Beside(case, us))
    return found


def _plain(case: Case) -> bool:
    alone = (case["layers"], case["bidirectional"], case["heads"]) == ("1", "False", "1")
    return alone and not case["option"] and timed(case.ours) and case["cell"].lower() in cells.CELLS


def _loop(case: Case, device: str) -> float | None:
    """Microseconds of a step of all passes, by the table alone."""
    assert case.ours is not None
    backend, sizes = case.ours["variant"], (int(case["H"]), int(case["B"]))
    passes = [
        problem(device, case["cell"].lower(), case["dtype"], direction, *sizes)
        for direction in OF_CALL[case["direction"]]
    ]
    if backend not in LOOPS or not all(chains.simulated(each, backend) for each in passes):
        return None
    return sum(1e6 * chains.step(each, backend, _no_model) for each in passes)


def _no_model(problem: Problem) -> float:
    raise AssertionError("a step that the table has asks no model")


def fastest(found: Sequence[Step]) -> Mapping[tuple[int, int], Step]:
    """By H and B the step of the backend that is the shortest."""
    best: dict[tuple[int, int], Step] = {}
    for step in found:
        if step.size not in best or step.us < best[step.size].us:
            best[step.size] = step
    return best


def by_build(device: str) -> Iterator[tuple[Chain, list[Step]]]:
    """The steps of each build."""
    found: dict[Chain, list[Step]] = {}
    for step in steps(device):
        found.setdefault(step.build, []).append(step)
    yield from found.items()
