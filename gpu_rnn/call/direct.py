# SPDX-License-Identifier: Apache-2.0
"""The short way of layers that run as the time loop in C, and of all loops in training: one function for each pass of a
layer.

What a call goes by is asked once for all calls that are alike. Whoever looks on, transforms or records takes the way of
`gpu_rnn.call.autograd`, which computes the same; so do second derivatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_rnn import environment, memo
from gpu_rnn.backends import precision
from gpu_rnn.backends.native import building, limits
from gpu_rnn.backends.native import direct as native
from gpu_rnn.backends.problem import Problem
from gpu_rnn.backends.tensors import PLAIN, Inputs, LayerControls, all_dense, counted, dense, readable, state_dtype
from gpu_rnn.call import loop_plan, onlookers, second_order, transforms
from gpu_rnn.call.controls import NONE, StackControls
from gpu_rnn.call.loop_plan import LoopPlan
from gpu_rnn.call.stack import Stack, States
from gpu_rnn.dispatch import choice

MOST_LAYER_PLANS = 1024  # of calls whose plan is kept

ShortPlan = native.LayerPlan | LoopPlan
ShortPlans = tuple[ShortPlan, ShortPlan]  # of the lowest layer, and of those above it

_plans: dict[tuple[Any, ...], ShortPlans | None] = memo.hold(f"{__name__}: plans", {}, MOST_LAYER_PLANS)


def run(
    stack: Stack, x: Tensor, hx: States | None, weights: Sequence[Tensor], controls: StackControls = NONE
) -> tuple[Tensor, States, States] | None:
    """y, the final states and, if wanted, those of all steps as `loops.run` has them, or None where the call goes
    another way.

    It is not packed nor recorded, and autocast is off.
    """
    tensors = (x, *(hx or ()), *weights, *(controls.reset_state or ()))
    steering = () if controls is NONE else controls.of_steps
    if onlookers.watched((*tensors, *steering)) or transforms.active():
        return None
    grad = torch.is_grad_enabled() and True in [t.requires_grad for t in tensors]
    plans = _found(stack, x, hx, weights, controls, grad)
    if plans is None or not readable(tensors, x.dtype, x.device):
        return None
    wide, dtype = plans[0].dtype, x.dtype
    if type(plans[0]) is not LoopPlan and torch.autograd._profiler_enabled():  # a loop in C has no name to be seen
        return None
    if dtype != wide:
        x, *weights = [t.to(wide) for t in (x, *weights)]
        hx = hx and tuple(state.to(wide) for state in hx)
    states = hx or stack.initial(x, weights, x.shape[0 if stack.batch_first else 1])
    y, final, every = _layers(plans, stack, x, states, weights, controls, grad)
    if dtype == wide:
        return y, final, every
    return y.to(dtype), tuple([state.to(dtype) for state in final]), tuple([state.to(dtype) for state in every])


def _layers(
    plans: ShortPlans,
    stack: Stack,
    x: Tensor,
    states: States,
    weights: Sequence[Tensor],
    controls: StackControls,
    grad: bool,
) -> tuple[Tensor, States, States]:
    y, valid, flags, directions = x.transpose(0, 1) if stack.batch_first else x, None, None, stack.directions
    if controls is not NONE:
        controls, steps, in_c = controls.to(plans[0].dtype), y.shape[0], type(plans[0]) is not LoopPlan
        flags = controls.flags(stack.reverse, steps, stack.all_states)
        if stack.all_states or not in_c:  # else the loop's y is 0 at steps that do not count
            valid = controls.valid(steps)
        y = y if in_c else counted(y, valid)  # what stands in the padding, NaN too, must not reach a gradient
    final, every = [], []
    for number in range(stack.num_layers):
        if number and stack.dropout:
            y = F.dropout(y, stack.dropout)
        rows = slice(number * directions, (number + 1) * directions)
        entering = states if stack.num_layers == 1 else [state[rows] for state in states]
        steering, resets = (PLAIN, []) if controls is NONE else controls.of_layer(rows, stack.reverse, len(y), flags)
        of_layer = stack.of_layer(weights, number)
        if directions == 2:
            entering = [state.transpose(0, 1) for state in entering]
        y, *leaving = _layer(plans[number > 0], stack, steering, grad, y, *entering, *of_layer, *resets)
        inner = leaving.pop() if stack.all_states else None
        final.append([state.transpose(0, 1) for state in leaving] if directions == 2 else leaving)
        if inner is not None:
            of_h = y.unflatten(2, (directions, -1))
            every.append([state.transpose(1, 2) for state in (of_h, *inner.to(y.dtype).unbind(0))])
    joined = final[0] if stack.is_one_layer else map(torch.cat, zip(*final, strict=True))
    y = y if valid is None else controls.silenced(y, valid, stack.all_states)
    of_all = tuple(torch.cat(parts, 1) for parts in zip(*every, strict=True))
    return y.transpose(0, 1) if stack.batch_first else y, tuple(joined), of_all


def _found(
    stack: Stack, x: Tensor, hx: States | None, weights: Sequence[Tensor], controls: StackControls, grad: bool
) -> ShortPlans | None:
    """What the calls of a kind need; None where there is no short way of what dispatch chooses."""
    if choice.on_trial():
        return _chosen(stack, x, hx, weights, controls, grad)
    shapes = [t.shape for t in (x, *(hx or ()), *weights)]
    steering = () if controls is NONE else tuple(controls.described(False, stack.all_states).values())
    settings = environment.of_calls(), precision.of_rnn(), torch.get_num_threads(), memo.Age.now
    kind = stack.as_key, x.dtype, x.device, grad, settings, steering, *shapes
    plans = _plans.get(kind, memo.ABSENT)
    if plans is memo.ABSENT:
        plans = memo.put(_plans, kind, _chosen(stack, x, hx, weights, controls, grad), MOST_LAYER_PLANS)
    return plans


def _chosen(
    stack: Stack, x: Tensor, hx: States | None, weights: Sequence[Tensor], controls: StackControls, grad: bool
) -> ShortPlans | None:
    problem = stack.problem(x, hx, weights, None, controls)
    if problem.reverse not in ("0", "01") or problem.transforms or problem.rebuilds or problem.B == 0:
        return None
    chosen = choice.select(problem, stack.backend)
    shapes = [*(stack.state_shapes(weights, problem.B) if hx else ()), *stack.weight_shapes(problem.I, problem.H)]
    if [t.shape for t in (*(hx or ()), *weights)] != shapes:
        return None  # the long way has the words
    if chosen == "native":
        return _in_c(stack, problem, grad)
    if not grad or chosen == "aten" or choice.on_trial() or choice.staggers(problem, stack.backend):
        return None
    return loop_plan.made(stack, problem, weights, hx is None and stack.starts_at_zero)


def _in_c(stack: Stack, problem: Problem, grad: bool) -> ShortPlans | None:
    if not limits.plain_layer(problem):
        return None
    dtype, of_stack = state_dtype(problem.dtype), (stack.weight_names, stack.reverse, stack.rms)
    try:
        plan = native.plan(problem.program.text, dtype, grad, *of_stack)
    except building.CompilerError:
        return None  # of the backward loop: dispatch knows what else there is
    return plan, plan


def _layer(plan: ShortPlan, stack: Stack, controls: LayerControls, grad: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
    """y (T, B, N·P), the final states and, where all states are wanted, the others of all steps of one layer, of x, its
    states, its weights and the values of resets."""
    if isinstance(plan, LoopPlan):
        return loop_plan.run(plan, controls, tensors)
    if grad:
        return _Layer.apply(plan, stack, controls, *tensors)
    return _outputs(_forward(plan, stack, controls.dense(plan.dtype), tensors, False))


def _outputs(done: native.Done) -> tuple[Tensor, ...]:
    return (done.y, *done.final) if done.inner is None else (done.y, *done.final, done.inner)


def _forward(
    plan: native.LayerPlan, stack: Stack, controls: LayerControls, tensors: Sequence[Tensor], save: bool
) -> native.Done:
    x, states, weights, resets = _apart(plan, [t.contiguous() for t in tensors])
    return native.forward(plan, x, states, weights, resets, controls, save, stack.all_states)


def _apart(plan: native.LayerPlan, tensors: Sequence[Any]) -> tuple[Any, Sequence[Any], Sequence[Any], Sequence[Any]]:
    """x, the states, the weights and the values of resets."""
    first = 1 + len(plan.program.states)
    last = first + len(plan.names)
    return tensors[0], tensors[1:first], tensors[first:last], tensors[last:]


def _inputs(plan: native.LayerPlan, controls: LayerControls, tensors: Sequence[Tensor]) -> Inputs:
    """In canonical layout; what x holds at steps that do not count, NaN perhaps, reaches no gradient."""
    x, states, weights, resets = _apart(plan, tensors)
    x = x if controls is PLAIN else counted(x, controls.counts(len(x)))
    return Inputs(x, plan.weights(weights), controls, plan.rows_first(x, states), list(resets))


class _Layer(torch.autograd.Function):
    """(plan, stack, controls, x, *states, *weights, *values of resets) of one layer -> `_outputs`."""

    @staticmethod
    def forward(
        ctx: Any, plan: native.LayerPlan, stack: Stack, controls: LayerControls, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        controls = controls.dense(plan.dtype)
        done = _forward(plan, stack, controls, tensors, True)
        steering = () if controls is PLAIN else controls
        ctx.plan, ctx.stack, ctx.sizes = plan, stack, done.sizes
        ctx.tensors, ctx.controls = len(tensors), len(steering)
        ctx.save_for_backward(*tensors, *steering, done.y, *done.saved)
        ctx.set_materialize_grads(False)
        return _outputs(done)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        plan, stack, every, after = ctx.plan, ctx.stack, ctx.saved_tensors, ctx.tensors + ctx.controls
        tensors = every[: ctx.tensors]
        controls = LayerControls(*every[ctx.tensors : after]).dense(plan.dtype) if ctx.controls else PLAIN
        if second_order.needs_operations(grads):
            arranged = partial(_inputs, plan, controls)
            if ctx.sizes.silenced and grads[0] is not None:  # y was 0 where the reference has h
                grads = (counted(grads[0], controls.counts(len(grads[0]))), *grads[1:])
            return None, None, None, *second_order.of_a_layer(stack, tensors, arranged, grads)
        # A hook of saved tensors may have changed their dtype, and how they lie.
        x, states, weights, resets = _apart(plan, all_dense(tensors, plan.dtype))
        y, *saved = all_dense(every[after:], plan.dtype)
        d_y, *d_final = (d if d is None else dense(d, plan.dtype) for d in grads)
        d_inner = d_final.pop() if stack.all_states else None
        wanted, first = ctx.needs_input_grad[3:], 1 + len(states)
        given = plan, ctx.sizes, x, states, weights, resets, controls, y, saved
        return None, None, None, *native.backward(*given, d_y, d_final, d_inner, wanted[0], any(wanted[1:first]))
