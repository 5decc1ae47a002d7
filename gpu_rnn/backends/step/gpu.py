# SPDX-License-Identifier: Apache-2.0
"""The step loop on a GPU: a batched product and one generated Triton kernel a stage, in chunks that are CUDA graphs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from gpu_rnn.backends import building, triton_interpreter
from gpu_rnn.backends.building import Kernel
from gpu_rnn.backends.linear import inputs_over_time, over_steps
from gpu_rnn.backends.problem import Problem
from gpu_rnn.backends.step.controls import StepControls
from gpu_rnn.backends.step.cuda_graphs import Chunks, alone
from gpu_rnn.backends.step.gpu_buffers import BackwardSteps, ForwardSteps, Kind
from gpu_rnn.backends.tensors import Call, LoopGradients, Result, parts, reorder, reorder_each, state_dtype
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
    return narrow and (not projects or _h_only_enters_the_product(program))


def kernels(problem: Problem) -> Iterator[Kernel]:
    """The launches of one step of a problem; none where this loop does not take it."""
    from gpu_rnn.kernels.triton.step import step_backward, step_forward

    if not _fits(problem.dtype, bool(problem.proj_size), problem.program):
        return
    call, gates, _ = building.example(problem)
    back = problem.direction == "backward"
    save = problem.direction == "training"
    kind = Kind.of(call, save, inner=problem.all_states or save)
    loop: Any = (BackwardSteps if back else ForwardSteps)(problem.program, gates, len(gates), kind)
    for steps in filter(None, (loop, loop.projection)):
        for shape, product in zip(steps.shapes, steps.products, strict=True):
            if back:
                yield Kernel(step_backward, steps.grid, steps.arguments(0, shape))
                continue
            entering = loop.of_h.entering if steps is loop else loop.y[0].transpose(0, 1)
            yield Kernel(step_forward, steps.grid, steps.arguments(0, shape, product.batched(entering)))


def _h_only_enters_the_product(program: Program) -> bool:
    """As the h of an LSTM: a projected one has other units than the gates, so that no kernel could read it beside
    them."""
    stage, *others = program.stages
    read = {*stage.outputs, *(arg for op in stage.ops for arg in op.args)}
    return not others and f"s_{program.state_names[0]}" not in read


def _fill(pairs: Pairs, part: slice) -> None:
    for buffer, values in pairs:
        buffer[: part.stop - part.start].copy_(values[part])


def _empty(pairs: Pairs, part: slice) -> None:
    for buffer, values in pairs:
        values[part].copy_(buffer[: part.stop - part.start])


def _control_pairs(loop: ForwardSteps | BackwardSteps, controls: StepControls) -> Iterator[tuple[Tensor, Tensor]]:
    if loop.flags is not None:
        yield loop.flags, controls.after
    if controls.zone is not None:
        for buffer, zone in zip(loop.each_state("zone"), controls.zone, strict=True):
            yield buffer, zone[..., : buffer.shape[-1]]


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
    given = [(loop.gates, gates), *_control_pairs(loop, controls), *_reset_pairs(loop, controls)]
    wanted = [(loop.of_h.y, y), *(zip(loop.inner, inner, strict=True) if kind.inner else ())]
    wanted += [(loop.gates, gates), (loop.recurrent, recurrent)] if save else []
    for part in parts(steps, chunks.chunk):
        _fill(given, part)
        chunks.run(part.stop - part.start)
        _empty(wanted, part)
    final = [state.to(gates.dtype, copy=True) for state in loop.each_state("states")]
    y, inner = controls.output(y), reorder_each(inner, controls.order)
    if not save:
        return Result(y, final, y.new_empty(0), recurrent, inner)
    return Result(y, final, reorder(gates, controls.order), reorder(recurrent, controls.order), inner)


@alone
def backward(call: Call, saved: Result, d_y: Tensor, d_final: list[Tensor], d_inner: Tensor | None) -> LoopGradients:
    """As `step.backward`."""
    program, weights, controls = call.program, call.weights, StepControls.of(call, len(d_y))
    order = controls.order
    before, read, entering = _over_time(call, saved, controls)
    gates, recurrent = reorder(saved.gates, order), reorder(saved.recurrent, order)
    kind = Kind.of(call, inner=d_inner is not None)
    chunks = Chunks.get(
        ("backward", program.text, kind, call.problem.precision),
        lambda count: BackwardSteps(program, gates, count, kind),
        gates,
    )
    loop = chunks.loop
    loop.load(call)
    loop.start(d_final)
    d_gates, d_recurrent = torch.empty_like(gates), torch.empty_like(recurrent)
    d_products = torch.empty_like(gates) if kind.norm else None
    d_norm = torch.zeros_like(weights.norm, dtype=torch.float32) if weights.norm is not None else None
    of_w_hr = None  # the factors of its gradient, (T, B, N, 1, P) and (T, B, N, H)
    if kind.projection:
        of_w_hr = d_y.new_empty(*d_y.shape[:3], 1, kind.projection), entering.pop().to(d_y.dtype)
    d_entered: list[Tensor] = []  # of each state, (T + 1, B, N, ·): before each step, and after the last
    if kind.reset_values:
        d_entered = [state.new_empty(len(d_y) + 1, *state.shape[1:], dtype=torch.float32) for state in before]
    given = [(loop.gates, gates), (loop.recurrent, recurrent), (loop.of_h.d_y, controls.d_output(d_y))]
    given += [*zip(loop.each_state("before"), before, strict=True), *_control_pairs(loop, controls)]
    for buffers, values in zip(loop.values, read, strict=True):
        given += zip(buffers, values, strict=True)
    if d_inner is not None:
        given += zip(loop.d_inner, reorder_each(d_inner, order), strict=True)
    wanted = [(loop.d_gates, d_gates), (loop.d_recurrent, d_recurrent)]
    # At each step: of the next one's.
    wanted += [(buffer, d[1:]) for buffer, d in zip(loop.each_state("d_entered"), d_entered, strict=True)]
    if of_w_hr is not None:
        wanted.append((loop.of_h.d_recurrent, of_w_hr[0]))
    for part in reversed(parts(len(d_y), chunks.chunk)):
        _fill(given, part)
        if d_norm is not None:
            loop.normalise([values[part] for values in entering])
        chunks.run(part.stop - part.start)
        _empty(wanted, part)
        if d_norm is not None and d_products is not None:
            loop.of_norm(d_gates[part], d_recurrent[part], d_products[part], d_norm)
    d_states = loop.finish()
    for d, first in zip(d_entered, d_states, strict=False):
        d[0] = first
    return LoopGradients(
        reorder(d_gates, order),
        reorder(d_recurrent, order),
        controls.d_enter(0, d_states),
        loop.d_params.sum(0) if program.params else None,
        None if of_w_hr is None else over_steps(*of_w_hr).squeeze(1),
        d_norm,
        None if d_products is None else reorder(d_products, order),
        controls.d_values([d[:-1] for d in d_entered]) if d_entered else [],
    )


def _over_time(
    call: Call, saved: Result, controls: StepControls
) -> tuple[list[Tensor], list[list[Tensor]], list[Tensor]]:
    """In processing order: the states before each step, what each stage reads of earlier ones, what enters its product.

    What enters the projection of h, if it has one, stands after what enters the stages.
    """
    program, order, values = call.program, controls.order, inputs_over_time(call, saved)
    before = [reorder(values[f"s_{name}"], order) for name in program.state_names]
    read: list[list[Tensor]] = []
    entering = before[:1]
    for number, stage in enumerate(program.stages):
        read.append([reorder(values[name], order) for name in carried_values(program, number)])
        if number == len(program.stages) - 1 and call.weights.w_hr is None:
            break
        stage.run(values)
        made = reorder(lookup(values, stage.outputs[0], values[program.gate_inputs(stage)[0]]), order)
        entering.append(made if controls.skip is None else torch.where(controls.skip, 0, made))
    return before, read, entering
