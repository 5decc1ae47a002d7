# SPDX-License-Identifier: Apache-2.0
"""The reference path as a row of the table: it runs everything, and is the last choice."""

from __future__ import annotations

from gpu_rnn.backends import rates
from gpu_rnn.backends.persistent import product_rate
from gpu_rnn.backends.problem import Problem


def unsupported(problem: Problem) -> list[str]:
    """The reference runs everything."""
    return []


def cost(problem: Problem, given: rates.Rates | None = None) -> float:
    """Seconds by the cost model (see `resident.cost`): every operation of every step is one torch call, and autograd
    records each."""
    operations = sum(len(stage.ops) + 4 * len(stage.gates) for stage in problem.program.stages)
    steps = problem.T * problem.layers * (3 if problem.training else 1)
    return steps * operations * (given or rates.of(problem.device)).reference.operation + problem.flops / product_rate(
        problem
    )
