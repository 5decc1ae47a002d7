# SPDX-License-Identifier: Apache-2.0
"""The short way of a layer in training on a loop that is not in C: one function for each pass, of its weights as they
come. What follows from shapes and settings alone is found once, in a `LoopPlan`.

Whoever wants more of the backward pass than first derivatives goes on in `gpu_rnn.call.autograd`, on the same backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpu_rnn.backends import ADDS_B_HH, KERNELS, LOOPS, linear
from gpu_rnn.backends.normalisation import Normalised
from gpu_rnn.backends.problem import Problem
from gpu_rnn.backends.tensors import FIRST_STATE, PLAIN, Call, Inputs, LayerControls, Result, Weights, all_in_memory
from gpu_rnn.call import autograd, passes, second_order
from gpu_rnn.call.passes import Options
from gpu_rnn.call.stack import Stack
from gpu_rnn.compiler.program import Program
from gpu_rnn.dispatch import choice


class LoopPlan(NamedTuple):
    """What every call of a kind of layer needs in training."""

    text: str
    options: Options
    program: Program
    dtype: torch.dtype
    names: tuple[str, ...]  # of the weights, as in `Weights`
    shapes: tuple[tuple[int, ...], ...]  # theirs in canonical layout
    there: Problem
    back: Problem
    loops: tuple[str, str]  # of each pass
    joined: bool
    matrices: bool  # the gradients of weights are those of `linear.of_one`

    def apart(self, tensors: Sequence[Any]) -> tuple[Any, Sequence[Any], Sequence[Any], Sequence[Any]]:
        """x, the states, the weights and the values of resets."""
        first = 1 + len(self.program.states)
        last = first + len(self.names)
        return tensors[0], tensors[1:first], tensors[first:last], tensors[last:]

    def weights(self, each: Sequence[Tensor]) -> Weights:
        """In canonical layout; `each` is as `Stack.of_layer` has them."""
        views = [weight.view(shape) for weight, shape in zip(each, self.shapes, strict=True)]
        return Weights(**dict(zip(self.names, views, strict=True)))

    def rows_first(self, states: Sequence[Tensor]) -> list[Tensor]:
        """(B, N, ·) of states like them, or of one recurrence (1, B, ·)."""
        return [state.transpose(0, 1) for state in states] if self.there.N == 1 else list(states)

    def call(self, problem: Problem, tensors: Sequence[Any], controls: LayerControls, joined: bool) -> Call:
        _, states, weights, resets = self.apart(tensors)
        entering, named = self.rows_first(states), self.weights(weights)
        fixed = self.options.reverse, problem, joined
        return Call(self.program, named, entering, controls, list(resets), *fixed, rms=self.options.rms)

    def gradients_as_given(self, grads: Sequence[Any], tensors: Sequence[Tensor]) -> list[Tensor | None]:
        """Of the gradients of x, of all of `Weights`, of the states (B, N, ·) and of the values of resets those of
        `tensors`, in their shapes."""
        weights, rest = dict(zip(Weights._fields, grads[1:], strict=False)), grads[1 + len(Weights._fields) :]
        count = len(self.program.states)
        each = [grads[0], *self.rows_first(rest[:count]), *(weights[name] for name in self.names), *rest[count:]]
        return [d if d is None else d.reshape(t.shape).to(t.dtype) for d, t in zip(each, tensors, strict=True)]


def made(stack: Stack, problem: Problem, weights: Sequence[Tensor], zeros: bool) -> tuple[LoopPlan, LoopPlan] | None:
    """Of the lowest layer and of those above it, for a call of a stack that runs layer after layer; None where one of
    them does not run on a loop of its own. `zeros` as in `Options`."""
    text = stack.recurrence.text(stack.recurrence.identity)
    width = stack.directions * (problem.proj_size or problem.H)
    plans = []
    for number, features in enumerate((problem.I, width)[: stack.num_layers]):
        there = problem.but(layers=1, I=features)
        back = there.but(direction="backward")
        loops = choice.select(there, stack.backend, LOOPS), choice.select(back, stack.backend, LOOPS)
        if "reference" in loops:
            return None
        gates, n = len(stack.recurrence.gates), problem.N
        lead = (n, gates, problem.H)
        of_layer = stack.of_layer(weights, number)
        shapes = [
            (n, *weight.shape[-2:])
            if name in ("w_hr", "params")
            else (*lead, *weight.shape[-1:] * name.startswith("w_"))
            for name, weight in zip(stack.weight_names, of_layer, strict=True)
        ]
        special = there.drop or there.norm or there.proj_size or problem.program.split or not there.bias
        options = Options(stack.backend, stack.reverse, True, stack.all_states, True, zeros, stack.rms)
        plan = LoopPlan(
            text,
            options,
            problem.program,
            problem.dtype,
            stack.weight_names,
            tuple(shapes),
            there,
            back,
            loops,
            not ADDS_B_HH[loops[0]](there),
            n == 1 and len(problem.program.stages) == 1 and not special,
        )
        plans.append(plan)
    return plans[0], plans[-1]


def run(plan: LoopPlan, controls: LayerControls, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """y (T, B, N·P), the final states, laid out as those given, and, where all are wanted, the others of all steps: of
    x, its states, its weights and the values of resets."""
    apply = _OnLoop.apply if autograd.outlived(tensors) else ON_LOOP
    return apply(plan, controls, *tensors)


class _OnLoop(torch.autograd.Function):
    """(plan, controls, x, *states, *weights, *values of resets) -> what `run` returns."""

    @staticmethod
    def forward(ctx: Any, plan: LoopPlan, controls: LayerControls, *tensors: Tensor) -> tuple[Tensor, ...]:
        call = plan.call(plan.there, tensors, controls, plan.joined)
        result = passes.forward_on(plan.loops[0], call, tensors[0], True, plan.options.all_states, True)
        y, final = _in_one_axis(result.y), result.final
        if plan.there.N == 1:
            final = [state.transpose(0, 1).clone() if state._is_view() else state.transpose_(0, 1) for state in final]
        steering = () if controls is PLAIN else controls
        ctx.plan, ctx.tensors, ctx.controls = plan, len(tensors), len(steering)
        ctx.save_for_backward(*tensors, *steering, y, result.gates, result.recurrent, result.inner, *result.kept or ())
        ctx.set_materialize_grads(False)
        return (y, *final, result.inner) if plan.options.all_states else (y, *final)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        every, after = ctx.saved_tensors, ctx.tensors + ctx.controls
        controls = LayerControls(*every[ctx.tensors : after]) if ctx.controls else PLAIN
        given = ctx.plan, every[: ctx.tensors], controls, every[after:], grads, ctx.needs_input_grad[2]
        if second_order.needs_operations(grads) or autograd.outlived((*every, *grads)):
            return None, None, *_by_operations(*given)
        return None, None, *_by_loop(*given)


ON_LOOP = super(torch.autograd.Function, _OnLoop).apply  # as `autograd.APPLY`


def _in_one_axis(y: Tensor) -> Tensor:
    """(T, B, N·P) of a loop's own (T, B, N, P): no view, as the outputs of an operation with several may be changed in
    place only where they are none."""
    steps, batch, n, width = y.shape
    y = y.clone(memory_format=torch.contiguous_format) if y._is_view() or not y.is_contiguous() else y
    return y.as_strided_((steps, batch, n * width), (batch * n * width, n * width, 1))


def _saved(plan: LoopPlan, every: Sequence[Tensor]) -> Result:
    """In canonical layout."""
    y, gates, recurrent, inner, *kept = every
    y = y.view(*y.shape[:2], plan.there.N, -1)
    return Result(y, [], gates, recurrent, inner, Normalised(*kept) if kept else None)


def _incoming(plan: LoopPlan, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The gradients of y (T, B, N, P), of the final states (B, N, ·) and perhaps of the others of all steps."""
    d_y, *others = grads
    d_y = d_y if d_y is None else d_y.view(*d_y.shape[:2], plan.there.N, -1)
    if plan.there.N > 1:
        return [d_y, *others]
    count = len(plan.program.states)
    return [d_y, *(d if d is None else d.transpose(0, 1) for d in others[:count]), *others[count:]]


def _by_operations(
    plan: LoopPlan,
    tensors: Sequence[Tensor],
    controls: LayerControls,
    every: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    of_x: bool,
) -> list[Tensor | None]:
    """With derivatives, rules for transforms, and seen by those who look on."""
    _, states, weights, resets = plan.apart(tensors)
    inputs = Inputs(tensors[0], plan.weights(weights), controls, plan.rows_first(states), list(resets))
    saved = _saved(plan, every)
    row = autograd.pulled_back(plan.text, plan.options, inputs.row, saved.y, saved.saved, _incoming(plan, grads), of_x)
    return plan.gradients_as_given([*row[: 1 + len(Weights._fields)], *row[FIRST_STATE:]], tensors)


def _by_loop(
    plan: LoopPlan,
    tensors: Sequence[Tensor],
    controls: LayerControls,
    every: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    of_x: bool,
) -> list[Tensor | None]:
    """First derivatives."""
    saved, name, x = _saved(plan, every), plan.loops[1], tensors[0]
    call = plan.call(plan.back, tensors, controls, True)
    likes = [saved.y, *call.states, *[saved.inner] * plan.options.all_states]
    zeros = call.states if plan.options.zeros else ()
    d_y, *d_final = all_in_memory(autograd.completed(_incoming(plan, grads), likes, zeros))
    d_inner = d_final.pop() if plan.options.all_states else None
    with passes.arithmetic(plan.back.precision, x):
        with passes.named(f"gpu_rnn::{name}_backward"):
            loop = KERNELS[name].backward(call, saved, d_y, d_final, d_inner)
        if not plan.matrices:
            d_x, d_weights = linear.gradients(call, x, saved, loop, of_x)
            return plan.gradients_as_given([d_x, *d_weights, *loop.d_states, *loop.d_resets], tensors)
        over_time = x, linear.entered(call, saved, 0), loop.d_gates, loop.d_recurrent
        inputs, before, d_gates, d_split = [t.flatten(0, 1).flatten(1) for t in over_time]
        w_ih = plan.apart(tensors)[2][0]
        d_x, by_name = linear.of_one(plan.program, inputs, before, d_gates, d_split, w_ih, of_x)
    d_weights = Weights(**by_name, params=loop.d_params)
    return plan.gradients_as_given([d_x, *d_weights, *loop.d_states, *loop.d_resets], tensors)
