# SPDX-License-Identifier: Apache-2.0
"""One product and one pointwise pass a step: every recurrence, every size, any device.

On a GPU the pointwise pass is one generated Triton kernel and chunks of steps are replayed as a CUDA graph
(`launch/pointwise.py`); on a CPU it is the program in torch, where what needs no incoming gradient is computed for all
steps at once before the backward loop.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpu_rnn.derivative import Derivative, differentiate
from gpu_rnn.devices import CPU_FLOPS
from gpu_rnn.launch import pointwise
from gpu_rnn.problem import Problem
from gpu_rnn.products import inputs_over_time, state_dtype
from gpu_rnn.program import Program, evaluate, lookup
from gpu_rnn.reference import Result, Weights, processing_order, reorder

# Seconds, predicted. The GPU's is above ATen's on purpose: as long as nothing is measured, what cuDNN can run stays there.
CPU_OPERATION, GPU_STEP = 3e-6, 8e-6


def unsupported(problem: Problem) -> list[str]:
    """Why the step loop cannot run a problem."""
    return ["complex numbers run on the reference only"] if problem.dtype.is_complex else []


def cost(problem: Problem) -> float:
    """Predicted seconds: the products, and a torch operation for each of the program's, or two launches a stage."""
    stages, passes = problem.program.stages, 2.0 if problem.direction == "backward" else 1.0
    steps = passes * problem.T * problem.layers
    if problem.device.is_gpu:
        return steps * len(stages) * GPU_STEP + problem.flops / (problem.device.tensor_flops * 1e12)
    return steps * sum(len(stage.ops) + len(stage.gates) for stage in stages) * CPU_OPERATION + problem.flops / CPU_FLOPS


def _stage_rows(program: Program) -> list[slice]:
    rows, first = [], 0
    for stage in program.stages:
        rows.append(slice(first, first + len(stage.gates)))
        first += len(stage.gates)
    return rows


def _product(entering: Tensor, matrix: Tensor) -> Tensor:
    """(B, N, P) times (N, P, X) -> (B, N, X), in the matrix's dtype."""
    return torch.bmm(entering.to(matrix.dtype).transpose(0, 1), matrix).transpose(0, 1)


def forward(
    program: Program,
    gates: Tensor,  # (T, B, N, G, H), the input projection; overwritten
    weights: Weights,
    states: list[Tensor],
    lengths: Tensor | None,
    reverse: str,
    save: bool,
    problem: Problem,
) -> Result:
    """The forward loop; see `reference.forward`, whose results it gives."""
    if pointwise.runs(gates, weights):
        return pointwise.forward(program, gates, weights, states, lengths, reverse, save, problem)
    steps, batch, n, _, hidden = gates.shape
    compute = state_dtype(gates.dtype)
    order = processing_order(steps, lengths, reverse, gates.device)
    gates = reorder(gates, order)
    width = weights.w_hh.shape[-1]
    y = gates.new_empty(steps, batch, n, width)
    recurrent = gates.new_empty(steps, batch, n, len(program.split), hidden) if save else gates.new_empty(0)
    inner = gates.new_empty(len(states) - 1, steps, batch, n, hidden, dtype=compute) if save else gates.new_empty(0)
    loop = _Loop(program, weights, compute)
    states = [state.to(compute) for state in states]
    for t in range(steps):
        new = loop.step(gates[t], states, recurrent[t] if save else None)
        if lengths is not None:
            use = (t < lengths)[:, None, None]
            y[t] = torch.where(use, new[0], 0)
            new = [torch.where(use, after, before) for after, before in zip(new, states, strict=True)]
        else:
            y[t] = new[0]
        states = new
        if save:
            for kept, state in zip(inner, states[1:], strict=True):
                kept[t] = state
    final = [state.to(gates.dtype) for state in states]
    if not save:
        return Result(reorder(y, order), final, gates.new_empty(0), recurrent, inner)
    inner = torch.stack([reorder(state, order) for state in inner]) if len(inner) else inner
    return Result(reorder(y, order), final, reorder(gates, order), reorder(recurrent, order), inner)


class _Loop:
    """One forward step; the weights are laid out for its products once."""

    def __init__(self, program: Program, weights: Weights, compute: torch.dtype) -> None:
        self.program, self.rows = program, _stage_rows(program)
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
            product = _product(entering, matrix).unflatten(-1, (len(stage.gates), x.shape[-1]))
            for i, gate in enumerate(stage.gates):
                own, r = x[:, :, rows.start + i], product[:, :, i]
                if gate in program.summed:
                    values[f"a_{gate}"] = own.add_(r).to(self.compute)
                    continue
                r = (r if self.bias is None else r + self.bias[:, rows.start + i]).to(self.compute)
                values[f"x_{gate}"], values[f"r_{gate}"] = own.to(self.compute), r
                if recurrent is not None:
                    recurrent[:, :, program.split.index(gate)] = r
            evaluate(stage.ops, values)
            entering = lookup(values, stage.outputs[0], product[:, :, 0])
        new = [lookup(values, out, states[-1]) for out in program.stages[-1].outputs]
        if self.projection is not None:
            new[0] = _product(new[0], self.projection).to(self.compute)
        return new


def backward(
    program: Program,
    saved: Result,
    weights: Weights,
    states: list[Tensor],
    lengths: Tensor | None,
    reverse: str,
    d_y: Tensor,  # (T, B, N, P)
    d_final: list[Tensor],
    problem: Problem,
) -> tuple[Tensor, Tensor, list[Tensor], Tensor | None, Tensor | None]:
    """The backward loop; see `execution.LoopGradients`."""
    if pointwise.runs(saved.gates, weights):
        return *pointwise.backward(program, saved, weights, states, lengths, reverse, d_y, d_final, problem), None
    steps = saved.gates.shape[0]
    compute = state_dtype(saved.gates.dtype)
    order = processing_order(steps, lengths, reverse, d_y.device)
    values = inputs_over_time(program, saved, weights, states, lengths, reverse)
    loop = _BackwardLoop(program, weights, values, order)
    d_y = reorder(d_y, order).to(compute)
    d_gates, d_recurrent = torch.empty_like(saved.gates), torch.empty_like(saved.recurrent)
    d_states = [d.to(compute) for d in d_final]
    d_projected = torch.empty_like(d_y) if weights.w_hr is not None else None
    for t in reversed(range(steps)):
        arriving = [d_states[0] + d_y[t], *d_states[1:]]
        if lengths is not None:
            use = (t < lengths)[:, None, None]
            arriving = [torch.where(use, d, 0) for d in arriving]
        if d_projected is not None:
            d_projected[t] = arriving[0]
        d_new = loop.step(t, arriving, d_gates[t], d_recurrent[t])
        if lengths is not None:
            d_new = [torch.where(use, new, old) for new, old in zip(d_new, d_states, strict=True)]
            d_gates[t].masked_fill_(~use[..., None], 0)
            d_recurrent[t].masked_fill_(~use[..., None], 0)
        d_states = d_new
    d_w_hr = None
    if d_projected is not None:
        evaluate(program.stages[-1].ops, values)
        h = reorder(lookup(values, program.stages[-1].outputs[0], values[f"s_{program.state_names[-1]}"]), order)
        d_w_hr = torch.einsum("tbnp,tbnh->nph", d_projected, h)
    return reorder(d_gates, order), reorder(d_recurrent, order), d_states, loop.d_params(), d_w_hr


class _BackwardLoop:
    """One backward step; what needs no incoming gradient was computed for all steps beforehand."""

    def __init__(
        self, program: Program, weights: Weights, values: dict[str, Tensor], order: Tensor | None
    ) -> None:
        self.program, self.rows = program, _stage_rows(program)
        self.matrices = [weights.w_hh[:, rows].flatten(1, 2) for rows in self.rows]
        self.projection = weights.w_hr
        self.derivatives = [differentiate(program, k) for k in range(len(program.stages))]
        for stage, derivative in zip(program.stages, self.derivatives, strict=True):
            evaluate(stage.ops, values)
            evaluate(derivative.unseeded[0], values)
        late = {arg for d in self.derivatives for op in d.unseeded[1] for arg in op.args if isinstance(arg, str)}
        constant = {f"p_{name}" for name in program.params}
        self.fixed = {name: values[name] for name in late & constant}
        self.stepped = {name: reorder(values[name], order) for name in (late & values.keys()) - constant}
        self.sums: dict[str, Tensor] = {}

    def step(self, t: int, arriving: list[Tensor], d_gates: Tensor, d_recurrent: Tensor) -> list[Tensor]:
        """Gradients of the states after step t -> those before it; writes d_gates[t] and d_recurrent[t]."""
        values = {name: value[t] for name, value in self.stepped.items()} | self.fixed
        program = self.program
        seeds = list(arriving)
        if self.projection is not None:
            seeds[0] = _product(seeds[0], self.projection).to(seeds[0].dtype)
        d_states: dict[str, Tensor] = {}
        for k in reversed(range(len(program.stages))):
            derivative = self.derivatives[k]
            values |= dict(zip(derivative.seeds, seeds, strict=True))
            evaluate(derivative.unseeded[1], values)
            found = self._collect(derivative, values, seeds[-1])
            d_product = self._gates(k, found, d_gates, d_recurrent)
            d_entering = _product(d_product.flatten(2), self.matrices[k]).to(seeds[-1].dtype)
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

