# SPDX-License-Identifier: Apache-2.0
"""One multiprocessor: four sub-cores that issue the instructions of their warps in order, by the compiler's own codes.

A sub-core issues one instruction a cycle, of the warp that it issued last while that can go on, else of the youngest
that can. Not modelled: instruction fetch, bank conflicts, register ports, other multiprocessors.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from benchmarks.simulating.instructions import BOARDS, NONE, Instruction
from benchmarks.simulating.units import BUSY, Unit, unit_of, waves

SUB_CORES = 4
LANES = 32
NEVER = float("inf")


@dataclass(frozen=True)
class Machine:
    """Cycles of what the compiler's codes do not say.

    Attributes:
        load: of a load from global memory, until the result can be used.
        shared, matrix: of one from shared memory, and of LDSM.
        constant: of one from constant memory, and of a special register.
        shuffle, special, tensor: of a shuffle, a special function, a matrix instruction.
        special_busy, tensor_busy: that one such instruction takes its unit; the latter for a product of 16 x 8 x 16.
        operands: until a memory instruction has read its operands.
        barrier: from the last arrival to the release of all.
        branch: that a taken branch takes besides.
    """

    load: float
    shared: float
    matrix: float
    constant: float
    shuffle: float
    special: float
    special_busy: float
    tensor: float
    tensor_busy: float
    operands: float
    barrier: float
    branch: float


class Issue(NamedTuple):
    """An instruction as it was issued, and what it waited for: the number of another issue, or None."""

    warp: int
    step: int
    index: int
    time: float
    reason: str
    cause: int | None


class Event(NamedTuple):
    """When something is there, and the issue that brought it."""

    time: float = 0.0
    cause: int | None = None


START = Event()


@dataclass
class Run:
    """What a simulation gave: every issue in order, and when each step's last instruction was issued."""

    issues: list[Issue]
    ends: list[float]

    @property
    def cycles(self) -> float:
        """Of a step, once the loop has settled."""
        first = len(self.ends) // 2 - 1
        return (self.ends[-1] - self.ends[first]) / (len(self.ends) - 1 - first)

    def critical_path(self) -> list[Issue]:
        """From the last issue back to the first: each waited for the one before it."""
        chain, issue = [], self.issues[-1]
        while issue.cause is not None:
            chain.append(issue)
            issue = self.issues[issue.cause]
        return [*reversed(chain)]


@dataclass
class _Warp:
    number: int
    path: Sequence[int]  # of indices into the code, for one step
    position: int = 0
    step: int = 0
    ready: Event = START
    reason: str = "stall"
    boards: list[Event] = field(default_factory=lambda: [START] * BOARDS)
    copies: Event = START  # the latest asynchronous one
    groups: list[Event] = field(default_factory=list)  # of asynchronous copies


class Multiprocessor:
    """`paths[w]` is what warp w executes in a step, as indices into the code."""

    def __init__(self, code: Sequence[Instruction], paths: Sequence[Sequence[int]], machine: Machine) -> None:
        self.code, self.machine = code, machine
        self.warps = [_Warp(number, path) for number, path in enumerate(paths)]
        self.units = {index: unit_of(code[index]) for path in paths for index in path}
        self.free: dict[tuple[Unit, int], Event] = defaultdict(Event)  # by unit and sub-core
        self.arrived: dict[tuple[int, ...], list[_Warp]] = defaultdict(list)
        self.latest: list[_Warp | None] = [None] * SUB_CORES
        self.issues: list[Issue] = []

    def run(self, steps: int = 8) -> Run:
        """The time loop, `steps` times.

        Raises:
            RuntimeError: some warps wait for ever.
        """
        ends, time = [[0.0] * steps for _ in self.warps], 0.0
        while any(warp.step < steps for warp in self.warps):
            chosen = [self._choose(core, time, steps) for core in range(SUB_CORES)]
            for warp in chosen:
                if warp is not None:
                    ends[warp.number][warp.step] = time
                    self._issue(warp, time)
            time = time + 1 if any(chosen) else self._next(steps)
        return Run(self.issues, [max(end[step] for end in ends) for step in range(steps)])

    def _next(self, steps: int) -> float:
        """The cycle in which some warp can go on."""
        soonest = min(self._earliest(warp)[0].time for warp in self.warps if warp.step < steps)
        if soonest == NEVER:
            raise RuntimeError("the warps wait for each other for ever: their paths meet different barriers")
        return math.ceil(soonest)

    def _choose(self, core: int, time: float, steps: int) -> _Warp | None:
        """The warp that a sub-core issues of."""
        latest = self.latest[core]
        for warp in [latest, *reversed(self.warps[core::SUB_CORES])]:
            if warp is None or warp.step == steps or warp.ready.time > time:  # the last is what mostly holds
                continue
            if self._earliest(warp)[0].time <= time:
                self.latest[core] = warp
                return warp
        return None

    def _earliest(self, warp: _Warp) -> tuple[Event, str]:
        """When a warp's next instruction can be issued, and what it waits for until then."""
        index = warp.path[warp.position]
        instruction, unit = self.code[index], self.units[index]
        waits = [(warp.ready, warp.reason), *((warp.boards[board], "scoreboard") for board in instruction.waits)]
        if unit in BUSY or unit is Unit.TENSOR:
            waits.append((self.free[unit, warp.number % SUB_CORES], unit.name.lower()))
        if instruction.base == "DEPBAR" and (match := re.search(r"SB\d, (0x[0-9a-f]+)", instruction.operands)):
            groups = warp.groups[: len(warp.groups) - int(match[1], 16)]
            waits += [(group, "copy") for group in groups]
        return max(waits, key=lambda wait: wait[0].time)

    def _issue(self, warp: _Warp, time: float) -> None:
        event, reason = self._earliest(warp)
        index, number = warp.path[warp.position], len(self.issues)
        instruction = self.code[index]
        self.issues.append(Issue(warp.number, warp.step, index, time, reason, event.cause))
        there, read = self._execute(warp, instruction, self.units[index], time, number)
        if instruction.writes != NONE:
            self._mark(warp, instruction.writes, Event(there, number))
        if instruction.reads != NONE:
            self._mark(warp, instruction.reads, Event(read, number))
        warp.ready, warp.reason = Event(time + max(1, instruction.stall), number), "stall"
        warp.position += 1
        if warp.position == len(warp.path):
            warp.position, warp.step = 0, warp.step + 1
        if instruction.base == "BRA" and warp.path[warp.position] != index + 1:
            warp.ready = Event(max(warp.ready.time, time + self.machine.branch), number)
        if instruction.base == "BAR" and "ARV" not in instruction.op:
            self._meet(warp, instruction, index, number)

    @staticmethod
    def _mark(warp: _Warp, board: int, event: Event) -> None:
        warp.boards[board] = max(warp.boards[board], event, key=lambda each: each.time)

    def _execute(
        self, warp: _Warp, instruction: Instruction, unit: Unit, time: float, number: int
    ) -> tuple[float, float]:
        """When the result is there, and when the operands were read."""
        machine, core = self.machine, warp.number % SUB_CORES
        if unit in BUSY:
            self.free[unit, core] = Event(time + BUSY[unit], number)
        elif unit is Unit.TENSOR:
            half = "16816" not in instruction.op and "TF32" not in instruction.op
            self.free[unit, core] = Event(time + machine.tensor_busy / (2 if half else 1), number)
            return time + machine.tensor, time + 2
        elif unit is Unit.SPECIAL:
            begin = max(time, self.free[unit, core].time)
            self.free[unit, core] = Event(begin + machine.special_busy, number)
            return begin + machine.special, begin + machine.operands
        elif unit is Unit.MEMORY:
            begin = max(time + 2, self.free[unit, 0].time)
            self.free[unit, 0] = Event(begin + waves(instruction), number)
            return begin + self._latency(warp, instruction, begin, number), begin + machine.operands
        elif instruction.base == "LDGDEPBAR":
            warp.groups.append(warp.copies)
        return time + 2, time + 2

    def _latency(self, warp: _Warp, instruction: Instruction, begin: float, number: int) -> float:
        """Of a memory instruction, from when the unit takes it."""
        machine, more = self.machine, waves(instruction) - 1
        match instruction.base:
            case "LDS" | "ATOMS":
                return machine.shared - 2 + more
            case "LDSM":
                return machine.matrix - 2 + more
            case "SHFL":
                return machine.shuffle
            case "LDG" | "LD" | "ATOM" | "ATOMG":
                return machine.load
            case "LDC" | "LDCU" | "S2R":
                return machine.constant
            case "LDGSTS":
                warp.copies = max(warp.copies, Event(begin + machine.load, number), key=lambda each: each.time)
        return machine.operands

    def _meet(self, warp: _Warp, instruction: Instruction, index: int, number: int) -> None:
        """At a barrier of so many threads as its last operand says, or of all; who comes last lets all go on."""
        match = re.search(r", (0x[0-9a-f]+)$", instruction.operands)
        members = int(match[1], 16) // LANES if match else len(self.warps)
        group = warp.number // members
        waiting = self.arrived[group, warp.step if warp.position else warp.step - 1, index]
        waiting.append(warp)
        if len(waiting) < members:
            warp.ready, warp.reason = Event(NEVER, number), "barrier"
            return
        released = Event(self.issues[number].time + self.machine.barrier, number)
        for each in waiting:
            each.ready, each.reason = released, "barrier"
