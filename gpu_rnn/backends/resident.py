# SPDX-License-Identifier: Apache-2.0
"""W_hh stays on chip for the whole sequence (`kernels/triton/resident.py`): its limits and its cost. Its launches are
in `resident_launch.py`, its tiles in `resident_tiles.py`.

Any recurrence with one product a step, or two. Programs never wait for each other, so any grid is right on any device.
"""

from __future__ import annotations

import math
from importlib.util import find_spec

import torch

from gpu_rnn.backends import building, chains, persistent, rates, triton_interpreter
from gpu_rnn.backends.persistent import bits
from gpu_rnn.backends.problem import Problem
from gpu_rnn.backends.resident_launch import FAST_FUNCTIONS, Again, adds_b_hh, backward, forward, functions, launches
from gpu_rnn.backends.resident_tiles import available, matrices, shared_memory, tile, widths
from gpu_rnn.backends.throughput import (
    FP32_PER_CYCLE,
    SHARED_BYTES_PER_CYCLE,
    SPECIAL_PER_CYCLE,
    multiplications,
    projection,
    special,
)
from gpu_rnn.devices import is_described

__all__ = ["Again", "adds_b_hh", "backward", "cost", "forward", "prepare", "source", "unsupported"]  # see `TABLE`

MOST_ACROSS = 65535  # blocks in the second dimension of a CUDA grid, which is N
LONGEST_PATTERN = 62  # bits of a signed 64-bit argument that can be shifted and tested
WIDEST_PROJECTED = 128  # units with a projection of h: more spill (test_resident_builds.py)
WIDEST_FULL = 64  # units in full fp32: without tensor cores a wider product spills registers (test_resident_builds.py)

INTERPRETED = 5e-3  # seconds for a tile's step in Triton's interpreter; predicted

_builds = building.Builds(launches)
prepare = _builds.prepare


def unsupported(problem: Problem) -> list[str]:
    """Why this kernel cannot run a problem."""
    program, device, reasons = problem.program, problem.device, []
    if find_spec("triton") is None and not is_described(device):
        reasons.append(triton_interpreter.NOT_INSTALLED)
    runs_here = device.is_gpu or (triton_interpreter.INTERPRETING and problem.device_type == "cpu")
    if not runs_here:
        reasons.append(f"needs an NVIDIA GPU, not {problem.device_type} (or TRITON_INTERPRET=1, for tests)")
    if len(program.stages) > 2:
        reasons.append(f"takes two products a step at most, {program.name} has {len(program.stages)}")
    reasons += persistent.unsupported(problem)
    if problem.N > MOST_ACROSS or bits(problem.reverse)[1] > LONGEST_PATTERN:
        reasons.append(f"takes {MOST_ACROSS} recurrences side by side, directions repeating within {LONGEST_PATTERN}")
    return reasons + (_too_wide(problem) if runs_here else []) or _builds.reasons(problem)


def _too_wide(problem: Problem) -> list[str]:
    """What the device's memories have against a problem."""
    program, reasons = problem.program, []
    if problem.dtype == torch.float32 and problem.precision == "ieee" and problem.H > WIDEST_FULL:
        reasons.append(f"takes {WIDEST_FULL} units at most in full float32, not {problem.H} (tf32 takes more)")
    if problem.proj_size and problem.H > WIDEST_PROJECTED:
        reasons.append(f"takes {WIDEST_PROJECTED} units at most with a projection of h (proj_size), not {problem.H}")
    needed, there = shared_memory(problem, 1), available(problem)
    if needed > there:
        reasons.append(
            f"keeps W_hh on chip: with {problem.H} units of {program.name} a block needs {needed >> 10} KiB of shared "
            f"memory and has {there >> 10}"
        )
    return reasons


def cost(problem: Problem, constants: rates.Rates | None = None) -> float:
    """Seconds by the cost model, with the device's own constants or those given."""
    device, chosen = problem.device, tile(problem)
    known = (constants or rates.of(device)).resident
    tiles = -(-problem.B // chosen.rows) * problem.N
    steps = problem.T * problem.layers
    if not device.is_gpu:
        return steps * tiles * INTERPRETED
    together = device.sms * max(1, available(problem) // shared_memory(problem, chosen.stages, chosen.held))
    one = chains.step(_one_tile(problem), "resident", modelled)
    step = known.step * max(min(one, _busy(problem)) * -(-tiles // device.sms), one * -(-tiles // together))
    return known.start + steps * step + known.projection * projection(problem)


def source(problem: Problem) -> str:
    """Where its time a step comes from: see `gpu_rnn.backends.Entry`."""
    alone = -(-problem.B // tile(problem).rows) * problem.N <= problem.device.sms
    return "simulated" if alone and chains.simulated(_one_tile(problem), "resident") else "modelled"


def _one_tile(problem: Problem) -> Problem:
    """What a block does of a problem."""
    width, entering = widths(problem)
    return problem.but(B=tile(problem).rows, N=1, H=width, proj_size=entering if problem.proj_size else 0)


def modelled(problem: Problem) -> float:
    """Seconds of a step of one tile by what its units have to do and what nothing hides."""
    products = len(problem.program.stages) + rates.RESIDENT.projected * bool(problem.proj_size)
    return _busy(problem) + rates.RESIDENT.latency * products / (problem.device.clock * 1e9)


def _busy(problem: Problem) -> float:
    """Seconds of the busiest unit of a multiprocessor, for a step of one tile."""
    program, chosen, known = problem.program, tile(problem), rates.RESIDENT
    units, weights = chosen.rows * chosen.width, matrices(problem) * math.prod(widths(problem))
    operations = [op for stage in program.stages for op in stage.ops]
    instructions = known.instructions * len(operations) * (known.backward if problem.direction == "backward" else 1.0)
    cycles = max(
        chosen.rows * weights / multiplications(problem, known.tensor_share),
        weights * problem.dtype.itemsize / SHARED_BYTES_PER_CYCLE,
        units * special(operations) / SPECIAL_PER_CYCLE / (2 if functions(problem) == FAST_FUNCTIONS else 1),
        units * instructions / FP32_PER_CYCLE,
    )
    return cycles / (problem.device.clock * 1e9)
