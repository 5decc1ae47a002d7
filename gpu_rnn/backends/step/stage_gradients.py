# SPDX-License-Identifier: Apache-2.0
"""The backward loop in torch, a stage of a step: the derivative of its program, and its products back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpu_rnn.backends.linear import runs
from gpu_rnn.backends.normalisation import Normalised, Normaliser
from gpu_rnn.backends.step.controls import selected
from gpu_rnn.backends.step.product import Product, cast, masks
from gpu_rnn.backends.step.torch_operations import compiled
from gpu_rnn.backends.tensors import Call
from gpu_rnn.compiler.derivative import carried_values, stage_outputs
from gpu_rnn.compiler.jacobian import jacobian
from gpu_rnn.compiler.operations import Argument
from gpu_rnn.compiler.program import lookup


class _Term:
    """The gradient of one input of a stage in a step: the sum of partial derivatives times what comes in for
    outputs."""

    def __init__(self, name: str, outputs: Sequence[dict[str, Tensor]]) -> None:
        self.parts = [(index, partials[name].unbind(0)) for index, partials in enumerate(outputs) if name in partials]

    def sum(self, step: int, seeds: list[Tensor], out: Tensor | None = None) -> Tensor:
        """Of a step of the chunk, (B, N, H), like what comes in."""
        if not self.parts:
            return torch.zeros_like(seeds[0]) if out is None else out.zero_()
        (index, partials), *more = self.parts
        total = torch.mul(partials[step], seeds[index], out=out)
        for index, partials in more:
            total.addcmul_(partials[step], seeds[index])
        return total

    def add_to(self, total: Tensor, step: int, seeds: list[Tensor]) -> None:
        """The same, added to a total of all steps."""
        for index, partials in self.parts:
            total.addcmul_(partials[step], seeds[index])


class WrittenGradients(NamedTuple):
    """What the loop writes, in processing order."""

    gates: Tensor  # (T, B, N, G, H)
    recurrent: Tensor  # (T, B, N, number of split gates, H)
    products: Tensor | None  # (T, B, N, G, H), with layer normalisation
    params: list[Tensor]  # of each, (B, N, H)
    dtype: torch.dtype  # of the sums


class _Out:
    """What the loop writes for one gate, (T, B, N, H)."""

    def __init__(self, values: Tensor, dtype: torch.dtype) -> None:
        self.values = self.wide = values.unbind(0)
        self.narrow = values.dtype != dtype
        if self.narrow:
            self.wide = (values.new_empty(values.shape[1:], dtype=dtype),) * len(values)

    def write(self, t: int, value: Tensor) -> None:
        """`value`: what stands in `wide[t]`"""
        if self.narrow:
            self.values[t].copy_(value)


class _Norm:
    """The normalisation of a stage's products."""

    def __init__(self, scale: Tensor, d_products: Tensor, normaliser: Normaliser) -> None:
        """`scale` (N, gates, H); the gradients of the products go to (T, B, N, gates, H)."""
        self.scale, self.d_total = scale, torch.zeros_like(scale)
        self.d_products, self.d_flat = d_products.unbind(0), d_products.flatten(3).unbind(0)
        self.d_scale = torch.zeros_like(d_products[0], dtype=scale.dtype)  # of a chunk
        self.through = normaliser.back(self.d_scale[..., :1])

    def begin(self, products: Normalised) -> None:
        """A chunk, with its normalised products."""
        self.products = products.each
        self.d_total = self.finish()
        self.d_scale.zero_()

    def back(self, t: int, step: int, d: Tensor) -> Tensor:
        """From the gradients of what the scales made at step t, number `step` of the chunk, those of the products,
        flat."""
        self.d_scale.addcmul_(d, self.products[step].values)
        self.through(d * self.scale, self.products[step], self.d_products[t])
        return self.d_flat[t]

    def finish(self) -> Tensor:
        """The gradient of the scales: a sum of chunks' sums, as one over all steps would round more often."""
        return self.d_total + self.d_scale.sum(0)


class StageGradients:
    """One stage of a step: the pointwise derivative and the product back."""

    def __init__(self, call: Call, number: int, d: WrittenGradients) -> None:
        program, weights = call.program, call.weights
        self.rows = rows = program.rows[number]
        self.stage, self.jacobian, self.d = program.stages[number], jacobian(program, number), d
        made = stage_outputs(program, number)
        if number == len(program.stages) - 1:  # the new states; h before its projection is read again
            made = made[: weights.w_hr is not None]
        self.wanted = (*made, *self.jacobian.results)
        self.run = compiled((*self.stage.ops, *self.jacobian.ops), self.wanted)
        split = [gate for gate in program.gates[rows] if gate not in program.summed]
        self.names = [f"{'a' if gate in program.summed else 'x'}_{gate}" for gate in program.gates[rows]]
        self.names += [f"r_{gate}" for gate in split]
        first = program.split.index(split[0]) if split else 0
        written = [*d.gates[:, :, :, rows].unbind(3), *d.recurrent[:, :, :, first : first + len(split)].unbind(3)]
        self.outs = [_Out(values, d.dtype) for values in written]
        self.states = [f"s_{name}" for name in program.state_names]
        self.params = [f"p_{name}" for name in program.params]
        self.carried = list(carried_values(program, number))
        sources = [source for _, source in runs(program, rows, d.gates, d.recurrent)]
        w_hh, self.norm = weights.w_hh[:, rows], None
        if weights.norm is not None and d.products is not None:
            w_hh, self.of_products = call.normaliser.of_products(w_hh)
            self.norm = _Norm(weights.norm[:, rows].to(d.dtype), d.products[:, :, :, rows], call.normaliser)
        steps, batch = d.gates.shape[:2]
        self.product = Product.of(w_hh, masks(call.controls.drop, rows), batch, steps)
        # Of each step, of neighbouring gates that lie in the same tensor: (B, N, gates, H), or without scales (B, N,
        # gates·H).
        self.d_sources = [(source.flatten(3) if self.norm is None else source).unbind(0) for source in sources]

    @property
    def reads(self) -> set[str]:
        """The names of all values that it takes."""
        args = {arg for op in (*self.stage.ops, *self.jacobian.ops) for arg in op.args}
        return {str(name) for name in args.union(self.wanted)}

    def prepare(self, values: dict[str, Any], like: Tensor, alive: Tensor | None) -> None:
        """The partial derivatives at the steps of a chunk, 0 where a row is masked; `alive`: the words of the
        others."""
        self.run(values)

        def partial(value: Argument) -> Tensor:
            derivative = lookup(values, value, like)
            return derivative if alive is None else selected(derivative, alive)

        outputs = [{name: partial(value) for name, value in partials.items()} for partials in self.jacobian.partials]
        self.links = [(k, other, partial(value).unbind(0)) for k, other, value in self.jacobian.links]
        self.reached = [k for k, name in enumerate(self.states) if any(name in partials for partials in outputs)]
        groups = self.names, self.params, self.carried, [self.states[k] for k in self.reached]
        self.to_gates, self.to_params, self.to_carried, self.to_states = (
            [_Term(name, outputs) for name in names] for names in groups
        )

    def normalise(self, entering: Tensor, kept: Normalised | None) -> None:
        """The normalised products of a chunk, taken once more if they were not kept."""
        if self.norm is None:
            return
        if kept is None:
            products = self.of_products(self.product.over_time(entering).to(self.d.dtype).contiguous())
        else:
            products = kept.at((..., self.rows, slice(None)))
        self.norm.begin(products)

    def back(self, t: int, step: int, seeds: list[Tensor]) -> Tensor:
        """Writes what belongs to step t, number `step` of the chunk; returns the gradient of what entered.

        To what comes in for an output, it first adds what the output gets through others.
        """
        for k, other, partials in self.links:
            seeds[k] = torch.addcmul(seeds[k], partials[step], seeds[other])
        for term, out in zip(self.to_gates, self.outs, strict=True):
            out.write(t, term.sum(step, seeds, out.wide[t]))
        for term, total in zip(self.to_params, self.d.params, strict=True):
            term.add_to(total, step, seeds)
        sources = [source[t] for source in self.d_sources]
        d = torch.cat(sources, 2) if len(sources) > 1 else sources[0]
        if self.norm is not None:
            d = self.norm.back(t, step, d)
        return cast(self.product.back(d), self.d.dtype)

    def d_states(self, step: int, seeds: list[Tensor]) -> Iterator[tuple[int, Tensor]]:
        """The gradients of the states before the step, (B, N, H), other than through the product, with their
        numbers."""
        for k, term in zip(self.reached, self.to_states, strict=True):
            yield k, term.sum(step, seeds)

    def d_carried(self, step: int, seeds: list[Tensor]) -> Iterator[Tensor]:
        """Those of the values of earlier stages."""
        return (term.sum(step, seeds) for term in self.to_carried)
