# SPDX-License-Identifier: Apache-2.0
"""The time loop over a recurrence in plain PyTorch: ground truth, on any device, in any dtype, differentiable to any order.

Sizes: T time, B batch, N independent recurrences (directions, members), G gates, H hidden units, I input features,
P width of the product's input (H, or proj_size).
"""

from __future__ import annotations

from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_rnn.program import Program, lookup


class Weights(NamedTuple):
    """The weights of one layer in canonical layout; None where the layer has none."""

    w_ih: Tensor  # (N, G, H, I)
    w_hh: Tensor  # (N, G, H, P)
    b_ih: Tensor | None = None  # (N, G, H)
    b_hh: Tensor | None = None  # (N, G, H)
    params: Tensor | None = None  # (N, number of params, H)
    w_hr: Tensor | None = None  # (N, P, H): projection of h


class Result(NamedTuple):
    """What a forward pass returns.

    `gates`, `recurrent` and `inner` are what the backward pass needs, empty in inference: pre-activations (the sum
    x + r of a summed gate, else x), the products of the split gates, and the states other than h after each step. The
    steps of a reversed recurrence stand at the times they belong to.
    """

    y: Tensor  # (T, B, N, P)
    final: list[Tensor]  # h (B, N, P), other states (B, N, H)
    gates: Tensor  # (T, B, N, G, H)
    recurrent: Tensor  # (T, B, N, number of split gates, H)
    inner: Tensor  # (number of states - 1, T, B, N, H)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which states live and sums are taken: fp32 for 16-bit storage."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def project(x: Tensor, weights: Weights, program: Program) -> Tensor:
    """W_ih x + b_ih for all steps, with b_hh added where a gate is a sum. x (T, B, I) or (T, B, N, I) -> (T, B, N, G, H)."""
    bias = None
    if weights.b_ih is not None and weights.b_hh is not None:
        pairs = zip(program.gates, weights.b_ih.unbind(1), weights.b_hh.unbind(1), strict=True)
        bias = torch.stack([own + other if gate in program.summed else own for gate, own, other in pairs], 1)
    if x.dim() == 3:  # one product for all N
        flat = F.linear(x, weights.w_ih.flatten(0, 2), None if bias is None else bias.flatten())
        return flat.unflatten(-1, weights.w_ih.shape[:3])
    gates = torch.einsum("tbni,nghi->tbngh", x, weights.w_ih)
    return gates if bias is None else gates + bias


def processing_order(steps: int, lengths: Tensor | None, reverse: str, device: torch.device) -> Tensor | None:
    """(T, B or 1, N): the time at which each row's step number t lies, None when that is t for all.

    A reversed row starts at its own last step. The map is its own inverse, so it also puts results back in place.
    `reverse` has a character for each recurrence, "1" for a reversed one.
    """
    if "1" not in reverse:
        return None
    step = torch.arange(steps, device=device)[:, None, None]
    last = (lengths[None, :, None] if lengths is not None else torch.full((1, 1, 1), steps, device=device)) - 1
    # No tensor is made from a list: that would copy from the host, and wait.
    turned = torch.cat([torch.full((len(list(run)),), flag == "1", device=device) for flag, run in groupby(reverse)])
    return torch.where(turned & (step <= last), last - step, step)


def reorder(values: Tensor, order: Tensor | None) -> Tensor:
    """Values (T, B, N, ...) in processing order, or from it back into the order of time."""
    if order is None:
        return values
    steps, batch, n = values.shape[:3]
    rows = torch.arange(batch * n, device=values.device).view(batch, n) + order * (batch * n)  # whole rows are copied
    return values.flatten(0, 2).index_select(0, rows.flatten()).unflatten(0, (steps, batch, n))


def forward(
    program: Program,
    x: Tensor,  # (T, B, I) or (T, B, N, I)
    weights: Weights,
    states: list[Tensor],  # h (B, N, P), others (B, N, H)
    lengths: Tensor | None = None,  # (B,)
    reverse: str = "0",
    save: bool = False,
) -> Result:
    """Runs a recurrence. See `Result`; rows beyond their length have output 0 and keep their states."""
    order = processing_order(x.shape[0], lengths, reverse, x.device)
    gates = reorder(project(x, weights, program), order)
    step = _Step(program, weights)
    outputs, saved_gates, saved_recurrent, saved_inner = [], [], [], []
    for t in range(x.shape[0]):
        new, pre, recurrent = step(gates[t], states)
        y = new[0]
        if lengths is not None:
            use = (t < lengths)[:, None, None]  # (B, 1, 1)
            y = torch.where(use, y, 0)
            new = [torch.where(use, after, before) for after, before in zip(new, states, strict=True)]
        states = new
        outputs.append(y)
        if save:
            saved_gates.append(pre)
            saved_recurrent.append(recurrent)
            saved_inner.append(torch.stack(states[1:], 2) if states[1:] else pre[:, :, :0])
    y = reorder(torch.stack(outputs), order)
    if not save:
        empty = y.new_empty(0)
        return Result(y, states, empty, empty, empty)
    gates, recurrent, inner = (
        reorder(torch.stack(each), order) for each in (saved_gates, saved_recurrent, saved_inner)
    )
    return Result(y, states, gates, recurrent, inner.movedim(3, 0).to(state_dtype(y.dtype)))


class _Step:
    """One step: the products, stage after stage, and the pointwise program between them."""

    def __init__(self, program: Program, weights: Weights) -> None:
        self.program, self.weights = program, weights
        self.params = {}
        if weights.params is not None:
            self.params = {f"p_{name}": weights.params[:, i] for i, name in enumerate(program.params)}

    def __call__(self, x: Tensor, states: list[Tensor]) -> tuple[list[Tensor], Tensor, Tensor]:
        """x (B, N, G, H), states -> new states, pre-activations (B, N, G, H), products of split gates."""
        program, weights = self.program, self.weights
        values = {f"s_{name}": state for name, state in zip(program.state_names, states, strict=True)} | self.params
        like, entering = states[-1], states[0]
        pre, kept = [], []
        for stage, rows in zip(program.stages, program.rows, strict=True):
            product = torch.einsum("bnk,nghk->bngh", entering, weights.w_hh[:, rows])
            for i, gate in enumerate(stage.gates):
                own, r = x[:, :, rows.start + i], product[:, :, i]
                if gate in program.summed:
                    own = values[f"a_{gate}"] = own + r
                else:
                    r = r if weights.b_hh is None else r + weights.b_hh[:, rows.start + i]
                    values[f"x_{gate}"], values[f"r_{gate}"] = own, r
                    kept.append(r)
                pre.append(own)
            stage.run(values)
            like = pre[0]
            entering = lookup(values, stage.outputs[0], like).to(like.dtype)
        new = [lookup(values, out, like).to(like.dtype) for out in program.stages[-1].outputs]
        if weights.w_hr is not None:
            new[0] = torch.einsum("bnh,nph->bnp", new[0], weights.w_hr)
        gates = torch.stack(pre, 2)
        return new, gates, torch.stack(kept, 2) if kept else gates[:, :, :0]
