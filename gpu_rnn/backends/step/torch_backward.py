# SPDX-License-Identifier: Apache-2.0
"""The backward loop in torch. What no incoming gradient is needed for is found for a chunk of steps at once.

Not for all steps: on a CPU the tensors of a chunk stay in the cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gpu_rnn.backends.linear import of_projection
from gpu_rnn.backends.normalisation import Normalised
from gpu_rnn.backends.step.controls import StepControls, selected, steps_with, words
from gpu_rnn.backends.step.stage_gradients import StageGradients, WrittenGradients
from gpu_rnn.backends.step.torch_forward import parameters
from gpu_rnn.backends.tensors import Call, LoopGradients, Result, chunks, reorder, reorder_each, state_dtype
from gpu_rnn.compiler.program import lookup


def backward(call: Call, saved: Result, d_y: Tensor, d_final: list[Tensor], d_inner: Tensor | None) -> LoopGradients:
    """As `step.backward`."""
    loop = _BackwardLoop(call, saved, d_y, d_inner)
    loop.d_states = [d.to(loop.dtype) for d in d_final]
    for part in reversed(chunks(saved.gates)):
        loop.run(part)
    return loop.gradients()


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
        # Without gaps, however the saved ones lie: the loop reads what it has written by flat views.
        self.d = WrittenGradients(
            self.gates.new_empty(self.gates.shape),
            self.recurrent.new_empty(self.recurrent.shape),
            None if scales is None else self.gates.new_empty(self.gates.shape),
            [torch.zeros_like(like, dtype=self.dtype) for _ in program.params],
            self.dtype,
        )
        self.stages = [StageGradients(call, number, self.d) for number in range(len(program.stages))]
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
        # By way of uint8: `to` of bool takes six times as long on a CPU.
        self.kept = [keep.view(torch.uint8).to(self.dtype).unbind(0) for keep in kept]
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
            share = of_projection(torch.stack(d_new[::-1]), h)
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
        d_entered: list[Tensor | None] = [None] * len(seeds)
        for stage in reversed(self.stages):
            d_entering = stage.back(t, step, seeds)
            for k, d in stage.d_states(step, seeds):
                before = d_entered[k]
                d_entered[k] = d if before is None else before.add_(d)
            seeds = [d_entering, *stage.d_carried(step, seeds)]
        d_entered[0] = d_entering if d_entered[0] is None else d_entering.add_(d_entered[0])
        d_states = [torch.zeros_like(like) if d is None else d for d, like in zip(d_entered, incoming, strict=True)]
        self._enter(t, d_states, incoming)
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
