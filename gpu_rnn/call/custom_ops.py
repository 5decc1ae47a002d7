# SPDX-License-Identifier: Apache-2.0
"""The two functional custom ops, `gpu_rnn::rnn` and `gpu_rnn::rnn_backward`, for torch.compile, torch.export and
whatever else records operations (`gpu_rnn.call.onlookers`).

Both take the cell as its program's text and the options as one short string. The eager way in, with derivatives of
every order and forward mode, is `gpu_rnn.call.autograd`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gpu_rnn.backends.tensors import FIRST_CONTROL, FIRST_STATE, Inputs, LayerControls, Result, Weights, state_dtype
from gpu_rnn.call import checks, onlookers, passes
from gpu_rnn.call import vmap as batching
from gpu_rnn.call.passes import Options
from gpu_rnn.compiler.program import Program

REQUIRED = ("w_ih", "w_hh")
NAMED = [f"Tensor{'' if name in REQUIRED else '?'} {name}" for name in (*Weights._fields, *LayerControls._fields)]
INPUTS = ", ".join(["Tensor x", *NAMED, "Tensor[] states", "Tensor[]? reset_values"])
IDENTITY = "str program, str options"


def owned(outputs: Sequence[Tensor], inputs: Sequence[Tensor | None]) -> list[Tensor]:
    """The outputs as tensors of their own: a custom op may return neither an input nor a view of another output."""
    taken = {t.untyped_storage().data_ptr() for t in inputs if t is not None}
    owned = []
    for output in outputs:
        if output.untyped_storage().data_ptr() in taken or not output.is_contiguous():
            output = output.clone(memory_format=torch.contiguous_format)
        taken.add(output.untyped_storage().data_ptr())
        owned.append(output)
    return owned


class _Derived(threading.local):
    """Whether the operation that runs in this thread is a part of what `gpu_rnn.call.autograd` takes derivatives of."""

    yes = False


_derived = _Derived()


@contextmanager
def derived() -> Iterator[None]:
    """An operation in here may run while forward-mode derivatives are taken."""
    before, _derived.yes = _derived.yes, True
    try:
        yield
    finally:
        _derived.yes = before


def _refuse_tangents() -> None:
    """A custom op's tangent would be 0 without a word, and it does not see whether its inputs have one."""
    if torch.autograd.forward_ad._current_level >= 0 and not _derived.yes:
        raise RuntimeError(
            "what was recorded of a layer (torch.export, make_fx, torch.jit.trace) has no forward-mode derivative: "
            "take it of "
            "the layer itself"
        )


@torch.library.custom_op("gpu_rnn::rnn", mutates_args=(), schema=f"({INPUTS}, {IDENTITY}) -> Tensor[]")
def rnn(*arguments: Any) -> list[Tensor]:
    """One layer: y, the final states, then what the backward pass needs (empty unless saved).

    Shapes, dtypes and devices are checked; lengths are clamped to the steps there are (see `checks.inputs`).
    """
    _refuse_tangents()
    *tensors, program, options = arguments
    decoded = Options.decode(options)
    inputs = checks.inputs("gpu_rnn::rnn", program, decoded, Inputs.of(*tensors))
    result = passes.run(program, decoded, inputs)
    nothing = result.y.new_empty(0)
    if not decoded.save or decoded.rebuilds:
        result = result._replace(gates=nothing, recurrent=nothing)
        if not (decoded.save or decoded.all_states):
            result = result._replace(inner=result.inner.new_empty(0))
    return owned([result.y, *result.final, result.gates, result.recurrent, result.inner], inputs.row)


@rnn.register_fake
def _(*arguments: Any) -> list[Tensor]:
    onlookers.check_translated()
    *tensors, program, text = arguments
    inputs = Inputs.of(*tensors)
    checks.devices("gpu_rnn::rnn", inputs.x, inputs.row)
    x, weights, _, states, _ = inputs
    options = Options.decode(text)
    n, gates, hidden, width = weights.w_hh.shape
    steps, batch = x.shape[:2]
    # The layers of a stack stand first.
    over_time = (steps, batch, n) if weights.w_between is None else (n, steps, batch)
    final = [x.new_empty(batch, n, width), *(x.new_empty(batch, n, hidden) for _ in states[1:])]
    inner = x.new_empty(0, dtype=state_dtype(x.dtype))
    if options.save or options.all_states:
        inner = inner.new_empty(len(states) - 1, *over_time, hidden)
    outputs = [x.new_empty(*over_time, width), *final]
    if not options.save or options.rebuilds:
        return [*outputs, x.new_empty(0), x.new_empty(0), inner]
    split = len(Program.parse(program).split)
    return [*outputs, x.new_empty(*over_time, gates, hidden), x.new_empty(*over_time, split, hidden), inner]


@torch.library.custom_op(
    "gpu_rnn::rnn_backward",
    mutates_args=(),
    schema=f"(Tensor[] d_outputs, Tensor[] saved, {INPUTS}, {IDENTITY}) -> Tensor[]",
)
def rnn_backward(d_outputs: list[Tensor], saved: list[Tensor], *arguments: Any) -> list[Tensor]:
    """The gradients of the differentiable inputs in a row; an empty tensor where there is no such weight.

    Checks what it is given as `rnn` does.
    """
    _refuse_tangents()
    *tensors, program, options = arguments
    decoded = Options.decode(options)
    inputs = checks.inputs("gpu_rnn::rnn_backward", program, decoded, Inputs.of(*tensors))
    checks.gradients("gpu_rnn::rnn_backward", program, decoded, inputs, d_outputs, saved)
    y, gates, recurrent, inner = saved
    result = Result(y, [], gates, recurrent, inner)
    grads = passes.run_backward(program, decoded, d_outputs, inputs, result)
    outputs = [inputs.x.new_empty(0) if d is None else d for d in grads]
    return owned(outputs, [*d_outputs, *saved, *inputs.row])


@rnn_backward.register_fake
def _(d_outputs: list[Tensor], saved: list[Tensor], *arguments: Any) -> list[Tensor]:
    inputs = Inputs.of(*arguments[:-2])
    checks.devices("gpu_rnn::rnn_backward", inputs.x, [*inputs.row, *d_outputs, *saved])
    return [
        inputs.x.new_empty(0) if t is None else torch.empty_like(t, memory_format=torch.contiguous_format)
        for t in inputs.primals
    ]


def _keep(ctx: Any, tensors: Sequence[Any], others: Sequence[Tensor], program: str, options: str) -> None:
    inputs = Inputs.of(*tensors)
    ctx.program, ctx.options, ctx.others, ctx.states = program, options, len(others), len(inputs.states)
    ctx.no_values = None if tensors[-1] is None else []  # what was given where there is nothing to reset to
    ctx.save_for_backward(*others, *inputs.row)


def _kept(ctx: Any) -> tuple[Inputs, Sequence[Tensor]]:
    saved = ctx.saved_tensors  # each access unpacks once more, which checkpoints refuse
    return Inputs.flat(saved[ctx.others :], ctx.states), saved[: ctx.others]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    *tensors, program, options = inputs
    states = len(Inputs.of(*tensors).states)
    _keep(ctx, tensors, [output[0], *output[1 + states :]], program, options)


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    inputs, saved = _kept(ctx)
    shapes = [saved[0], *inputs.states]
    if Options.decode(ctx.options).all_states:
        grads, shapes = [*grads[: len(shapes)], grads[-1]], [*shapes, saved[-1]]
    d = [torch.zeros_like(s) if g is None else g for g, s in zip(grads, shapes, strict=False)]
    d_primals = torch.ops.gpu_rnn.rnn_backward(d, list(saved), *in_order(inputs), ctx.program, ctx.options)
    return *_as_given(ctx, inputs, d_primals), None, None


def in_order(inputs: Inputs) -> list[Any]:
    """A call's tensors as both ops take them."""
    return _grouped(inputs.row, len(inputs.states), None)


def _grouped(row: Sequence[Any], states: int, no_values: list[Any] | None) -> list[Any]:
    """A row like `Inputs.row` as the ops take it, the states and the reset values in a list each; `no_values` where
    there are none of these: an empty list is lost in a package of AOTInductor."""
    reset_values = list(row[FIRST_STATE + states :])
    return [*row[:FIRST_STATE], list(row[FIRST_STATE : FIRST_STATE + states]), reset_values or no_values]


def _as_given(ctx: Any, inputs: Inputs, grads: Sequence[Tensor | None]) -> list[Any]:
    """Gradients of the primals in the places of the op's arguments; None for what the layer does not have."""
    d = [None if t is None else g for t, g in zip(inputs.primals, grads, strict=True)]
    row = [*d[:FIRST_CONTROL], *[None] * len(LayerControls._fields), *d[FIRST_CONTROL:]]
    return _grouped(row, len(inputs.states), ctx.no_values)


def _setup_second(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    d_outputs, _, *tensors, program, options = inputs
    _keep(ctx, tensors, d_outputs, program, options)


def _second(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    inputs, d_outputs = _kept(ctx)
    of_d_outputs, of_primals = passes.second_vjp(ctx.program, Options.decode(ctx.options), inputs, d_outputs, grads)
    return list(of_d_outputs), [None] * len(checks.SAVED_AXES), *_as_given(ctx, inputs, of_primals), None, None


rnn.register_autograd(_backward, setup_context=_setup)
rnn_backward.register_autograd(_second, setup_context=_setup_second)


class _Operation:
    """`gpu_rnn::rnn` as the rules of vmap call a Function, which also gives what a normalisation keeps."""

    @staticmethod
    def apply(program: str, options: Options, *row: Tensor | None) -> list[Tensor]:
        tensors = _grouped(row, len(Program.parse(program).states), None)
        *outputs, inner = torch.ops.gpu_rnn.rnn(*tensors, program, options.encode())
        return [*outputs, inner.new_empty(0), inner.new_empty(0), inner]


@rnn.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[list[Tensor], list[int | None]]:
    *tensors, program, options = arguments
    row, dims = ([*each[:FIRST_STATE], *each[FIRST_STATE], *(each[-1] or ())] for each in (tensors, in_dims[:-2]))
    outputs, places = batching.forward(_Operation, info.batch_size, dims, program, Options.decode(options), row)
    return [*outputs[:-3], outputs[-1]], [*places[:-3], places[-1]]
