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
from torch._C._functorch import is_functorch_wrapped_tensor as wrapped

from gpu_rnn import environment, memo
from gpu_rnn.backends import ADDS_B_HH, AGAIN, LOOPS, linear, onednn, precision
from gpu_rnn.backends.persistent import ALIGNMENT, whole
from gpu_rnn.backends.tensors import Weights
from gpu_rnn.call import autograd, heads, loops, onlookers, passes, transforms
from gpu_rnn.call.passes import Options
from gpu_rnn.call.stack import Stack, States
from gpu_rnn.dispatch import choice

MOST_SHAPES = 8  # shapes of the input that a stack keeps plans for


class _PlannedLayer:
    """One layer of a call."""

    def __init__(self, stack: Stack, number: int, x: Tensor, states: list[Tensor], weights: Sequence[Tensor]) -> None:
        """`states` are (B, N, ·)."""
        text = stack.recurrence.text(stack.recurrence.identity)
        options = Options(stack.backend, stack.reverse, rms=stack.rms)
        inputs = stack.inputs(x, weights, number, states)
        problem = passes.problem_of(text, options, inputs, "inference")
        chosen = choice.select(problem, stack.backend, LOOPS)
        self.stack, self.number, self.name = stack, number, f"gpu_rnn::{chosen}_forward"
        self.joined = chosen in ADDS_B_HH and not ADDS_B_HH[chosen](problem)
        call = passes.call_of(text, options, inputs, problem, self.joined)
        self.program, self.normaliser, self.again, self.own = call.program, call.normaliser, None, None
        if chosen in AGAIN:
            gates = self._input_products(x, call.weights)
            self.again = AGAIN[chosen](call, gates)
        if self.again is not None and self.again.by_address and stack.directions == stack.heads == 1:
            count = len(stack.weight_names)
            of_layer = weights[number * count : (number + 1) * count]
            self.own = Weights(**dict(zip(stack.weight_names, of_layer, strict=True)))

    def __call__(self, x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """As `Repeated`."""
        assert self.again is not None
        if self.own is None:
            named = self.stack.canonical(weights, self.number)
            gates = self._input_products(x, named)
        else:
            named, b_ih = self.own, self.own.b_ih
            bias = linear.joined_bias(b_ih, named.b_hh, self.program) if self.joined else b_ih
            gates = onednn.linear(x, named.w_ih, bias)
        with passes.named(self.name):
            return self.again(gates, states, named)

    def _input_products(self, x: Tensor, weights: Weights) -> Tensor:
        products = linear.project(x, weights, self.program, joined=self.joined, normaliser=self.normaliser)
        return products.contiguous()


class Plan:
    """A call of a stack, layer after layer, for x (T, B, I) of one shape."""

    def __init__(self, stack: Stack, x: Tensor, states: States, weights: Sequence[Tensor]) -> None:
        self.stack, self.weights, self.precision, self.layers = stack, weights, precision.of_rnn(), []
        self.shapes, self.dtype, self.device = (x.shape, *(state.shape for state in states)), x.dtype, x.device
        self.age, self.setting = memo.Age.now, environment.of_calls()
        for number in range(stack.num_layers):
            entering = _entering(stack, states, number)
            self.layers.append(_PlannedLayer(stack, number, x, entering, weights))
            x = x.new_empty(*x.shape[:2], stack.directions * states[0].shape[-1])
        self.complete = all(layer.again is not None for layer in self.layers)
        self.by_address = stack.is_one_layer and self.layers[0].own is not None

    def fits(self, x: Tensor, hx: States | None, weights: Sequence[Tensor]) -> bool:
        """Whether a call, which nothing records, is as the plan has it."""
        tensors = (x,) if hx is None else (x, *hx)
        return (
            self.age == memo.Age.now
            and self.complete
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
        address = 0 if wrapped(tensor) else tensor.data_ptr()  # 0 of zeros that lie nowhere, and of nothing
        return alike and tensor.is_contiguous() and address % ALIGNMENT == 0 < address and not tensor.is_neg()

    def __call__(self, x: Tensor, hx: States | None) -> tuple[Tensor, States]:
        """y (T, B, D·P) and the final states (D·layers, B, ·)."""
        stack, weights = self.stack, self.weights
        states, full = hx or stack.initial(x, weights, x.shape[1]), x.dtype == torch.float32 and x.is_cuda
        with precision.of_products(self.precision, x) if full else passes.NOTHING:
            if self.by_address:  # states that are (B, 1, ·) in memory as well
                y, final = self.layers[0](x, states, weights)
                return y.squeeze_(2), tuple([state.transpose_(0, 1) for state in final])
            every = []
            for number, layer in enumerate(self.layers):
                x, final = layer(x, [*map(whole, _entering(stack, states, number))], weights)
                x = x.flatten(2)
                if stack.heads > 1:  # else `heads.together` is a call for nothing, and a step is all overhead
                    final = [heads.together(state, stack.heads) for state in final]
                every.append(autograd.turned_in_place(final))
        return x, tuple(map(loops.joined, zip(*every, strict=True)))


def _entering(stack: Stack, states: States, number: int) -> list[Tensor]:
    """The states of a layer, (B, N, ·)."""
    rows = slice(number * stack.directions, (number + 1) * stack.directions)
    of_layer = [state[rows].transpose(0, 1) for state in states]
    return of_layer if stack.heads == 1 else [heads.apart(state, stack.heads) for state in of_layer]


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
    draws = stack.dropout > 0 and stack.num_layers > 1
    if stack.all_states or draws or any(type(weight) is not nn.Parameter for weight in weights):
        return
    if _wants_more((x, *states), weights) or choice.staggers(stack.problem(x, states, weights, None), stack.backend):
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
