# SPDX-License-Identifier: Apache-2.0
"""The backward loop in torch. What no incoming gradient is needed for is found for a chunk of steps at once.

Not for all steps: on a CPU the tensors of a chunk stay in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpu_rnn import normalisation
from gpu_rnn.derivative import carried_values
from gpu_rnn.launch.jacobian import ONE, jacobian
from gpu_rnn.launch.loop_forward import parameters, steps_with
from gpu_rnn.launch.multiply import Product, masks
from gpu_rnn.launch.steering import Steering
from gpu_rnn.layout import Call, LoopGradients, Result, reorder, reorder_each, state_dtype
from gpu_rnn.products import over_steps, runs
from gpu_rnn.program import lookup

CPU_CHUNK, GPU_CHUNK = 1 << 15, 1 << 22  # elements (T, B, N, H) of a chunk: 128 KiB a tensor in fp32; fewer launches


def backward(call: Call, saved: Result, d_y: Tensor, d_final: list[Tensor], d_inner: Tensor | None) -> LoopGradients:
    """As `step.backward`."""
    loop = _Loop(call, saved, d_y, d_inner)
    loop.d_states = [d.to(loop.dtype) for d in d_final]
    steps, batch, n, _, hidden = saved.gates.shape
    chunk = max(1, (CPU_CHUNK if d_y.is_cpu else GPU_CHUNK) // max(1, batch * n * hidden))
    for start in reversed(range(0, steps, chunk)):
        loop.run(slice(start, min(start + chunk, steps)))
    return loop.gradients()


class _Keep(NamedTuple):
    """Units that keep their state, (chunk, B, N, 1 or H)."""

    ones: Tensor  # 1 for them, else 0
    others: Tensor  # as integers as wide as the floats: no bit set for them, else all

    @staticmethod
    def of(keep: Tensor, dtype: torch.dtype) -> _Keep:
        words = torch.int64 if dtype == torch.float64 else torch.int32
        return _Keep(keep.to(dtype), (~keep).to(words).neg_())

    def clear(self, values: Tensor) -> None:
        """Sets values to 0, NaN too, as a product would not; six times as fast as masked_fill_ on a CPU."""
        values.view(self.others.dtype).bitwise_and_(self.others.unsqueeze(3))


class _Output(NamedTuple):
    """Of one output of a stage, at the steps of a chunk."""

    partials: dict[str, Tensor]  # its partial derivative by each input, (chunk, B, N, H), where it is not 0
    keep: _Keep | None  # the units that keep their state instead; in earlier stages masked rows
    same: str  # the input that is the kept state


class _Terms:
    """The gradients of some inputs of a stage in one step: sums of partial derivatives times what comes in."""

    def __init__(self, names: list[str], outputs: list[_Output], like: Tensor) -> None:
        self.width, spans = len(names), []
        for index, (partials, keep, same) in enumerate(outputs):
            there = [i for i, name in enumerate(names) if name in partials or (keep is not None and name == same)]
            if there:
                spans.append((there[-1] + 1 - there[0], index, slice(there[0], there[-1] + 1)))
        spans.sort(key=lambda found: -found[0])
        covered = sorted(i for *_, span in spans for i in range(span.start, span.stop))
        self.apart = covered == list(range(len(names)))  # each is written once
        if not self.apart and spans:  # the widest is written first, and over everything
            spans[0] = (len(names), spans[0][1], slice(0, len(names)))
        self.parts = [(index, span, self._joined(names[span], outputs[index], like)) for _, index, span in spans]

    @staticmethod
    def _joined(names: list[str], output: _Output, like: Tensor) -> Sequence[Tensor]:
        """Of each step the partial derivatives side by side, (B, N, inputs, H); of what a unit keeps 1, else 0."""
        partials, keep, same = output
        joined = torch.stack([partials[name] if name in partials else torch.zeros_like(like) for name in names], 3)
        if keep is not None:
            keep.clear(joined)
            if same in names:
                joined[:, :, :, names.index(same)] += keep.ones
        return joined.unbind(0)

    def write(self, step: int, seeds: list[Tensor], out: Tensor) -> None:
        """Into (B, N, inputs, H), of any dtype, for a step of the chunk; what comes in is (B, N, 1, H) each."""
        if not self.parts:
            out.zero_()
        elif out.dtype == seeds[0].dtype:
            self.sum(step, seeds, out)
        else:
            out.copy_(self.sum(step, seeds))

    def sum(self, step: int, seeds: list[Tensor], out: Tensor | None = None) -> Tensor:
        (index, _, partials), *others = self.parts
        if not others:
            return torch.mul(partials[step], seeds[index], out=out)
        if self.apart:
            batch, n, _, hidden = seeds[0].shape
            out = seeds[0].new_empty(batch, n, self.width, hidden) if out is None else out
            for index, span, partials in self.parts:
                torch.mul(partials[step], seeds[index], out=out[:, :, span])
            return out
        found = torch.mul(partials[step], seeds[index], out=out)
        for index, span, partials in others:
            found[:, :, span].addcmul_(partials[step], seeds[index])
        return found


class _Gradients(NamedTuple):
    """What the loop writes, in processing order."""

    gates: Tensor  # (T, B, N, G, H)
    recurrent: Tensor  # (T, B, N, number of split gates, H)
    products: Tensor | None  # (T, B, N, G, H), with layer normalisation
    params: Tensor  # (N, number of params, H)
    norm: Tensor | None  # (N, G, H)


class _Stage:
    """One stage of a step: the pointwise derivative and the product back."""

    def __init__(self, call: Call, number: int, d: _Gradients) -> None:
        program, weights = call.program, call.weights
        self.rows = rows = program.rows[number]
        self.stage, self.jacobian, self.d = program.stages[number], jacobian(program, number, call.control.zone is None), d
        self.split = [gate for gate in program.gates[rows] if gate not in program.summed]
        self.gate_names = [f"{'a' if gate in program.summed else 'x'}_{gate}" for gate in program.gates[rows]]
        self.states = [f"s_{name}" for name in program.state_names]
        self.split_names = [f"r_{gate}" for gate in self.split]
        self.params = [f"p_{name}" for name in program.params]
        self.carried = list(carried_values(program, number))
        # The outputs of the last stage are the states, which masked steps and zoneout keep.
        last = number == len(program.stages) - 1
        self.same = self.states if last else [""] * len(self.jacobian.partials)
        if last and weights.w_hr is not None:
            self.same = ["", *self.states[1:]]
        found = list(runs(program, rows, d.gates, d.recurrent))
        self.sources = [source for _, source in found]
        self.d_of_sources = [source.unbind(0) for source in self.sources]
        self.scale = None
        if weights.norm is not None and d.products is not None:
            self.scale = weights.norm[:, rows].to(d.params.dtype)
            found = [(rows, d.products[:, :, :, rows])]
        drop, batch = call.control.drop, d.gates.shape[1]
        self.products = [Product(weights.w_hh[:, which], masks(drop, which), batch) for which, _ in found]
        self.d_products = [source.unbind(0) for _, source in found]
        self.d_gates = d.gates[:, :, :, rows].unbind(0)
        first = program.split.index(self.split[0]) if self.split else 0
        self.d_recurrent = d.recurrent[:, :, :, first : first + len(self.split)].unbind(0)

    @property
    def reads(self) -> set[str]:
        """The names of all values that it takes."""
        args = {arg for op in (*self.stage.ops, *self.jacobian.ops) for arg in op.args}
        args.update(value for *_, value in self.jacobian.links)
        return {str(name) for name in args.union(*(own.values() for own in self.jacobian.partials))}

    def prepare(self, values: dict[str, Any], like: Tensor, entering: Tensor, keeps: list[_Keep | None]) -> None:
        """The partial derivatives at the steps of a chunk; `keeps`: of each output."""
        self.stage.run(values)
        self.jacobian.run(values)
        outputs = [
            _Output({name: lookup(values, value, like) for name, value in own.items()}, keep, same)
            for own, keep, same in zip(self.jacobian.partials, keeps, self.same, strict=True)
        ]
        reached = {name for own in outputs for name in (*own.partials, own.same if own.keep is not None else "")}
        self.reached = [k for k, name in enumerate(self.states) if name in reached]
        self.links = [
            (k, other, _Terms._joined([""], _Output({"": lookup(values, value, like)}, keeps[other], "none"), like))
            for k, other, value in self.jacobian.links
        ]
        groups = self.gate_names, self.split_names, self.params, self.carried, [self.states[k] for k in self.reached]
        terms = (_Terms(names, outputs, like) for names in groups)
        self.to_gates, self.to_recurrent, self.to_params, self.to_carried, self.to_states = terms
        if self.params:
            self.d_params = like.new_empty(*like.shape[:3], len(self.params), like.shape[3])
        if self.scale is not None:
            self.raw = self.products[0].over_time(entering).to(like.dtype).contiguous()
            self.unscaled, self.mean, self.rstd = normalisation.with_statistics(self.raw)

    def complete(self, step: int, seeds: list[Tensor]) -> None:
        """Adds to the gradients of outputs what they get through other outputs."""
        for k, other, partials in self.links:
            seeds[k] = torch.addcmul(seeds[k], partials[step], seeds[other])

    def back(self, t: int, step: int, seeds: list[Tensor]) -> Tensor:
        """Writes what belongs to step t, number `step` of the chunk; returns the gradient of what entered."""
        self.to_gates.write(step, seeds, self.d_gates[t])
        if self.split:
            self.to_recurrent.write(step, seeds, self.d_recurrent[t])
        if self.params:
            self.to_params.write(step, seeds, self.d_params[step])
        if self.scale is not None:
            d, *others = (source[t] for source in self.d_of_sources)
            d = (torch.cat([d, *others], 2) if others else d) * self.scale
            self.d_products[0][t].copy_(normalisation.back(d, self.raw[step], self.mean[step], self.rstd[step]))
        d_entering, *others = (p.back(of[t]) for p, of in zip(self.products, self.d_products, strict=True))
        for other in others:
            d_entering = d_entering + other
        return d_entering.to(seeds[0].dtype)

    def d_states(self, step: int, seeds: list[Tensor]) -> Iterator[tuple[int, Tensor]]:
        """The gradients of the states before the step, (B, N, H), other than through the product, with their numbers."""
        if self.reached:
            yield from zip(self.reached, self.to_states.sum(step, seeds).unbind(2), strict=True)

    def d_carried(self, step: int, seeds: list[Tensor]) -> Sequence[Tensor]:
        """Those of the values of earlier stages."""
        if self.to_carried.parts:
            return self.to_carried.sum(step, seeds).unbind(2)
        return [torch.zeros_like(seeds[0][:, :, 0])] * len(self.carried)

    def finish(self, part: slice) -> None:
        """Adds what a chunk gives for the weights."""
        if self.params:
            self.d.params.add_(self.d_params.sum((0, 1)))
        if self.d.norm is not None:
            sources = [source[part] for source in self.sources]
            d = sources[0] if len(sources) == 1 else torch.cat(sources, 3)
            self.d.norm[:, self.rows] += (d * self.unscaled).sum((0, 1))


class _Loop:
    """One step after the other, from the last to the first in processing order."""

    def __init__(self, call: Call, saved: Result, d_y: Tensor, d_inner: Tensor | None) -> None:
        program, weights = call.program, call.weights
        self.call, self.program, self.dtype = call, program, state_dtype(saved.gates.dtype)
        self.steering = steering = Steering.of(call, len(d_y))
        order = steering.order
        self.gates, self.recurrent = reorder(saved.gates, order), reorder(saved.recurrent, order)
        self.after = [reorder(state, order) for state in (saved.y, *saved.inner)]
        self.d_y = steering.d_output(d_y).to(self.dtype).unbind(0)
        self.d_inner = [] if d_inner is None else [d.unbind(0) for d in reorder_each(d_inner, order)]
        self.params = parameters(program, weights, self.dtype)
        scales = weights.norm
        self.d = _Gradients(
            torch.empty_like(self.gates),
            torch.empty_like(self.recurrent),
            None if scales is None else torch.empty_like(self.gates),
            d_y.new_zeros(d_y.shape[2], len(program.params), self.gates.shape[-1], dtype=self.dtype),
            None if scales is None else torch.zeros_like(scales, dtype=self.dtype),
        )
        self.stages = [_Stage(call, number, self.d) for number in range(len(program.stages))]
        self.reads = set().union(*(stage.reads for stage in self.stages))
        if scales is not None:
            self.reads.add(f"s_{program.state_names[0]}")
        self.resets, self.keeps, self.skip = steps_with(steering.reset, len(d_y)), steering.keeps, steering.skip
        self.reset = steering.reset if any(self.resets) else None
        self.d_w_hr: Tensor | None = None
        self.d_states: list[Tensor] = []
        self.d_entered: list[list[Tensor]] = []

    def run(self, part: slice) -> None:
        """The steps of a chunk."""
        h = self._prepare(part)
        d_new = [self._step(t, t - part.start) for t in reversed(range(part.start, part.stop))]
        for stage in self.stages:
            stage.finish(part)
        if h is not None:
            share = over_steps(torch.stack(d_new[::-1]).unsqueeze(3), h).squeeze(1)  # (N, P, H)
            self.d_w_hr = share if self.d_w_hr is None else self.d_w_hr + share

    def _prepare(self, part: slice) -> Tensor | None:
        """The partial derivatives; returns h of all steps before its projection, if it has one."""
        program, values = self.program, self._values(part)
        like = values[self.stages[0].gate_names[0]]
        projected = self.call.weights.w_hr is not None
        skip = None if self.skip is None else self.skip[part]
        masked = None if skip is None else _Keep.of(skip, self.dtype)
        keeps = [masked] * len(self.keeps)
        if self.steering.zone is not None:
            keeps = [None if keep is None else _Keep.of(keep[part], self.dtype) for keep in self.keeps]
            keeps[0] = masked if projected else keeps[0]  # of a projected h, `_kept` takes care
        entering = values.get(f"s_{program.state_names[0]}", like)  # read by a normalisation only
        for stage in self.stages:
            last = stage is self.stages[-1]
            stage.prepare(values, like, entering, keeps if last else [masked] * len(stage.same))
            if last and not projected:
                return None
            entering = lookup(values, stage.stage.outputs[0], like)
            entering = entering if skip is None else torch.where(skip, 0.0, entering)
        return entering

    def _values(self, part: slice) -> dict[str, Any]:
        """Every input of the program at the steps of a chunk."""
        program = self.program
        values: dict[str, Any] = {ONE: torch.ones((), dtype=self.dtype, device=self.gates.device)} | self.params
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
        value = self.steering.values[k]
        if isinstance(value, Tensor):
            value = (value[part] if len(value) > 1 else value).to(self.dtype)
        return torch.where(self.reset[part], value, before)

    def _step(self, t: int, step: int) -> Tensor:
        """The gradients of the states after step t become those before it; returns that of the h which the step made."""
        seeds = [self.d_states[0] + self.d_y[t], *self.d_states[1:]]
        for k, d in enumerate(self.d_inner, 1):
            seeds[k] = seeds[k] + d[t]
        made, kept = seeds[0], None
        if self.call.weights.w_hr is not None:
            made, kept = self._kept(t, seeds[0])
            through = torch.bmm(made.to(self.gates.dtype).transpose(0, 1), self.call.weights.w_hr)
            seeds[0] = through.transpose(0, 1).to(self.dtype)
        found: list[Tensor | None] = [None] * len(seeds)
        for stage in reversed(self.stages):
            wide = [seed.unsqueeze(2) for seed in seeds]
            stage.complete(step, wide)
            d_entering = stage.back(t, step, wide)
            for k, d in stage.d_states(step, wide):
                before = found[k]
                found[k] = d if before is None else before + d
            seeds = [d_entering, *stage.d_carried(step, wide)]
        rest = found[0] if kept is None else kept
        d_h = d_entering if rest is None else d_entering + rest
        others = zip(found[1:], self.d_states[1:], strict=True)
        self.d_states = [d_h, *(torch.zeros_like(like) if d is None else d for d, like in others)]
        if self.call.reset_values:
            self.d_entered.append(self.d_states)
        if self.resets[t] and self.reset is not None:
            self.d_states = [d.masked_fill(self.reset[t], 0.0) for d in self.d_states]
        return made

    def _kept(self, t: int, d_h: Tensor) -> tuple[Tensor, Tensor | None]:
        """The gradient of a projected h, of what the step made and of what it kept."""
        keep = self.keeps[0]
        if keep is None:
            return d_h, None
        own = keep[t][..., : d_h.shape[-1]]
        return d_h.masked_fill(own, 0.0), d_h.masked_fill(~own, 0.0)

    def gradients(self) -> LoopGradients:
        """Of all steps, in the order of time."""
        order, d = self.steering.order, self.d
        d_entered = [torch.stack(each[::-1]) for each in zip(*self.d_entered, strict=True)]
        return LoopGradients(
            reorder(d.gates, order),
            reorder(d.recurrent, order),
            self.d_states,
            d.params if self.program.params else None,
            self.d_w_hr,
            d.norm,
            None if d.products is None else reorder(d.products, order),
            self.steering.d_values(d_entered) if self.d_entered else [],
        )
