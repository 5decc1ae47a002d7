# SPDX-License-Identifier: Apache-2.0
"""What a backend is predicted to take on a CPU: one model for all, with constants for each (`rates.CpuRates`).

What a call costs however long it is, and for each step: something in any case, the weights that are read, the
multiplications, and the operations of the program at each unit and row; where threads share it, what these wait for
each other.
"""

from __future__ import annotations

from gpu_rnn.backends.problem import Problem
from gpu_rnn.backends.rates import CpuRates


def seconds(problem: Problem, known: CpuRates, of_a_step: int = 1, most: int = 1 << 30) -> float:
    """Of one pass; `of_a_step` times what a step costs in any case; `most` threads share it."""
    start, step, weight, product, element = of_pass(problem, known)
    width = problem.proj_size or problem.H
    weights = problem.N * problem.G * problem.H * width
    products = problem.B * problem.N * problem.G * problem.H * (problem.I + width)
    operations = problem.B * problem.N * problem.H * sum(len(stage.ops) for stage in problem.program.stages)
    work = weight * weights + product * products + element * operations
    threads = min(problem.device.sms, most)
    backward = problem.direction == "backward"
    join, together = (known.back_join, known.back_together) if backward else (known.join, known.together)
    shared = together * (1 - 1 / max(1, threads))  # what other threads take off this one
    joining = join if threads > 1 else 0.0
    pack = known.back_pack if backward else known.pack
    start += pack * problem.N * problem.G * problem.H * (problem.I + width)
    return problem.layers * (start + problem.T * ((step * of_a_step + work) * (1 - shared) + joining))


def of_pass(problem: Problem, known: CpuRates) -> tuple[float, float, float, float, float]:
    """The constants of the pass that is asked for."""
    if problem.direction == "backward":
        return known.back_start, known.back_step, known.back_weight, known.back_product, known.back_element
    return known.start, known.step, known.weight, known.product, known.element
