# SPDX-License-Identifier: Apache-2.0
"""The two functional custom ops, `gpu_rnn::rnn` and `gpu_rnn::rnn_backward`, for torch.compile and torch.export.

Both take the cell as its program's text and the options as one short string. The eager way in, with derivatives of
every order, jvp and vmap, is `gpu_rnn.autograd`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpu_rnn import execution
from gpu_rnn.execution import Options
from gpu_rnn.products import state_dtype
from gpu_rnn.program import Program
from gpu_rnn.reference import Result, Weights

INPUTS = (
    "Tensor x, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor? params, Tensor? w_hr, "
    "Tensor? lengths, Tensor[] states"
)
IDENTITY = "str program, str options"
WEIGHTS = len(Weights._fields)
SAVED = 4  # y, gates, recurrent, inner


class Inputs(NamedTuple):
    """The inputs that both ops share, in the order of `INPUTS`."""

    x: Tensor
    weights: Weights
    lengths: Tensor | None
    states: list[Tensor]

    @staticmethod
    def of(x: Tensor, *rest: Any) -> Inputs:
        return Inputs(x, Weights(*rest[:WEIGHTS]), *rest[WEIGHTS:])

    @staticmethod
    def flat(tensors: Sequence[Any]) -> Inputs:
        """From x, the weights, the lengths and each state in a row."""
        return Inputs.of(*tensors[: 2 + WEIGHTS], list(tensors[2 + WEIGHTS :]))

    @property
    def primals(self) -> list[Tensor | None]:
        """The differentiable ones."""
        return [self.x, *self.weights, *self.states]


def _owned(outputs: Sequence[Tensor], inputs: Sequence[Tensor | None]) -> list[Tensor]:
    """The outputs as tensors of their own: a custom op may return neither an input nor a view of another output."""
    taken = {t.untyped_storage().data_ptr() for t in inputs if t is not None}
    owned = []
    for output in outputs:
        if output.untyped_storage().data_ptr() in taken or not output.is_contiguous():
            output = output.clone(memory_format=torch.contiguous_format)
        taken.add(output.untyped_storage().data_ptr())
        owned.append(output)
    return owned


@torch.library.custom_op("gpu_rnn::rnn", mutates_args=(), schema=f"({INPUTS}, {IDENTITY}) -> Tensor[]")
def rnn(*arguments: Any) -> list[Tensor]:
    """One layer: y, the final states, then what the backward pass needs (empty unless saved)."""
    *given, program, options = arguments
    inputs = Inputs.of(*given)
    result = execution.run(program, Options.decode(options), *inputs)
    outputs = [result.y, *result.final, result.gates, result.recurrent, result.inner]
    return _owned(outputs, [*inputs.primals, inputs.lengths])


@rnn.register_fake
def _(*arguments: Any) -> list[Tensor]:
    *given, program, options = arguments
    x, weights, _, states = Inputs.of(*given)
    steps, batch = x.shape[:2]
    n, gates, hidden, width = weights.w_hh.shape
    final = [x.new_empty(batch, n, width), *(x.new_empty(batch, n, hidden) for _ in states[1:])]
    y = x.new_empty(steps, batch, n, width)
    inner = x.new_empty(0, dtype=state_dtype(x.dtype))
    if not Options.decode(options).save:
        return [y, *final, x.new_empty(0), x.new_empty(0), inner]
    split = len(Program.parse(program).split)
    saved = [x.new_empty(steps, batch, n, gates, hidden), x.new_empty(steps, batch, n, split, hidden)]
    return [y, *final, *saved, inner.new_empty(len(states) - 1, steps, batch, n, hidden)]


@torch.library.custom_op(
    "gpu_rnn::rnn_backward",
    mutates_args=(),
    schema=f"(Tensor d_y, Tensor[] d_final, Tensor[] saved, {INPUTS}, {IDENTITY}) -> Tensor[]",
)
def rnn_backward(d_y: Tensor, d_final: list[Tensor], saved: list[Tensor], *arguments: Any) -> list[Tensor]:
    """The gradients of x, of the weights and of the states; an empty tensor where there is no such weight."""
    *given, program, options = arguments
    inputs = Inputs.of(*given)
    y, gates, recurrent, inner = saved
    result = Result(y, [], gates, recurrent, inner)
    found = execution.run_backward(program, Options.decode(options), d_y, d_final, *inputs, result)
    outputs = [inputs.x.new_empty(0) if d is None else d for d in found]
    return _owned(outputs, [d_y, *d_final, *saved, *inputs.primals, inputs.lengths])


@rnn_backward.register_fake
def _(d_y: Tensor, d_final: list[Tensor], saved: list[Tensor], *arguments: Any) -> list[Tensor]:
    primals = Inputs.of(*arguments[:-2]).primals
    return [
        d_y.new_empty(0) if t is None else torch.empty_like(t, memory_format=torch.contiguous_format) for t in primals
    ]


def _keep(ctx: Any, inputs: Inputs, others: Sequence[Tensor], program: str, options: str) -> None:
    ctx.program, ctx.options, ctx.others = program, options, len(others)
    ctx.save_for_backward(*others, inputs.x, *inputs.weights, inputs.lengths, *inputs.states)


def _kept(ctx: Any) -> tuple[Inputs, Sequence[Tensor]]:
    others, given = ctx.saved_tensors[: ctx.others], ctx.saved_tensors[ctx.others :]
    return Inputs.flat(given), others


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    *given, program, options = inputs
    kept = Inputs.of(*given)
    _keep(ctx, kept, [output[0], *output[1 + len(kept.states) :]], program, options)


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    inputs, saved = _kept(ctx)
    shapes = [saved[0], *inputs.states]
    d = [torch.zeros_like(s) if g is None else g for g, s in zip(grads, shapes, strict=False)]
    x, weights, lengths, states = inputs
    found = torch.ops.gpu_rnn.rnn_backward(
        d[0], d[1:], list(saved), x, *weights, lengths, states, ctx.program, ctx.options
    )
    return *_given(inputs, found), None, list(found[1 + WEIGHTS :]), None, None


def _given(inputs: Inputs, found: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The gradients of x and the weights, None for a weight that the layer does not have."""
    return [None if t is None else d for t, d in zip((inputs.x, *inputs.weights), found, strict=False)]


def _setup_second(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    d_y, d_final, _, *given, program, options = inputs
    _keep(ctx, Inputs.of(*given), [d_y, *d_final], program, options)


def _second(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    inputs, d_outputs = _kept(ctx)
    found_d, found = execution.second_vjp(
        ctx.program, Options.decode(ctx.options), inputs.lengths, inputs.primals, d_outputs, grads
    )
    states = list(found[1 + WEIGHTS :])
    return found_d[0], list(found_d[1:]), [None] * SAVED, *_given(inputs, found), None, states, None, None


rnn.register_autograd(_backward, setup_context=_setup)
rnn_backward.register_autograd(_second, setup_context=_setup_second)
