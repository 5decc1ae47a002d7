# SPDX-License-Identifier: Apache-2.0
"""What a simulated time loop spends its cycles on. Simulated from machine code: nothing here was measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from benchmarks.simulating import paths
from benchmarks.simulating.builds import Kernel
from benchmarks.simulating.exchange import Exchange
from benchmarks.simulating.machines import Machine
from benchmarks.simulating.multiprocessor import SUB_CORES, Multiprocessor, Run, tensor_busy
from benchmarks.simulating.paths import Lost
from benchmarks.simulating.units import BUSY, Unit, unit_of, waves

STEPS = 8
SHOWN = 12  # waits, the longest first
LABEL = "simulated from machine code"


@dataclass(frozen=True)
class Simulation:
    """A kernel's time loop on one multiprocessor."""

    kernel: Kernel
    machine: Machine
    run: Run

    @property
    def cycles(self) -> float:
        """Of a step of all rows; of a kernel without a loop, of its one pass."""
        return self.run.cycles * self.kernel.rounds if self.kernel.loops else self.run.ends[-1]

    @property
    def us(self) -> float:
        return self.cycles / (self.machine.clock * 1e3)

    @property
    def spills(self) -> int:
        return paths.spills(self.kernel.code, self.kernel.paths[0])


def simulate(kernel: Kernel, machine: Machine) -> Simulation:
    """Runs a kernel's time loop.

    Raises:
        Lost: blocks exchange words, and nobody has published how long that takes on this device; or the warps' paths
            do not fit together.
    """
    exchange = None
    if kernel.hops:
        remote = any(each.base == "STAS" for each in kernel.code)
        if None in ((machine.remote, machine.remote_bytes) if remote else (machine.hop, machine.l2, machine.l2_bytes)):
            raise Lost("nobody has published how long a word takes from block to block on this device")
        exchange = Exchange(kernel.code, kernel.paths, (machine.hop or 0.0) * machine.clock * 1e9, kernel.hops)
    multiprocessor = Multiprocessor(kernel.code, kernel.paths, machine, exchange, kernel.blocks)
    try:
        return Simulation(kernel, machine, multiprocessor.run(STEPS if kernel.loops else 1))
    except RuntimeError as error:
        raise Lost(f"{kernel.name}: {error}") from error


@dataclass(frozen=True)
class Wait:
    """Cycles a step on the critical path between two instructions: `after` was waited for."""

    cycles: float
    reason: str
    after: int  # an index into the code


def waits(simulation: Simulation) -> list[Wait]:
    """What is waited for along the critical path, once the loop has settled; the longest first."""
    run = simulation.run
    first = len(run.ends) // 2 - 1 if simulation.kernel.loops else -1
    spent: Counter[tuple[str, int]] = Counter()
    for before, issue in pairwise(run.critical_path()):
        if issue.step > first:
            spent[issue.reason, before.index] += issue.time - before.time  # type: ignore[assignment]
    steps = len(run.ends) - 1 - first
    return [Wait(cycles / steps, reason, index) for (reason, index), cycles in spent.most_common()]


def busy(simulation: Simulation) -> dict[str, float]:
    """Cycles a step that each unit of the busiest sub-core works, and what all four share."""
    machine, kernel = simulation.machine, simulation.kernel
    special = {Unit.SPECIAL: machine.special_busy}
    cores: list[Counter[str]] = [Counter() for _ in range(SUB_CORES)]
    shared: Counter[str] = Counter()
    for warp, path in enumerate(kernel.paths):
        core = cores[warp % SUB_CORES]
        core["issue of instructions"] += len(path)
        for index in path:
            instruction = kernel.code[index]
            unit = unit_of(instruction)
            if unit is Unit.MEMORY:
                shared[unit.value] += waves(instruction)
            elif unit is Unit.TENSOR:
                core[unit.value] += tensor_busy(instruction, machine)  # type: ignore[assignment]
            elif unit is not Unit.CONTROL:
                core[unit.value] += {**BUSY, **special}[unit]  # type: ignore[assignment]
    names = {name for core in cores for name in core}
    return {**{name: max(core[name] for core in cores) for name in names}, **shared}


def lines(simulation: Simulation) -> Iterator[str]:
    """The report of one kernel."""
    kernel, machine = simulation.kernel, simulation.machine
    code, path, other = kernel.code, kernel.paths[0], kernel.paths[-1]
    what = "a step" if kernel.loops else "a pass, without the launch"
    rounds = f", in {kernel.rounds} rounds" if kernel.rounds > 1 else ""
    rounds += f", {kernel.blocks} blocks on a multiprocessor" if kernel.blocks > 1 else ""
    yield f"{kernel.name}: {simulation.cycles:.0f} cycles {what}{rounds}, {simulation.us:.2f} µs at {machine.clock} GHz"
    if kernel.hops and machine.hop and "hop" in machine.predicted:
        yield f"  the hop between blocks, {machine.hop * 1e6:.2f} µs, is predicted for this device and not published"
    if simulation.spills:
        yield f"  {simulation.spills} accesses to local memory: it takes longer than this, and nobody knows how much"
    one = f", {len(other)} of one that owns no units" if len(other) != len(path) else ""
    yield f"  {len(kernel.paths)} warps; {len(path)} instructions of a warp{one}"
    barriers = sum(code[index].base == "BAR" for index in path)
    yield f"  {barriers} barriers{_regions(simulation)}"
    unit, cycles = max(busy(simulation).items(), key=lambda item: item[1])
    yield f"  busiest: {unit}, {cycles:.0f} cycles"
    yield "  along the critical path, cycles of a round:"
    for wait in waits(simulation)[:SHOWN]:
        instruction = code[wait.after]
        yield f"  {wait.cycles:8.0f}  {wait.reason:10} after {instruction.address:#06x}  {str(instruction)[:70]}"


def _regions(simulation: Simulation) -> str:
    if not simulation.kernel.hops:
        return ""
    path, code = simulation.kernel.paths[0], simulation.kernel.code
    regions, early = len(list(paths.regions(code, path))), len(list(paths.early_waits(code, path)))
    return f"; {regions} branches between barrier and publication; {early} waits for loads before the first poll"
