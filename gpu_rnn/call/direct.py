# SPDX-License-Identifier: Apache-2.0
"""The short way of layers on a CPU that run as the time loop in C: one function for each pass of a layer.

What a call goes by is asked once for all calls that are alike. Whoever looks on, transforms, profiles or records takes
the way of `gpu_rnn.call.autograd`, which computes the same; so do second derivatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_rnn import environment, memo
from gpu_rnn.backends import linear
from gpu_rnn.backends.native import building, launch, limits
from gpu_rnn.backends.native import direct as native
from gpu_rnn.backends.normalisation import Normalised
from gpu_rnn.backends.tensors import (
    PLAIN,
    Call,
    Inputs,
    LayerControls,
    Result,
    Weights,
    dense,
    readable_in_c,
    state_dtype,
)
from gpu_rnn.call import onlookers, second_order, transforms
from gpu_rnn.call.controls import NONE, StackControls
from gpu_rnn.call.stack import Stack, States
from gpu_rnn.dispatch import choice

MOST_LAYER_PLANS = 1024  # of calls whose plan is kept

_plans: dict[tuple[Any, ...], native.LayerPlan | None] = memo.hold(f"{__name__}: plans", {}, MOST_LAYER_PLANS)


def run(
    stack: Stack, x: Tensor, hx: States | None, weights: Sequence[Tensor], controls: StackControls = NONE
) -> tuple[Tensor, States, States] | None:
    """y, the final states and, if wanted, those of all steps as `loops.run` has them, or None where the call goes
    another way.

    It is not packed nor recorded, and autocast is off.
    """
    tensors = (x, *(hx or ()), *weights, *(controls.reset_state or ()))
    steering = () if controls is NONE else controls.of_steps
    if onlookers.watched((*tensors, *steering)) or transforms.active() or torch.autograd._profiler_enabled():
        return None
    grad = torch.is_grad_enabled() and True in [t.requires_grad for t in tensors]
    plan = _plan(stack, x, hx, weights, controls, grad)
    if plan is None or not readable_in_c(tensors, x.dtype):
        return None
    states = hx or stack.initial(x, weights, x.shape[0 if stack.batch_first else 1])
    if x.dtype == plan.dtype:
        return _layers(plan, stack, x, states, weights, controls, grad)
    x, *rest = (t.to(plan.dtype) for t in (x, *states, *weights))
    states, weights = rest[: len(states)], rest[len(states) :]
    y, final, every = _layers(plan, stack, x, tuple(states), weights, controls, grad)
    dtype = tensors[0].dtype
    return y.to(dtype), tuple(state.to(dtype) for state in final), tuple(state.to(dtype) for state in every)


def _layers(
    plan: native.LayerPlan,
    stack: Stack,
    x: Tensor,
    states: States,
    weights: Sequence[Tensor],
    controls: StackControls,
    grad: bool,
) -> tuple[Tensor, States, States]:
    y, valid, flags, directions = x.transpose(0, 1) if stack.batch_first else x, None, None, stack.directions
    if controls is not NONE:
        controls, steps = controls.to(plan.dtype), y.shape[0]
        flags = controls.flags(stack.reverse, steps, stack.all_states)
        if grad or stack.all_states:  # else the loop's y is 0 at steps that do not count
            valid = controls.valid(steps)
        if grad and valid is not None:  # whatever stands in the padding, NaN too, must not reach a gradient
            y = torch.where(valid.unsqueeze(-1), y, 0)
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
        y, *leaving = _layer(plan, stack, steering, grad, y, *entering, *of_layer, *resets)
        inner = leaving.pop() if stack.all_states else None
        final.append([state.transpose(0, 1) for state in leaving] if directions == 2 else leaving)
        if inner is not None:
            of_h = y.unflatten(2, (directions, -1))
            every.append([state.transpose(1, 2) for state in (of_h, *inner.unbind(0))])
    joined = final[0] if stack.is_one_layer else map(torch.cat, zip(*final, strict=True))
    y = y if valid is None else controls.silenced(y, valid, stack.all_states)
    of_all = tuple(torch.cat(parts, 1) for parts in zip(*every, strict=True))
    return y.transpose(0, 1) if stack.batch_first else y, tuple(joined), of_all


def _plan(
    stack: Stack, x: Tensor, hx: States | None, weights: Sequence[Tensor], controls: StackControls, grad: bool
) -> native.LayerPlan | None:
    """What the calls of a kind need in C; None where that is not what dispatch chooses."""
    if environment.names_a_backend() or not choice.only_predicted_on_cpu():
        return _chosen(stack, x, hx, weights, controls, grad)
    shapes = [t.shape for t in (x, *(hx or ()), *weights)]
    steering = () if controls is NONE else tuple(controls.described(False, stack.all_states).values())
    kind = stack.as_key, x.dtype, grad, torch.get_num_threads(), steering, *shapes
    plan = _plans.get(kind, memo.ABSENT)
    if plan is memo.ABSENT:
        plan = memo.put(_plans, kind, _chosen(stack, x, hx, weights, controls, grad), MOST_LAYER_PLANS)
    return plan


def _chosen(
    stack: Stack, x: Tensor, hx: States | None, weights: Sequence[Tensor], controls: StackControls, grad: bool
) -> native.LayerPlan | None:
    problem = stack.problem(x, hx, weights, None, controls)
    if not limits.plain_layer(problem) or choice.select(problem, stack.backend) != "native":
        return None
    shapes = [*(stack.state_shapes(weights, problem.B) if hx else ()), *stack.weight_shapes(problem.I, problem.H)]
    if [t.shape for t in (*(hx or ()), *weights)] != shapes:
        return None  # the long way has the words
    try:
        return native.plan(
            problem.program.text, state_dtype(problem.dtype), grad, stack.weight_names, stack.reverse, stack.rms
        )
    except building.CompilerError:
        return None  # of the backward loop: dispatch knows what else there is


def _layer(
    plan: native.LayerPlan, stack: Stack, controls: LayerControls, grad: bool, *tensors: Tensor
) -> tuple[Tensor, ...]:
    """y (T, B, N·P), the final states and, where all states are wanted, `Result.inner` of one layer, of x, its states,
    its weights and the values of resets."""
    if grad:
        return _Layer.apply(plan, stack, controls, *tensors)
    result = _forward(plan, stack, controls.dense(plan.dtype), tensors, False)
    return (result.y, *result.final, *([result.inner] if stack.all_states else []))


def _forward(
    plan: native.LayerPlan, stack: Stack, controls: LayerControls, tensors: Sequence[Tensor], save: bool
) -> Result:
    x, states, weights, resets = _apart(plan, [t.contiguous() for t in tensors])
    return native.forward(plan, x, states, weights, resets, controls, save, stack.all_states)


def _apart(plan: native.LayerPlan, tensors: Sequence[Any]) -> tuple[Any, Sequence[Any], Sequence[Any], Sequence[Any]]:
    """x, the states, the weights and the values of resets."""
    first = 1 + len(plan.program.states)
    last = first + len(plan.names)
    return tensors[0], tensors[1:first], tensors[first:last], tensors[last:]


def _inputs(plan: native.LayerPlan, controls: LayerControls, tensors: Sequence[Tensor]) -> Inputs:
    """In canonical layout."""
    x, states, weights, resets = _apart(plan, tensors)
    return Inputs(x, plan.weights(weights), controls, _rows_first(plan, x, states), list(resets))


def _rows_first(plan: native.LayerPlan, x: Tensor, states: Sequence[Tensor]) -> list[Tensor]:
    """(B, N, ·)"""
    return [state.view(x.shape[1], len(plan.reverse), -1) for state in states]


class _Layer(torch.autograd.Function):
    """(plan, stack, controls, x, *states, *weights, *values of resets) of one layer -> y, *final states and,
    where all states are wanted, `Result.inner`."""

    @staticmethod
    def forward(
        ctx: Any, plan: native.LayerPlan, stack: Stack, controls: LayerControls, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        controls = controls.dense(plan.dtype)
        result = _forward(plan, stack, controls, tensors, True)
        ctx.plan, ctx.stack, ctx.tensors = plan, stack, len(tensors)
        steering = () if controls is PLAIN else controls
        ctx.controls = len(steering)
        saved = result.y, result.gates, result.recurrent, result.inner, *(result.kept or ())
        ctx.save_for_backward(*tensors, *steering, *saved)
        ctx.set_materialize_grads(False)
        return (result.y, *result.final, *([result.inner] if stack.all_states else []))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        plan, stack, every, after = ctx.plan, ctx.stack, ctx.saved_tensors, ctx.tensors + ctx.controls
        tensors = every[: ctx.tensors]
        controls = LayerControls(*every[ctx.tensors : after]).dense(plan.dtype) if ctx.controls else PLAIN
        if second_order.needs_operations(grads):
            arranged = partial(_inputs, plan, controls)
            return None, None, None, *second_order.of_a_layer(stack, tensors, arranged, grads)
        # A hook of saved tensors may have changed their dtype, and how they lie.
        whole = [dense(t, plan.dtype) for t in (*tensors, *every[after:])]
        incoming = [None if d is None else dense(d, plan.dtype) for d in grads]
        saved = whole[ctx.tensors :]
        found = _backward(plan, controls, whole[: ctx.tensors], saved, incoming, ctx.needs_input_grad[3])
        given = (d if d is None or d.shape == t.shape else d.view(t.shape) for d, t in zip(found, tensors, strict=True))
        return None, None, None, *given


def _backward(
    plan: native.LayerPlan,
    controls: LayerControls,
    tensors: Sequence[Tensor],
    saved: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    of_x: bool,
) -> list[Tensor | None]:
    """The gradients of x, the states, the weights and the values of resets."""
    x, states, weights, resets = _apart(plan, tensors)
    y, gates, recurrent, inner, *kept = saved
    d_y, *d_final = grads
    d_inner = d_final.pop() if len(d_final) > len(states) else None
    across = (*x.shape[:2], len(plan.reverse), -1)
    result = Result(y.view(across), [], gates, recurrent, inner, Normalised(*kept) if kept else None)
    simple = plan.of_one and (controls.drop is None or controls.drop.shape[2] == 1)
    named = Weights(**dict(zip(plan.names, weights, strict=True))) if simple else plan.weights(weights)
    before = [*states] if simple and controls is PLAIN else _rows_first(plan, x, states)
    call = Call(plan.program, named, before, controls, [*resets], plan.reverse, rms=plan.rms)
    after = [torch.zeros_like(s) if d is None else d for d, s in zip(d_final, before, strict=True)]
    assert plan.back is not None
    loop = launch.backward_of_dense(plan.back, call, result, d_y, after, d_inner)
    if simple:
        rows = len(x) * x.shape[1]
        matrices = (
            x.view(rows, -1),
            _entered(call, result, rows),
            loop.d_gates.view(rows, -1),
            loop.d_recurrent.view(rows, -1),
        )
        d_x, of_weights = linear.of_one(plan.program, *matrices, weights[0], of_x)
        by_name: dict[str, Any] = {**of_weights, "params": loop.d_params}
    else:
        d_x, d_weights = linear.gradients(call, x, result, loop, of_x)
        by_name = d_weights._asdict()
    return [d_x, *loop.d_states, *(by_name[name] for name in plan.names), *loop.d_resets]


def _entered(call: Call, saved: Result, rows: int) -> Tensor:
    """(T·B, P): what entered the product of each step of one recurrence, which runs forward in time."""
    controls, batch = call.controls, saved.y.shape[1]
    if controls.flags is None:
        h = torch.cat([call.states[0].view(batch, -1), saved.y.view(rows, -1).narrow(0, 0, rows - batch)])
    else:
        h = linear.entered(call, saved, 0).view(rows, -1)
    return h if controls.drop is None else (h.view(-1, batch, h.shape[1]) * controls.drop[:, 0, 0]).view(rows, -1)
