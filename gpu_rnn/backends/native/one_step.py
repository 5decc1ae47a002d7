# SPDX-License-Identifier: Apache-2.0
"""One step of one layer in C, both products in it, and its gradients (`kernels/native/step.c`).

A step of a few rows costs little more than to call it: so tensors are read as they come, and what a call needs besides
them is found once, in a `StepPlan`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gpu_rnn.backends.native import arguments, building, text
from gpu_rnn.compiler.program import Program
from gpu_rnn.memo import memoize

NO_MEMORY_FOR_A_STEP = "one step in C has no memory for its gradients"


class StepPlan(NamedTuple):
    """What every call of a cell in one dtype needs."""

    forward: Callable[[bytes], int]
    backward: Callable[[bytes], int]
    packed: Callable[..., bytes]  # of every number and address, in the order of `arguments.STEP`
    states: int
    gates: int
    split: int
    params: int


@memoize(256)
def plan(program: str, dtype: torch.dtype) -> StepPlan:
    """Built or found.

    Raises:
        CompilerError: it cannot be built here.
    """
    best, parsed = building.instruction_sets()[0], Program.parse(program)
    library = building.library(text.of_step(program, dtype, best), best.flags, ("forward", "backward"))
    sizes = len(parsed.states), len(parsed.gates), len(parsed.split), len(parsed.params)
    packed = arguments.STEP.packing(sizes[0]).packed
    return StepPlan(library.forward, library.backward, packed, *sizes)


def forward(
    plan: StepPlan, x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor | None], save: bool
) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
    """x (B, I), states (B, H), w_ih (G·H, I), w_hh (G·H, H), b_ih, b_hh (G·H) and params (U, H) -> new states and, if
    they are saved, pre-activations (B, G, H) and products of split gates (B, K, H).

    All without gaps and of one dtype; x and the states may have dimensions of 1 before these.
    """
    (rows, features), units = x.shape[-2:], states[0].shape[-1]
    final = [torch.empty_like(state) for state in states]
    gates = x.new_empty(rows, plan.gates, units) if save else None
    recurrent = x.new_empty(rows, plan.split, units) if save and plan.split else None
    nothing = (0,) * plan.states
    given = plan.packed(
        *(rows, features, units, save, x.data_ptr()),
        *[0 if weight is None else weight.data_ptr() for weight in weights],  # a generator is entered for each
        *(0 if gates is None else gates.data_ptr(), 0 if recurrent is None else recurrent.data_ptr()),
        *(0, 0, 0, 0, 0, 0),
        *[state.data_ptr() for state in states],
        *nothing,
        *[state.data_ptr() for state in final],
        *nothing,
    )
    if plan.forward(given):
        raise MemoryError(NO_MEMORY_FOR_A_STEP)
    return final, gates, recurrent


def backward(
    plan: StepPlan,
    x: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    gates: Tensor,
    recurrent: Tensor | None,
    d_final: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of x, the states and the weights; `wanted` says which, None stands for the others."""
    (rows, features), units, count = x.shape[-2:], states[0].shape[-1], 1 + plan.states
    d_x = torch.empty_like(x) if wanted[0] else None
    d_states = [torch.empty_like(state) for state in states]
    needed = [*wanted[count : count + 2], any(wanted[count + 2 : count + 4]), any(wanted[count + 2 : count + 4]), True]
    d_weights = [
        torch.empty_like(weight) if weight is not None and need else None
        for weight, need in zip(weights, needed, strict=True)
    ]
    given = plan.packed(
        *(rows, features, units, 0, x.data_ptr()),
        *(0 if weight is None else weight.data_ptr() for weight in weights),
        *(gates.data_ptr(), 0 if recurrent is None else recurrent.data_ptr()),
        *(0 if d is None else d.data_ptr() for d in (d_x, *d_weights)),
        *(state.data_ptr() for state in states),
        *(0 if d is None else d.data_ptr() for d in d_final),
        *(0,) * plan.states,
        *(d.data_ptr() for d in d_states),
    )
    if plan.backward(given):
        raise MemoryError(NO_MEMORY_FOR_A_STEP)
    return [d_x, *d_states, *d_weights]
