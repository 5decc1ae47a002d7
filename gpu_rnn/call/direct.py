# SPDX-License-Identifier: Apache-2.0
"""The short way of plain layers on a CPU that run as the time loop in C: one function for each pass of a layer.

What a call goes by is asked once for all calls that are alike. Whoever looks on, transforms, profiles or records takes
the way of `gpu_rnn.call.loops`, which computes the same; so do second derivatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_rnn import environment, memo
from gpu_rnn.backends import onednn
from gpu_rnn.backends.native import building, limits
from gpu_rnn.backends.native import direct as native
from gpu_rnn.backends.tensors import dense
from gpu_rnn.call import onlookers, second_order, transforms
from gpu_rnn.call.stack import Stack, States
from gpu_rnn.dispatch import choice

MOST_LAYER_PLANS = 1024  # of calls whose plan is kept

_plans: dict[tuple[Any, ...], native.LayerPlan | None] = memo.hold(f"{__name__}: plans", {}, MOST_LAYER_PLANS)


def run(stack: Stack, x: Tensor, hx: States | None, weights: Sequence[Tensor]) -> tuple[Tensor, States] | None:
    """y and the final states as `loops.run` has them, or None where the call goes another way.

    It has no controls, is not packed nor recorded, and autocast is off.
    """
    tensors = (x, *(hx or ()), *weights)
    if onlookers.watched(tensors) or transforms.active() or torch.autograd._profiler_enabled():
        return None
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    plan = _plan(stack, x, hx, weights, grad)
    if plan is None or not all(t.dtype == x.dtype and t.is_cpu and not t.is_neg() for t in tensors):
        return None
    states = hx or stack.initial(x, weights, x.shape[0 if stack.batch_first else 1])
    y = x.transpose(0, 1) if stack.batch_first else x
    count, final = len(weights) // stack.num_layers, []
    for number in range(stack.num_layers):
        if number and stack.dropout:
            y = F.dropout(y, stack.dropout)
        entering = states if stack.num_layers == 1 else [state[number : number + 1] for state in states]
        of_layer = weights[number * count : (number + 1) * count]
        if grad:
            y, *leaving = _Layer.apply(plan, stack, y, *entering, *of_layer)
        else:
            whole = [t.contiguous() for t in (y, *entering, *of_layer)]
            leaving, saved = _forward(plan, stack.bias, whole, False)
            y = saved.y
        final.append(leaving)
    joined = final[0] if len(final) == 1 else map(torch.cat, zip(*final, strict=True))
    return y.transpose(0, 1) if stack.batch_first else y, tuple(joined)


def _plan(stack: Stack, x: Tensor, hx: States | None, weights: Sequence[Tensor], grad: bool) -> native.LayerPlan | None:
    """What the calls of a kind need in C; None where that is not what dispatch chooses."""
    if environment.names_a_backend() or not choice.only_predicted_on_cpu():
        return _chosen(stack, x, hx, weights, grad)
    kind = stack.as_key, x.dtype, grad, torch.get_num_threads(), *[t.shape for t in (x, *(hx or ()), *weights)]
    plan = _plans.get(kind, memo.ABSENT)
    if plan is memo.ABSENT:
        plan = memo.put(_plans, kind, _chosen(stack, x, hx, weights, grad), MOST_LAYER_PLANS)
    return plan


def _chosen(
    stack: Stack, x: Tensor, hx: States | None, weights: Sequence[Tensor], grad: bool
) -> native.LayerPlan | None:
    problem = stack.problem(x, hx, weights, None)
    if not limits.plain_layer(problem) or choice.select(problem, stack.backend) != "native":
        return None
    shapes = [*(stack.state_shapes(weights, problem.B) if hx else ()), *stack.weight_shapes(problem.I, problem.H)]
    if [t.shape for t in (*(hx or ()), *weights)] != shapes:
        return None  # the long way has the words
    try:
        return native.plan(problem.program.text, problem.dtype, grad)
    except building.CompilerError:
        return None  # of the backward loop: dispatch knows what else there is


def _forward(
    plan: native.LayerPlan, bias: bool, whole: Sequence[Tensor], save: bool
) -> tuple[list[Tensor], native.Saved]:
    """One layer: x, the states and the weights, all without gaps."""
    count = 1 + len(plan.program.states)
    x, *states = whole[:count]
    return native.forward(plan, x, states, *_weights(plan, bias, whole[count:]), save)


def _weights(plan: native.LayerPlan, bias: bool, weights: Sequence[Any]) -> tuple[Any, Any, Any, Any, Any]:
    """w_ih, w_hh, b_ih, b_hh and params, None for those that the layer has not."""
    b_ih, b_hh = weights[2:4] if bias else (None, None)
    return weights[0], weights[1], b_ih, b_hh, weights[-1] if plan.program.params else None


class _Layer(torch.autograd.Function):
    """(plan, stack, x, *states, *weights) of one layer -> y, *final states."""

    @staticmethod
    def forward(ctx: Any, plan: native.LayerPlan, stack: Stack, *tensors: Tensor) -> tuple[Tensor, ...]:
        final, saved = _forward(plan, stack.bias, [t.contiguous() for t in tensors], True)
        ctx.plan, ctx.stack, ctx.dtype = plan, stack, tensors[0].dtype
        ctx.save_for_backward(*tensors, *saved)
        ctx.set_materialize_grads(False)
        return (saved.y, *final)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        plan, stack, every = ctx.plan, ctx.stack, ctx.saved_tensors
        tensors, saved = every[: -len(native.Saved._fields)], native.Saved(*every[-len(native.Saved._fields) :])
        if second_order.needs_operations(grads):
            return None, None, *second_order.of_a_layer(stack, tensors, len(plan.program.states), grads)
        dtype = ctx.dtype  # a hook of saved tensors may have changed theirs, and how they lie
        tensors = [dense(t, dtype) for t in tensors]
        saved = native.Saved(*(dense(t, dtype) for t in saved))
        incoming = [None if d is None else dense(d, dtype) for d in grads]
        return None, None, *_backward(plan, stack.bias, tensors, saved, incoming, ctx.needs_input_grad[2:])


def _backward(
    plan: native.LayerPlan,
    bias: bool,
    tensors: Sequence[Tensor],
    saved: native.Saved,
    grads: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of x, the states and the weights, None for those that are not wanted; all that is given is
    dense."""
    count = 1 + len(plan.program.states)
    x, *states = tensors[:count]
    w_ih, w_hh, _, _, params = _weights(plan, bias, tensors[count:])
    d_y, *d_final = grads
    zeros = torch.zeros_like(states[0]) if any(d is None for d in d_final) else None
    d = native.backward(plan, saved, states, w_hh, params, d_y, [zeros if g is None else g for g in d_final])  # type: ignore[misc]
    d_gates, d_split = d.gates.flatten(0, 1), d.recurrent.flatten(0, 1)
    want_w_ih, want_w_hh, want_b_ih, want_b_hh, _ = _weights(plan, bias, wanted[count:])
    d_x = _product(d_gates, w_ih).view_as(x) if wanted[0] else None
    d_w_ih = _product(d_gates.T, x.flatten(0, 1)) if want_w_ih else None
    d_w_hh = _of_products(plan, d_gates, d_split, _entered(states[0], saved.y)) if want_w_hh else None
    d_weights = [d_w_ih, d_w_hh]
    if bias:
        d_b_ih = d_gates.sum(0) if want_b_ih or want_b_hh else None
        d_b_hh = _joined(plan, d_b_ih, d_split.sum(0)) if want_b_hh and d_b_ih is not None else None
        d_weights += [d_b_ih if want_b_ih else None, d_b_hh]
    return [d_x, *d.states, *d_weights, *([d.params] if d.params is not None else [])]


def _product(a: Tensor, b: Tensor) -> Tensor:
    return onednn.bmm(a[None], b[None])[0]


def _entered(initial: Tensor, y: Tensor) -> Tensor:
    """(T·B, H): h before each step."""
    return torch.cat([initial, y[:-1]]).flatten(0, 1)


def _of_products(plan: native.LayerPlan, d_gates: Tensor, d_split: Tensor, entered: Tensor) -> Tensor:
    """The gradient of w_hh: of summed gates their own, of split ones that of the product."""
    rows = plan.summed * entered.shape[1]
    parts = [_product(d_gates[:, :rows].T, entered)] if rows else []
    parts += [_product(d_split.T, entered)] if plan.program.split else []
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _joined(plan: native.LayerPlan, d_b_ih: Tensor, d_b_split: Tensor) -> Tensor:
    """The gradient of b_hh, of its own: gradients that share memory are scaled twice."""
    rows = plan.summed * d_b_ih.shape[0] // len(plan.program.gates)
    return torch.cat([d_b_ih[:rows], d_b_split])
