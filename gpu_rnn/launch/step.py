# SPDX-License-Identifier: Apache-2.0
"""One product and one pointwise pass a step: every recurrence, every size, any device.

On a GPU the pointwise pass is one generated Triton kernel and chunks of steps are replayed as a CUDA graph
(`launch/pointwise.py`); on a CPU it is the program in torch, where what needs no incoming gradient is computed for all
steps at once before the backward loop.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby

import torch
from torch import Tensor

from gpu_rnn.derivative import Derivative, differentiate
from gpu_rnn.devices import CPU_FLOPS
from gpu_rnn.launch import pointwise
from gpu_rnn.layout import (
    Call,
    Control,
    LoopGradients,
    Result,
    processing_order,
    reorder,
    reorder_each,
    state_dtype,
)
from gpu_rnn.problem import Problem
from gpu_rnn.program import lookup

# Seconds, predicted. The GPU's is above ATen's on purpose: as long as nothing is measured, what cuDNN can run stays there.
CPU_OPERATION, GPU_STEP = 3e-6, 8e-6


def unsupported(problem: Problem) -> list[str]:
    """Why the step loop cannot run a problem."""
    return ["complex numbers run on the reference only"] * problem.dtype.is_complex + problem.without("lengths")


def cost(problem: Problem) -> float:
    """Predicted seconds: the products, and a torch operation for each of the program's, or two launches a stage."""
    stages, passes = problem.program.stages, 2.0 if problem.direction == "backward" else 1.0
    steps = passes * problem.T * problem.layers
    if problem.device.is_gpu:
        return steps * len(stages) * GPU_STEP + problem.flops / (problem.device.tensor_flops * 1e12)
    return steps * sum(len(stage.ops) + len(stage.gates) for stage in stages) * CPU_OPERATION + problem.flops / CPU_FLOPS


def _product(entering: Tensor, matrix: Tensor) -> Tensor:
    """(B, N, P) times (N, P, X) -> (B, N, X), in the matrix's dtype."""
    return torch.bmm(entering.to(matrix.dtype).transpose(0, 1), matrix).transpose(0, 1)


def _active_rows(lengths: Tensor | None, steps: int, batch: int) -> list[int]:
    """How many rows each step has. The longest come first, so those that are over drop out at the end of the batch."""
    if lengths is None:
        return [batch] * steps
    return (lengths > torch.arange(steps, device=lengths.device)[:, None]).sum(1).tolist()


def _longest_first(lengths: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """The order that puts the longest rows first and the one that puts them back; None where they are so already."""
    if lengths is None or bool((lengths[:-1] >= lengths[1:]).all()):
        return None
    order = lengths.argsort(descending=True, stable=True)
    return order, order.argsort()


def _permuted(result: Result, rows: Tensor) -> Result:
    y, final, gates, recurrent, inner = result
    if gates.dim() == 1:  # nothing was saved
        return Result(y[:, rows], [f[rows] for f in final], gates, recurrent, inner)
    return Result(y[:, rows], [f[rows] for f in final], gates[:, rows], recurrent[:, rows], inner[:, :, rows])


def _rows_permuted(call: Call, rows: Tensor) -> Call:
    """The call with the rows of the batch in another order."""
    assert call.lengths is not None
    return replace(call, states=[state[rows] for state in call.states], control=Control(call.lengths[rows]))


def forward(
    call: Call,
    gates: Tensor,  # (T, B, N, G, H), the input projection; overwritten
    save: bool,
    all_states: bool,
) -> Result:
    """The forward loop; see `reference.forward`, whose results it gives."""
    if pointwise.runs(gates, call.weights):
        return pointwise.forward(call, gates, save)
    permutation = _longest_first(call.lengths)
    if permutation is not None:
        rows, back = permutation
        return _permuted(forward(_rows_permuted(call, rows), gates[:, rows], save, all_states), back)
    program, weights, states, lengths = call.program, call.weights, call.states, call.lengths
    steps, batch, n, _, hidden = gates.shape
    compute = state_dtype(gates.dtype)
    order = processing_order(steps, lengths, call.reverse, gates.device)
    gates = reorder(gates, order)
    blank = gates.new_empty if lengths is None else gates.new_zeros
    y = blank(steps, batch, n, weights.w_hh.shape[-1])
    recurrent = blank(steps, batch, n, len(program.split), hidden) if save else gates.new_empty(0)
    inner = gates.new_empty(len(states) - 1, steps, batch, n, hidden, dtype=compute) if save else gates.new_empty(0)
    loop = _Loop(call, compute)
    states = [state.to(compute, copy=True) for state in states]
    for t, rows in enumerate(_active_rows(lengths, steps, batch)):
        new = loop.step(gates[t, :rows], [s[:rows] for s in states], recurrent[t, :rows] if save else None)
        y[t, :rows] = new[0]
        for state, after in zip(states, new, strict=True):
            state[:rows] = after
        if save:
            for kept, state in zip(inner, states[1:], strict=True):
                kept[t] = state
    final = [state.to(gates.dtype) for state in states]
    if not save:
        return Result(reorder(y, order), final, gates.new_empty(0), recurrent, inner)
    return Result(reorder(y, order), final, reorder(gates, order), reorder(recurrent, order), reorder_each(inner, order))


class _Loop:
    """One forward step; the weights are laid out for its products once."""

    def __init__(self, call: Call, compute: torch.dtype) -> None:
        program, weights = call.program, call.weights
        self.program, self.rows = program, program.rows
        self.matrices = [weights.w_hh[:, rows].flatten(1, 2).transpose(1, 2) for rows in self.rows]
        self.bias = weights.b_hh
        self.projection = weights.w_hr.transpose(1, 2) if weights.w_hr is not None else None
        self.params = {}
        if weights.params is not None:
            self.params = {f"p_{name}": weights.params[:, i].to(compute) for i, name in enumerate(program.params)}
        self.compute = compute

    def step(self, x: Tensor, states: list[Tensor], recurrent: Tensor | None) -> list[Tensor]:
        """x (B, N, G, H) receives the sums of the summed gates; `recurrent` the products of the split ones."""
        program = self.program
        values = {f"s_{name}": state for name, state in zip(program.state_names, states, strict=True)} | self.params
        entering = states[0]
        for stage, rows, matrix in zip(program.stages, self.rows, self.matrices, strict=True):
            product = _product(entering, matrix)
            product = product.view(*product.shape[:2], len(stage.gates), x.shape[-1])
            self._gates(values, stage.gates, x[:, :, rows], product, rows.start, recurrent)
            stage.run(values)
            entering = lookup(values, stage.outputs[0], product[:, :, 0])
        new = [lookup(values, out, states[-1]) for out in program.stages[-1].outputs]
        if self.projection is not None:
            new[0] = _product(new[0], self.projection).to(self.compute)
        return new

    def _gates(
        self,
        values: dict[str, Tensor],
        gates: tuple[str, ...],
        x: Tensor,
        product: Tensor,
        first: int,
        recurrent: Tensor | None,
    ) -> None:
        """Enters a stage's gates into `values`; neighbouring summed ones are added in one operation."""
        program = self.program
        for is_sum, run in groupby(range(len(gates)), key=lambda i: gates[i] in program.summed):
            own = list(run)
            part = slice(own[0], own[-1] + 1)
            if is_sum:
                sums = x[:, :, part].add_(product[:, :, part]).to(self.compute)
                values.update(zip([f"a_{gates[i]}" for i in own], sums.unbind(2), strict=True))
                continue
            r = product[:, :, part]
            r = (r if self.bias is None else r + self.bias[:, first + own[0] : first + own[-1] + 1]).to(self.compute)
            values.update(zip([f"x_{gates[i]}" for i in own], x[:, :, part].to(self.compute).unbind(2), strict=True))
            values.update(zip([f"r_{gates[i]}" for i in own], r.unbind(2), strict=True))
            if recurrent is not None:
                start = program.split.index(gates[own[0]])
                recurrent[:, :, start : start + len(own)] = r


def backward(
    call: Call, saved: Result, d_y: Tensor, d_final: list[Tensor], d_inner: Tensor | None
) -> LoopGradients:
    """The backward loop."""
    if pointwise.runs(saved.gates, call.weights):
        return pointwise.backward(call, saved, d_y, d_final)
    permutation = _longest_first(call.lengths)
    if permutation is not None:
        rows, back = permutation
        d_rows = [d[rows] for d in d_final]
        found = backward(_rows_permuted(call, rows), _permuted(saved, rows), d_y[:, rows], d_rows, d_inner)
        return found._replace(
            d_gates=found.d_gates[:, back],
            d_recurrent=found.d_recurrent[:, back],
            d_states=[d[back] for d in found.d_states],
        )
    steps, batch = saved.gates.shape[:2]
    compute = state_dtype(saved.gates.dtype)
    order = processing_order(steps, call.lengths, call.reverse, d_y.device)
    loop = _BackwardLoop(call, saved, order)
    d_y = reorder(d_y, order).to(compute)
    empty = torch.empty_like if call.lengths is None else torch.zeros_like
    d_gates, d_recurrent = empty(saved.gates), empty(saved.recurrent)
    d_states = [d.to(compute, copy=True) for d in d_final]
    for t, rows in reversed(list(enumerate(_active_rows(call.lengths, steps, batch)))):
        arriving = [d_states[0][:rows] + d_y[t, :rows], *(d[:rows] for d in d_states[1:])]
        d_before = loop.step(t, arriving, d_gates[t, :rows], d_recurrent[t, :rows])
        for d_state, before in zip(d_states, d_before, strict=True):
            d_state[:rows] = before
    d_gates, d_recurrent = reorder(d_gates, order), reorder(d_recurrent, order)
    return LoopGradients(d_gates, d_recurrent, d_states, loop.d_params(), loop.d_w_hr)


class _BackwardLoop:
    """One backward step, from what the forward pass saved; the activations are computed again.

    Step by step, since on a CPU tensors of one step stay in the cache and those of all steps do not.
    """

    def __init__(self, call: Call, saved: Result, order: Tensor | None) -> None:
        program, weights, states = call.program, call.weights, call.states
        self.program, self.rows, self.compute = program, program.rows, state_dtype(saved.gates.dtype)
        self.matrices = [weights.w_hh[:, rows].flatten(1, 2) for rows in self.rows]
        self.projection = weights.w_hr
        self.derivatives = [differentiate(program, k) for k in range(len(program.stages))]
        self.gates, self.recurrent = reorder(saved.gates, order), reorder(saved.recurrent, order)
        self.initial, self.after = states, [reorder(state, order) for state in (saved.y, *saved.inner)]
        self.params: dict[str, Tensor] = {}
        if weights.params is not None:
            self.params = {f"p_{name}": weights.params[:, i].to(self.compute) for i, name in enumerate(program.params)}
        self.sums: dict[str, Tensor] = {}
        self.d_w_hr: Tensor | None = None

    def _inputs(self, t: int, rows: int) -> dict[str, Tensor]:
        """Every input of the program at step t."""
        program, values = self.program, dict(self.params)
        for gate, value in zip(program.gates, self.gates[t, :rows].to(self.compute).unbind(2), strict=True):
            values[f"a_{gate}" if gate in program.summed else f"x_{gate}"] = value
        for gate, value in zip(program.split, self.recurrent[t, :rows].to(self.compute).unbind(2), strict=True):
            values[f"r_{gate}"] = value
        for name, after, initial in zip(program.state_names, self.after, self.initial, strict=True):
            values[f"s_{name}"] = (after[t - 1, :rows] if t else initial[:rows]).to(self.compute)
        return values

    def step(self, t: int, arriving: list[Tensor], d_gates: Tensor, d_recurrent: Tensor) -> list[Tensor]:
        """Gradients of the states after step t -> those before it; writes d_gates and d_recurrent of the step."""
        program, seeds = self.program, list(arriving)
        values = self._inputs(t, len(arriving[0]))
        if len(program.stages) > 1 or self.projection is not None:
            for stage in program.stages:
                stage.run(values)
        if self.projection is not None:
            h = lookup(values, program.stages[-1].outputs[0], seeds[-1])
            share = torch.einsum("bnp,bnh->nph", seeds[0], h)
            self.d_w_hr = share if self.d_w_hr is None else self.d_w_hr + share
            seeds[0] = _product(seeds[0], self.projection).to(self.compute)
        d_states: dict[str, Tensor] = {}
        for k in reversed(range(len(program.stages))):
            derivative = self.derivatives[k]
            values |= dict(zip(derivative.seeds, seeds, strict=True))
            derivative.run(values)
            found = self._collect(derivative, values, seeds[-1])
            d_product = self._gates(k, found, d_gates, d_recurrent)
            d_entering = _product(d_product.flatten(2), self.matrices[k]).to(self.compute)
            for name in program.state_names:
                d_states[name] = d_states[name] + found[f"s_{name}"] if name in d_states else found[f"s_{name}"]
            seeds = [d_entering, *(found[name] for name in derivative.carried)]
        first = program.state_names[0]
        # A projected h enters the product only, and has another width than the units.
        d_states[first] = d_entering if self.projection is not None else d_states[first] + d_entering
        return [d_states[name] for name in program.state_names]

    def _collect(self, derivative: Derivative, values: dict[str, Tensor], like: Tensor) -> dict[str, Tensor]:
        found = {}
        for name, output in zip(derivative.wrt, derivative.outputs, strict=True):
            found[name] = lookup(values, output, like)
            if name.startswith("p_"):
                share = found[name].sum(0)
                self.sums[name] = self.sums[name] + share if name in self.sums else share
        return found

    def _gates(self, k: int, found: dict[str, Tensor], d_gates: Tensor, d_recurrent: Tensor) -> Tensor:
        """Writes the gradients of a stage's gates and returns those of its products, (B, N, gates, H)."""
        program, products = self.program, []
        for i, gate in enumerate(program.stages[k].gates):
            summed = gate in program.summed
            d_gates[:, :, self.rows[k].start + i] = found[f"a_{gate}" if summed else f"x_{gate}"]
            products.append(found[f"a_{gate}" if summed else f"r_{gate}"])
            if not summed:
                d_recurrent[:, :, program.split.index(gate)] = products[-1]
        return torch.stack(products, 2)

    def d_params(self) -> Tensor | None:
        """(N, number of params, H)"""
        names = [f"p_{name}" for name in self.program.params]
        return torch.stack([self.sums[name] for name in names], 1) if names else None

