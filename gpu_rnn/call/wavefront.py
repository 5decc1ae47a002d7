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
from typing import NamedTuple

import torch
from torch import Tensor

from gpu_rnn.backends import Loop, reference
from gpu_rnn.backends.tensors import Call, LayerControls, LoopGradients, Result, Weights, state_dtype
from gpu_rnn.dispatch.wavefront_plan import Diagonal, diagonals, launched


class _Layers(NamedTuple):
    """What some neighbouring layers take at all their steps, so that most diagonals need not make it."""

    call: Call  # but for its states and what differs from step to step
    into: Tensor  # (layers, G·H, H): the input weights of those that have others below them
    bias: Tensor | None  # (layers, 1, G·H), likewise


class _Stack:
    """A call's tensors as the diagonals take them."""

    def __init__(self, call: Call, steps: int, chunk: int) -> None:
        controls, self.call, self.count = call.controls, call, len(call.weights.w_hh)
        self.diagonals = diagonals(self.count, steps, chunk)
        self.bias = reference.input_bias(call.weights, call.program)
        self.flags = (
            None if controls.flags is None else controls.flags.expand(-1, -1, self.count).movedim(2, 0).contiguous()
        )
        self.zone = [] if controls.zone is None else [zone.movedim(2, 0).contiguous() for zone in controls.zone]
        self.values = [value.movedim(2, 0).contiguous() for value in call.reset_values]  # (L, 1 or T, B, ·)
        self.known: dict[tuple[int, int, int], _Layers] = {}

    def layers(self, diagonal: Diagonal) -> _Layers:
        """What the layers of a diagonal share with others of the same layers."""
        key = diagonal.first, diagonal.last, diagonal.chunk
        if key not in self.known:
            self.known[key] = self._layers(diagonal)
        return self.known[key]

    def _layers(self, diagonal: Diagonal) -> _Layers:
        call = _of_layers(self.call, diagonal.layers)
        call = replace(call, problem=launched(call.problem, diagonal.chunk, diagonal.count))
        upper, between = diagonal.above(0).layers, self.call.weights.w_between
        assert between is not None
        into = between[upper.start - 1 : upper.stop - 1].flatten(1, 2)
        return _Layers(call, into, None if self.bias is None else self.bias[upper].flatten(1).unsqueeze(1))

    def part(self, diagonal: Diagonal, states: list[Tensor], d_gates: Tensor | None = None) -> Call:
        """A diagonal as a backend takes it; `states` are (B, layers, ·)."""
        call = self.layers(diagonal).call
        controls, values = call.controls, call.reset_values
        if self.flags is not None:
            controls = controls._replace(flags=diagonal.of(self.flags))
        if self.zone:
            controls = controls._replace(zone=torch.stack([diagonal.of(zone) for zone in self.zone]))
        if self.values:
            values = [_of_resets(diagonal, value) for value in self.values]
        return Call(call.program, call.weights, states, controls, values, call.reverse, call.problem, d_gates)

    def enter(self, diagonal: Diagonal, y: Tensor, gates: Tensor) -> Tensor:
        """(chunk, B, layers, G, H): the input products. `gates` (L or 1, T, B, G, H) holds those of the lowest layer;
        those of the others are written there, or where it has no room for them to a place of their own."""
        upper = diagonal.above(0)
        if len(gates) == self.count:
            found, products = diagonal.of(gates), upper.rows(gates)
        else:
            own = gates.new_empty(diagonal.count, diagonal.chunk, *gates.shape[2:])
            if diagonal.first == 0:
                own[0] = gates[0, diagonal.start : diagonal.start + diagonal.chunk]
            found, products = own.movedim(0, 2), own[diagonal.count - upper.count :].flatten(1, 2).flatten(2)
        if not upper.count:
            return found
        _, into, bias = self.layers(diagonal)
        lower, between = upper.shifted(-1), self.call.controls.between
        entering = lower.rows(y) if between is None else lower.rows(y) * lower.rows(between)
        if bias is None:
            torch.bmm(entering, into.transpose(1, 2), out=products)
        else:
            torch.baddbmm(bias, entering, into.transpose(1, 2), out=products)
        return found

    def leave(self, diagonal: Diagonal, d_y: Tensor, d_gates: Tensor) -> Tensor:
        """(chunk, B, layers, H): the gradients of the layers' h, with those that come back from the layers above."""
        weights, between = self.call.weights.w_between, self.call.controls.between
        assert weights is not None
        lower = diagonal.below(len(weights))
        found = d_y.new_empty(diagonal.count, diagonal.chunk * d_y.shape[2], d_y.shape[3])
        if lower.count < diagonal.count:  # nothing is above the uppermost
            found[-1] = diagonal.rows(d_y)[-1]
        if lower.count:
            coming, back = lower.shifted(1).rows(d_gates), weights[lower.layers].flatten(1, 2)
            if between is None:
                torch.baddbmm(lower.rows(d_y), coming, back, out=found[: lower.count])
            else:
                found[: lower.count] = lower.rows(d_y) + torch.bmm(coming, back) * lower.rows(between)
        return found.unflatten(1, (diagonal.chunk, -1)).movedim(0, 2)


def _of_layers(call: Call, own: slice) -> Call:
    """What some neighbouring layers take, but for their input weights and what differs from step to step."""
    weights, drop = call.weights, call.controls.drop
    b_ih, b_hh, params = (None if w is None else w[own] for w in (weights.b_ih, weights.b_hh, weights.params))
    return replace(
        call,
        weights=Weights(weights.w_ih, weights.w_hh[own], b_ih, b_hh, params),
        controls=LayerControls(drop=None if drop is None else drop[:, own]),
        reverse=call.reverse[own],
    )


def _of_resets(diagonal: Diagonal, values: Tensor) -> Tensor:
    """(1 or chunk, B, layers, ·) of (L, 1 or T, B, ·)."""
    return values[diagonal.layers].movedim(0, 2) if values.shape[1] == 1 else diagonal.of(values)


def _put(target: Tensor, found: Tensor) -> None:
    """Copies a result to where it belongs, if it is not there already."""
    if found.data_ptr() != target.data_ptr():
        target.copy_(found)


def forward(call: Call, x: Tensor, chunk: int, loop: Loop, save: bool, all_states: bool) -> Result:
    """Runs a stack over x (T, B, I), so many steps at a time; see `Result`, whose tensors are layer first here."""
    stack, program = _Stack(call, len(x), chunk), call.program
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
        entering, own = stack.enter(diagonal, y, gates), diagonal.layers
        found = loop.forward(stack.part(diagonal, [s[:, own] for s in states]), entering, save, all_states)
        diagonal.of(y).copy_(found.y)
        for whole, values in zip(inner, found.inner, strict=True):
            diagonal.of(whole).copy_(values)
        for state, final in zip(states, found.final, strict=True):
            state[:, own] = final
        if save:
            _put(entering, found.gates)
            diagonal.of(recurrent).copy_(found.recurrent)
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
    stack, d_y = _Stack(call, y.shape[1], chunk), d_y.contiguous()
    d_gates, d_recurrent = torch.empty_like(gates), torch.empty_like(saved.recurrent)
    dtype, params = state_dtype(y.dtype), call.weights.params
    d_states, d_values = [d.clone() for d in d_final], [torch.zeros_like(v, dtype=dtype) for v in stack.values]
    d_params = None if params is None else torch.zeros_like(params, dtype=dtype)
    d_others = [] if d_inner is None else list(d_inner.contiguous())
    for diagonal in reversed(stack.diagonals):
        own, after = diagonal.layers, zip((y, *saved.inner), call.states, strict=True)
        part = stack.part(diagonal, [diagonal.before(*state) for state in after], d_gates=diagonal.of(d_gates))
        inner = torch.stack([diagonal.of(state) for state in saved.inner]) if len(saved.inner) else saved.inner[:, 0]
        kept = Result(diagonal.of(y), [], diagonal.of(gates), diagonal.of(saved.recurrent), inner)
        d_part = torch.stack([diagonal.of(d) for d in d_others]) if d_others else None
        found = loop.backward(part, kept, stack.leave(diagonal, d_y, d_gates), [d[:, own] for d in d_states], d_part)
        _put(diagonal.of(d_gates), found.d_gates)
        diagonal.of(d_recurrent).copy_(found.d_recurrent)
        for d, of_state in zip(d_states, found.d_states, strict=True):
            d[:, own] = of_state
        for d, of_values in zip(d_values, found.d_resets, strict=True):
            _of_resets(diagonal, d).add_(of_values) if d.shape[1] == 1 else diagonal.of(d).copy_(of_values)
        if d_params is not None and found.d_params is not None:
            d_params[own] += found.d_params
    d_resets = [d.movedim(0, 2) for d in d_values]
    return LoopGradients(d_gates.movedim(0, 2), d_recurrent.movedim(0, 2), d_states, d_params, d_resets=d_resets)


def steps_first(saved: Result) -> Result:
    """What `forward` saved as `Result` has it of recurrences that are independent: (T, B, L, …)."""
    y, gates, recurrent = (t.movedim(0, 2) for t in (saved.y, saved.gates, saved.recurrent))
    return Result(y, saved.final, gates, recurrent, saved.inner.movedim(1, 3))


def in_torch(call: Call, x: Tensor, all_states: bool) -> Result:
    """The same by the reference, one layer after the other, differentiable to any order."""
    weights, controls = call.weights, call.controls
    assert weights.w_between is not None
    found: list[Result] = []
    for layer in range(len(weights.w_hh)):
        own = slice(layer, layer + 1)
        one = _of_layers(call, own)
        one = replace(
            one,
            weights=one.weights._replace(w_ih=weights.w_between[layer - 1 : layer] if layer else weights.w_ih),
            states=[state[:, own] for state in call.states],
            controls=one.controls._replace(
                flags=controls.flags, zone=None if controls.zone is None else controls.zone[:, :, :, own]
            ),
            reset_values=[value[:, :, own] for value in call.reset_values],
        )
        if layer:
            x = (
                found[-1].y.squeeze(2)
                if controls.between is None
                else found[-1].y.squeeze(2) * controls.between[layer - 1]
            )
        found.append(reference.forward(one, x, all_states=all_states))
    y = torch.cat([each.y.movedim(2, 0) for each in found])
    final = [torch.cat(states, 1) for states in zip(*(each.final for each in found), strict=True)]
    inner = torch.cat([each.inner.movedim(3, 1) for each in found], 1) if all_states else found[0].inner
    return Result(y, final, y.new_empty(0), y.new_empty(0), inner)
