# SPDX-License-Identifier: Apache-2.0
"""The step loop on a GPU: a batched product and one generated Triton kernel a stage, in chunks that are CUDA graphs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from gpu_rnn.backends import building, triton_interpreter
from gpu_rnn.backends.building import TritonLaunch
from gpu_rnn.backends.linear import inputs_over_time, over_steps
from gpu_rnn.backends.problem import Problem
from gpu_rnn.backends.step.controls import StepControls
from gpu_rnn.backends.step.cuda_graphs import Chunks, alone
from gpu_rnn.backends.step.gpu_buffers import BackwardSteps, ForwardSteps, Kind
from gpu_rnn.backends.tensors import Call, LoopGradients, Result, reorder, reorder_each, state_dtype
from gpu_rnn.compiler.derivative import carried_values
from gpu_rnn.compiler.program import Program, lookup

Pairs = Sequence[tuple[Tensor, Tensor]]  # a buffer (steps, ...) and what it holds a chunk of, (T, ...)


def takes(gates: Tensor, call: Call) -> bool:
    """Whether this loop takes a call: on a GPU with Triton, or in its interpreter; the rest goes to the loop in
    torch."""
    on_device = triton_interpreter.INTERPRETING or (gates.is_cuda and find_spec("triton") is not None)
    return on_device and _fits(gates.dtype, call.weights.w_hr is not None, call.program)


def _fits(dtype: torch.dtype, projects: bool, program: Program) -> bool:
    narrow = dtype in (torch.float16, torch.bfloat16, torch.float32)
    return narrow and (not projects or program.h_only_enters_the_product)


def launches(problem: Problem) -> Iterator[TritonLaunch]:
    """The launches of one step of a problem; none where this loop does not take it."""
    from gpu_rnn.kernels.triton.step import step_backward, step_forward

    if not _fits(problem.dtype, bool(problem.proj_size), problem.program):
        return
    call, gates, _ = building.example(problem)
    inner = problem.all_states or problem.direction == "training"
    kind = Kind.of(call, problem.saves_gates, inner)
    if problem.direction == "backward":
        backward = BackwardSteps(problem.program, gates, len(gates), kind)
        for steps in filter(None, (backward, backward.projection)):
            for shape in steps.shapes:
                yield TritonLaunch(step_backward, steps.grid, steps.arguments(0, shape))
        return
    forward = ForwardSteps(problem.program, gates, len(gates), kind)
    for steps in filter(None, (forward, forward.projection)):
        entering = forward.of_h.entering if steps is forward else forward.y[0].transpose(0, 1)
        for shape, product in zip(steps.shapes, steps.products, strict=True):
            yield TritonLaunch(step_forward, steps.grid, steps.arguments(0, shape, product.batched(entering)))


def _fill(pairs: Pairs, part: slice) -> None:
    for buffer, values in pairs:
        buffer[: part.stop - part.start].copy_(values[part])


def _empty(pairs: Pairs, part: slice) -> None:
    for buffer, values in pairs:
        values[part].copy_(buffer[: part.stop - part.start])


def _control_pairs(loop: ForwardSteps | BackwardSteps, controls: StepControls) -> Iterator[tuple[Tensor, Tensor]]:
    if loop.flags is not None:
        yield loop.flags, controls.after
    for name, of_states in controls.of_states.items():
        for buffer, values in zip(loop.each_state(name), of_states, strict=True):
            yield buffer, values[..., : buffer.shape[-1]]


def _reset_pairs(loop: ForwardSteps, controls: StepControls) -> Iterator[tuple[Tensor, Tensor]]:
    """What the states are reset to after each step; values that are the same at all steps are filled in here."""
    if loop.reset is None:
        return
    for buffer, value in zip(loop.each_state("reset"), controls.values, strict=True):
        if isinstance(value, float):
            buffer.fill_(value)
        elif len(value) == 1:
            buffer.copy_(value)
        else:
            yield buffer, torch.cat([value[1:], value[:1]])


@alone
def forward(call: Call, gates: Tensor, save: bool, all_states: bool) -> Result:
    """As `step.forward`."""
    program, controls = call.program, StepControls.of(call, len(gates))
    steps, batch, n, _, hidden = gates.shape
    gates = reorder(gates, controls.order)
    kind = Kind.of(call, save, save or all_states)
    chunks = Chunks.get(
        ("forward", program.text, kind, call.problem.precision),
        lambda count: ForwardSteps(program, gates, count, kind),
        gates,
    )
    loop = chunks.loop
    loop.load(call)
    loop.start(controls.enter(0, call.states))
    y = gates.new_empty(steps, *call.states[0].shape)
    recurrent = gates.new_empty(steps, batch, n, len(program.split), hidden) if save else gates.new_empty(0)
    inner = gates.new_empty(0, dtype=state_dtype(y.dtype))
    if kind.inner:
        inner = inner.new_empty(len(call.states) - 1, steps, batch, n, hidden)
    inputs = [(loop.gates, gates), *_control_pairs(loop, controls), *_reset_pairs(loop, controls)]
    outputs = [(loop.of_h.y, y)]
    outputs += [] if loop.inner is None else zip(loop.inner, inner, strict=True)
    outputs += [(loop.gates, gates), (loop.recurrent, recurrent)] if save else []
    for part in chunks.parts(steps):
        _fill(inputs, part)
        chunks.run(part.stop - part.start)
        _empty(outputs, part)
    final = [state.to(gates.dtype, copy=True) for state in loop.each_state("states")]
    y, inner = controls.output(y), reorder_each(inner, controls.order)
    if not save:
        return Result(y, final, y.new_empty(0), recurrent, inner)
    return Result(y, final, reorder(gates, controls.order), reorder(recurrent, controls.order), inner)


class _Saved(NamedTuple):
    """What a backward loop reads of the forward pass, in processing order, (T, B, N, ·)."""

    gates: Tensor
    recurrent: Tensor
    before: list[Tensor]  # each state, before each step
    carried: list[list[Tensor]]  # what each stage reads of earlier ones
    entering: list[Tensor]  # what enters the product of each stage
    projected: Tensor | None  # what enters the projection of h

    @staticmethod
    def of(call: Call, saved: Result, controls: StepControls) -> _Saved:
        program, order, values = call.program, controls.order, inputs_over_time(call, saved)
        before = [reorder(values[f"s_{name}"], order) for name in program.state_names]
        carried: list[list[Tensor]] = []
        made: list[Tensor] = []
        for number, stage in enumerate(program.stages):
            carried.append([reorder(values[name], order) for name in carried_values(program, number)])
            if number == len(program.stages) - 1 and call.weights.w_hr is None:
                break
            stage.run(values)
            output = reorder(lookup(values, stage.outputs[0], values[program.gate_inputs(stage)[0]]), order)
            made.append(output if controls.skip is None else torch.where(controls.skip, 0, output))
        projected = None if call.weights.w_hr is None else made.pop()
        gates, recurrent = reorder(saved.gates, order), reorder(saved.recurrent, order)
        return _Saved(gates, recurrent, before, carried, [before[0], *made], projected)


class _GradientsOverTime:
    """What a backward loop makes, in processing order."""

    def __init__(self, saved: _Saved, kind: Kind, norm: Tensor | None) -> None:
        batch_shape = saved.gates.shape[:3]
        self.gates, self.recurrent = torch.empty_like(saved.gates), torch.empty_like(saved.recurrent)
        self.products = None if norm is None else torch.empty_like(saved.gates)
        self.norm = None if norm is None else torch.zeros_like(norm, dtype=torch.float32)
        self.projected = saved.gates.new_empty(*batch_shape, 1, kind.projection) if kind.projection else None
        # Of each state, (T + 1, B, N, ·): before each step, and after the last.
        self.entered: list[Tensor] = []
        if kind.reset_values:
            size = len(saved.gates) + 1
            self.entered = [each.new_empty(size, *each.shape[1:], dtype=torch.float32) for each in saved.before]

    def buffers(self, loop: BackwardSteps) -> Iterator[tuple[Tensor, Tensor]]:
        """Those of the loop, each with what takes its values."""
        yield loop.d_gates, self.gates
        yield loop.d_recurrent, self.recurrent
        for buffer, d in zip(loop.each_state("d_entered"), self.entered, strict=True):
            yield buffer, d[1:]  # at each step that of the next one
        if self.projected is not None:
            yield loop.of_h.d_recurrent, self.projected

    def add_norm(self, loop: BackwardSteps, part: slice) -> None:
        """Those of the products of a chunk before their normalisation, and their share of those of the scales."""
        if self.norm is not None and self.products is not None:
            loop.of_norm(self.gates[part], self.recurrent[part], self.products[part], self.norm)

    def finished(
        self, d_states: list[Tensor], d_params: Tensor | None, saved: _Saved, controls: StepControls
    ) -> LoopGradients:
        """In the order of time; `d_states` those of the states that the first step entered with."""
        for d, first in zip(self.entered, d_states, strict=False):
            d[0] = first
        d_w_hr = None
        if self.projected is not None and saved.projected is not None:
            d_w_hr = over_steps(self.projected, saved.projected.to(self.projected.dtype)).squeeze(1)
        order = controls.order
        return LoopGradients(
            reorder(self.gates, order),
            reorder(self.recurrent, order),
            controls.d_enter(0, d_states),
            d_params,
            d_w_hr,
            self.norm,
            None if self.products is None else reorder(self.products, order),
            controls.d_values([d[:-1] for d in self.entered]) if self.entered else [],
        )


def _backward_inputs(
    loop: BackwardSteps, saved: _Saved, controls: StepControls, d_y: Tensor, d_inner: Tensor | None
) -> Iterator[tuple[Tensor, Tensor]]:
    yield loop.gates, saved.gates
    yield loop.recurrent, saved.recurrent
    yield loop.of_h.d_y, controls.d_output(d_y)
    yield from zip(loop.each_state("before"), saved.before, strict=True)
    yield from _control_pairs(loop, controls)
    for buffers, values in zip(loop.values, saved.carried, strict=True):
        yield from zip(buffers, values, strict=True)
    if loop.d_inner is not None and d_inner is not None:
        yield from zip(loop.d_inner, reorder_each(d_inner, controls.order), strict=True)


@alone
def backward(call: Call, saved: Result, d_y: Tensor, d_final: list[Tensor], d_inner: Tensor | None) -> LoopGradients:
    """As `step.backward`."""
    program, controls = call.program, StepControls.of(call, len(d_y))
    ordered, kind = _Saved.of(call, saved, controls), Kind.of(call, inner=d_inner is not None)
    chunks = Chunks.get(
        ("backward", program.text, kind, call.problem.precision),
        lambda count: BackwardSteps(program, ordered.gates, count, kind),
        ordered.gates,
    )
    loop, d = chunks.loop, _GradientsOverTime(ordered, kind, call.weights.norm)
    loop.load(call)
    loop.start(d_final)
    inputs, outputs = [*_backward_inputs(loop, ordered, controls, d_y, d_inner)], [*d.buffers(loop)]
    for part in reversed(chunks.parts(len(d_y))):
        _fill(inputs, part)
        if kind.norm:
            loop.normalise([values[part] for values in ordered.entering])
        chunks.run(part.stop - part.start)
        _empty(outputs, part)
        d.add_norm(loop, part)
    d_params = loop.d_params.sum(0) if program.params else None
    return d.finished(loop.finish(), d_params, ordered, controls)
