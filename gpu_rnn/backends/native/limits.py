# SPDX-License-Identifier: Apache-2.0
"""Which calls of the C backend go one of its short ways: what is launched, and what is predicted, go by it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from gpu_rnn.backends.native import text
from gpu_rnn.backends.problem import Problem
from gpu_rnn.backends.tensors import state_dtype

MOST_ROWS = 8  # of one step: with more, products whose weights were packed before take less (an AMD EPYC, H 128)
# Multiplications of one step at most: with more, a second thread and a library's product gain more than a call costs.
MOST_PRODUCTS = 1 << 23
# Of the input products: up to here the loop's own take less, by a fifth to a half, on an Intel Xeon that has bfloat16
# among its instructions.
MOST_IN_16_BITS = 1 << 24
# Gradients of the weights and of x are the loop's own up to so many multiplications, and steps of all rows for each
# gate. On one and two threads of an EPYC both passes took 0.60 to 1.02 of the time with a library's products, and
# beyond up to 1.55.
OWN_GRADIENTS, OWN_STEPS = 1 << 26, 214


def single_step(problem: Problem) -> bool:
    """Whether it is one step of a few rows, of one layer and direction (`one_step`)."""
    one = problem.T * problem.layers * problem.N == 1 and 0 < problem.B <= MOST_ROWS
    work = problem.B * problem.G * problem.H * (problem.I + problem.H)
    special = problem.options or problem.proj_size or problem.transforms or problem.packed
    return (
        one
        and not special
        and problem.dtype in text.C_TYPES
        and len(problem.program.stages) <= 2
        and 0 < work <= MOST_PRODUCTS
    )


def plain_layer(problem: Problem) -> bool:
    """Whether it is a stack of one head (`direct`); in bfloat16, of few products: more are a library's, which
    multiplies such numbers faster. (float16 takes oneDNN five times as long as float32, on an AMD EPYC.)"""
    few = problem.T * problem.B * problem.N * problem.G * problem.H * problem.I <= MOST_IN_16_BITS
    in_float32 = few or (state_dtype(problem.dtype) in text.C_TYPES and problem.dtype != torch.bfloat16)
    of_a_layer = problem.reverse in ("0", "01") and not problem.transforms
    return of_a_layer and problem.B > 0 and in_float32


def owns_gradients(gates: Sequence[int], features: int, width: int) -> bool:
    """Whether a layer's weights, whose gates are (T, B, N, G, H), have their gradients from the loop."""
    steps, batch, _, count, _ = gates
    return of_gradients(gates, features, width) <= OWN_GRADIENTS and steps * batch <= OWN_STEPS * count


def of_gradients(gates: Sequence[int], features: int, width: int) -> int:
    """The multiplications of the gradients of the weights and of x; `width` is that of h."""
    return math.prod(gates) * (2 * features + width)
