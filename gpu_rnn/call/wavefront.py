# SPDX-License-Identifier: Apache-2.0
"""A stack's layers as a wavefront: while a layer runs a chunk of steps, those above it run earlier chunks in the same
launch.

    steps    0 …       chunk …   2 chunk …            N, the recurrences of a launch, is what a diagonal holds:
    layer 0  launch 0  launch 1  launch 2             layers that do not wait for each other. A launch waits for the
    layer 1            launch 1  launch 2  launch 3   one before, so that L layers of K chunks take K + L - 1 launches
    layer 2                      launch 2  launch 3…  of a chunk each, instead of L·K.

Between two launches one batched product makes the input products of the layers above from what the launch has written.
Tensors of all layers stand layer first, (L, T, B, …): each diagonal is a view of them, since to be a chunk behind is a
matter of strides. The idea for stacks of recurrent layers is cuDNN's (Appleyard et al., arXiv:1604.01946).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from gpu_rnn.backends import Loop, reference
from gpu_rnn.backends.tensors import Call, LoopGradients, Result, Weights, state_dtype
from gpu_rnn.call.wavefront_views import StackViews, controls_by_layer, of_layers, of_resets, of_some


def _put(target: Tensor, values: Tensor) -> None:
    """Copies values to where they belong, if they are not there already."""
    if values.data_ptr() != target.data_ptr():
        target.copy_(values)


def forward(call: Call, x: Tensor, chunk: int, loop: Loop, save: bool, all_states: bool) -> Result:
    """Runs a stack over x (T, B, I), so many steps at a time; see `Result`, whose tensors are layer first here."""
    stack, program = StackViews(call, len(x), chunk), call.program
    layers, gate_count, hidden, _ = call.weights.w_hh.shape
    shape = layers, *x.shape[:2]
    gates = x.new_empty(layers if save else 1, *shape[1:], gate_count, hidden)
    _lowest(call.weights, stack.bias, x, out=gates[0])
    y = x.new_empty(*shape, hidden)
    recurrent = x.new_empty(*shape, len(program.split), hidden) if save else x.new_empty(0)
    others = len(call.states) - 1 if save or all_states else 0
    inner = x.new_empty(others, *shape, hidden, dtype=state_dtype(x.dtype))
    states = [state.clone() for state in call.states]
    for diagonal in stack.diagonals:
        entering, at = stack.enter(diagonal, y, gates), diagonal.layers
        result = loop.forward(stack.part(diagonal, [s[:, at] for s in states]), entering, save, all_states)
        diagonal.of(y).copy_(result.y)
        for whole, values in zip(inner, result.inner, strict=True):
            diagonal.of(whole).copy_(values)
        for state, final in zip(states, result.final, strict=True):
            state[:, at] = final
        if save:
            _put(entering, result.gates)
            diagonal.of(recurrent).copy_(result.recurrent)
    return Result(y, states, gates if save else x.new_empty(0), recurrent, inner)


def _lowest(weights: Weights, bias: Tensor | None, x: Tensor, out: Tensor) -> None:
    """Writes the input products of the lowest layer, (T, B, G, H)."""
    rows, into, products = x.flatten(0, 1), weights.w_ih.flatten(0, 2).T, out.flatten(0, 1).flatten(1)
    if bias is None:
        torch.mm(rows, into, out=products)
    else:
        torch.addmm(bias[0].flatten(), rows, into, out=products)


def backward(
    call: Call,
    saved: Result,  # layer first
    chunk: int,
    loop: Loop,
    d_y: Tensor,  # (L, T, B, H)
    d_final: list[Tensor],  # (B, L, H)
    d_inner: Tensor | None,  # (S - 1, L, T, B, H)
) -> LoopGradients:
    """The backward pass of `forward`."""
    y, gates = saved.y, saved.gates
    stack, d_y = StackViews(call, y.shape[1], chunk), d_y.contiguous()
    d_gates, d_recurrent = torch.empty_like(gates), torch.empty_like(saved.recurrent)
    dtype, params = state_dtype(y.dtype), call.weights.params
    d_states, d_values = [d.clone() for d in d_final], [torch.zeros_like(v, dtype=dtype) for v in stack.values]
    d_params = None if params is None else torch.zeros_like(params, dtype=dtype)
    d_others = [] if d_inner is None else list(d_inner.contiguous())
    for diagonal in reversed(stack.diagonals):
        at, after = diagonal.layers, zip((y, *saved.inner), call.states, strict=True)
        part = stack.part(diagonal, [diagonal.before(*state) for state in after], d_gates=diagonal.of(d_gates))
        inner = torch.stack([diagonal.of(state) for state in saved.inner]) if len(saved.inner) else saved.inner[:, 0]
        before = Result(diagonal.of(y), [], diagonal.of(gates), diagonal.of(saved.recurrent), inner)
        d_part = torch.stack([diagonal.of(d) for d in d_others]) if d_others else None
        d_h = stack.leave(diagonal, d_y, d_gates)
        grads = loop.backward(part, before, d_h, [d[:, at] for d in d_states], d_part)
        _put(diagonal.of(d_gates), grads.d_gates)
        diagonal.of(d_recurrent).copy_(grads.d_recurrent)
        for d, of_state in zip(d_states, grads.d_states, strict=True):
            d[:, at] = of_state
        for d, of_values in zip(d_values, grads.d_resets, strict=True):
            of_resets(diagonal, d).add_(of_values) if d.shape[1] == 1 else diagonal.of(d).copy_(of_values)
        if d_params is not None and grads.d_params is not None:
            d_params[at] += grads.d_params
    d_resets = [d.movedim(0, 2) for d in d_values]
    return LoopGradients(d_gates.movedim(0, 2), d_recurrent.movedim(0, 2), d_states, d_params, d_resets=d_resets)


def steps_first(saved: Result) -> Result:
    """What `forward` saved as `Result` has it of recurrences that are independent: (T, B, L, …)."""
    y, gates, recurrent = (t.movedim(0, 2) for t in (saved.y, saved.gates, saved.recurrent))
    return Result(y, saved.final, gates, recurrent, saved.inner.movedim(1, 3))


def in_torch(call: Call, x: Tensor, all_states: bool) -> Result:
    """The same by the reference, one layer after the other, differentiable to any order."""
    results: list[Result] = []
    for layer in range(len(call.weights.w_hh)):
        if layer:
            x = results[-1].y.squeeze(2)
            x = x if call.controls.between is None else x * call.controls.between[layer - 1]
        results.append(reference.forward(_alone(call, layer), x, all_states=all_states))
    y = torch.cat([result.y.movedim(2, 0) for result in results])
    final = [torch.cat(states, 1) for states in zip(*(result.final for result in results), strict=True)]
    inner = torch.cat([result.inner.movedim(3, 1) for result in results], 1) if all_states else results[0].inner
    return Result(y, final, y.new_empty(0), y.new_empty(0), inner)


def _alone(call: Call, layer: int) -> Call:
    """One layer of a stack as a call of its own."""
    at, between = slice(layer, layer + 1), call.weights.w_between
    assert between is not None
    one, (_, over_time) = of_layers(call, at), controls_by_layer(call.controls)
    return replace(
        one,
        weights=one.weights._replace(w_ih=between[layer - 1 : layer] if layer else call.weights.w_ih),
        states=[state[:, at] for state in call.states],
        controls=one.controls._replace(**{name: of_some(name, value, at) for name, value in over_time.items()}),
        reset_values=[value[:, :, at] for value in call.reset_values],
    )
