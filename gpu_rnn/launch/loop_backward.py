# SPDX-License-Identifier: Apache-2.0
"""The backward loop in torch. What no incoming gradient is needed for is found for a chunk of steps at once.

Not for all steps: on a CPU the tensors of a chunk stay in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpu_rnn.derivative import carried_values
from gpu_rnn.launch.jacobian import ONE, jacobian
from gpu_rnn.launch.loop_forward import parameters, steps_with
from gpu_rnn.launch.multiply import Product, masks, normalised, normalised_back
from gpu_rnn.launch.steering import Steering
from gpu_rnn.layout import Call, LoopGradients, Result, reorder, reorder_each, state_dtype
from gpu_rnn.products import runs
from gpu_rnn.program import Argument, lookup

CPU_CHUNK, GPU_CHUNK = 1 << 16, 1 << 22  # elements (T, B, N, H) of a chunk: 256 KiB a tensor in fp32; fewer launches


def backward(call: Call, saved: Result, d_y: Tensor, d_final: list[Tensor], d_inner: Tensor | None) -> LoopGradients:
    """As `step.backward`."""
    loop = _Loop(call, saved, d_y, d_inner)
    loop.d_states = [d.to(loop.dtype) for d in d_final]
    steps, batch, n, _, hidden = saved.gates.shape
    chunk = max(1, (CPU_CHUNK if d_y.is_cpu else GPU_CHUNK) // max(1, batch * n * hidden))
    for start in reversed(range(0, steps, chunk)):
        loop.run(slice(start, min(start + chunk, steps)))
    return loop.gradients()


class _Terms:
    """The gradients of some of a stage's inputs in one step: sums of partial derivatives times what comes in."""

    def __init__(self, partials: list[list[Tensor | None]], like: Tensor) -> None:
        """`partials`: of each output of the stage, those by each input, (chunk, B, N, H); None for 0."""
        spans = []
        for index, own in enumerate(partials):
            there = [i for i, partial in enumerate(own) if partial is not None]
            if there:
                spans.append((there[-1] + 1 - there[0], index, slice(there[0], there[-1] + 1)))
        self.parts: list[tuple[int, slice, Sequence[Tensor]]] = []
        for _, index, span in sorted(spans, key=lambda found: -found[0]):
            span = span if self.parts else slice(0, len(partials[0]))  # the widest is written first, over everything
            filled = [torch.zeros_like(like) if p is None else p for p in partials[index][span]]
            self.parts.append((index, span, torch.stack(filled, 3).unbind(0)))

    def write(self, step: int, seeds: list[Tensor], out: Tensor) -> None:
        """Into (B, N, inputs, H), of any dtype, for a step of the chunk."""
        if not self.parts:
            out.zero_()
        elif out.dtype == seeds[0].dtype:
            self.sum(step, seeds, out)
        else:
            out.copy_(self.sum(step, seeds))

    def sum(self, step: int, seeds: list[Tensor], out: Tensor | None = None) -> Tensor:
        (index, _, partials), *others = self.parts
        found = torch.mul(partials[step], seeds[index].unsqueeze(2), out=out)
        for index, span, partials in others:
            found[:, :, span].addcmul_(partials[step], seeds[index].unsqueeze(2))
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
        self.stage, self.jacobian, self.d = program.stages[number], jacobian(program, number), d
        self.split = [gate for gate in program.gates[rows] if gate not in program.summed]
        self.gate_names = [f"{'a' if gate in program.summed else 'x'}_{gate}" for gate in program.gates[rows]]
        self.states = [f"s_{name}" for name in program.state_names]
        self.params = [f"p_{name}" for name in program.params]
        self.carried = list(carried_values(program, number))
        # The outputs of the last stage are the states, which masked steps and zoneout keep.
        last = number == len(program.stages) - 1
        self.same = self.states if last else [""] * len(self.jacobian.partials)
        if last and weights.w_hr is not None:
            self.same = ["", *self.states[1:]]
        found = list(runs(program, rows, d.gates, d.recurrent))
        self.sources = [source for _, source in found]
        self.scale = None
        if weights.norm is not None and d.products is not None:
            self.scale = weights.norm[:, rows].to(d.params.dtype)
            found = [(rows, d.products[:, :, :, rows])]
        self.products = [Product(weights.w_hh[:, which], masks(call.control.drop, which)) for which, _ in found]
        self.d_products = [source.unbind(0) for _, source in found]
        self.d_gates = d.gates[:, :, :, rows].unbind(0)
        first = program.split.index(self.split[0]) if self.split else 0
        self.d_recurrent = d.recurrent[:, :, :, first : first + len(self.split)].unbind(0)

    @property
    def reads(self) -> set[str]:
        """The names of all values that it takes."""
        args = {arg for op in (*self.stage.ops, *self.jacobian.ops) for arg in op.args}
        return {str(name) for name in args.union(*(own.values() for own in self.jacobian.partials))}

    def prepare(self, values: dict[str, Any], like: Tensor, entering: Tensor, keeps: list[Tensor | None]) -> None:
        """The partial derivatives at the steps of a chunk; `keeps` as `Steering.keeps`, of each output."""
        self.stage.run(values)
        self.jacobian.run(values)

        def terms(names: list[str]) -> _Terms:
            outputs = zip(self.jacobian.partials, keeps, self.same, strict=True)
            return _Terms([[_partial(own.get(n), values, like, keep, n == same) for n in names] for own, keep, same in outputs], like)

        self.to_gates, self.to_recurrent = terms(self.gate_names), terms([f"r_{gate}" for gate in self.split])
        self.to_params, self.to_carried = terms(self.params), terms(self.carried)
        reached = {name for own in self.jacobian.partials for name in own}
        if any(keep is not None for keep in keeps):
            reached.update(self.same)
        self.reached = [name for name in self.states if name in reached]
        self.to_states = terms(self.reached)
        self.d_params = like.new_zeros(len(like), *like.shape[1:3], len(self.params), like.shape[3])
        if self.scale is not None:
            self.raw = self.products[0].over_time(entering).to(like.dtype).contiguous()
            self.unscaled, self.mean, self.rstd = normalised(self.raw)

    def back(self, t: int, step: int, seeds: list[Tensor]) -> Tensor:
        """Writes what belongs to step t, number `step` of the chunk; returns the gradient of what entered."""
        self.to_gates.write(step, seeds, self.d_gates[t])
        if self.split:
            self.to_recurrent.write(step, seeds, self.d_recurrent[t])
        if self.params:
            self.to_params.write(step, seeds, self.d_params[step])
        if self.scale is not None:
            d = torch.cat([source[t] for source in self.sources], 2) * self.scale
            self.d_products[0][t].copy_(normalised_back(d, self.raw[step], self.mean[step], self.rstd[step]))
        d_entering, *others = (p.back(of[t]) for p, of in zip(self.products, self.d_products, strict=True))
        for other in others:
            d_entering = d_entering + other
        return d_entering.to(seeds[0].dtype)

    def d_states(self, step: int, seeds: list[Tensor]) -> dict[str, Tensor]:
        """The gradients of the states before the step, other than through the product."""
        if not self.to_states.parts:
            return {}
        return dict(zip(self.reached, self.to_states.sum(step, seeds).unbind(2), strict=True))

    def d_carried(self, step: int, seeds: list[Tensor]) -> Sequence[Tensor]:
        """Those of the values of earlier stages."""
        return self.to_carried.sum(step, seeds).unbind(2) if self.carried else ()

    def finish(self, part: slice) -> None:
        """Adds what a chunk gives for the weights."""
        self.d.params.add_(self.d_params.sum((0, 1)))
        if self.d.norm is not None:
            d = torch.cat([source[part] for source in self.sources], 3)
            self.d.norm[:, self.rows] += (d * self.unscaled).sum((0, 1))


def _partial(name: Argument | None, values: dict[str, Any], like: Tensor, keep: Tensor | None, same: bool) -> Tensor | None:
    """One partial derivative, (chunk, B, N, H); where a unit keeps its state, 1 of the same state and 0 of all others."""
    if name is None:
        return keep.to(like.dtype).expand(like.shape) if same and keep is not None else None
    value = lookup(values, name, like)
    return value if keep is None else torch.where(keep, float(same), value)


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
        self.reset, self.keeps = steering.reset, steering.keeps
        self.resets = steps_with(self.reset, len(d_y))
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
            share = torch.einsum("tbnp,tbnh->nph", torch.stack(d_new[::-1]), h)
            self.d_w_hr = share if self.d_w_hr is None else self.d_w_hr + share

    def _prepare(self, part: slice) -> Tensor | None:
        """The partial derivatives; returns h of all steps before its projection, if it has one."""
        program, values = self.program, self._values(part)
        skip = None if self.steering.skip is None else self.steering.skip[part]
        like = values[self.stages[0].gate_names[0]]
        projected = self.call.weights.w_hr is not None
        keeps = [skip if projected and k == 0 else keep if keep is None else keep[part] for k, keep in enumerate(self.keeps)]
        entering = values.get(f"s_{program.state_names[0]}", like)  # read by a normalisation only
        for number, stage in enumerate(self.stages):
            last = number == len(self.stages) - 1
            stage.prepare(values, like, entering, keeps if last else [skip] * len(stage.same))
            entering = lookup(values, stage.stage.outputs[0], like)
            entering = entering if skip is None else torch.where(skip, 0.0, entering)
        return entering if projected else None

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
            seeds[0] = torch.bmm(made.to(self.gates.dtype).transpose(0, 1), self.call.weights.w_hr).transpose(0, 1).to(self.dtype)
        found: dict[str, Tensor] = {}
        for stage in reversed(self.stages):
            d_entering = stage.back(t, step, seeds)
            for name, d in stage.d_states(step, seeds).items():
                found[name] = found[name] + d if name in found else d
            seeds = [d_entering, *stage.d_carried(step, seeds)]
        first, *names = self.program.state_names
        through = kept if self.call.weights.w_hr is not None else found.get(f"s_{first}")
        d_h = d_entering if through is None else d_entering + through
        self.d_states = [d_h, *(found.get(f"s_{name}", torch.zeros_like(self.d_states[1])) for name in names)]
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
