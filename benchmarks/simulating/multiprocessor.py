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

from benchmarks.simulating.exchange import Exchange, awaits
from benchmarks.simulating.instructions import BOARDS, NONE, Instruction
from benchmarks.simulating.machines import Machine
from benchmarks.simulating.units import BUSY, Unit, unit_of, waves

SUB_CORES = 4
LANES = 32
NEVER = float("inf")


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


class _Decoded(NamedTuple):
    """What the loop over cycles asks of an instruction."""

    index: int
    instruction: Instruction
    unit: Unit
    waves: int
    queued: bool  # waits until its unit is free
    groups: int | None  # of asynchronous copies that may be under way
    members: int  # warps that a barrier waits for; 0: all


def _decoded(code: Sequence[Instruction], index: int) -> _Decoded:
    instruction = code[index]
    unit = unit_of(instruction)
    groups = re.search(r"SB\d, (0x[0-9a-f]+)", instruction.operands) if instruction.base == "DEPBAR" else None
    threads = re.search(r", (0x[0-9a-f]+)$", instruction.operands) if instruction.base == "BAR" else None
    return _Decoded(
        index,
        instruction,
        unit,
        waves(instruction),
        unit in BUSY or unit is Unit.TENSOR,
        int(groups[1], 16) if groups else None,
        int(threads[1], 16) // LANES if threads else 0,
    )


@dataclass
class _Warp:
    number: int
    path: Sequence[_Decoded]  # of one step
    position: int = 0
    step: int = 0
    ready: Event = START
    reason: str = "stall"
    boards: list[Event] = field(default_factory=lambda: [START] * BOARDS)
    copies: Event = START  # the latest asynchronous one
    groups: list[Event] = field(default_factory=list)  # of asynchronous copies
    due: tuple[Event, str] = (START, "stall")  # when its next instruction can go, but for the unit

    @property
    def core(self) -> int:
        return self.number % SUB_CORES

    @property
    def next(self) -> _Decoded:
        return self.path[self.position]

    def look(self) -> None:
        """Finds out anew when the next instruction can go: after whatever this warp waits for has changed."""
        decoded = self.path[self.position]
        event, reason = self.ready, self.reason
        for board in decoded.instruction.waits:
            if self.boards[board].time > event.time:
                event, reason = self.boards[board], "scoreboard"
        if decoded.groups is not None:
            for group in self.groups[: len(self.groups) - decoded.groups]:
                if group.time > event.time:
                    event, reason = group, "copy"
        self.due = event, reason

    def mark(self, board: int, event: Event) -> None:
        if event.time >= self.boards[board].time:
            self.boards[board] = event


class Multiprocessor:
    """`paths[w]` is what warp w executes in a step, as indices into the code; `exchange` is with the other blocks.

    The warps are those of `blocks` blocks, one after the other.
    """

    def __init__(
        self,
        code: Sequence[Instruction],
        paths: Sequence[Sequence[int]],
        machine: Machine,
        exchange: Exchange | None = None,
        blocks: int = 1,
    ) -> None:
        self.machine, self.exchange = machine, exchange
        self.together = len(paths) // blocks  # warps of a block
        decoded = {index: _decoded(code, index) for path in paths for index in path}
        self.warps = [_Warp(number, [decoded[index] for index in path]) for number, path in enumerate(paths)]
        self.free: dict[tuple[Unit, int], Event] = defaultdict(Event)  # by unit and sub-core
        self.l2 = 0.0  # when the way from L2 is free
        self.network = 0.0  # and that to the other multiprocessors of a cluster
        self.arrived: dict[tuple[int, ...], list[_Warp]] = defaultdict(list)
        self.waiting: dict[int, list[tuple[_Warp, int, Event]]] = defaultdict(list)  # for a publication
        self.latest: list[_Warp | None] = [None] * SUB_CORES
        self.order = [list(reversed(self.warps[core::SUB_CORES])) for core in range(SUB_CORES)]
        self.issues: list[Issue] = []

    def run(self, steps: int = 8) -> Run:
        """The time loop, `steps` times.

        Raises:
            RuntimeError: some warps wait for ever.
        """
        ends, time = [[0.0] * steps for _ in self.warps], 0.0
        for warp in self.warps:
            warp.look()
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
        if latest is not None and latest.step < steps and self._can(latest, time):
            return latest
        for warp in self.order[core]:
            if warp.step < steps and self._can(warp, time):
                self.latest[core] = warp
                return warp
        return None

    def _can(self, warp: _Warp, time: float) -> bool:
        if warp.due[0].time > time:
            return False
        decoded = warp.path[warp.position]
        return not decoded.queued or self.free[decoded.unit, warp.number % SUB_CORES].time <= time

    def _earliest(self, warp: _Warp) -> tuple[Event, str]:
        """When a warp's next instruction can be issued, and what it waits for until then."""
        unit = warp.next.unit
        if warp.next.queued and self.free[unit, warp.core].time > warp.due[0].time:
            return self.free[unit, warp.core], unit.name.lower()
        return warp.due

    def _issue(self, warp: _Warp, time: float) -> None:
        event, reason = self._earliest(warp)
        decoded, number, place, step = warp.next, len(self.issues), warp.position, warp.step
        instruction = decoded.instruction
        self.issues.append(Issue(warp.number, step, decoded.index, time, reason, event.cause))
        there, read = self._execute(warp, decoded, time, number)
        result = Event(there, number)
        if self.exchange is not None and place in self.exchange.words[warp.number]:
            result = self._exchange(warp, decoded, (step, place), result)
        if instruction.writes != NONE:
            warp.mark(instruction.writes, result)
        if instruction.reads != NONE:
            warp.mark(instruction.reads, Event(read, number))
        warp.ready, warp.reason = Event(time + max(1, instruction.stall), number), "stall"
        warp.position += 1
        if warp.position == len(warp.path):
            warp.position, warp.step = 0, step + 1
        if instruction.base == "BRA" and warp.next.index != decoded.index + 1:
            warp.ready = Event(max(warp.ready.time, time + self.machine.branch), number)
        if instruction.base == "BAR" and "ARV" not in instruction.op:
            self._meet(warp, decoded, (step, place), number)
        warp.look()

    def _exchange(self, warp: _Warp, decoded: _Decoded, where: tuple[int, int], there: Event) -> Event:
        """Who waits has a publication no sooner than it has arrived; its last store brings it to all."""
        assert self.exchange is not None and there.cause is not None
        (step, place), board = where, decoded.instruction.writes
        if decoded.instruction.base in ("STG", "STAS"):
            sent = decoded.instruction.base == "STAS"
            seen = there.time if sent else self.issues[there.cause].time + self.exchange.hop
            published = self.exchange.publish(warp.number, step, place, seen, there.cause)
            arrival = None if published is None else self.exchange.arrival(published)
            if published is not None and arrival is not None:
                self._deliver(published, Event(*arrival))
            return there
        number = self.exchange.wanted(warp.number, step, place)
        arrival = self.exchange.arrival(number)
        if arrival is not None:
            return max(there, Event(*arrival), key=lambda event: event.time)
        before = warp.boards[board]
        self.waiting[number].append((warp, board, there if before.time == NEVER else max(before, there)))
        return Event(NEVER, there.cause)

    def _deliver(self, publication: int, arrival: Event) -> None:
        for warp, board, there in self.waiting.pop(publication, []):
            event = max(there, arrival, key=lambda each: each.time)
            if warp.boards[board].time == NEVER or event.time > warp.boards[board].time:
                warp.boards[board] = event
            warp.look()

    def _execute(self, warp: _Warp, decoded: _Decoded, time: float, number: int) -> tuple[float, float]:
        """When the result is there, and when the operands were read."""
        machine, unit, instruction = self.machine, decoded.unit, decoded.instruction
        where = unit, warp.core
        if unit in BUSY:
            self.free[where] = Event(time + BUSY[unit], number)
        elif unit is Unit.TENSOR:
            self.free[where] = Event(time + tensor_busy(instruction, machine), number)
            return time + machine.tensor, time + 2
        elif unit is Unit.SPECIAL:
            begin = max(time, self.free[where].time)
            self.free[where] = Event(begin + machine.special_busy, number)
            return begin + machine.special, begin + machine.operands
        elif unit is Unit.MEMORY:
            begin = max(time + 2, self.free[unit, 0].time)
            self.free[unit, 0] = Event(begin + decoded.waves, number)
            return begin + self._latency(warp, decoded, begin, number), begin + machine.operands
        elif instruction.base == "LDGDEPBAR":
            warp.groups.append(warp.copies)
        return time + 2, time + 2

    def _latency(self, warp: _Warp, decoded: _Decoded, begin: float, number: int) -> float:
        """Of a memory instruction, from when the unit takes it."""
        machine, more = self.machine, decoded.waves - 1
        match decoded.instruction.base:
            case "LDS" | "ATOMS" | "SYNCS":
                return machine.shared - 2 + more
            case "LDSM":
                return machine.matrix - 2 + more
            case "SHFL":
                return machine.shuffle
            case "LDG" if self.exchange is not None and awaits(decoded.instruction):
                return self._from_l2(decoded.waves, begin)
            case "STAS":
                return self._to_others(decoded.waves, begin)
            case "LDG" | "LD" | "ATOM" | "ATOMG":
                return machine.load
            case "LDC" | "LDCU" | "S2R":
                return machine.constant
            case "LDGSTS":
                warp.copies = max(warp.copies, Event(begin + machine.load, number), key=lambda each: each.time)
        return machine.operands

    def _from_l2(self, count: int, begin: float) -> float:
        """Of a strong load of so many words of 32 bits a thread: the way from L2 is shared by the multiprocessor."""
        machine = self.machine
        assert machine.l2 is not None and machine.l2_bytes is not None
        self.l2 = max(self.l2, begin) + count * LANES * 4 / machine.l2_bytes
        return max(begin, self.l2) - begin + machine.l2

    def _to_others(self, count: int, begin: float) -> float:
        """Of a store of so many words of 32 bits a thread into another block's shared memory."""
        machine = self.machine
        assert machine.remote is not None and machine.remote_bytes is not None
        self.network = max(self.network, begin) + count * LANES * 4 / machine.remote_bytes
        return self.network - begin + machine.remote

    def _meet(self, warp: _Warp, decoded: _Decoded, where: tuple[int, int], number: int) -> None:
        """At a barrier of so many threads as its last operand says, or of all; who comes last lets all go on."""
        members = decoded.members or self.together
        waiting = self.arrived[warp.number // members, where[0], decoded.index]
        waiting.append(warp)
        if len(waiting) < members:
            warp.ready, warp.reason = Event(NEVER, number), "barrier"
            return
        released = Event(self.issues[number].time + self.machine.barrier, number)
        for each in waiting:
            each.ready, each.reason = released, "barrier"
            each.look()
        waiting.clear()


def tensor_busy(instruction: Instruction, machine: Machine) -> float:
    """Cycles that a matrix instruction takes its unit."""
    half = "16816" not in instruction.op and "TF32" not in instruction.op
    return machine.tensor_busy / (2 if half else 1)
