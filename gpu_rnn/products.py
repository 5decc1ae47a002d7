# SPDX-License-Identifier: Apache-2.0
"""What surrounds the time loop: the gradients that are products over all steps, once the loop has given d_gates.

Weights enter a step linearly, so their gradients need no loop: dW_hh is the product of the gradients of the recurrent
products with the values that entered them, over all steps at once.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby

import torch
from torch import Tensor

from gpu_rnn.program import Program, lookup
from gpu_rnn.reference import Result, Weights, state_dtype


class _Setting:
    """torch's process-wide setting for fp32 products, while calls of this package want another: the last one restores it."""

    lock = threading.Lock()
    calls = 0
    before = ""


@contextmanager
def fp32_precision(precision: str, like: Tensor) -> Iterator[None]:
    """Makes fp32 products on a GPU follow the recurrent layers' own setting ("ieee" or "tf32")."""
    matmul = torch.backends.cuda.matmul
    if not like.is_cuda or like.dtype != torch.float32 or (matmul.fp32_precision == precision and not _Setting.calls):
        yield
        return
    with _Setting.lock:
        if not _Setting.calls:
            _Setting.before = matmul.fp32_precision
        _Setting.calls += 1
        matmul.fp32_precision = precision
    try:
        yield
    finally:
        with _Setting.lock:
            _Setting.calls -= 1
            if not _Setting.calls:
                matmul.fp32_precision = _Setting.before


def previous(
    values: Tensor,  # (T, B, N, X): a state after each step, in the order of time
    initial: Tensor,  # (B, N, X)
    lengths: Tensor | None,  # (B,)
    reverse: str,
) -> Tensor:
    """The state before each step. Reversed rows start at their own last step."""
    before = torch.empty_like(values)
    for n, flag in enumerate(reverse):
        if flag == "0":
            before[1:, :, n] = values[:-1, :, n]
            before[0, :, n] = initial[:, n]
            continue
        before[:-1, :, n] = values[1:, :, n]
        before[-1, :, n] = initial[:, n]
        if lengths is not None:
            rows = torch.arange(len(lengths), device=values.device)
            before[(lengths - 1).clamp(min=0), rows, n] = initial[:, n].to(values.dtype)
    return before


def inputs_over_time(
    program: Program, saved: Result, weights: Weights, states: list[Tensor], lengths: Tensor | None, reverse: str
) -> dict[str, Tensor]:
    """Every input of the program at all steps, by name, each (T, B, N, H) in the order of time."""
    values = {}
    compute = state_dtype(saved.gates.dtype)
    for g, gate in enumerate(program.gates):
        name = "a" if gate in program.summed else "x"
        values[f"{name}_{gate}"] = saved.gates[..., g, :].to(compute)
    for r, gate in enumerate(program.split):
        values[f"r_{gate}"] = saved.recurrent[..., r, :].to(compute)
    after = [saved.y, *saved.inner]
    for name, value, initial in zip(program.state_names, after, states, strict=True):
        values[f"s_{name}"] = previous(value, initial, lengths, reverse).to(compute)
    if weights.params is not None:
        values |= {f"p_{name}": weights.params[:, i].to(compute) for i, name in enumerate(program.params)}
    return values


def gradients(
    program: Program,
    x: Tensor,  # (T, B, I) or (T, B, N, I)
    weights: Weights,
    states: list[Tensor],
    lengths: Tensor | None,
    reverse: str,
    saved: Result,
    d_gates: Tensor,  # (T, B, N, G, H)
    d_recurrent: Tensor,  # (T, B, N, number of split gates, H)
) -> tuple[Tensor, Weights]:
    """The gradients of x and of the weights other than `params` and `w_hr`."""
    if x.dim() == 3:
        d_x = torch.einsum("tbngh,nghi->tbi", d_gates, weights.w_ih)
        d_w_ih = torch.einsum("tbngh,tbi->nghi", d_gates, x)
    else:
        d_x = torch.einsum("tbngh,nghi->tbni", d_gates, weights.w_ih)
        d_w_ih = torch.einsum("tbngh,tbni->nghi", d_gates, x)
    parts_w, parts_b = [], []
    for entering, rows in _entering(program, weights, states, lengths, reverse, saved):
        for gradient in _runs(program, rows, d_gates, d_recurrent):
            parts_w.append(torch.einsum("tbngh,tbnp->nghp", gradient, entering.to(gradient.dtype)))
            parts_b.append(gradient.sum((0, 1)))
    has_bias = weights.b_ih is not None
    return d_x, Weights(
        d_w_ih,
        torch.cat(parts_w, 1),
        d_gates.sum((0, 1)) if has_bias else None,
        torch.cat(parts_b, 1) if has_bias else None,
    )


def _entering(
    program: Program, weights: Weights, states: list[Tensor], lengths: Tensor | None, reverse: str, saved: Result
) -> Iterator[tuple[Tensor, slice]]:
    """For each stage: what entered its product at all steps, and the rows of its gates."""
    yield previous(saved.y, states[0], lengths, reverse), program.rows[0]
    if len(program.stages) == 1:
        return
    values = inputs_over_time(program, saved, weights, states, lengths, reverse)
    for stage, rows in zip(program.stages, program.rows[1:], strict=False):
        stage.run(values)
        entering = lookup(values, stage.outputs[0], values["s_" + program.state_names[0]])
        yield entering, rows


def _runs(program: Program, rows: slice, d_gates: Tensor, d_recurrent: Tensor) -> Iterator[Tensor]:
    """The gradients of a stage's products, in runs of neighbouring gates that lie in the same tensor."""
    for is_sum, run in groupby(range(rows.start, rows.stop), key=lambda g: program.gates[g] in program.summed):
        gates = list(run)
        if is_sum:
            yield d_gates[..., gates[0] : gates[-1] + 1, :]
        else:
            start = program.split.index(program.gates[gates[0]])
            yield d_recurrent[..., start : start + len(gates), :]
