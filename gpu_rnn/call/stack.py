# SPDX-License-Identifier: Apache-2.0
"""A stack of layers: what does not change between its calls, the shapes that follow, and a call as dispatch sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from gpu_rnn.backends.problem import Problem
from gpu_rnn.backends.tensors import PLAIN, Inputs, LayerControls, Weights
from gpu_rnn.call import onlookers, transforms
from gpu_rnn.call.controls import NONE, StackControls
from gpu_rnn.call.description import describe
from gpu_rnn.once import once
from gpu_rnn.recurrence import Recurrence

States = tuple[Tensor, ...]
RECORDED_FLAGS = ("bias", "bidirectional", "norm", "rms", "rebuilds")  # in the order in which `Stack.words` writes them


@dataclass(frozen=True, kw_only=True)
class Stack:
    """What does not change between the calls of a layer. `dropout` is 0 outside training.

    With `norm`, each layer and direction has two weights more, the scales of the normalised input products and of the
    normalised recurrent products, (G·H) each; with `rms` it is by the root mean square. With `heads`, k of them, W_hh
    is block-diagonal: each direction is k recurrences of H/k units side by side (`gpu_rnn.call.heads`), and each of its
    weights has k in front. With `time_parallel`, the tolerance of borders, a layer's steps run in chunks side by side
    (`gpu_rnn.call.relaxation`); 0: one after the other. What `rebuilds` saves states alone for the backward pass, which
    computes the gates again (`gpu_rnn.backends.rebuilding`).
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
    rms: bool = False
    all_states: bool = False
    heads: int = 1
    time_parallel: float = 0.0
    rebuilds: bool = False

    @once
    def as_key(self) -> tuple[object, ...]:
        """What is alike for stacks that are, of values that hash at once."""
        others = (getattr(self, each.name) for each in fields(self) if each.name != "recurrence")
        return self.recurrence.key, *others

    @once
    def is_atens(self) -> bool:
        """Whether ATen has the cell and those options that are the same at all calls, and may be taken."""
        others = self.norm or self.all_states or self.heads > 1 or self.time_parallel
        return not others and self.backend in ("auto", "aten") and self.recurrence.aten is not None

    @once
    def is_one_layer(self) -> bool:
        """Whether there is one, which runs forward in time, in one head."""
        return self.num_layers == self.heads == 1 and not self.bidirectional

    @property
    def starts_at_zero(self) -> bool:
        """Whether that is the initial value of all states. Not kept: Dynamo of torch 2.11 cannot follow `once`."""
        return not any(self.recurrence.initial)

    @once
    def plans(self) -> dict[torch.Size, object]:
        """Kept by `gpu_rnn.call.plans`."""
        return {}

    @property
    def directions(self) -> int:
        """D"""
        return 2 if self.bidirectional else 1

    def words(self, wanted: str) -> str:
        """Its options but for the cell, as `gpu_rnn.call.stack_ops` reads them."""
        flags = [name for name in RECORDED_FLAGS if getattr(self, name)]
        numbers = f"{self.backend} {self.num_layers} {self.proj_size} {self.heads}"
        return " ".join((numbers, *flags, f"kept:{wanted}"))

    @property
    def time_first(self) -> Stack:
        """The same without `batch_first`."""
        return replace(self, batch_first=False) if self.batch_first else self

    @property
    def reverse(self) -> str:
        """A character for each recurrence, those of a direction together, "1" where time runs backwards."""
        return "0" * self.heads + "1" * self.heads * self.bidirectional

    def sizes(self, x: Tensor, batch_sizes: Tensor | None) -> tuple[int, int]:
        """T and B."""
        if batch_sizes is not None:
            return batch_sizes.shape[0], int(batch_sizes[0])
        steps, batch = (x.shape[1], x.shape[0]) if self.batch_first else (x.shape[0], x.shape[1])
        if steps == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        return steps, batch

    def hidden(self, weights: Sequence[Tensor]) -> int:
        """Units of each recurrence: H, of each head H/k."""
        return weights[0].shape[-2] // len(self.recurrence.gates)

    def state_shapes(self, weights: Sequence[Tensor], batch: int) -> list[tuple[int, ...]]:
        """Of each state, (D·num_layers, B, ·)."""
        rows, hidden = self.num_layers * self.directions, self.heads * self.hidden(weights)
        widths = [self.proj_size or hidden, *[hidden] * (len(self.recurrence.states) - 1)]
        return [(rows, batch, width) for width in widths]

    @property
    def weight_names(self) -> tuple[str, ...]:
        """The fields of `Weights` that a layer has, in the order of `functional.rnn`."""
        biases, projection = ("b_ih", "b_hh") * self.bias, ("w_hr",) * bool(self.proj_size)
        params, norms = ("params",) * bool(self.recurrence.params), ("norm_ih", "norm") * self.norm
        return "w_ih", "w_hh", *biases, *projection, *params, *norms

    def weight_shapes(self, features: int, hidden: int) -> list[tuple[int, ...]]:
        """Of each weight, layer after layer and direction after direction in the order of `weight_names`."""
        units, width = hidden // self.heads, (self.proj_size or hidden) // self.heads
        rows, params = len(self.recurrence.gates) * units, len(self.recurrence.params)
        pair = [(rows,)] * 2
        after_w_hh = [*pair * self.bias, *[(width, units)] * bool(self.proj_size), *[(params, units)] * bool(params)]
        after_w_hh += pair * self.norm
        shapes: list[tuple[int, ...]] = []
        for number in range(self.num_layers):
            inputs = self.directions * self.heads * width if number else features
            shapes += [(rows, inputs), (rows, width), *after_w_hh] * self.directions
        return shapes if self.heads == 1 else [(self.heads, *shape) for shape in shapes]

    def initial(self, x: Tensor, weights: Sequence[Tensor], batch: int) -> States:
        """The recurrence's own initial values, (D·num_layers, B, ·); states that are all alike share one tensor."""
        values = self.recurrence.initial
        if not self.proj_size and values == values[:1] * len(values):
            rows = self.num_layers * (1 + self.bidirectional)  # written out: of a short call each frame is a part
            hidden = self.heads * weights[0].shape[-2] // len(self.recurrence.gates)
            return (x.new_full((rows, batch, hidden), values[0]),) * len(values)
        shapes = self.state_shapes(weights, batch)
        return tuple(x.new_full(shape, value) for shape, value in zip(shapes, values, strict=True))

    def initial_of_a_step(self, x: Tensor, weights: Sequence[Tensor]) -> States:
        """The same of a cell of one head, (B, H) each."""
        shape, values = (x.shape[0], weights[1].shape[1]), self.recurrence.initial
        if values == values[:1] * len(values):
            return (x.new_full(shape, values[0]),) * len(values)
        return tuple(x.new_full(shape, value) for value in values)

    def problem(
        self,
        x: Tensor,
        hx: States | None,
        weights: Sequence[Tensor],
        batch_sizes: Tensor | None,
        controls: StackControls = NONE,
    ) -> Problem:
        """The call as dispatch sees it."""
        steps, batch = self.sizes(x, batch_sizes)
        wanting = (x, *weights, *(hx or ()), *(controls.reset_state or ()))
        wants_grad = torch.is_grad_enabled() and any(t.requires_grad for t in wanting)
        packed = batch_sizes is not None
        return describe(
            recurrence=self.recurrence,
            x=x,
            steps=steps,
            batch=batch,
            hidden=self.hidden(weights),
            direction="training" if wants_grad else "inference",
            reverse=self.reverse,
            layers=self.num_layers,
            proj_size=self.proj_size // self.heads,
            bias=self.bias,
            norm=self.norm,
            rms=self.rms,
            rebuilds=self.rebuilds and wants_grad,
            controls=controls.described(packed, self.all_states),
            all_states=self.all_states,
            packed=packed,
            transforms=transforms.active(),
        )

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
        return Inputs(x, self.canonical(weights, number), controls, states, list(reset_values))

    def canonical(self, weights: Sequence[Tensor], number: int) -> Weights:
        """The weights of one layer, the directions, and in each of them the heads, along N."""
        gates, of_layer = len(self.recurrence.gates), self.of_layer(weights, number)
        stacked = of_layer if self.bidirectional else [weight[None] for weight in of_layer]
        if self.heads > 1:
            stacked = [weight.flatten(0, 1) for weight in stacked]
        fields = {
            name: weight if name in ("w_hr", "params") else weight.unflatten(1, (gates, -1))
            for name, weight in zip(self.weight_names, stacked, strict=True)
        }
        return Weights(**fields)

    def of_layer(self, weights: Sequence[Tensor], number: int) -> Sequence[Tensor]:
        """The weights of one layer in the order of `weight_names`; of two directions those of both, (2, ...)."""
        directions, count = self.directions, len(weights) // self.num_layers
        of_all = weights[number * count : (number + 1) * count]
        return of_all if directions == 1 else _side_by_side([of_all[: count // 2], of_all[count // 2 :]])


ALIGNED = 64  # bytes: torch's allocations begin at a multiple of it, on a CPU too, where products depend on it


def _side_by_side(each: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The weights of both directions, (2, ...) each; by one copy of all where none is recorded or has a derivative, and
    each of them begins where an allocation might."""
    pairs = list(zip(*each, strict=True))
    sizes = [len(pair) * pair[0].numel() for pair in pairs]
    derived = torch.is_grad_enabled() or onlookers.recorded(each[0][0]) or transforms.active()
    if derived or any(size * each[0][0].itemsize % ALIGNED for size in sizes):
        return [torch.stack(pair) for pair in pairs]
    flat = torch.cat([weight.flatten() for pair in pairs for weight in pair])
    return [part.view(len(pair), *pair[0].shape) for part, pair in zip(flat.split(sizes), pairs, strict=True)]
