# SPDX-License-Identifier: Apache-2.0
"""The reference's time loop as torch's `scan`: one step in a program, for any number of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gpu_rnn.backends import reference
from gpu_rnn.backends.tensors import Call, LayerControls, Result, Weights, reorder, state_dtype


def forward(call: Call, x: Tensor, all_states: bool = False) -> Result:
    """As `reference.forward`, saving nothing, of one step at least; for who records, not for who runs."""
    order, gates = reference.processed(call, x)
    steering = reference.Steering(call, x.shape[0], order)
    read = (*call.weights, call.controls.drop)

    def body(*tensors: Tensor) -> list[Tensor]:
        """From the states, a step's part of what has one for each, and what all steps read."""
        rest = iter(tensors)
        carried = [next(rest).view(-1, *state.shape[1:]) for state in call.states]
        inputs = next(rest)
        controls = steering.at([next(rest) for _ in steering.steered])
        *weights, drop = (None if each is None else next(rest) for each in read)
        inside = replace(call, weights=Weights(*weights), controls=LayerControls(drop=drop))  # type: ignore[arg-type]
        entered = controls.enter(carried)
        new, pre, _ = reference.OneStep(inside)(inputs, entered)
        states = controls.leave(new, entered)
        outputs = [controls.output(states[0])]
        if all_states:
            outputs.append(torch.stack(states[1:], 2) if states[1:] else pre[:, :, :0])
        kept = [state.to(old.dtype) for state, old in zip(states, carried, strict=True)]
        return [*_flat(kept), *(output.clone(memory_format=torch.contiguous_format) for output in outputs)]

    whole = tuple(each for each in read if each is not None)
    results = torch.ops.higher_order.scan(body, _flat(call.states), [gates, *steering.steered], whole)
    final = [each.view(-1, *state.shape[1:]) for each, state in zip(results, call.states, strict=False)]
    y, *inner = results[len(final) :]
    y, nothing = reorder(y, order), y.new_empty(0)
    found = reorder(inner[0], order).movedim(3, 0).to(state_dtype(y.dtype)) if inner else nothing
    return Result(y, final, nothing, nothing, found)


def _flat(states: Sequence[Tensor]) -> list[Tensor]:
    """States as a scan hands them on: sharing no memory, and laid out alike at each step, whatever the sizes."""
    return [state.reshape(-1).clone() for state in states]
