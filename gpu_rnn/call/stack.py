# SPDX-License-Identifier: Apache-2.0
"""A stack of layers: how it is described to dispatch, and run as a whole by ATen or layer by layer by the loops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_rnn import environment
from gpu_rnn.backends import aten, precision
from gpu_rnn.backends.problem import Problem
from gpu_rnn.backends.tensors import PLAIN, Inputs, LayerControls, Weights
from gpu_rnn.call import arguments, autograd, onlookers
from gpu_rnn.call.controls import NONE, StackControls
from gpu_rnn.call.passes import Options
from gpu_rnn.call.transfer import to_device
from gpu_rnn.dispatch import choice
from gpu_rnn.recurrence import Recurrence

States = tuple[Tensor, ...]


class Stack(NamedTuple):
    """What does not change between the calls of a layer. `dropout` is 0 outside training.

    With `norm`, each layer and direction has two weights more, the scales of the normalised input products and of the
    normalised recurrent products, (G·H) each.
    """

    recurrence: Recurrence
    bias: bool = True
    num_layers: int = 1
    dropout: float = 0.0
    bidirectional: bool = False
    batch_first: bool = False
    proj_size: int = 0
    backend: str = "auto"
    norm: bool = False
    all_states: bool = False

    @property
    def reverse(self) -> str:
        """A character for each direction, "1" where time runs backwards."""
        return "01" if self.bidirectional else "0"

    def sizes(self, x: Tensor, batch_sizes: Tensor | None) -> tuple[int, int]:
        """T and B."""
        if batch_sizes is not None:
            return batch_sizes.shape[0], int(batch_sizes[0])
        steps, batch = (x.shape[1], x.shape[0]) if self.batch_first else (x.shape[0], x.shape[1])
        if steps == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        return steps, batch

    def hidden(self, weights: Sequence[Tensor]) -> int:
        """H"""
        return weights[0].shape[0] // len(self.recurrence.gates)

    def state_shapes(self, weights: Sequence[Tensor], batch: int) -> list[tuple[int, ...]]:
        """Of each state, (D·num_layers, B, ·)."""
        rows, hidden = self.num_layers * len(self.reverse), self.hidden(weights)
        widths = [self.proj_size or hidden, *[hidden] * (len(self.recurrence.states) - 1)]
        return [(rows, batch, width) for width in widths]

    def weight_shapes(self, features: int, hidden: int) -> list[tuple[int, ...]]:
        """Of each weight, in the order of `functional.rnn`."""
        gates, directions, width = len(self.recurrence.gates), len(self.reverse), self.proj_size or hidden
        shapes: list[tuple[int, ...]] = []
        for number in range(self.num_layers):
            inputs = directions * width if number else features
            own: list[tuple[int, ...]] = [(gates * hidden, inputs), (gates * hidden, width)]
            own += [(gates * hidden,)] * (2 * self.bias) + [(width, hidden)] * bool(self.proj_size)
            own += [(len(self.recurrence.params), hidden)] * bool(self.recurrence.params) + [(gates * hidden,)] * (
                2 * self.norm
            )
            shapes += own * directions
        return shapes

    def initial(self, x: Tensor, weights: Sequence[Tensor], batch: int) -> States:
        """The recurrence's own initial values, (D·num_layers, B, ·); states that are all alike share one tensor."""
        shapes, values = self.state_shapes(weights, batch), self.recurrence.initial
        if not self.proj_size and values == values[:1] * len(values):
            return (x.new_full(shapes[0], values[0]),) * len(values)
        return tuple(x.new_full(shape, value) for shape, value in zip(shapes, values, strict=True))

    def problem(
        self,
        x: Tensor,
        hx: States | None,
        weights: Sequence[Tensor],
        steps: int,
        batch: int,
        packed: bool,
        controls: StackControls = NONE,
    ) -> Problem:
        """The call as dispatch sees it."""
        wanting = (x, *weights, *(hx or ()), *(controls.reset_state or ()))
        wants_grad = torch.is_grad_enabled() and any(t.requires_grad for t in wanting)
        flags = controls.flagged(self.all_states)
        return Problem(
            self.recurrence,
            steps,
            batch,
            len(self.reverse),
            x.shape[-1],
            self.hidden(weights),
            x.dtype,
            x.device.type,
            choice.device_of(x.device),
            "training" if wants_grad else "inference",
            precision.of_rnn() if x.is_cuda else "ieee",
            packed or (controls.lengths is not None and not flags),
            packed,
            self.reverse,
            self.proj_size,
            self.num_layers,
            autograd.transforms_active(),
            flags,
            controls.reset_state is not None,
            0 if controls.recurrent_mask is None else controls.recurrent_mask.shape[2],
            controls.zone is not None,
            self.all_states,
            self.norm,
        )

    def aten(
        self, x: Tensor, states: States, weights: Sequence[Tensor], batch_sizes: Tensor | None, recorded: bool = False
    ) -> tuple[Tensor, States]:
        """The whole stack in ATen's kernels; `recorded` as `onlookers.recorded` says."""
        return aten.stack(
            self.recurrence.aten or "",
            x,
            states,
            weights,
            self.bias,
            self.num_layers,
            self.dropout,
            self.bidirectional,
            self.batch_first,
            batch_sizes,
            recorded,
        )

    def one_by_one(
        self,
        run: Callable[..., tuple[Tensor, States]],
        x: Tensor,
        states: States,
        weights: Sequence[Tensor],
        *rest: Any,
    ) -> tuple[Tensor, States]:
        """``run(stack, x, states, weights, *rest)`` of each layer, with dropout between them: y and the final
        states."""
        alone, final = self._replace(num_layers=1, dropout=0.0), []
        rows, count = len(self.reverse), len(weights) // self.num_layers
        for number in range(self.num_layers):
            if number:
                x = F.dropout(x, self.dropout)
            entering = tuple(state[number * rows : (number + 1) * rows] for state in states)
            x, after = run(alone, x, entering, weights[number * count : (number + 1) * count], *rest)
            final.append(after)
        return x, tuple(torch.cat(parts) for parts in zip(*final, strict=True))

    def loops(
        self,
        x: Tensor,
        states: States,
        weights: Sequence[Tensor],
        batch_sizes: Tensor | None,
        controls: StackControls = NONE,
    ) -> tuple[Tensor, States, States]:
        """One layer after the other in canonical layout: y, the final states and, if wanted, those of all steps."""
        arguments.check_alike(x, weights, states)
        controls = controls if controls is NONE else controls.to(x.dtype)
        if batch_sizes is not None:
            padded, lengths, places = _unpack(x, batch_sizes)
            y, final, every = self._layers(padded, states, weights, controls._replace(lengths=lengths))
            return y.flatten(0, 1).index_select(0, places), final, every
        if self.batch_first:
            x = x.transpose(0, 1)
        valid = controls.valid(x.shape[0])
        if valid is not None:  # whatever stands in the padding, NaN too, must not reach a gradient
            x = torch.where(valid.unsqueeze(-1), x, 0)
        y, final, every = self._layers(x, states, weights, controls)
        if controls.mask is not None or controls.resets is not None or self.all_states:
            y = y if valid is None else torch.where(valid.unsqueeze(-1), y, 0)
        return y.transpose(0, 1) if self.batch_first else y, final, every

    def _layers(
        self, x: Tensor, states: States, weights: Sequence[Tensor], controls: StackControls
    ) -> tuple[Tensor, States, States]:
        """x (T, B, I), states (D·layers, B, ·) -> y (T, B, D·P), final states, all states (T, D·layers, B, ·)."""
        if self._staggered(x, states, weights, controls):
            return self._wavefront(x, states, weights, controls)
        text = self.recurrence.text(self.recurrence.identity)
        options = Options(self.backend, self.reverse, all_states=self.all_states)
        flags = controls.flags(self.reverse, x.shape[0], self.all_states)
        final: list[list[Tensor]] = []
        every: list[list[Tensor]] = []
        for number in range(self.num_layers):
            rows = slice(number * len(self.reverse), (number + 1) * len(self.reverse))
            entering = [state[rows].transpose(0, 1) for state in states]  # (B, N, ·)
            layer_controls, reset_values = controls.of_layer(rows, self.reverse, x.shape[0], flags)
            inputs = self.inputs(x, weights, number, entering, layer_controls, reset_values)
            y, after, inner = autograd.layer(text, options, inputs)
            final.append([state.transpose(0, 1) for state in after])
            if self.all_states:
                every.append([state.transpose(1, 2) for state in (y, *_others(inner, y, states))])
            x = y.flatten(2)
            if self.dropout and number < self.num_layers - 1:
                x = F.dropout(x, self.dropout)
        joined = tuple(torch.cat(parts) for parts in zip(*final, strict=True))
        return x, joined, tuple(torch.cat(parts, 1) for parts in zip(*every, strict=True))

    def _staggered(self, x: Tensor, states: States, weights: Sequence[Tensor], controls: StackControls) -> bool:
        """Whether the layers run as a wavefront. What is recorded decides as it runs: its T may be any."""
        if self.num_layers == 1 or self.bidirectional or self.norm or self.proj_size:
            return False
        lowest, wanting = weights[: len(weights) // self.num_layers], (x, *states, *weights)
        frozen = not any(t.requires_grad for t in (x, *lowest)) and any(t.requires_grad for t in wanting)
        if frozen and torch.is_grad_enabled():  # a wavefront would run its layers backward all the same
            return False
        if onlookers.recorded(x):
            asked = (self.backend, environment.unchecked_backend())
            return x.is_cuda and "reference" not in asked and not x.is_complex()
        problem = self.problem(x, states, weights, x.shape[0], x.shape[1], False, controls)
        return choice.staggers(problem, self.backend)

    def _wavefront(
        self, x: Tensor, states: States, weights: Sequence[Tensor], controls: StackControls
    ) -> tuple[Tensor, States, States]:
        """As `_layers`: all layers by one operation, along N."""
        steps, reverse = x.shape[0], "0" * self.num_layers
        flags = controls.flags(self.reverse, steps, all_states=True)  # each layer of a launch is at other steps
        layer_controls, reset_values = controls.of_layer(slice(None), reverse, steps, flags)
        lowest, *others = (self._canonical(weights, number) for number in range(self.num_layers))
        own = zip(*(each[1:] for each in (lowest, *others)), strict=True)
        rest: list[Any] = [None if parts[0] is None else torch.cat(parts) for parts in own]
        joined = Weights(lowest.w_ih, *rest)._replace(w_between=torch.cat([each.w_ih for each in others]))
        if self.dropout:  # drawn as layer after layer would draw it
            like = x.new_ones(*x.shape[:2], self.hidden(weights))
            layer_controls = layer_controls._replace(
                between=torch.stack([F.dropout(like, self.dropout) for _ in others])
            )
        inputs = Inputs(x, joined, layer_controls, [state.transpose(0, 1) for state in states], list(reset_values))
        options = Options(self.backend, reverse, all_states=self.all_states)
        every, after, inner = autograd.layer(self.recurrence.text(self.recurrence.identity), options, inputs)
        # A copy, as what is handed out would share memory, and y by itself hold that of all layers.
        y, final = every[-1].clone(), tuple(state.transpose(0, 1) for state in after)
        valid = controls.valid(steps)
        if valid is not None and not controls.flagged(
            self.all_states
        ):  # lengths alone: of the others `loops` takes care
            y = torch.where(valid.unsqueeze(-1), y, 0)
        if not self.all_states:
            return y, final, ()
        return y, final, tuple(state.transpose(0, 1) for state in (every, *_others(inner, y, states)))

    def inputs(
        self,
        x: Tensor,
        weights: Sequence[Tensor],
        number: int,
        states: list[Tensor],
        controls: LayerControls = PLAIN,
        reset_values: Sequence[Tensor] = (),
    ) -> Inputs:
        """What one layer of the stack takes."""
        return Inputs(x, self._canonical(weights, number), controls, states, list(reset_values))

    def _canonical(self, weights: Sequence[Tensor], number: int) -> Weights:
        """The weights of one layer, the directions stacked along N."""
        gates, params, projected = len(self.recurrence.gates), bool(self.recurrence.params), bool(self.proj_size)
        count = 2 + 2 * self.bias + projected + params + 2 * self.norm
        first = number * len(self.reverse) * count
        own = [weights[first + d * count : first + (d + 1) * count] for d in range(len(self.reverse))]
        stacked = [parts[0][None] if len(parts) == 1 else torch.stack(parts) for parts in zip(*own, strict=True)]
        rest = iter(stacked)

        def by_gate(there: bool) -> Any:
            return next(rest).unflatten(1, (gates, -1)) if there else None

        w_ih, w_hh, b_ih, b_hh = (by_gate(there) for there in (True, True, self.bias, self.bias))
        w_hr, values = (next(rest) if there else None for there in (projected, params))
        norm_ih, norm_hh = by_gate(self.norm), by_gate(self.norm)
        return Weights(w_ih, w_hh, b_ih, b_hh, values, w_hr, norm_hh, norm_ih)


def _others(inner: Tensor, like: Tensor, states: States) -> Sequence[Tensor]:
    """Those of `Result.inner`, in the dtype of y. Where there are none nothing is taken apart: torch.export writes such
    a file, but cannot read it."""
    return inner.to(like.dtype).unbind(0) if len(states) > 1 else ()


def _unpack(data: Tensor, batch_sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Packed data (sum, I) -> (T, B, I) padded with zeros, the lengths (B,) of its rows, and the places of the data in
    (T·B).

    All that depends on values is found on the host, where batch_sizes are.
    """
    valid = torch.arange(int(batch_sizes[0]), device="cpu") < batch_sizes[:, None]  # (T, B)
    places = valid.flatten().nonzero().squeeze(1)
    words = "the batch sizes of a PackedSequence", "the padded tensor, with lengths,"
    both = to_device(torch.cat([valid.sum(0), places]), data.device, *words)
    lengths, places = both.split([valid.shape[1], len(places)])
    padded = torch.index_put(data.new_zeros(valid.numel(), data.shape[-1]), (places,), data)
    return padded.unflatten(0, valid.shape), lengths, places
