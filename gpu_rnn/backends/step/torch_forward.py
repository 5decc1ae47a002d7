# SPDX-License-Identifier: Apache-2.0
"""The forward loop in torch: on a CPU, and on a GPU for what the Triton kernel does not take."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from gpu_rnn.backends.linear import runs
from gpu_rnn.backends.normalisation import Normalised
from gpu_rnn.backends.step.controls import StepControls, selected, steps_with, words
from gpu_rnn.backends.step.product import Product, masks
from gpu_rnn.backends.step.torch_operations import compiled
from gpu_rnn.backends.tensors import Call, Result, Weights, reorder, reorder_each, state_dtype
from gpu_rnn.compiler.derivative import stage_outputs
from gpu_rnn.compiler.program import Program, lookup


def forward(call: Call, gates: Tensor, save: bool, all_states: bool) -> Result:
    """As `step.forward`."""
    steps, batch, n, _, hidden = gates.shape
    controls = StepControls.of(call, steps)
    gates = reorder(gates, controls.order)
    recurrent = gates.new_zeros(steps, batch, n, len(call.program.split), hidden)
    loop = _ForwardLoop(call, gates, recurrent, controls)
    outputs, inner = [], []
    for t in range(steps):
        h, *other_states = loop.step(t)
        outputs.append(h)
        if save or all_states:
            inner += other_states
    y = controls.output(torch.stack(outputs).to(gates.dtype))
    final = [state.to(gates.dtype, copy=True) for state in loop.states]
    of_states = gates.new_empty(0, dtype=loop.dtype)
    if save or all_states:
        width = len(call.states) - 1
        of_states = gates.new_empty(width, steps, batch, n, hidden, dtype=loop.dtype)
        for k, of_state in enumerate(of_states):
            torch.stack(inner[k::width], out=of_state)
        of_states = reorder_each(of_states, controls.order)
    if not save:
        return Result(y, final, gates.new_empty(0), gates.new_empty(0), of_states)
    gates, recurrent = (reorder(values, controls.order) for values in (gates, recurrent))
    return Result(y, final, gates, recurrent, of_states, _in_time(call.kept, controls))


def _in_time(kept: Normalised | None, controls: StepControls) -> Normalised | None:
    """The recurrent products in the order of time, as the others are."""
    if kept is not None and controls.order is not None:
        for values in kept:
            values[1] = reorder(values[1], controls.order)
    return kept


def parameters(program: Program, weights: Weights, dtype: torch.dtype) -> dict[str, Tensor]:
    """The values of the per-unit parameters, (N, H) each."""
    if weights.params is None:
        return {}
    return {f"p_{name}": weights.params[:, i].to(dtype) for i, name in enumerate(program.params)}


class _ForwardLoop:
    """One step after the other, in processing order; see `reference.OneStep` and `reference.SteeredStep`."""

    def __init__(self, call: Call, gates: Tensor, recurrent: Tensor, controls: StepControls) -> None:
        program, weights = call.program, call.weights
        self.dtype = state_dtype(gates.dtype)
        self.names = [f"s_{name}" for name in program.state_names]
        self.states = [state.to(self.dtype) for state in call.states]
        self.params = parameters(program, weights, self.dtype)
        self.stages = [_StageProducts(call, number, gates, recurrent) for number in range(len(program.stages))]
        self.projection = None if weights.w_hr is None else weights.w_hr.transpose(1, 2)
        steps = len(gates)
        self.resets, self.entered = steps_with(controls.reset, steps), []
        if any(self.resets):
            self.entered = [_reset(controls, value, self.dtype) for value in controls.values]
        self.keeps = [
            keep[..., : state.shape[-1]].unbind(0)
            for keep, state in zip(controls.keeps, self.states, strict=True)
            if keep is not None
        ]
        self.kept = controls.keeping(steps)

    def step(self, t: int) -> list[Tensor]:
        """The states after step t."""
        if self.resets[t]:
            self.states = [reset(t, state) for reset, state in zip(self.entered, self.states, strict=True)]
        entered = self.states
        values = {**self.params, **dict(zip(self.names, entered, strict=True))}
        entering = entered[0]
        for stage in self.stages:
            stage.multiply(t, entering)
            values.update(stage.values(t))
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


def _reset(controls: StepControls, value: Tensor | float, dtype: torch.dtype) -> Callable[[int, Tensor], Tensor]:
    """What sets the rows of a state before a step to a value where they are reset."""
    reset = controls.reset
    assert reset is not None
    if isinstance(value, float) and value == 0.0:
        stays = words(~reset, dtype).unbind(0)
        return lambda t, state: selected(state, stays[t])
    flags = reset.unbind(0)
    if isinstance(value, float):
        return lambda t, state: torch.where(flags[t], value, state)
    values = value.to(dtype).expand(len(flags), *value.shape[1:]).unbind(0)
    return lambda t, state: torch.where(flags[t], values[t], state)


class _StageProducts:
    """The products of one stage, taken where its gates' other parts stand already."""

    def __init__(self, call: Call, number: int, gates: Tensor, recurrent: Tensor) -> None:
        program, weights = call.program, call.weights
        rows, stage = program.rows[number], program.stages[number]
        self.run, self.outputs = compiled(stage.ops, stage_outputs(program, number)), stage.outputs
        self.dtype = state_dtype(gates.dtype)
        self.narrow = gates.dtype != self.dtype
        parts = list(runs(program, rows, gates, recurrent))
        values: dict[str, Sequence[Tensor]] = {}
        for which, target in parts:
            names = program.gates[which]
            is_sum = names[0] in program.summed
            if not is_sum and weights.b_hh is not None:
                target += weights.b_hh[:, which]
            sources = {"a": target} if is_sum else {"r": target, "x": gates[..., which, :]}
            for kind, source in sources.items():
                each = (gate.unbind(0) for gate in source.unbind(3))
                values.update(zip((f"{kind}_{name}" for name in names), each, strict=True))
        self.names, self.gates = tuple(values), list(zip(*values.values(), strict=True))
        self.multiply = (_Plain if weights.norm is None else _Scaled)(call, rows, parts).add_to

    def values(self, t: int) -> Iterator[tuple[str, Tensor]]:
        """The gates of step t, with their products, by name."""
        gates = self.gates[t]
        return zip(self.names, [gate.to(self.dtype) for gate in gates] if self.narrow else gates, strict=True)


Part = tuple[
    slice, Tensor
]  # gates that are neighbours in the same tensor, and there (T, B, N, gates, H): see `products.runs`


class _Plain:
    """The products of a stage."""

    def __init__(self, call: Call, rows: slice, parts: Sequence[Part]) -> None:
        w_hh, drop, (steps, batch) = call.weights.w_hh, call.controls.drop, parts[0][1].shape[:2]
        self.parts = [
            (Product.of(w_hh[:, which], masks(drop, which), batch, steps), target.flatten(3).unbind(0))
            for which, target in parts
        ]

    def add_to(self, t: int, entering: Tensor) -> None:
        """Adds the products to what stands at step t."""
        for product, targets in self.parts:
            product.add_to(targets[t], entering)


class _Scaled:
    """Those that are normalised."""

    def __init__(self, call: Call, rows: slice, parts: Sequence[Part]) -> None:
        weights, kept, steps, batch = call.weights, call.kept, *parts[0][1].shape[:2]
        assert weights.norm is not None
        w_hh, self.normalise = call.normaliser.of_products(weights.w_hh[:, rows])
        self.product = Product.of(w_hh, masks(call.controls.drop, rows), batch, steps)
        self.kept = [None] * steps if kept is None else kept.at((1, ..., rows, slice(None))).each
        self.sizes = [target.shape[3] for _, target in parts]
        self.parts = [(weights.norm[:, which], target.unbind(0)) for which, target in parts]

    def add_to(self, t: int, entering: Tensor) -> None:
        """As `_Plain.add_to`."""
        normalised = self.normalise(self.product(entering), self.kept[t]).values
        parts = normalised.split(self.sizes, 2) if len(self.sizes) > 1 else (normalised,)
        for products, (scale, targets) in zip(parts, self.parts, strict=True):
            targets[t].addcmul_(products, scale)
