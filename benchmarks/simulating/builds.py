# SPDX-License-Identifier: Apache-2.0
"""A problem's kernels as machine code, built without a GPU, and what each of their warps executes in a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from benchmarks.simulating import paths
from benchmarks.simulating.instructions import Instruction, disassemble
from benchmarks.simulating.multiprocessor import LANES
from benchmarks.simulating.no_device import NoDevice
from benchmarks.simulating.paths import Lost, Turn
from benchmarks.simulating.tools import needed, registers_of, written
from gpu_rnn.backends import resident_launch
from gpu_rnn.backends.building import TritonLaunch
from gpu_rnn.backends.group import launch as group
from gpu_rnn.backends.group import nvrtc
from gpu_rnn.backends.group.choice import Choice, choose
from gpu_rnn.backends.group.layout import Layout, source
from gpu_rnn.backends.problem import Problem
from gpu_rnn.backends.step import gpu
from gpu_rnn.devices import Device

REGISTERS = 65536  # of a multiprocessor; a warp takes them in units of so many for each thread
REGISTER_UNIT = 8
SYSTEM_BYTES = 1024  # of shared memory, that the system takes for each block


@dataclass(frozen=True)
class Kernel:
    """One kernel of a backend.

    Attributes:
        name: its function.
        code: its instructions.
        paths: what each warp of a block executes in a step; first of all one that has units of its own.
        rounds: of the loop, one after another, that make a step of all rows.
        hops: exchanges of words between blocks in a step of a tile; 0 where blocks do not talk.
        blocks: that share a multiprocessor.
        loops: it holds the time loop; else it is launched once a step.
    """

    name: str
    code: Sequence[Instruction]
    paths: Sequence[Sequence[int]]
    rounds: int = 1
    hops: int = 0
    loops: bool = True
    blocks: int = 1


def kernels(problem: Problem, backend: str) -> list[Kernel]:
    """The kernels that a backend launches for a problem.

    Raises:
        Lost: the simulator follows no kernel of that backend, or not these; the message says where it stops.
    """
    if backend not in _KERNELS:
        raise Lost(f"{backend} launches no kernel of this library: its machine code is not here")
    return _KERNELS[backend](problem)


def code_of(cubin: bytes) -> list[Instruction]:
    """The instructions of a kernel's machine code.

    Raises:
        FileNotFoundError: nvdisasm is not there.
    """
    with written(cubin) as file:
        return disassemble(file, needed("nvdisasm"))


def _resident(problem: Problem) -> list[Kernel]:
    """As many blocks on a multiprocessor as it holds; what is then left comes after them, and is taken to last as long
    as they do."""
    (launch,) = resident_launch.launches(problem)
    binary = built(launch, problem.device)
    code, warps = code_of(binary.asm["cubin"]), binary.metadata.num_warps
    path = paths.straight(code, paths.time_loop(code))
    each = -(-launch.grid[0] * launch.grid[1] // problem.device.sms)
    blocks = min(each, together(binary.asm["cubin"], warps, binary.metadata.shared, problem.device))
    return [Kernel(launch.kernel.__name__, code, [path] * (warps * blocks), -(-each // blocks), blocks=blocks)]


def together(cubin: bytes, warps: int, shared: int, device: Device) -> int:
    """Blocks that a multiprocessor holds at once, by registers, shared memory and threads: CUDA C++ programming guide,
    compute capabilities.

    Raises:
        FileNotFoundError: cuobjdump is not there.
    """
    with written(cubin) as file:
        registers = -(-registers_of(file) // REGISTER_UNIT) * REGISTER_UNIT * warps * LANES
    threads = 2048 if device.capability in ((8, 0), (9, 0), (10, 0)) else 1536
    memory = device.shared_memory + SYSTEM_BYTES
    return max(1, min(REGISTERS // registers, memory // (shared + SYSTEM_BYTES), threads // (warps * LANES)))


def _step(problem: Problem) -> list[Kernel]:
    found = []
    for launch in gpu.launches(problem):
        code, warps = compiled(launch, problem.device)
        end = next(k for k, each in enumerate(code) if each.base == "EXIT" and not each.predicate)
        path = paths.through(code, Turn(range(end + 1)))
        found.append(Kernel(launch.kernel.__name__, code, [path] * warps, loops=False))
    return found


def compiled(launch: TritonLaunch, device: Device) -> tuple[list[Instruction], int]:
    """The machine code of a launch of Triton's for a device, and the warps of a block."""
    binary = built(launch, device)
    return code_of(binary.asm["cubin"]), binary.metadata.num_warps


def built(launch: TritonLaunch, device: Device) -> Any:
    """What Triton makes of a launch for a device."""
    from triton.runtime.driver import driver

    before = driver._active
    driver.set_active(NoDevice(10 * device.capability[0] + device.capability[1]))
    try:
        return launch.kernel.warmup(grid=launch.grid, **launch.arguments)
    finally:
        driver._active = before


def _group(problem: Problem) -> list[Kernel]:
    choice = choose(problem)
    if choice is None:
        raise Lost(f"group has no layout for {problem.H} units on {problem.device.name}")
    return [group_kernel(problem, choice)]


def group_kernel(problem: Problem, choice: Choice) -> Kernel:
    """The group kernel of a problem in one of the layouts that fit.

    Raises:
        Lost: as `through_group`, or more blocks that wait for nobody than multiprocessors.
    """
    if choice.layout.members == 1:
        _alone(choice.groups * problem.N, problem)
    layout = replace(choice.layout, save=problem.saves_gates, paired=problem.H % 2 == 0)
    code, ways = followed(layout, nvrtc.architecture(problem.device.capability))
    rounds = -(-problem.B // (layout.rows * choice.groups)) * -(-problem.N // choice.at_once)
    rounds, hops = (1, 0) if layout.members == 1 else (rounds, layout.hops)
    return Kernel(layout.kernel, code, ways, rounds, hops)


@lru_cache(8)  # problems of other batches often have the same
def followed(layout: Layout, architecture: str) -> tuple[Sequence[Instruction], Sequence[Sequence[int]]]:
    """The group kernel's instructions and what each warp of a block executes in a step.

    Raises:
        Lost: as `through_group`.
    """
    layout = group.fit(layout, architecture)
    code = code_of(nvrtc.compile_cubin(source(layout), architecture))
    return code, through_group(code, layout)


def through_group(code: Sequence[Instruction], layout: Layout) -> list[list[int]]:
    """What each warp of a group kernel's block executes in a step.

    Raises:
        Lost: an exchange by counters, or as `paths.through` and `paths.complete`.
    """
    if layout.counter:
        raise Lost("group with counters is not followed")
    loop = paths.time_loop(code)
    operation, each = _multiplying(layout)
    products = layout.tiles * layout.share * layout.fragments * layout.columns * each
    rounds = paths.rounds(code, loop, products, operation)
    joined = [_joined(layout, warp) for warp in range(layout.across * layout.along)]
    found = {of: paths.through(code, Turn(loop, bool(of), rounds, layout.joins, of)) for of in {*joined}}
    for path in found.values():
        paths.complete(code, path, products, operation)
    return [found[of] for of in joined]


def _multiplying(layout: Layout) -> tuple[str, int]:
    """The instruction of the products, and how many of a warp's make one of 16 x 8 x 16."""
    if layout.half:
        return "HMMA", 1
    return ("HMMA", 2) if layout.precision == "tf32" else ("FFMA", 16 * 8 * 16 // LANES)


def _joined(layout: Layout, warp: int) -> frozenset[int]:
    """The passes that join sums of a warp's own units: a pair of them for each row, two rows a thread."""
    each = -(-layout.spots // layout.along)
    first = warp % layout.along * each
    return frozenset(spot * layout.joins // layout.spots for spot in range(first, min(first + each, layout.spots)))


def _alone(blocks: int, problem: Problem) -> None:
    if blocks > problem.device.sms:
        raise Lost(f"{blocks} blocks share {problem.device.sms} multiprocessors: only one on each is followed yet")


_KERNELS: dict[str, Callable[[Problem], list[Kernel]]] = {"resident": _resident, "step": _step, "group": _group}
