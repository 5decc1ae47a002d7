# SPDX-License-Identifier: Apache-2.0
"""What runs together in a wavefront (`gpu_rnn.call.wavefront`), as views of tensors that hold all layers and steps."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from gpu_rnn.backends import linear
from gpu_rnn.backends.tensors import CONTROL_AXES, Call, LayerControls, Weights
from gpu_rnn.dispatch.wavefront_plan import launched


class Diagonal(NamedTuple):
    """The chunks that run together: that of layer `first` begins at step `start`, and each layer above is a chunk
    behind."""

    first: int
    last: int  # one above the uppermost layer
    start: int
    chunk: int

    @property
    def layers(self) -> slice:
        return slice(self.first, self.last)

    @property
    def count(self) -> int:
        return self.last - self.first

    def of(self, whole: Tensor) -> Tensor:
        """A view (chunk, B, layers, …) of (L, T, B, …)."""
        layer, step, batch, *rest = _strides(whole)
        size = (self.chunk, whole.shape[2], self.count, *whole.shape[3:])
        return whole.as_strided(size, (step, batch, layer - self.chunk * step, *rest), self._offset(whole, self.start))

    def rows(self, whole: Tensor) -> Tensor:
        """The same as matrices (layers, chunk·B, …)."""
        layer, step, batch, *_ = _strides(whole)
        size = (self.count, self.chunk * whole.shape[2], batch)
        return whole.as_strided(size, (layer - self.chunk * step, batch, 1), self._offset(whole, self.start))

    def before(self, whole: Tensor, initial: Tensor) -> Tensor:
        """(B, layers, ·): of a state after each step, (L, T, B, ·), what each layer's chunk begins with."""
        if self.start == 0:
            return initial[:, self.layers]
        layer, step, batch, unit = _strides(whole)
        size = (whole.shape[2], self.count, whole.shape[3])
        view = whole.as_strided(size, (batch, layer - self.chunk * step, unit), self._offset(whole, self.start - 1))
        entering = view.to(initial.dtype, copy=True)
        if self.start == (self.count - 1) * self.chunk:  # the uppermost layer begins with its first step
            entering[:, -1] = initial[:, self.last - 1]
        return entering

    def _offset(self, whole: Tensor, step: int) -> int:
        layer, of_step, *_ = _strides(whole)
        return int(whole.storage_offset()) + self.first * layer + step * of_step

    def above(self, layer: int) -> Diagonal:
        """The part above a layer."""
        behind = max(0, layer + 1 - self.first)
        first, start = self.first + behind, self.start - behind * self.chunk
        return Diagonal(first, max(self.last, first), start, self.chunk)

    def below(self, layer: int) -> Diagonal:
        """The part below a layer."""
        return self._replace(last=max(self.first, min(self.last, layer)))

    def shifted(self, layers: int) -> Diagonal:
        """The same steps of the layers so many above."""
        return self._replace(first=self.first + layers, last=self.last + layers)


def _strides(whole: Tensor) -> list[int]:
    """Of a contiguous tensor, by its shape: along axes of size 1, as of T or B, `Tensor.stride` may give anything."""
    assert whole.is_contiguous()
    strides = [1]
    for size in reversed(whole.shape[1:]):
        strides.append(strides[-1] * size)
    return strides[::-1]


def diagonals(layers: int, steps: int, chunk: int) -> list[Diagonal]:
    """All chunks of all layers, in an order in which each finds what it needs; the odd steps come first, layer by
    layer."""
    odd, count = steps % chunk, steps // chunk
    order = [Diagonal(layer, layer + 1, 0, odd) for layer in range(layers) if odd]
    for number in range(count + layers - 1):
        first = max(0, number - count + 1)
        order.append(Diagonal(first, min(layers, number + 1), odd + (number - first) * chunk, chunk))
    return order


class SharedParts(NamedTuple):
    """What some neighbouring layers take at all their steps, so that most diagonals need not make it."""

    call: Call  # but for its states and what differs from step to step
    into: Tensor  # (layers, G·H, H): the input weights of those that have others below them
    bias: Tensor | None  # (layers, 1, G·H), likewise


class StackViews:
    """A call's tensors as the diagonals take them."""

    def __init__(self, call: Call, steps: int, chunk: int) -> None:
        self.call, self.count = call, len(call.weights.w_hh)
        _, over_time = controls_by_layer(call.controls)
        self.diagonals = diagonals(self.count, steps, chunk)
        self.bias = linear.input_bias(call.weights, call.program, call.joined)
        self.over_time = {name: _layer_first(name, value, self.count) for name, value in over_time.items()}
        self.values = [value.movedim(2, 0).contiguous() for value in call.reset_values]  # (L, 1 or T, B, ·)
        self.known: dict[tuple[int, int, int], SharedParts] = {}

    def layers(self, diagonal: Diagonal) -> SharedParts:
        """What the layers of a diagonal share with others of the same layers."""
        key = diagonal.first, diagonal.last, diagonal.chunk
        if key not in self.known:
            self.known[key] = self._layers(diagonal)
        return self.known[key]

    def _layers(self, diagonal: Diagonal) -> SharedParts:
        call = of_layers(self.call, diagonal.layers)
        call = replace(call, problem=launched(call.problem, diagonal.chunk, diagonal.count))
        upper, between = diagonal.above(0).layers, self.call.weights.w_between
        assert between is not None
        into = between[upper.start - 1 : upper.stop - 1].flatten(1, 2)
        return SharedParts(call, into, None if self.bias is None else self.bias[upper].flatten(1).unsqueeze(1))

    def part(self, diagonal: Diagonal, states: list[Tensor], d_gates: Tensor | None = None) -> Call:
        """A diagonal as a backend takes it; `states` are (B, layers, ·)."""
        call = self.layers(diagonal).call
        controls, values = call.controls, call.reset_values
        for name, value in self.over_time.items():
            each = [diagonal.of(of_state) for of_state in (value if isinstance(value, list) else [value])]
            controls = controls._replace(**{name: torch.stack(each) if isinstance(value, list) else each[0]})
        if self.values:
            values = [of_resets(diagonal, value) for value in self.values]
        fixed = call.reverse, call.problem, call.joined
        return Call(call.program, call.weights, states, controls, values, *fixed, d_gates)

    def enter(self, diagonal: Diagonal, y: Tensor, gates: Tensor) -> Tensor:
        """(chunk, B, layers, G, H): the input products. `gates` (L or 1, T, B, G, H) holds those of the lowest layer;
        those of the others are written there, or where it has no room for them to a place of their own."""
        upper = diagonal.above(0)
        if len(gates) == self.count:
            entering, products = diagonal.of(gates), upper.rows(gates)
        else:
            room = gates.new_empty(diagonal.count, diagonal.chunk, *gates.shape[2:])
            if diagonal.first == 0:
                room[0] = gates[0, diagonal.start : diagonal.start + diagonal.chunk]
            entering, products = room.movedim(0, 2), room[diagonal.count - upper.count :].flatten(1, 2).flatten(2)
        if not upper.count:
            return entering
        _, into, bias = self.layers(diagonal)
        lower, between = upper.shifted(-1), self.call.controls.between
        below = lower.rows(y) if between is None else lower.rows(y) * lower.rows(between)
        if bias is None:
            torch.bmm(below, into.transpose(1, 2), out=products)
        else:
            torch.baddbmm(bias, below, into.transpose(1, 2), out=products)
        return entering

    def leave(self, diagonal: Diagonal, d_y: Tensor, d_gates: Tensor) -> Tensor:
        """(chunk, B, layers, H): the gradients of the layers' h, with those that come back from the layers above."""
        weights, between = self.call.weights.w_between, self.call.controls.between
        assert weights is not None
        lower = diagonal.below(len(weights))
        d_h = d_y.new_empty(diagonal.count, diagonal.chunk * d_y.shape[2], d_y.shape[3])
        if lower.count < diagonal.count:  # nothing is above the uppermost
            d_h[-1] = diagonal.rows(d_y)[-1]
        if lower.count:
            coming, back = lower.shifted(1).rows(d_gates), weights[lower.layers].flatten(1, 2)
            if between is None:
                torch.baddbmm(lower.rows(d_y), coming, back, out=d_h[: lower.count])
            else:
                d_h[: lower.count] = lower.rows(d_y) + torch.bmm(coming, back) * lower.rows(between)
        return d_h.unflatten(1, (diagonal.chunk, -1)).movedim(0, 2)


def of_layers(call: Call, layers: slice) -> Call:
    """What some neighbouring layers take, but for their input weights and what differs from step to step."""
    weights, (alike, _) = call.weights, controls_by_layer(call.controls)
    b_ih, b_hh, params = (None if w is None else w[layers] for w in (weights.b_ih, weights.b_hh, weights.params))
    return replace(
        call,
        weights=Weights(weights.w_ih, weights.w_hh[layers], b_ih, b_hh, params),
        controls=LayerControls(**{name: of_some(name, value, layers) for name, value in alike.items()}),
        reverse=call.reverse[layers],
    )


def controls_by_layer(controls: LayerControls) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Those with an axis of layers, by name: what is alike at all steps, and what is not."""
    given = {name: value for name, value in controls.of_loops.items() if value is not None}
    each = {name: value for name, value in given.items() if CONTROL_AXES[name].place("N") is not None}
    over_time = {name: value for name, value in each.items() if CONTROL_AXES[name].place("T") is not None}
    return {name: value for name, value in each.items() if name not in over_time}, over_time


def of_some(name: str, control: Tensor, layers: slice) -> Tensor:
    """A control of some layers; one that serves all of a stack stays as it is."""
    axis = CONTROL_AXES[name].place("N")
    assert axis is not None
    return control if control.shape[axis] == 1 else control.narrow(axis, layers.start, layers.stop - layers.start)


def _layer_first(name: str, control: Tensor, layers: int) -> Tensor | list[Tensor]:
    """(L, T, B, …), contiguous, of one that differs from step to step; of one with states a list of them."""
    axes = CONTROL_AXES[name]
    steps, axis = axes.place("T"), axes.place("N")
    assert steps is not None and axis is not None
    each = control.expand(*control.shape[:axis], layers, *control.shape[axis + 1 :]).movedim(axis, steps)
    return [of_state.contiguous() for of_state in each] if steps else each.contiguous()


def of_resets(diagonal: Diagonal, values: Tensor) -> Tensor:
    """(1 or chunk, B, layers, ·) of (L, 1 or T, B, ·)."""
    return values[diagonal.layers].movedim(0, 2) if values.shape[1] == 1 else diagonal.of(values)
