# SPDX-License-Identifier: Apache-2.0
"""The time loop over a recurrence in plain PyTorch: ground truth, on any device, in any dtype, differentiable to any
order.

As a backend it runs everything, from the input of a layer, and is the last choice; its backward pass is torch's. Sizes
and tensors are named as in `gpu_rnn.backends.tensors`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_rnn.backends import cpu_cost, rates
from gpu_rnn.backends.normalisation import normalised
from gpu_rnn.backends.problem import Problem
from gpu_rnn.backends.tensors import (
    RESET,
    SKIP,
    Call,
    Result,
    Weights,
    bit,
    processing_order,
    reorder,
    state_dtype,
)
from gpu_rnn.backends.throughput import product_rate
from gpu_rnn.compiler.program import Program, lookup


def unsupported(problem: Problem) -> list[str]:
    """The reference runs everything."""
    return []


def cost(problem: Problem, constants: rates.Rates | None = None) -> float:
    """Seconds by the cost model: every operation of every step is one torch call, and autograd records each.

    On a CPU a call starts as the step loop's does, so that what torch takes for a step is what tells them apart.
    """
    operations = sum(len(stage.ops) + 4 * len(stage.gates) for stage in problem.program.stages)
    steps = problem.T * problem.layers * (3 if problem.training else 1)
    every = constants or rates.of(problem.device)
    start = 0.0 if problem.device.is_gpu else problem.layers * cpu_cost.of_pass(problem, every.cpu_step).start
    return start + steps * operations * every.reference.operation + problem.flops / product_rate(problem)


def prepare(problem: Problem) -> None:
    """Nothing is to be compiled."""


def input_bias(weights: Weights, program: Program) -> Tensor | None:
    """(N, G, H): b_ih, with b_hh added where a gate is a sum."""
    if weights.b_ih is None or weights.b_hh is None:
        return None
    pairs = zip(program.gates, weights.b_ih.unbind(1), weights.b_hh.unbind(1), strict=True)
    return torch.stack([b_ih + b_hh if gate in program.summed else b_ih for gate, b_ih, b_hh in pairs], 1)


def project(
    x: Tensor,
    weights: Weights,
    program: Program,
    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor] = F.linear,
    rms: bool = False,
) -> Tensor:
    """W_ih x + b_ih for all steps, with b_hh added where a gate is a sum; with `norm_ih`, the product normalised.

    x (T, B, I) or (T, B, N, I) -> (T, B, N, G, H).
    """
    bias = input_bias(weights, program)
    if x.dim() == 3:  # one product for all N
        within = None if bias is None or weights.norm_ih is not None else bias.flatten()
        gates = linear(x, weights.w_ih.flatten(0, 2), within).unflatten(-1, weights.w_ih.shape[:3])
        bias = bias if within is None else None
    else:
        gates = torch.einsum("tbni,nghi->tbngh", x, weights.w_ih)
    if weights.norm_ih is not None:
        gates = normalised(gates, rms) * weights.norm_ih
    return gates if bias is None else gates + bias


def processed(call: Call, x: Tensor) -> tuple[Tensor | None, Tensor]:
    """The order in which steps are processed, and the input products (T, B, N, G, H) in it."""
    order = processing_order(x.shape[0], call.controls.lengths, call.reverse, x.device)
    return order, reorder(project(x, call.weights, call.program, rms=call.rms), order)


def forward(call: Call, x: Tensor, save: bool = False, all_states: bool = False) -> Result:
    """Runs a recurrence over x, (T, B, I) or (T, B, N, I). See `Result` and `LayerControls`."""
    order, gates = processed(call, x)
    step, steering = OneStep(call), Steering(call, len(gates), order)
    states: list[Tensor] = list(call.states)
    outputs, saved_gates, saved_recurrent, saved_inner = [], [], [], []
    # Unbound: the derivative of gates[t] would be as large as gates, for each step.
    for inputs, *steered in zip(gates.unbind(0), *(each.unbind(0) for each in steering.steered), strict=True):
        controls = steering.at(steered)
        entered = controls.enter(states)
        new, pre, recurrent = step(inputs, entered)
        states = controls.leave(new, entered)
        outputs.append(controls.output(states[0]))
        if all_states or save:
            saved_inner.append(torch.stack(states[1:], 2) if states[1:] else pre[:, :, :0])
        if save:
            saved_gates.append(pre)
            saved_recurrent.append(recurrent)
    *states, y = _attached([*states, _over_time(outputs)], gates)
    y = reorder(y, order)
    inner = y.new_empty(0)
    if saved_inner:
        inner = reorder(_over_time(saved_inner), order).movedim(3, 0)
    inner = inner.to(state_dtype(y.dtype))
    if not save:
        return Result(y, states, y.new_empty(0), y.new_empty(0), inner)
    gates, recurrent = (reorder(_over_time(each), order) for each in (saved_gates, saved_recurrent))
    return Result(y, states, gates, recurrent, inner)


def _attached(results: list[Tensor], gates: Tensor) -> list[Tensor]:
    """What is made of truth values alone has a gradient of 0, as on the other backends, not none at all."""
    if not gates.requires_grad or all(result.requires_grad for result in results):
        return results
    always, like = torch.ones((), dtype=torch.bool, device=gates.device), gates[-1, :, :, 0]
    return [r if r.requires_grad else torch.where(always, r, like.to(r.dtype)) for r in results]


def _over_time(steps: list[Tensor]) -> Tensor:
    """torch.stack, eight at a time: at second order its derivative is as large as the result, for each of what it
    joins."""
    parts = [step.unsqueeze(0) for step in steps]
    while len(parts) > 1:
        parts = [torch.cat(parts[first : first + 8]) for first in range(0, len(parts), 8)]
    return parts[0]


class Steering:
    """What steers the steps of a call; `steered` has a part for each step, in processing order.

    The loops have the like (`step/controls.py`): what judges them shares no such code with them.
    """

    def __init__(self, call: Call, steps: int, order: Tensor | None) -> None:
        controls, self.values = call.controls, [call.reset_value(k) for k in range(len(call.states))]
        zones = () if controls.zone is None else controls.zone.unbind(0)
        self.ragged, self.flagged, self.zones = controls.lengths is not None, controls.flags is not None, len(zones)
        self.steered = [reorder(zone, order) for zone in zones]
        if controls.flags is not None:
            flags = reorder(controls.flags, order)
            self.steered += [bit(flags, RESET), bit(flags, SKIP)]
        for value in (value for value in self.values if isinstance(value, Tensor)):
            every = value.expand(steps, -1, -1, -1)
            self.steered.append(every if len(value) == 1 else reorder(every, order))
        if controls.lengths is not None:
            number = torch.arange(steps, device=controls.lengths.device)
            self.steered.append((number[:, None] < controls.lengths)[..., None, None])

    def at(self, steered: Iterable[Tensor]) -> SteeredStep:
        """Of a step, whose part of each of `steered` these are."""
        parts = iter(steered)
        zone = [next(parts) for _ in range(self.zones)]
        reset, skip = (next(parts) if self.flagged else None for _ in range(2))
        values = [next(parts) if isinstance(value, Tensor) else value for value in self.values]
        return SteeredStep(zone, reset, skip, values, next(parts) if self.ragged else None)


class SteeredStep(NamedTuple):
    """Which rows are reset before a step, and which units keep their states after it."""

    zone: list[Tensor]
    reset: Tensor | None
    skip: Tensor | None
    values: list[Any]
    """What each state is reset to."""
    runs: Tensor | None
    """(B, 1, 1): the rows that have this step; with lengths."""

    def enter(self, states: list[Tensor]) -> list[Tensor]:
        """The states that the step starts from."""
        if self.reset is None:
            return states
        return [torch.where(self.reset, value, state) for value, state in zip(self.values, states, strict=True)]

    def leave(self, new: list[Tensor], entered: list[Tensor]) -> list[Tensor]:
        """The states after it."""
        if self.zone:
            masks = [zone[:, :, : state.shape[-1]] for zone, state in zip(self.zone, entered, strict=True)]
            new = [torch.where(keep, before, after) for keep, before, after in zip(masks, entered, new, strict=True)]
        if self.runs is not None:
            return [torch.where(self.runs, after, before) for after, before in zip(new, entered, strict=True)]
        if self.skip is None:
            return new
        return [torch.where(self.skip, before, after) for before, after in zip(entered, new, strict=True)]

    def output(self, h: Tensor) -> Tensor:
        """h, and 0 in rows that have no such step."""
        return h if self.runs is None else torch.where(self.runs, h, 0)


class OneStep:
    """One step: the products, stage after stage, and the pointwise program between them.

    The program computes in float32 where storage has 16 bits, as in every other backend: in float16 the exp of 11.1 is
    infinite already.
    """

    def __init__(self, call: Call) -> None:
        self.program, self.weights, self.drop, self.rms = call.program, call.weights, call.controls.drop, call.rms
        self.params = {}
        if call.weights.params is not None:
            params = call.weights.params.unbind(1)
            wide = [value.to(state_dtype(value.dtype)) for value in params]
            self.params = {f"p_{name}": value for name, value in zip(call.program.params, wide, strict=True)}

    def product(self, entering: Tensor, rows: slice) -> Tensor:
        """(B, N, gates, H): what enters a stage, times its weights."""
        weights = self.weights.w_hh[:, rows]
        if self.drop is None:
            product = torch.einsum("bnk,nghk->bngh", entering, weights)
        else:
            drop = self.drop if self.drop.shape[2] == 1 else self.drop[:, :, rows]
            dropped = (entering[:, :, None] * drop).expand(-1, -1, weights.shape[1], -1)
            product = torch.einsum("bngk,nghk->bngh", dropped, weights)
        if self.weights.norm is None:
            return product
        return normalised(product, self.rms) * self.weights.norm[:, rows]

    def __call__(self, x: Tensor, states: list[Tensor]) -> tuple[list[Tensor], Tensor, Tensor]:
        """x (B, N, G, H), states -> new states, pre-activations (B, N, G, H), products of split gates."""
        program, weights, wide = self.program, self.weights, state_dtype(x.dtype)
        named = zip(program.state_names, states, strict=True)
        values = {f"s_{name}": state.to(wide) for name, state in named} | self.params
        like, entering = states[-1], states[0]
        pre, split = [], []
        for stage, rows in zip(program.stages, program.rows, strict=True):
            product = self.product(entering, rows)
            for i, gate in enumerate(stage.gates):
                a, r = x[:, :, rows.start + i], product[:, :, i]
                if gate in program.summed:
                    a = a + r
                    values[f"a_{gate}"] = a.to(wide)
                else:
                    r = r if weights.b_hh is None else r + weights.b_hh[:, rows.start + i]
                    values[f"x_{gate}"], values[f"r_{gate}"] = a.to(wide), r.to(wide)
                    split.append(r)
                pre.append(a)
            stage.run(values)
            like = pre[0]
            entering = lookup(values, stage.outputs[0], like).to(like.dtype)
        new = [lookup(values, out, like).to(like.dtype) for out in program.stages[-1].outputs]
        if weights.w_hr is not None:
            new[0] = torch.einsum("bnh,nph->bnp", new[0], weights.w_hr)
        gates = torch.stack(pre, 2)
        return new, gates, torch.stack(split, 2) if split else gates[:, :, :0]
