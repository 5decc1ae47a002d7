# SPDX-License-Identifier: Apache-2.0
"""Every option of a layer as a loop over rows and steps with plain conditions: nothing of the package is used in here.

One row of one direction at a time, in vectors: no masks, no selection, no batching, no order of processing to undo.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.certifying.given import Given, Step

Function = Callable[[Tensor], Tensor]
Weights = dict[str, Any]  # tensors by torch's names; "clip" is a number, "rms" a flag


def _norm(value: Tensor, gates: int, scale: Tensor | None, rms: bool) -> Tensor:
    """Normalisation written out, gate by gate."""
    if scale is None:
        return value
    parts = []
    for gate in value.chunk(gates):
        mean = 0 if rms else gate.mean()
        parts.append((gate - mean) / ((gate - mean).square().mean() + 1e-5).sqrt())
    return torch.cat(parts) * scale


def _functions(w: Weights) -> tuple[Function, Function]:
    """φ and σ, of arguments cut to ±clip."""
    clip = w["clip"]
    return (lambda v: v.clip(-clip, clip).tanh()), (lambda v: v.clip(-clip, clip).sigmoid())


def _lstm(x: Tensor, state: list[Tensor], product: Callable[..., Tensor], w: Weights) -> list[Tensor]:
    (h, c), (phi, sigma) = state, _functions(w)
    i, f, g, o = (x + product(h)).chunk(4)
    if "weight_peephole" in w:
        p_i, p_f, p_o = w["weight_peephole"]
        i, f = i + p_i * c, f + p_f * c
        c = sigma(f) * c + sigma(i) * phi(g)
        return [sigma(o + p_o * c) * phi(c), c]
    c = sigma(f) * c + sigma(i) * phi(g)
    h = sigma(o) * phi(c)
    return [w["weight_hr"] @ h if "weight_hr" in w else h, c]


def _gru(x: Tensor, state: list[Tensor], product: Callable[..., Tensor], w: Weights) -> list[Tensor]:
    (h,), (phi, sigma) = state, _functions(w)
    (x_r, x_z, x_n), (r_r, r_z, r_n) = x.chunk(3), product(h).chunk(3)
    r, z = sigma(x_r + r_r), sigma(x_z + r_z)
    n = phi(x_n + r * r_n)
    return [(1 - z) * n + z * h]


def _gru_reset_before(x: Tensor, state: list[Tensor], product: Callable[..., Tensor], w: Weights) -> list[Tensor]:
    (h,), (phi, sigma) = state, _functions(w)
    x_r, x_z, x_n = x.chunk(3)
    r_r, r_z, _ = product(h).chunk(3)
    r, z = sigma(x_r + r_r), sigma(x_z + r_z)
    n = phi(x_n + product(r * h).chunk(3)[2])
    return [(1 - z) * n + z * h]


def _rnn(x: Tensor, state: list[Tensor], product: Callable[..., Tensor], w: Weights) -> list[Tensor]:
    phi, _ = _functions(w)
    return [phi(x + product(state[0]))]


CELLS: dict[str, tuple[Step, int]] = {
    "lstm": (_lstm, 4),
    "peephole_lstm": (_lstm, 4),
    "gru": (_gru, 3),
    "gru_reset_before": (_gru_reset_before, 3),
    "rnn": (_rnn, 1),
}


def run(given: Given) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """y (T, B, D·P), the final states (L·D, B, ·), the states of all steps (T, L·D, B, ·)."""
    steps, batch = given.x.shape[:2]
    finals: list[list[list[Tensor]]] = []
    every: list[list[list[list[Tensor]]]] = []
    x = given.x
    for layer in range(len(given.weights) // given.directions):
        sides = []
        for side in range(given.directions):
            index = layer * given.directions + side
            rows = [_row(given, x[:, row], index, side == 1, row) for row in range(batch)]
            sides.append(torch.stack([torch.stack(outputs) for outputs, _, _ in rows], 1))  # (T, B, P)
            finals.append([final for _, final, _ in rows])
            every.append([states for _, _, states in rows])
        x = torch.cat(sides, 2)
    count = len(given.states)
    final = [torch.stack([torch.stack([f[k] for f in rows]) for rows in finals]) for k in range(count)]
    by_step = [
        torch.stack(
            [torch.stack([torch.stack([states[t][k] for states in rows]) for rows in every]) for t in range(steps)]
        )
        for k in range(count)
    ]
    return x, final, by_step


def _row(
    given: Given, x: Tensor, index: int, backwards: bool, row: int
) -> tuple[list[Tensor], list[Tensor], list[list[Tensor]]]:
    """One row of one direction of one layer: outputs, final states, states after every step."""
    steps, length = x.shape[0], given.length(row)
    weights: Weights = {**given.weights[index], "clip": given.clip, "rms": given.rms}
    state = [s[index, row] for s in given.states]
    outputs: list[Any] = [None] * steps
    every: list[Any] = [None] * steps
    for t in reversed(range(steps)) if backwards else range(steps):
        edge = t + 1 if backwards else t  # where a new episode begins, seen from this direction
        if edge < length and t < length and given.resets is not None and given.resets[edge, row]:
            state = _reset(given, state, index, row, edge)
        uses = t < length and (given.mask is None or bool(given.mask[t, row]))
        if uses:
            drops = None if given.recurrent_mask is None else given.recurrent_mask[index, row]
            new = _stepped(given, x[t], state, weights, drops)
            if given.zone is not None:
                keeps = [given.zone[k, t, index, row, : len(s)] for k, s in enumerate(state)]
                new = [
                    torch.stack([o if k else n for o, n, k in zip(old, now, keep, strict=True)])
                    for old, now, keep in zip(state, new, keeps, strict=True)
                ]
            state = new
        outputs[t] = state[0] if uses else torch.zeros_like(state[0])
        every[t] = state
    return outputs, state, every


def _stepped(given: Given, x: Tensor, state: list[Tensor], weights: Weights, drops: Tensor | None) -> list[Tensor]:
    """One step of all heads, each a cell of its own on the same input."""
    step, gates = given.formula or CELLS[given.cell]
    if given.heads == 1:
        return step(_input(x, weights, gates), state, _product(weights, drops, gates), weights)
    parts = []
    for head in range(given.heads):
        own = {name: weight[head] if isinstance(weight, Tensor) else weight for name, weight in weights.items()}
        mine = [s.chunk(given.heads)[head] for s in state]
        dropped = None if drops is None else drops.chunk(given.heads, 1)[head]
        parts.append(step(_input(x, own, gates), mine, _product(own, dropped, gates), own))
    return [torch.cat(of_heads) for of_heads in zip(*parts, strict=True)]


def _reset(given: Given, state: list[Tensor], index: int, row: int, t: int) -> list[Tensor]:
    if given.reset_state is None:
        return [torch.full_like(s, value) for s, value in zip(state, given.initial, strict=False)]
    return [value[index, row] if value.dim() == 3 else value[t, index, row] for value in given.reset_state]


def _input(x: Tensor, weights: dict[str, Tensor], gates: int) -> Tensor:
    product = _norm(weights["weight_ih"] @ x, gates, weights.get("norm_ih"), bool(weights["rms"]))
    return product + weights["bias_ih"] if "bias_ih" in weights else product


def _product(weights: dict[str, Tensor], drops: Tensor | None, gates: int) -> Callable[[Tensor], Tensor]:
    def product(h: Tensor) -> Tensor:
        matrices = weights["weight_hh"].chunk(gates)
        parts = []
        for g, matrix in enumerate(matrices):
            entering = h if drops is None else h * drops[g if len(drops) > 1 else 0]
            parts.append(matrix @ entering)
        found = _norm(torch.cat(parts), gates, weights.get("norm_hh"), bool(weights["rms"]))
        return found + weights["bias_hh"] if "bias_hh" in weights else found

    return product
