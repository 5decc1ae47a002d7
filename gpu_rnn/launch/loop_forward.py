# SPDX-License-Identifier: Apache-2.0
"""The forward loop in torch: on a CPU, and on a GPU for what the Triton kernel does not take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gpu_rnn import normalisation
from gpu_rnn.launch.multiply import Product, masks
from gpu_rnn.launch.steering import Steering
from gpu_rnn.layout import Call, Result, Weights, reorder, reorder_each, state_dtype
from gpu_rnn.products import runs
from gpu_rnn.program import Program, lookup


def forward(call: Call, gates: Tensor, save: bool, all_states: bool) -> Result:
    """As `step.forward`."""
    steps, batch, n, _, hidden = gates.shape
    steering = Steering.of(call, steps)
    gates = reorder(gates, steering.order)
    recurrent = gates.new_zeros(steps, batch, n, len(call.program.split), hidden)
    loop = _Loop(call, gates, recurrent, steering)
    outputs, inner = [], []
    for t in range(steps):
        first, *others = loop.step(t)
        outputs.append(first)
        if save or all_states:
            inner += others
    y = steering.output(torch.stack(outputs).to(gates.dtype))
    final = [state.to(gates.dtype, copy=True) for state in loop.states]
    of_states = gates.new_empty(0, dtype=loop.dtype)
    if save or all_states:
        width = len(call.states) - 1
        of_states = gates.new_empty(width, steps, batch, n, hidden, dtype=loop.dtype)
        for k, kept in enumerate(of_states):
            torch.stack(inner[k::width], out=kept)
        of_states = reorder_each(of_states, steering.order)
    if not save:
        return Result(y, final, gates.new_empty(0), gates.new_empty(0), of_states)
    return Result(y, final, reorder(gates, steering.order), reorder(recurrent, steering.order), of_states)


def parameters(program: Program, weights: Weights, dtype: torch.dtype) -> dict[str, Tensor]:
    """The values of the per-unit parameters, (N, H) each."""
    if weights.params is None:
        return {}
    return {f"p_{name}": weights.params[:, i].to(dtype) for i, name in enumerate(program.params)}


def steps_with(flags: Tensor | None, steps: int) -> list[bool]:
    """The steps at which flags (T, B, N, 1) are set anywhere; on a GPU all, as to ask would be to wait."""
    if flags is None:
        return [False] * steps
    return flags.flatten(1).any(1).tolist() if flags.is_cpu else [True] * steps


class _Loop:
    """One step after the other, in processing order; see `reference._Step` and `reference._Steering`."""

    def __init__(self, call: Call, gates: Tensor, recurrent: Tensor, steering: Steering) -> None:
        program, weights = call.program, call.weights
        self.program, self.dtype = program, state_dtype(gates.dtype)
        self.states = [state.to(self.dtype) for state in call.states]
        self.params = parameters(program, weights, self.dtype)
        self.stages = [_Stage(call, number, gates, recurrent) for number in range(len(program.stages))]
        self.projection = None if weights.w_hr is None else weights.w_hr.transpose(1, 2)
        steps = len(gates)
        self.reset = steering.reset
        self.resets = steps_with(self.reset, steps)
        self.values = steering.values
        self.keeps = [
            keep[..., : state.shape[-1]]
            for keep, state in zip(steering.keeps, self.states, strict=True)
            if keep is not None
        ]
        self.kept = [steering.zone is not None or skips for skips in steps_with(steering.skip, steps)]

    def step(self, t: int) -> list[Tensor]:
        """The states after step t."""
        if self.resets[t]:
            self.states = [self._set(t, value, s) for value, s in zip(self.values, self.states, strict=True)]
        entered, program = self.states, self.program
        values = {f"s_{name}": s for name, s in zip(program.state_names, entered, strict=True)} | self.params
        entering = entered[0]
        for stage in self.stages:
            stage.multiply(t, entering)
            values |= stage.values(t, self.dtype)
            stage.run(values)
            entering = lookup(values, stage.outputs[0], entered[-1])
        new = [lookup(values, out, entered[-1]) for out in self.stages[-1].outputs]
        if self.projection is not None:
            h = new[0].to(self.projection.dtype).transpose(0, 1)
            new[0] = torch.bmm(h, self.projection).transpose(0, 1).to(self.dtype)
        if self.kept[t]:
            new = [torch.where(keep[t], old, s) for keep, old, s in zip(self.keeps, entered, new, strict=True)]
        self.states = new
        return new

    def _set(self, t: int, value: Tensor | float, state: Tensor) -> Tensor:
        """A state where its rows are reset to a value."""
        assert self.reset is not None
        if isinstance(value, Tensor):
            value = value[t if len(value) > 1 else 0].to(self.dtype)
        return torch.where(self.reset[t], value, state)


class _Part(NamedTuple):
    """Neighbouring gates of a stage whose products are added to the same tensor."""

    product: Product
    own: slice  # among the stage's gates
    targets: Sequence[Tensor]  # of each step (B, N, gates, H): the projection of summed gates, the biases of split ones
    names: list[str]
    projections: Sequence[Tensor]  # of split gates
    projection_names: list[str]


class _Stage:
    """The products of one stage, taken where its gates' other parts stand already."""

    def __init__(self, call: Call, number: int, gates: Tensor, recurrent: Tensor) -> None:
        program, weights = call.program, call.weights
        rows, stage = program.rows[number], program.stages[number]
        self.run, self.outputs = stage.run, stage.outputs
        drop = call.control.drop
        batch = gates.shape[1]
        self.product = Product(weights.w_hh[:, rows], masks(drop, rows), batch)
        self.scale = None if weights.norm is None else weights.norm[:, rows]
        self.parts = []
        for which, target in runs(program, rows, gates, recurrent):
            names, projections = program.gates[which], gates[..., which, :]
            own = slice(which.start - rows.start, which.stop - rows.start)
            product, targets = Product(weights.w_hh[:, which], masks(drop, which), batch), target.unbind(0)
            if names[0] in program.summed:
                self.parts.append(_Part(product, own, targets, [f"a_{name}" for name in names], (), []))
                continue
            if weights.b_hh is not None:
                target += weights.b_hh[:, which]
            each = [f"{kind}_{name}" for kind in "rx" for name in names]
            split = each[: len(names)], projections.unbind(0), each[len(names) :]
            self.parts.append(_Part(product, own, targets, *split))

    def multiply(self, t: int, entering: Tensor) -> None:
        """Adds the products of step t."""
        if self.scale is None:
            for part in self.parts:
                part.product.add_to(part.targets[t], entering)
            return
        product, _, _ = normalisation.with_statistics(self.product(entering))
        for part in self.parts:
            part.targets[t].addcmul_(product[:, :, part.own], self.scale[:, part.own])

    def values(self, t: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """The gates of step t, with their products, by name."""
        found: dict[str, Tensor] = {}
        for part in self.parts:
            found.update(zip(part.names, part.targets[t].to(dtype).unbind(2), strict=True))
            if part.projections:
                found.update(zip(part.projection_names, part.projections[t].to(dtype).unbind(2), strict=True))
        return found
