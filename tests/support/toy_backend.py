# SPDX-License-Identifier: Apache-2.0
"""A backend as small as one can be: `tests/backends/test_table.py` enters it in the table."""

from __future__ import annotations

from torch import Tensor

from gpu_rnn.backends.problem import Problem
from gpu_rnn.backends.rates import Rates
from gpu_rnn.backends.step import torch_backward, torch_forward
from gpu_rnn.backends.tensors import Call, LoopGradients, Result


def unsupported(problem: Problem) -> list[str]:
    return ["the toy takes real numbers"] * problem.dtype.is_complex


def cost(problem: Problem, constants: Rates | None = None) -> float:
    return 1.0


def prepare(problem: Problem) -> None:
    """Nothing is to be compiled."""


def forward(call: Call, gates: Tensor, save: bool, all_states: bool) -> Result:
    return torch_forward.forward(call, gates, save, all_states)


def backward(call: Call, saved: Result, d_y: Tensor, d_final: list[Tensor], d_inner: Tensor | None) -> LoopGradients:
    return torch_backward.backward(call, saved, d_y, d_final, d_inner)
