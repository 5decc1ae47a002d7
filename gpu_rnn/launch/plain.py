# SPDX-License-Identifier: Apache-2.0
"""The reference path as a row of the table: it runs everything, and is the last choice."""

from __future__ import annotations

from gpu_rnn.devices import CPU_FLOPS
from gpu_rnn.problem import Problem

SECONDS_PER_OPERATION = 8e-6  # one small torch operation, CPU or launch on a GPU; predicted


def unsupported(problem: Problem) -> list[str]:
    """The reference runs everything."""
    return []


def cost(problem: Problem) -> float:
    """Predicted seconds: every operation of every step is one torch call, and autograd records each."""
    operations = sum(len(stage.ops) + 4 * len(stage.gates) for stage in problem.program.stages)
    steps = problem.T * problem.layers * (3 if problem.training else 1)
    rate = problem.device.tensor_flops * 1e12 if problem.device.is_gpu else CPU_FLOPS
    return steps * operations * SECONDS_PER_OPERATION + problem.flops / rate
