# SPDX-License-Identifier: Apache-2.0
"""Which calls of the C backend go one of its short ways: what is launched, and what is predicted, go by it."""

from __future__ import annotations

from gpu_rnn.backends.native import text
from gpu_rnn.backends.problem import Problem

MOST_ROWS = 8  # of one step: with more, products whose weights were packed before take less (an AMD EPYC, H 128)
# Multiplications of one step at most: with more, a second thread and a library's product gain more than a call costs.
MOST_PRODUCTS = 1 << 23


def single_step(problem: Problem) -> bool:
    """Whether it is one step of a few rows, of one layer and direction (`one_step`)."""
    one = problem.T * problem.layers * problem.N == 1 and 0 < problem.B <= MOST_ROWS
    work = problem.B * problem.G * problem.H * (problem.I + problem.H)
    return one and _plain(problem) and len(problem.program.stages) <= 2 and 0 < work <= MOST_PRODUCTS


def plain_layer(problem: Problem) -> bool:
    """Whether it is a stack in one direction, of one product a step, without an option (`direct`)."""
    program = problem.program
    in_order = len(program.stages) == 1 and program.summed == {*program.gates[: len(program.summed)]}
    return _plain(problem) and in_order and problem.N == 1 and problem.B > 0


def _plain(problem: Problem) -> bool:
    special = problem.options or problem.proj_size or problem.transforms or problem.packed
    return not special and problem.dtype in text.C_TYPES
