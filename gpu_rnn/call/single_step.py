# SPDX-License-Identifier: Apache-2.0
"""The short way of one step on a CPU: a cell's call, or a layer's over one step, in one function in C.

What a call goes by is asked once for all calls that are alike. Whoever looks on, transforms or records takes the way of
`gpu_rnn.call.loops`, which computes the same; so do second derivatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gpu_rnn import environment, memo
from gpu_rnn.backends.native import limits
from gpu_rnn.backends.native import one_step as native
from gpu_rnn.backends.tensors import Inputs, dense, readable
from gpu_rnn.call import onlookers, second_order
from gpu_rnn.call.stack import Stack, States
from gpu_rnn.dispatch import choice

MOST_PLANS = 1024  # of calls whose plan is kept

_plans: dict[tuple[Any, ...], native.StepPlan | None] = memo.hold(f"{__name__}: plans", {}, MOST_PLANS)


def run(stack: Stack, x: Tensor, states: States, weights: Sequence[Tensor]) -> States | None:
    """x (B, I), states (B, H) each, or of a layer (1, B, ·) -> the new states; None where the call goes another way.

    It is not recorded, nor under a transform or autocast.
    """
    tensors = (x, *states, *weights)
    if onlookers.watched(tensors) or not readable(tensors, x.dtype, x.device):
        return None
    grad = torch.is_grad_enabled() and True in [t.requires_grad for t in tensors]
    plan = _plan(stack, x, states, weights, grad)
    if plan is None:
        return None
    if grad:
        return _SingleStep.apply(plan, stack, *tensors)
    tensors = [t.contiguous() for t in tensors]
    count = 1 + plan.states
    final, _, _ = native.forward(plan, tensors[0], tensors[1:count], _in_order(stack, tensors[count:]), False)
    return tuple(final)


def _plan(stack: Stack, x: Tensor, states: States, weights: Sequence[Tensor], grad: bool) -> native.StepPlan | None:
    """What the call needs in C; None where it is not what dispatch chooses."""
    if environment.names_a_backend() or not choice.only_predicted_on_cpu():
        return _chosen(stack, x, states, weights)
    kind = (stack.as_key, x.shape, x.dtype, weights[1].shape[1], grad, torch.get_num_threads())
    plan = _plans.get(kind, memo.ABSENT)
    if plan is memo.ABSENT:
        plan = memo.put(_plans, kind, _chosen(stack, x, states, weights), MOST_PLANS)
    return plan


def _chosen(stack: Stack, x: Tensor, states: States, weights: Sequence[Tensor]) -> native.StepPlan | None:
    problem = stack.time_first.problem(x.view(1, *x.shape[-2:]), states, weights, None)
    if not limits.single_step(problem) or choice.select(problem, stack.backend) != "native":
        return None
    return native.plan(problem.program.text, problem.dtype)


def _in_order(stack: Stack, weights: Sequence[Tensor]) -> list[Tensor | None]:
    """w_ih, w_hh, b_ih, b_hh and params, None for those that the layer has not."""
    biases: Sequence[Tensor | None] = weights[2:4] if stack.bias else (None, None)
    params = weights[2 + 2 * stack.bias :]
    return [*weights[:2], *biases, *(params or (None,))]


def _inputs(stack: Stack, states: int, tensors: Sequence[Tensor]) -> Inputs:
    """x, the states and the weights in canonical layout."""
    x, *rest = tensors
    before = [state.view(-1, 1, state.shape[-1]) for state in rest[:states]]
    return stack.inputs(x.view(1, *x.shape[-2:]), rest[states:], 0, before)


class _SingleStep(torch.autograd.Function):
    """(plan, stack, x, *states, *weights) -> the new states."""

    @staticmethod
    def forward(ctx: Any, plan: native.StepPlan, stack: Stack, *tensors: Tensor) -> tuple[Tensor, ...]:
        x, *rest = (t.contiguous() for t in tensors)
        weights = _in_order(stack, rest[plan.states :])
        final, gates, recurrent = native.forward(plan, x, rest[: plan.states], weights, True)
        ctx.plan, ctx.stack, ctx.dtype = plan, stack, x.dtype
        ctx.save_for_backward(*tensors, gates, recurrent)
        ctx.set_materialize_grads(False)
        return tuple(final)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        plan, stack = ctx.plan, ctx.stack
        *tensors, gates, recurrent = ctx.saved_tensors
        if second_order.needs_operations(grads):
            arranged = partial(_inputs, stack, plan.states)
            return None, None, *second_order.of_a_layer(stack, tensors, arranged, (None, *grads))  # y is a final state
        dtype = ctx.dtype  # a hook of saved tensors may have changed theirs, and how they lie
        x, *rest = (dense(t, dtype) for t in tensors)
        gates, recurrent = dense(gates, dtype), None if recurrent is None else dense(recurrent, dtype)
        incoming = [None if d is None else dense(d, dtype) for d in grads]
        weights, needed = rest[plan.states :], ctx.needs_input_grad[2:]
        wanted = needed[: 1 + plan.states], _in_order(stack, needed[1 + plan.states :])
        d = native.backward(
            plan,
            x,
            rest[: plan.states],
            _in_order(stack, weights),
            gates,
            recurrent,
            incoming,
            [*wanted[0], *map(bool, wanted[1])],
        )
        d_weights = [
            each
            for each, weight in zip(d[1 + plan.states :], _in_order(stack, weights), strict=True)
            if weight is not None
        ]
        return None, None, *d[: 1 + plan.states], *d_weights
