# SPDX-License-Identifier: Apache-2.0
"""Plans: a call in inference that was made before is made again without being described, chosen and prepared.

A layer that gives one step at a time spends its time on the host. So a stack keeps, for each shape of its input, the
launch with all its arguments but the tensors. It is good for calls that differ in values, and for nothing else: weights
are the layer's own tensors, whose memory is looked up at each call.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_

import torch
from torch import Tensor, nn

from gpu_rnn import environment, memo
from gpu_rnn.backends import ADDS_B_HH, AGAIN, LOOPS, linear, onednn, precision
from gpu_rnn.backends.tensors import Weights
from gpu_rnn.call import onlookers, passes, transforms
from gpu_rnn.call.passes import Options
from gpu_rnn.call.stack import Stack, States
from gpu_rnn.dispatch import choice

MOST_SHAPES = 8  # shapes of the input that a stack keeps plans for
ALIGNMENT = 16  # bytes: kernels were compiled for tensors that begin at a multiple


class Plan:
    """A call of one layer with one direction, for x (T, B, I) of one shape."""

    def __init__(self, stack: Stack, x: Tensor, states: States, weights: Sequence[Tensor]) -> None:
        problem = stack.problem(x, states, weights, None)
        chosen = choice.select(problem, stack.backend, LOOPS)
        again, self.name = AGAIN.get(chosen), f"gpu_rnn::{chosen}_forward"
        text = stack.recurrence.text(stack.recurrence.identity)
        inputs = stack.inputs(x, weights, 0, [state.transpose(0, 1) for state in states])
        self.joined = not ADDS_B_HH[chosen](problem)
        call = passes.call_of(text, Options(stack.backend, stack.reverse), inputs, problem, self.joined)
        self.program, self.precision = call.program, problem.precision
        self.weights, self.named = weights, Weights(**dict(zip(stack.weight_names, weights, strict=True)))
        self.shapes, self.dtype, self.device = (x.shape, *(state.shape for state in states)), x.dtype, x.device
        self.initial = tuple(state.contiguous() for state in stack.initial(x, weights, problem.B))
        self.age, self.setting = memo.Age.now, environment.of_calls()
        self.again = again and again(
            call, linear.project(x, call.weights, call.program, joined=self.joined).contiguous()
        )

    def fits(self, x: Tensor, hx: States | None, weights: Sequence[Tensor]) -> bool:
        """Whether a call, which nothing records, is as the plan has it."""
        tensors = (x,) if hx is None else (x, *hx)
        return (
            self.age == memo.Age.now
            and self.again is not None
            and all(map(is_, weights, self.weights))
            and not _wants_more(tensors, weights)  # before any asks for memory, which under a transform is none
            and all(map(self._lies_well, tensors))
            and [tensor.shape for tensor in tensors] == [*self.shapes[: len(tensors)]]
            and all(map(self._lies_well, weights))
            and self.setting == environment.of_calls()
            and self.precision == precision.of_rnn()
        )

    def _lies_well(self, tensor: Tensor) -> bool:
        alike = tensor.dtype == self.dtype and tensor.device == self.device
        return alike and tensor.is_contiguous() and tensor.data_ptr() % ALIGNMENT == 0 and not tensor.is_neg()

    def __call__(self, x: Tensor, hx: States | None) -> tuple[Tensor, States]:
        """y (T, B, H) and the final states (1, B, H)."""
        assert self.again is not None
        bias = linear.joined_bias(self.named.b_ih, self.named.b_hh, self.program) if self.joined else self.named.b_ih
        with precision.of_products(self.precision, x) if x.dtype == torch.float32 and x.is_cuda else passes.NOTHING:
            gates = onednn.linear(x, self.named.w_ih, bias)
        with passes.named(self.name):
            y, final = self.again(gates, self.initial if hx is None else hx, self.named)
        return y.squeeze_(2), tuple([state.transpose_(0, 1) for state in final])


def run(stack: Stack, x: Tensor, hx: States | None, weights: Sequence[Tensor]) -> tuple[Tensor, States, States] | None:
    """A call that nothing records and no controls steer, by a plan; None where there is none for it."""
    x = x.transpose(0, 1) if stack.batch_first else x
    plan = stack.plans.get(x.shape)
    if type(plan) is not Plan or not plan.fits(x, hx, weights):
        return None
    y, final = plan(x, hx)
    return y.transpose(0, 1) if stack.batch_first else y, final, ()


def learn(stack: Stack, x: Tensor, states: States, weights: Sequence[Tensor]) -> None:
    """Makes a plan of a call that ran, where its shape ran before and its weights will be those of the next."""
    one = stack.is_one_layer and not (stack.norm or stack.proj_size or stack.all_states)
    if not one or any(type(weight) is not nn.Parameter for weight in weights) or _wants_more((x, *states), weights):
        return
    x = x.transpose(0, 1) if stack.batch_first else x
    plans = stack.plans
    known = plans.get(x.shape, memo.ABSENT)
    if known is memo.ABSENT:
        memo.put(plans, x.shape, None, MOST_SHAPES)
    elif known != memo.Age.now:  # which says that there is none, until something is cleared
        plan = Plan(stack, x, states, weights)
        plans[x.shape] = plan if plan.fits(x, None, weights) else memo.Age.now


def _wants_more(tensors: Sequence[Tensor], weights: Sequence[Tensor]) -> bool:
    """Whether a call is more than inference, or somebody looks at it."""
    return (
        (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*tensors, *weights)))
        or transforms.active()
        or onlookers.watched(tensors)
        or choice.on_trial()
    )
