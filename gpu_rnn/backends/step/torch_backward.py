# SPDX-License-Identifier: Apache-2.0
"""The backward loop in torch. What no incoming gradient is needed for is found for a chunk of steps at once.

Not for all steps: on a CPU the tensors of a chunk stay in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpu_rnn.backends import normalisation
from gpu_rnn.backends.linear import over_steps, runs
from gpu_rnn.backends.normalisation import Back, Normalised
from gpu_rnn.backends.step.controls import StepControls, selected, steps_with, words
from gpu_rnn.backends.step.product import Product, cast, masks
from gpu_rnn.backends.step.torch_forward import parameters
from gpu_rnn.backends.step.torch_operations import compiled
from gpu_rnn.backends.tensors import Call, LoopGradients, Result, chunks, reorder, reorder_each, state_dtype
from gpu_rnn.compiler.derivative import carried_values, stage_outputs
from gpu_rnn.compiler.jacobian import jacobian
from gpu_rnn.compiler.operations import Argument
from gpu_rnn.compiler.program import lookup


def backward(call: Call, saved: Result, d_y: Tensor, d_final: list[Tensor], d_inner: Tensor | None) -> LoopGradients:
    """As `step.backward`."""
    loop = _BackwardLoop(call, saved, d_y, d_inner)
    loop.d_states = [d.to(loop.dtype) for d in d_final]
    for part in reversed(chunks(saved.gates)):
        loop.run(part)
    return loop.gradients()


class _Term:
    """The gradient of one input of a stage in a step: the sum of partial derivatives times what comes in for
    outputs."""

    def __init__(self, name: str, outputs: Sequence[dict[str, Tensor]]) -> None:
        self.parts = [(index, partials[name].unbind(0)) for index, partials in enumerate(outputs) if name in partials]

    def sum(self, step: int, seeds: list[Tensor], out: Tensor | None = None) -> Tensor:
        """Of a step of the chunk, (B, N, H), like what comes in."""
        if not self.parts:
            return torch.zeros_like(seeds[0]) if out is None else out.zero_()
        (index, partials), *others = self.parts
        found = torch.mul(partials[step], seeds[index], out=out)
        for index, partials in others:
            found.addcmul_(partials[step], seeds[index])
        return found

    def add_to(self, total: Tensor, step: int, seeds: list[Tensor]) -> None:
        """The same, added to a total of all steps."""
        for index, partials in self.parts:
            total.addcmul_(partials[step], seeds[index])


class _Gradients(NamedTuple):
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

    def write(self, t: int, found: Tensor) -> None:
        """`found`: what stands in `wide[t]`"""
        if self.narrow:
            self.values[t].copy_(found)


class _Norm:
    """The layer normalisation of a stage's products."""

    def __init__(self, scale: Tensor, d_products: Tensor) -> None:
        """`scale` (N, gates, H); the gradients of the products go to (T, B, N, gates, H)."""
        self.scale, self.d_total = scale, torch.zeros_like(scale)
        self.d_products, self.d_flat = d_products.unbind(0), d_products.flatten(3).unbind(0)
        self.d_scale = torch.zeros_like(d_products[0], dtype=scale.dtype)  # of a chunk
        self.through = Back(self.d_scale[..., :1])

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


class _StageGradients:
    """One stage of a step: the pointwise derivative and the product back."""

    def __init__(self, call: Call, number: int, d: _Gradients) -> None:
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
            w_hh, self.of_products = normalisation.centred(w_hh)
            self.norm = _Norm(weights.norm[:, rows].to(d.dtype), d.products[:, :, :, rows])
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
            found = lookup(values, value, like)
            return found if alive is None else selected(found, alive)

        outputs = [{name: partial(value) for name, value in own.items()} for own in self.jacobian.partials]
        self.links = [(k, other, partial(value).unbind(0)) for k, other, value in self.jacobian.links]
        self.reached = [k for k, name in enumerate(self.states) if any(name in own for own in outputs)]
        groups = self.names, self.params, self.carried, [self.states[k] for k in self.reached]
        self.to_gates, self.to_params, self.to_carried, self.to_states = (
            [_Term(name, outputs) for name in names] for names in groups
        )

    def normalise(self, entering: Tensor, kept: Normalised | None) -> None:
        """The normalised products of a chunk, taken once more if they were not kept."""
        if self.norm is None:
            return
        if kept is None:
            found = self.of_products(self.product.over_time(entering).to(self.d.dtype).contiguous())
        else:
            found = kept.at((..., self.rows, slice(None)))
        self.norm.begin(found)

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
        d, *others = (source[t] for source in self.d_sources)
        d = torch.cat([d, *others], 2) if others else d
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


class _BackwardLoop:
    """One step after the other, from the last to the first in processing order."""

    def __init__(self, call: Call, saved: Result, d_y: Tensor, d_inner: Tensor | None) -> None:
        program, weights = call.program, call.weights
        self.call, self.program, self.dtype = call, program, state_dtype(saved.gates.dtype)
        self.controls = controls = StepControls.of(call, len(d_y))
        order = controls.order
        self.gates, self.recurrent = reorder(saved.gates, order), reorder(saved.recurrent, order)
        self.after = [reorder(state, order) for state in (saved.y, *saved.inner)]
        self.d_y = controls.d_output(d_y).to(self.dtype).unbind(0)
        self.d_inner = [] if d_inner is None else [d.unbind(0) for d in reorder_each(d_inner, order)]
        self.params = parameters(program, weights, self.dtype)
        scales, like = weights.norm, self.gates[0, :, :, 0]
        self.d = _Gradients(
            torch.empty_like(self.gates),
            torch.empty_like(self.recurrent),
            None if scales is None else torch.empty_like(self.gates),
            [torch.zeros_like(like, dtype=self.dtype) for _ in program.params],
            self.dtype,
        )
        self.stages = [_StageGradients(call, number, self.d) for number in range(len(program.stages))]
        self.reads = set().union(*(stage.reads for stage in self.stages))
        self.normalised = (
            None if saved.kept is None else Normalised(*(reorder(values[1], order) for values in saved.kept))
        )
        if scales is not None and self.normalised is None:
            self.reads.add(f"s_{program.state_names[0]}")
        self._steer(controls, len(d_y))
        self.d_w_hr: Tensor | None = None
        self.d_states: list[Tensor] = []
        self.d_entered: list[list[Tensor]] = []

    def _steer(self, controls: StepControls, steps: int) -> None:
        """Which rows and units are reset before a step, and which keep their states; `words` of those that do not."""
        skip, reset = controls.skip, controls.reset
        self.resets = steps_with(reset, steps)
        self.reset = reset if any(self.resets) else None
        self.stays = () if self.reset is None else words(~self.reset, self.dtype).unbind(0)
        self.keeps = controls.keeping(steps)
        widths = [state.shape[-1] for state in self.call.states]
        kept = [keep[..., :width] for keep, width in zip(controls.keeps, widths, strict=True) if keep is not None]
        self.kept = [
            keep.view(torch.uint8).to(self.dtype).unbind(0) for keep in kept
        ]  # of bool: six times as long on a CPU
        # A masked row's partial derivatives are 0. A unit that keeps its state alone, and a projected h, have 0 come in
        # instead.
        self.alive = None if skip is None else words(~skip, self.dtype)
        clears = controls.by_unit or self.call.weights.w_hr is not None
        self.made = [words(~keep, self.dtype).unbind(0) for keep in kept if clears]

    def run(self, part: slice) -> None:
        """The steps of a chunk."""
        h = self._prepare(part)
        d_new = [self._step(t, t - part.start) for t in reversed(range(part.start, part.stop))]
        if h is not None:
            share = over_steps(torch.stack(d_new[::-1]).unsqueeze(3), h).squeeze(1)  # (N, P, H)
            self.d_w_hr = share if self.d_w_hr is None else self.d_w_hr + share

    def _prepare(self, part: slice) -> Tensor | None:
        """The partial derivatives; returns h of all steps before its projection, if it has one."""
        values = self._values(part)
        like = values[self.stages[0].names[0]]
        alive = None if self.alive is None or not any(self.keeps[part]) else self.alive[part]
        entering = values.get(f"s_{self.program.state_names[0]}", like)  # read by a normalisation only
        kept = None if self.normalised is None else self.normalised.at(part)
        for stage in self.stages:
            stage.normalise(entering, kept)
            stage.prepare(values, like, alive)
            if stage is self.stages[-1] and self.call.weights.w_hr is None:
                return None
            entering = lookup(values, stage.stage.outputs[0], like)
            entering = entering if alive is None else selected(entering, alive)
        return entering

    def _values(self, part: slice) -> dict[str, Any]:
        """Every input of the program at the steps of a chunk."""
        program = self.program
        values: dict[str, Any] = dict(self.params)
        for gate, value in zip(program.gates, self.gates[part].to(self.dtype).unbind(3), strict=True):
            values[f"a_{gate}" if gate in program.summed else f"x_{gate}"] = value
        for gate, value in zip(program.split, self.recurrent[part].to(self.dtype).unbind(3), strict=True):
            values[f"r_{gate}"] = value
        for k, name in enumerate(program.state_names):
            if f"s_{name}" in self.reads:
                values[f"s_{name}"] = self._entered(k, part)
        return values

    def _entered(self, k: int, part: slice) -> Tensor:
        """(chunk, B, N, ·): a state as the steps of a chunk found it."""
        after, initial = self.after[k], self.call.states[k]
        if part.start:
            before = after[part.start - 1 : part.stop - 1].to(self.dtype)
        else:
            before = torch.cat([initial[None].to(self.dtype), after[: part.stop - 1].to(self.dtype)])
        if self.reset is None:
            return before
        value = self.controls.values[k]
        if isinstance(value, Tensor):
            value = (value[part] if len(value) > 1 else value).to(self.dtype)
        return torch.where(self.reset[part], value, before)

    def _step(self, t: int, step: int) -> Tensor:
        """The gradients of the states after step t become those before it; returns that of the h which the step
        made."""
        seeds = [self.d_states[0] + self.d_y[t], *self.d_states[1:]]
        for k, d in enumerate(self.d_inner, 1):
            seeds[k] = seeds[k] + d[t]
        incoming = list(seeds)
        if self.keeps[t] and self.made:
            seeds = [selected(seed, made[t]) for seed, made in zip(seeds, self.made, strict=True)]
        d_made = seeds[0]
        if self.call.weights.w_hr is not None:
            through = torch.bmm(d_made.to(self.gates.dtype).transpose(0, 1), self.call.weights.w_hr)
            seeds[0] = through.transpose(0, 1).to(self.dtype)
        found: list[Tensor | None] = [None] * len(seeds)
        for stage in reversed(self.stages):
            d_entering = stage.back(t, step, seeds)
            for k, d in stage.d_states(step, seeds):
                before = found[k]
                found[k] = d if before is None else before.add_(d)
            seeds = [d_entering, *stage.d_carried(step, seeds)]
        found[0] = d_entering if found[0] is None else d_entering.add_(found[0])
        self._enter(
            t, [torch.zeros_like(like) if d is None else d for d, like in zip(found, incoming, strict=True)], incoming
        )
        return d_made

    def _enter(self, t: int, d_states: list[Tensor], incoming: list[Tensor]) -> None:
        """From the gradients through the step those of the states before it, some of which were kept, or reset."""
        if self.keeps[t]:
            for d, kept, seed in zip(d_states, self.kept, incoming, strict=True):
                d.addcmul_(kept[t], seed)
        if self.call.reset_values:
            self.d_entered.append(d_states)
        if self.resets[t]:
            d_states = [selected(d, self.stays[t]) for d in d_states]
        self.d_states = d_states

    def gradients(self) -> LoopGradients:
        """Of all steps, in the order of time."""
        order, d = self.controls.order, self.d
        d_entered = [torch.stack(each[::-1]) for each in zip(*self.d_entered, strict=True)]
        return LoopGradients(
            reorder(d.gates, order),
            reorder(d.recurrent, order),
            self.d_states,
            torch.stack([each.sum(0) for each in d.params], 1) if d.params else None,
            self.d_w_hr,
            None if d.products is None else torch.cat([stage.norm.finish() for stage in self.stages if stage.norm], 1),
            None if d.products is None else reorder(d.products, order),
            self.controls.d_values(d_entered) if self.d_entered else [],
        )
