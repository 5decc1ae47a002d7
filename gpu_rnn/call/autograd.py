# SPDX-License-Identifier: Apache-2.0
"""The eager way into the time loops: autograd.Functions with jvp and vmap rules over the same two passes.

A custom op under jvp returns zeros without a word, and func.grad, jacrev and hessian raise; so eager and functorch come
in here, and torch.compile, torch.export and torch.jit.trace alone use the ops themselves. Who looks on below, such as
make_fx, is shown each pass as the op. First derivatives run on the chosen backend, all others on the reference.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor as wrapped

from gpu_rnn.backends.tensors import SAVED, Inputs, Result, like_row, primals
from gpu_rnn.call import custom_ops, onlookers, passes, transforms
from gpu_rnn.call import vmap as batching
from gpu_rnn.call.passes import Options
from gpu_rnn.compiler.program import Program
from gpu_rnn.dispatch import choice


def layer(text: str, options: Options, inputs: Inputs) -> tuple[Tensor, list[Tensor], Tensor]:
    """One layer, by the way in that fits: y (T, B, N, P), the final states (N, B, ·), and `Result.inner`."""
    count = len(inputs.states)
    wants_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs.primals)
    recorded = torch.compiler.is_compiling() or onlookers.traced()  # Dynamo reads no further
    if recorded or ((transformed := transforms.active()) and transforms.only_functionalizes()):
        y, *rest = _registered(text, options, inputs, wants_grad)
        return y, _turned(rest[:count]), rest[-1]
    exact = transformed and (transforms.forward_levels() > 1 or transforms.functionalizes())
    exact = exact or inputs.x.is_complex()
    by_torch = options.backend == "reference" and not options.rebuilds  # autograd saves what it will
    if exact or (by_torch and not onlookers.without_values(inputs.x)):
        y, *rest = passes.pure(text, options, inputs)(*(p for p in inputs.primals if p is not None))
        return y, _turned(rest[:count]), rest[-1]  # the last is `inner` where all states are wanted
    watched = onlookers.watched(inputs.row)  # a mode or a class of tensors may keep what it saw
    turned = _turned if watched or transformed else turned_in_place
    if not wants_grad and not transformed:
        result = _forward(text, options, inputs, watched)
        return result.y, turned(result.final), result.inner
    options = options._replace(save=wants_grad or transformed)
    apply = Forward.apply if transformed or outlived(inputs.row) else APPLY
    y, *rest = apply(text, options, *inputs.row)
    return y, turned(rest[:count]), rest[-1]


def outlived(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a transform of torch.func that has ended still wraps one of them, which `Function.apply` undoes."""
    return True in [t is not None and wrapped(t) for t in tensors]


def _turned(states: Sequence[Tensor]) -> list[Tensor]:
    """(B, N, ·) -> (N, B, ·)"""
    return [state.transpose(0, 1) for state in states]


def turned_in_place(states: Sequence[Tensor]) -> list[Tensor]:
    """Likewise of what a loop made, without views where it is contiguous either way."""
    if all(1 in state.shape[:2] and state.is_contiguous() and not state._is_view() for state in states):
        return [state.transpose_(0, 1) for state in states]
    return _turned(states)


def _registered(text: str, options: Options, inputs: Inputs, wants_grad: bool) -> list[Tensor]:
    """The registered operation with its own derivative, where torch records no autograd.Function."""
    if onlookers.traced() and torch.onnx.is_in_onnx_export():
        raise RuntimeError(
            "torch.onnx.export(dynamo=False) can write standard layers that ATen runs, not this call of a recurrent "
            "layer: import gpu_rnn.onnx and use torch.onnx.export(dynamo=True)"
        )
    onlookers.refuse_tangents()
    # An exported program keeps nothing: it is mostly for inference, and its backward pass runs forward again. (Its
    # flag, as torch.compiler.is_exporting() is true under torch.compile as well in torch 2.11.) Nor does a trace, whose
    # own check traces once more without gradients and compares the text.
    choice.check_recorded(options.backend)
    keeps = wants_grad and not (torch.compiler._is_exporting_flag or onlookers.traced())
    options = options._replace(save=keeps)
    return list(torch.ops.gpu_rnn.rnn(*custom_ops.in_order(inputs), text, options.encode()))


def _forward(text: str, options: Options, inputs: Inputs, watched: bool, keep: bool = False) -> Result:
    """The forward pass below all transforms: for those who look on, one operation."""
    if not watched:
        return passes.run(text, options, inputs, keep)
    choice.check_recorded(options.backend)
    with custom_ops.derived():
        *outputs, gates, recurrent, inner = torch.ops.gpu_rnn.rnn(*custom_ops.in_order(inputs), text, options.encode())
    return Result(outputs[0], outputs[1:], gates, recurrent, inner)


def _backward(
    text: str, options: Options, d_outputs: Sequence[Tensor], inputs: Inputs, saved: Result
) -> list[Tensor | None]:
    """Likewise the backward pass."""
    if not onlookers.watched((*inputs.row, *d_outputs)):
        grads = passes.run_backward(text, options, d_outputs, inputs, saved)
        return grads if options.of_x else [None, *grads[1:]]  # the reference, too, may have found that of x
    tensors = [saved.y, saved.gates, saved.recurrent, saved.inner]
    with custom_ops.derived():
        grads = torch.ops.gpu_rnn.rnn_backward(
            list(d_outputs), tensors, *custom_ops.in_order(inputs), text, options.encode()
        )
    given = [None if primal is None else d for primal, d in zip(inputs.primals, grads, strict=True)]
    return given if options.of_x else [None, *given[1:]]


def _of_those(grads: Iterator[Tensor], primals: Sequence[Tensor | None], options: Options) -> list[Tensor | None]:
    """The gradients that `Backward` gives, each in the place of its primal."""
    wanted = [options.of_x, *(p is not None for p in primals[1:])]
    return [next(grads) if each else None for each in wanted]


def _states(text: str) -> int:
    return len(Program.parse(text).states)


def completed(
    d_outputs: Sequence[Tensor | None], likes: Sequence[Tensor], known: Sequence[Tensor] = ()
) -> list[Tensor]:
    """Zeros where an output has no gradient: one tensor for all that are alike, as nothing writes to them, or one of
    those `known` to be zeros."""
    each_its_own, completed = transforms.active() or onlookers.recorded(likes[0]), []  # symbols are no keys
    zeros: dict[Any, Tensor] = {} if each_its_own else {(each.shape, each.dtype): each for each in known}
    for place, (d, like) in enumerate(zip(d_outputs, likes, strict=True)):
        alike = place if each_its_own else (like.shape, like.dtype)
        if d is None:
            d = zeros[alike] = zeros[alike] if alike in zeros else torch.zeros_like(like)
        completed.append(d)
    return completed


def pulled_back(
    text: str,
    options: Options,
    tensors: Sequence[Tensor | None],
    y: Tensor,
    saved: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    of_x: bool,
) -> list[Tensor | None]:
    """The gradients of `Inputs.row`, which `tensors` are, laid out like it; `saved` is `Result.saved`, and `grads` are
    those of y, the final states and, where all states are wanted, `Result.inner`. They have derivatives and rules for
    transforms where that is asked for."""
    states = Inputs.flat(tensors, _states(text)).states
    likes = [y, *states, *([saved[-1]] if options.all_states else [])]
    d_outputs = completed(grads, likes, states if options.zeros else ())
    if True in map(torch._C._functorch.is_legacy_batchedtensor, d_outputs):  # is_grads_batched: no rule is asked
        return like_row(passes.vjp(text, options, Inputs.flat(tensors, len(states)), d_outputs))
    # A rule of a transform has the gradients of all primals.
    transformed = transforms.active()
    options = options._replace(of_x=of_x or transformed)
    if not (transformed or torch.is_grad_enabled() or outlived((*tensors, *d_outputs))):  # nobody asks for more
        inputs = Inputs.flat(tensors, len(states))
        return like_row(_backward(text, options, d_outputs, inputs, Result.of_saved(y, *saved)))
    d_primals = iter(Backward.apply(text, options, *tensors, y, *saved, *d_outputs))
    return like_row(_of_those(d_primals, primals(tensors), options))


class Forward(torch.autograd.Function):
    """(text, options, *Inputs.row) -> (y, *final states, *Result.saved)."""

    @staticmethod
    def forward(text: str, options: Options, *tensors: Any) -> tuple[Tensor, ...]:
        inputs = Inputs.flat(tensors, _states(text))
        result = _forward(text, options, inputs, onlookers.watched(inputs.row), keep=options.save)
        return transforms.without_views([result.y, *result.final, *result.saved])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.text, ctx.options, *tensors = inputs
        saved = output[-SAVED:]
        ctx.mark_non_differentiable(*(saved[:-1] if ctx.options.all_states else saved))
        ctx.save_for_backward(*tensors, output[0], *saved)
        ctx.set_materialize_grads(False)  # zeros for the saved gates would take as long as 5 % of a pass on a CPU
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        if transforms.looked_into():
            return transforms.outside_of_graphs(Forward.backward, ctx, *grads)
        every = ctx.saved_tensors  # each access unpacks once more, which checkpoints refuse
        *tensors, y = every[:-SAVED]
        saved = every[-SAVED:]
        incoming = [*grads[:-SAVED], *([grads[-1]] if ctx.options.all_states else [])]
        return None, None, *pulled_back(ctx.text, ctx.options, tensors, y, saved, incoming, ctx.needs_input_grad[2])

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs = Inputs.flat(ctx.saved_tensors, _states(ctx.text))
        present = [p for p in inputs.primals if p is not None]
        along = [
            torch.zeros_like(p) if t is None else t
            for p, t in zip(inputs.primals, primals(tangents[2:]), strict=True)
            if p is not None
        ]
        t_outputs = pushforward(passes.pure(ctx.text, ctx.options, inputs), present, along)
        if ctx.options.all_states:
            return *t_outputs[:-1], *[None] * (SAVED - 1), t_outputs[-1]
        return (*t_outputs, *[None] * SAVED)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], text: str, options: Options, *tensors: Any) -> Any:
        return batching.forward(Forward, info.batch_size, in_dims[2:], text, options, tensors)


class Backward(torch.autograd.Function):
    """(text, options, *Inputs.row, y, *Result.saved, *d_outputs) -> gradients of the primals that are given."""

    @staticmethod
    def forward(text: str, options: Options, *tensors: Any) -> tuple[Tensor, ...]:
        row, saved, d_outputs = batching.split(text, options, tensors)
        inputs = Inputs.flat(row, _states(text))
        grads = _backward(text, options, d_outputs, inputs, Result.of_saved(*saved))
        return transforms.without_views(d for d in grads if d is not None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.text, ctx.options, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        if transforms.looked_into():
            return transforms.outside_of_graphs(Backward.backward, ctx, *grads)
        row, saved, d_outputs = batching.split(ctx.text, ctx.options, ctx.saved_tensors)
        inputs = Inputs.flat(row, _states(ctx.text))
        incoming = iter(grads)
        dd = _of_those(incoming, inputs.primals, ctx.options)
        of_d_outputs, of_primals = passes.second_vjp(ctx.text, ctx.options, inputs, d_outputs, dd)
        return None, None, *like_row(of_primals), *[None] * len(saved), *of_d_outputs

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        row, _, d_outputs = batching.split(ctx.text, ctx.options, ctx.saved_tensors)
        row_t, _, d_outputs_t = batching.split(ctx.text, ctx.options, tangents[2:])
        inputs = Inputs.flat(row, _states(ctx.text))
        count = len(d_outputs)

        def gradient(*at: Tensor) -> tuple[Tensor, ...]:
            grads = passes.vjp(ctx.text, ctx.options, passes.filled(inputs, at[count:]), at[:count])
            return tuple(d for d in grads if d is not None)

        point = [*d_outputs, *(p for p in inputs.primals if p is not None)]
        tangents_of = [t for t, p in zip(primals(row_t), inputs.primals, strict=True) if p is not None]
        along = [*d_outputs_t, *tangents_of]
        return pushforward(
            gradient, point, [torch.zeros_like(p) if t is None else t for p, t in zip(point, along, strict=True)]
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], text: str, options: Options, *tensors: Any) -> Any:
        return batching.backward(Backward, info.batch_size, in_dims[2:], text, options, tensors)


for _forward_of in (Forward.forward, Backward.forward):  # which `apply` would find out at each call
    _forward_of.__signature__ = inspect.signature(_forward_of)  # type: ignore[attr-defined]
# `Forward.apply` where no transform is active: that binds the arguments to a signature first, a tenth of a short call.
APPLY: Callable[..., Any] = super(torch.autograd.Function, Forward).apply


def pushforward(
    function: Callable[..., tuple[Tensor, ...]], point: Sequence[Tensor], along: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The derivative of a function along a direction: the transpose of its transpose, which is linear.

    torch.func.jvp would open a second level of forward-mode differentiation inside the user's, which torch refuses.
    """
    outputs, pull = passes.pullback(function, *point)
    _, push = passes.pullback(pull, tuple(torch.zeros_like(o) for o in outputs))
    return push(tuple(along))[0]
