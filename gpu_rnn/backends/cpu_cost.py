# SPDX-License-Identifier: Apache-2.0
"""What a backend is predicted to take on a CPU: one model for all, with constants for each (`rates.CpuRates`).

What a call costs however long it is, its weights laid out once, and for each step: something in any case, the weights
that are read, the multiplications, and the operations of the program at each unit and row; where threads share it, what
these wait for each other.
"""

from __future__ import annotations

from typing import NamedTuple

from gpu_rnn.backends.problem import Problem
from gpu_rnn.backends.rates import CpuRates


def seconds(problem: Problem, constants: CpuRates, of_a_step: int = 1, most: int = 1 << 30) -> float:
    """Of one pass; `of_a_step` times what a step costs in any case; `most` threads share it."""
    known = of_pass(problem, constants)
    width, across = problem.proj_size or problem.H, problem.N * problem.G * problem.H
    operations = problem.B * problem.N * problem.H * sum(len(stage.ops) for stage in problem.program.stages)
    products = problem.B * across * (problem.I + width)
    work = known.weight * across * width + known.product * products + known.element * operations
    threads = min(problem.device.sms, most)
    shared = known.together * (1 - 1 / max(1, threads))  # what other threads take off this one
    joining = known.join if threads > 1 else 0.0
    start = known.start + known.pack * across * (problem.I + width)
    return problem.layers * (start + problem.T * ((known.step * of_a_step + work) * (1 - shared) + joining))


class PassRates(NamedTuple):
    """The constants of one pass, as `CpuRates` names those of the forward one."""

    start: float
    step: float
    weight: float
    product: float
    element: float
    together: float
    join: float
    pack: float


def of_pass(problem: Problem, constants: CpuRates) -> PassRates:
    """Those of the pass that is asked for."""
    prefix = "back_" if problem.direction == "backward" else ""
    return PassRates(*(getattr(constants, prefix + name) for name in PassRates._fields))
