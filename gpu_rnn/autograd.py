# SPDX-License-Identifier: Apache-2.0
"""The eager way into the time loops: autograd.Functions with jvp and vmap rules over the same two passes.

A custom op under jvp returns zeros without a word, and func.grad, jacrev and hessian raise; so eager and functorch come
in here, and only torch.compile and torch.export use the ops. First derivatives run on the chosen backend, all others
on the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack, peek_interpreter_stack

from gpu_rnn import batching, execution, reference
from gpu_rnn.execution import Options
from gpu_rnn.ops import WEIGHTS, Inputs
from gpu_rnn.program import Program
from gpu_rnn.reference import Result, Weights


def transforms_active() -> bool:
    """Whether a functorch transform or forward-mode differentiation is going on."""
    return peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0


def _forward_levels() -> int:
    """How many forward-mode transforms are nested. torch takes what a Function's jvp returns for a constant of the outer
    ones, so from two on only plain operations are right."""
    return sum(level.key() == TransformType.Jvp for level in get_interpreter_stack() or ())


def layer(
    text: str,
    options: Options,
    x: Tensor,  # (T, B, I) or (T, B, N, I)
    weights: Weights,
    lengths: Tensor | None,
    states: Sequence[Tensor],
) -> tuple[Tensor, list[Tensor]]:
    """One layer, by the way in that fits: y (T, B, N, P) and the final states (B, N, ·)."""
    tensors = (x, *weights, *states)
    wants_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if torch.compiler.is_compiling():
        if torch.autograd.forward_ad._current_level >= 0:  # a custom op's tangent would be 0 without a word
            raise RuntimeError("torch.compile cannot take a layer's forward-mode derivative: take it of the layer itself")
        # An exported program keeps nothing: it is mostly for inference, and its backward pass runs forward again.
        # (Its flag, as torch.compiler.is_exporting() is true under torch.compile as well in torch 2.11.)
        options = options._replace(save=wants_grad and not torch.compiler._is_exporting_flag)
        y, *rest = torch.ops.gpu_rnn.rnn(x, *weights, lengths, list(states), text, options.encode())
        return y, rest[: len(states)]
    if options.backend == "reference" or x.is_complex() or _forward_levels() > 1:
        result = reference.forward(Program.parse(text), x, weights, list(states), lengths, options.reverse)
        return result.y, result.final
    transformed = transforms_active()
    if not wants_grad and not transformed:
        result = execution.run(text, options, x, weights, lengths, states)
        return result.y, result.final
    options = options._replace(save=wants_grad or transformed)
    y, *rest = Forward.apply(text, options, x, *weights, lengths, *states)
    return y, rest[: len(states)]


def _primals(tensors: Sequence[Any]) -> list[Any]:
    """The differentiable ones: x, the weights and the states, without the lengths."""
    return [*tensors[: 1 + WEIGHTS], *tensors[2 + WEIGHTS :]]


class Forward(torch.autograd.Function):
    """(text, options, x, *weights, lengths, *states) -> (y, *final states, gates, recurrent, inner)."""

    @staticmethod
    def forward(text: str, options: Options, *tensors: Any) -> tuple[Tensor, ...]:
        x, weights, lengths, states = Inputs.flat(tensors)
        result = execution.run(text, options, x, weights, lengths, states)
        return (result.y, *result.final, result.gates, result.recurrent, result.inner)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.text, ctx.options, *tensors = inputs
        ctx.mark_non_differentiable(*output[-3:])
        ctx.save_for_backward(*tensors, output[0], *output[-3:])
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        *tensors, y, gates, recurrent, inner = ctx.saved_tensors
        if any(torch._C._functorch.is_legacy_batchedtensor(g) for g in grads):  # is_grads_batched: no rule is asked
            d = execution.vjp(ctx.text, ctx.options, tensors[1 + WEIGHTS], _primals(tensors), grads[:-3])
            return None, None, *d[: 1 + WEIGHTS], None, *d[1 + WEIGHTS :]
        found = Backward.apply(ctx.text, ctx.options, *tensors, y, gates, recurrent, inner, *grads[:-3])
        given = iter(found)
        d = [next(given) if t is not None else None for t in _primals(tensors)]
        return None, None, *d[: 1 + WEIGHTS], None, *d[1 + WEIGHTS :]

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        primals = _primals(tensors)
        function = execution.pure(ctx.text, ctx.options, tensors[1 + WEIGHTS], primals)
        present = [p for p in primals if p is not None]
        along = [
            torch.zeros_like(p) if t is None else t
            for p, t in zip(primals, _primals(tangents[2:]), strict=True)
            if p is not None
        ]
        return (*pushforward(function, present, along), None, None, None)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], text: str, options: Options, *tensors: Any) -> Any:
        return batching.forward(Forward, info.batch_size, in_dims[2:], text, options, tensors)


class Backward(torch.autograd.Function):
    """(text, options, x, *weights, lengths, *states, y, gates, recurrent, inner, d_y, *d_final) -> gradients of those given."""

    @staticmethod
    def forward(text: str, options: Options, *tensors: Any) -> tuple[Tensor, ...]:
        inputs, saved, d_y, d_final = _split(text, tensors)
        x, weights, lengths, states = Inputs.flat(inputs)
        found = execution.run_backward(text, options, d_y, d_final, x, weights, lengths, states, saved)
        return tuple(d for d in found if d is not None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.text, ctx.options, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        inputs, _, d_y, d_final = _split(ctx.text, ctx.saved_tensors)
        primals = _primals(inputs)
        given = iter(grads)
        dd = [next(given) if p is not None else None for p in primals]
        found_d, found = execution.second_vjp(
            ctx.text, ctx.options, inputs[1 + WEIGHTS], primals, [d_y, *d_final], dd
        )
        return None, None, *found[: 1 + WEIGHTS], None, *found[1 + WEIGHTS :], None, None, None, None, *found_d

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        inputs, _, d_y, d_final = _split(ctx.text, ctx.saved_tensors)
        inputs_t, _, d_y_t, d_final_t = _split(ctx.text, tangents[2:])
        primals, d_outputs = _primals(inputs), [d_y, *d_final]
        lengths, present = inputs[1 + WEIGHTS], [p is not None for p in primals]

        def gradient(*given: Tensor) -> tuple[Tensor, ...]:
            own = iter(given[len(d_outputs) :])
            values = [next(own) if there else None for there in present]
            found = execution.vjp(ctx.text, ctx.options, lengths, values, given[: len(d_outputs)])
            return tuple(d for d in found if d is not None)

        point = [*d_outputs, *(p for p in primals if p is not None)]
        along = [d_y_t, *d_final_t, *(t for t, there in zip(_primals(inputs_t), present, strict=True) if there)]
        return pushforward(
            gradient, point, [torch.zeros_like(p) if t is None else t for p, t in zip(point, along, strict=True)]
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], text: str, options: Options, *tensors: Any) -> Any:
        return batching.backward(Backward, info.batch_size, in_dims[2:], text, options, tensors)


def _split(text: str, tensors: Sequence[Any]) -> tuple[Sequence[Any], Result, Any, list[Any]]:
    """Backward's tensors: the inputs of Forward, what it saved, and the incoming gradients."""
    count = len(Program.parse(text).states)
    end = 2 + WEIGHTS + count
    y, gates, recurrent, inner, d_y, *d_final = tensors[end:]
    return tensors[:end], Result(y, [], gates, recurrent, inner), d_y, d_final


def pushforward(
    function: Callable[..., tuple[Tensor, ...]], point: Sequence[Tensor], along: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The derivative of a function along a direction: the transpose of its transpose, which is linear.

    torch.func.jvp would open a second level of forward-mode differentiation inside the user's, which torch refuses.
    """
    outputs, pull = execution.pullback(function, *point)
    _, push = execution.pullback(pull, tuple(torch.zeros_like(o) for o in outputs))
    return push(tuple(along))[0]
