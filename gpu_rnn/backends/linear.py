# SPDX-License-Identifier: Apache-2.0
"""What surrounds the time loop: the gradients that are products over all steps, once the loop has given d_gates.

Weights enter a step linearly, so their gradients need no loop: dW_hh is the product of the gradients of the recurrent
products with the values that entered them, over all steps at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import torch
from torch import Tensor

from gpu_rnn.backends import onednn
from gpu_rnn.backends.normalisation import LAYER, Normalise, Normalised, Normaliser
from gpu_rnn.backends.tensors import RESET, SKIP, Call, LoopGradients, Result, Weights, bit, chunks, state_dtype
from gpu_rnn.compiler.program import Program, lookup
from gpu_rnn.memo import memoize


def project(
    x: Tensor,
    weights: Weights,
    program: Program,
    kept: Normalised | None = None,
    joined: bool = True,
    normaliser: Normaliser = LAYER,
) -> Tensor:
    """What `reference.project` gives, without a derivative and with as few kernels as it takes; `kept`, `joined` and
    `normaliser` as in `Call`."""
    bias = input_bias(weights, program, joined)
    if weights.norm_ih is not None:
        return _normalised(x, weights, bias, program, kept, normaliser)
    if x.dim() == 3:  # one product for all N
        flat = onednn.linear(x, weights.w_ih.flatten(0, 2), None if bias is None else bias.flatten())
        return flat.view(*x.shape[:2], *weights.w_ih.shape[:3])
    gates = torch.einsum("tbni,nghi->tbngh", x, weights.w_ih)
    return gates if bias is None else gates + bias


def input_bias(weights: Weights, program: Program, joined: bool = True) -> Tensor | None:
    """(N, G, H): b_ih, where `joined` with b_hh added where a gate is a sum."""
    return joined_bias(weights.b_ih, weights.b_hh, program, 1) if joined else weights.b_ih


def joined_bias(b_ih: Tensor | None, b_hh: Tensor | None, program: Program, across: int = 0) -> Tensor | None:
    """`input_bias` of biases whose gates lie along that dimension: of a layer's own, (G·H) each, along the first."""
    if b_ih is None or b_hh is None:
        return None
    bias = b_ih + b_hh
    if program.split:
        each = bias.shape[across] // len(program.gates)
        for is_sum, gates in _alike(program, 0, len(program.gates)):
            if not is_sum:
                rows = (across, gates.start * each, (gates.stop - gates.start) * each)
                bias.narrow(*rows).copy_(b_ih.narrow(*rows))
    return bias


def _normalised(
    x: Tensor, weights: Weights, bias: Tensor | None, program: Program, kept: Normalised | None, normaliser: Normaliser
) -> Tensor:
    assert weights.norm_ih is not None
    gates, normalise = _bare(x, weights, program, normaliser)
    bias = gates.new_zeros(()) if bias is None else bias
    for part in chunks(gates):
        products = normalise(gates[part], None if kept is None else kept.at((0, part)))
        torch.addcmul(bias, products.values, weights.norm_ih, out=gates[part])
    return gates


def _bare(x: Tensor, weights: Weights, program: Program, normaliser: Normaliser) -> tuple[Tensor, Normalise]:
    """The input products before their normalisation, and what normalises them.

    What comes of them takes their place, chunk by chunk: each tensor of all steps costs a CPU more than the arithmetic.
    """
    w_ih, normalise = normaliser.of_products(weights.w_ih)
    bare = weights._replace(w_ih=w_ih, b_ih=None, b_hh=None, norm_ih=None)
    return project(x, bare, program), normalise


def previous(
    values: Tensor,  # (T, B, N, X): a state after each step, in the order of time
    initial: Tensor,  # (B, N, X)
    lengths: Tensor | None,  # (B,)
    reverse: str,
) -> Tensor:
    """The state after the step before each. Reversed rows start at their own last step."""
    if "1" not in reverse:
        return torch.cat([initial[None].to(values.dtype), values[:-1]])
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


def entered(call: Call, saved: Result, state: int) -> Tensor:
    """(T, B, N, X): the values of a state that each step started from, in the order of time."""
    after = saved.y if state == 0 else saved.inner[state - 1]
    before = previous(after, call.states[state], call.controls.lengths, call.reverse)
    if call.controls.flags is None:
        return before
    value, reset = call.reset_value(state), bit(call.controls.flags, RESET)
    if reset.is_cpu and not reset.any():
        return before
    return torch.where(reset, value if isinstance(value, float) else value.to(before.dtype), before)


def inputs_over_time(call: Call, saved: Result) -> dict[str, Tensor]:
    """Every input of the program at all steps, by name, each (T, B, N, H) in the order of time."""
    program, params = call.program, call.weights.params
    values = {}
    compute = state_dtype(saved.gates.dtype)
    for g, gate in enumerate(program.gates):
        name = "a" if gate in program.summed else "x"
        values[f"{name}_{gate}"] = saved.gates[..., g, :].to(compute)
    for r, gate in enumerate(program.split):
        values[f"r_{gate}"] = saved.recurrent[..., r, :].to(compute)
    for k, name in enumerate(program.state_names):
        values[f"s_{name}"] = entered(call, saved, k).to(compute)
    if params is not None:
        values |= {f"p_{name}": params[:, i].to(compute) for i, name in enumerate(program.params)}
    return values


def gradients(
    call: Call, x: Tensor, saved: Result, loop: LoopGradients, of_x: bool = True
) -> tuple[Tensor | None, Weights]:
    """The gradients of x, (T, B, I) or (T, B, N, I), where it is wanted, and of the weights."""
    weights, d_gates = call.weights, loop.d_gates
    d_w_hh = d_gates.new_empty(weights.w_hh.shape)
    d_b_ih = d_b_hh = None
    if weights.b_ih is not None:  # each of its own: gradients that share memory are scaled twice
        d_b_ih = d_gates.sum((0, 1))
        d_b_hh = d_b_ih.clone()
    for entering, rows in entered_products(call, saved):
        for gates, gradient in runs(call.program, rows, d_gates, loop.d_recurrent):
            if d_b_hh is not None and call.program.gates[gates.start] not in call.program.summed:
                torch.sum(gradient, (0, 1), out=d_b_hh[:, gates])
            of_product = gradient if loop.d_products is None else loop.d_products[:, :, :, gates]
            entered_in = entering.to(gradient.dtype)
            _of_weights(d_w_hh[:, gates], of_product, entered_in, call.controls.drop, gates)
    of_layers = None if weights.w_between is None else _of_layers(call, saved.y, d_gates)
    d_norm_ih = None if weights.norm_ih is None else _through_norm(call, x, saved.kept, d_gates)
    d_x, d_w_ih = _projection(x, weights, d_gates[:, :, : len(weights.w_ih)], of_x)
    return d_x, Weights(
        d_w_ih,
        d_w_hh,
        d_b_ih,
        d_b_hh,
        loop.d_params,
        loop.d_w_hr,
        loop.d_norm,
        d_norm_ih,
        of_layers,
    )


def of_one(
    program: Program, x: Tensor, before: Tensor, d_gates: Tensor, d_split: Tensor, w_ih: Tensor, of_x: bool
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """`gradients` of one recurrence with one product a step and nothing dropped, as matrices: to arrange them otherwise
    takes a good part of a short call.

    Of x (T·B, I), h before each step (T·B, P), the gradients (T·B, G·H) of the gates and (T·B, K·H) of the split ones'
    products, and w_ih (G·H, I), those of x and, by name, of the weights.
    """
    hidden, d_b_ih = d_gates.shape[1] // len(program.gates), d_gates.sum(0)
    parts_w, parts_b = [], []
    for is_sum, gates in _alike(program, 0, len(program.gates)):
        first, size = gates.start * hidden, (gates.stop - gates.start) * hidden
        gradient, at = (d_gates, first) if is_sum else (d_split, _among_split(program, gates.start) * hidden)
        gradient = gradient if size == gradient.shape[1] else gradient.narrow(1, at, size)
        parts_w.append(_product(gradient.T, before))
        parts_b.append(d_b_ih.narrow(0, first, size) if is_sum else gradient.sum(0))
    return _product(d_gates, w_ih) if of_x else None, {
        "w_ih": _product(d_gates.T, x),
        "w_hh": parts_w[0] if len(parts_w) == 1 else torch.cat(parts_w),
        "b_ih": d_b_ih,
        "b_hh": torch.cat(parts_b),  # of its own: gradients that share memory are scaled twice
    }


def _product(a: Tensor, b: Tensor) -> Tensor:
    return onednn.bmm(a[None], b[None])[0]


def _through_norm(call: Call, x: Tensor, kept: Normalised | None, d_gates: Tensor) -> Tensor:
    """The gradient of the input products' scales. Those of the products, which are taken once more if they were not
    kept, replace `d_gates`: another tensor of all steps would not fit into a CPU's cache.
    """
    assert call.weights.norm_ih is not None
    scale = call.weights.norm_ih.to(state_dtype(d_gates.dtype))
    d_scale = torch.zeros_like(scale)
    if kept is None:
        bare, normalise = _bare(x, call.weights, call.program, call.normaliser)
    for part in chunks(d_gates):
        products = kept.at((0, part)) if kept is not None else normalise(bare[part].to(scale.dtype))
        d = d_gates[part]
        d_scale += (products.values * d).sum((0, 1))
        call.normaliser.back(products.rstd)(d * scale, products, d)
    return d_scale


def _projection(x: Tensor, weights: Weights, d_gates: Tensor, of_x: bool) -> tuple[Tensor | None, Tensor]:
    """The gradients of x, where it is wanted, and w_ih."""
    if x.dim() == 3:  # one input for all recurrences
        d_flat, w_flat = d_gates.flatten(0, 1).flatten(1), weights.w_ih.flatten(0, 2)
        d_w_ih = onednn.bmm(d_flat.T[None], x.flatten(0, 1)[None]).view_as(weights.w_ih)
        return onednn.bmm(d_flat[None], w_flat[None]).view_as(x) if of_x else None, d_w_ih
    d_x = torch.einsum("tbngh,nghi->tbni", d_gates, weights.w_ih) if of_x else None
    return d_x, over_steps(d_gates, x)


def _of_layers(call: Call, y: Tensor, d_gates: Tensor) -> Tensor:
    """The gradient of a stack's input weights between its layers."""
    between, below = call.controls.between, y[:, :, :-1]
    return over_steps(d_gates[:, :, 1:], below if between is None else below * between.movedim(0, 2))


def over_steps(d_product: Tensor, entering: Tensor, out: Tensor | None = None) -> Tensor:
    """(T, B, N, gates, H) and (T, B, N, P) -> (N, gates, H, P), summed over steps and rows.

    One batched product of views: einsum would move the steps inwards, which copies both.
    """
    steps = d_product.flatten(0, 1).flatten(2).permute(1, 2, 0)  # (N, gates·H, T·B)
    into = None if out is None else out.flatten(1, 2)
    return onednn.bmm(steps, entering.flatten(0, 1).transpose(0, 1), into).unflatten(1, d_product.shape[3:])


def of_projection(d_h: Tensor, made: Tensor) -> Tensor:
    """The gradient of w_hr, (N, P, H), from that of the projected h of all steps, (T, B, N, P), and the h that were
    `made`, (T, B, N, H)."""
    return over_steps(d_h.unsqueeze(3), made).squeeze(1)


def _of_weights(out: Tensor, d_product: Tensor, entering: Tensor, drop: Tensor | None, gates: slice) -> None:
    """Writes the gradient of w_hh's rows (N, gates, H, P) from that of their products and what entered them
    undropped."""
    if drop is None or drop.shape[2] == 1:
        over_steps(d_product, entering if drop is None else entering * drop[:, :, 0].to(entering.dtype), out)
        return
    across = entering.permute(2, 3, 0, 1).contiguous()  # (N, P, T, B): turned once for all gates
    factors = drop[:, :, gates].to(entering.dtype).permute(2, 1, 3, 0).contiguous()  # (gates, N, P, B)
    for d, mask, rows in zip(d_product.unbind(3), factors.unsqueeze(3), out.unbind(1), strict=True):
        dropped = (across * mask).flatten(2)
        rows.copy_(onednn.bmm(dropped, d.flatten(0, 1).transpose(0, 1)).transpose(1, 2))


def entered_products(call: Call, saved: Result) -> Iterator[tuple[Tensor, slice]]:
    """For each stage: what entered its product at all steps, before any dropping, and the rows of its gates."""
    program = call.program
    yield entered(call, saved, 0), program.rows[0]
    if len(program.stages) == 1:
        return
    values = inputs_over_time(call, saved)
    for stage, rows in zip(program.stages, program.rows[1:], strict=False):
        stage.run(values)
        entering = lookup(values, stage.outputs[0], values["s_" + program.state_names[0]])
        if call.controls.flags is not None:  # masked steps may hold NaN, and their gradient of 0 would multiply it
            entering = torch.where(bit(call.controls.flags, SKIP), 0, entering)
        yield entering, rows


def runs(program: Program, rows: slice, of_gates: Tensor, of_recurrent: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """What stands for a stage's products (biases included), in runs of neighbouring gates that lie in the same tensor.

    `of_gates` (T, B, N, G, H) has it for summed gates, `of_recurrent` (T, B, N, number of split gates, H) for the
    split.
    """
    for is_sum, gates in _alike(program, rows.start, rows.stop):
        source, start = (of_gates, gates.start) if is_sum else (of_recurrent, _among_split(program, gates.start))
        count = gates.stop - gates.start
        yield gates, source if count == source.shape[3] else source.narrow(3, start, count)


def _among_split(program: Program, gate: int) -> int:
    return program.split.index(program.gates[gate])


@memoize(256)
def _alike(program: Program, first: int, last: int) -> tuple[tuple[bool, slice], ...]:
    """The gates of these numbers in runs of neighbours that are all summed, or all split."""
    by_kind = groupby(range(first, last), key=lambda g: program.gates[g] in program.summed)
    gates = [(is_sum, list(run)) for is_sum, run in by_kind]
    return tuple((is_sum, slice(run[0], run[-1] + 1)) for is_sum, run in gates)
