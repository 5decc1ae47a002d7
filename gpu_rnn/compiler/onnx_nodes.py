# SPDX-License-Identifier: Apache-2.0
"""A program's operations as nodes of an ONNX graph, one row each.

Rows name ONNX's operators alone and emit them through whatever makes nodes, so no ONNX package is needed here. Those of
`gpu_rnn.onnx` write a graph of torch.onnx.export.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from gpu_rnn.compiler.operations import Argument, Op


class Emitter(Protocol):
    """Makes nodes: the value of one of the operator that is named, and constants in the dtype of a program."""

    def __call__(self, operator: str, *inputs: Any) -> Any: ...

    def number(self, value: float) -> Any: ...


def _node(operator: str) -> Callable[..., Any]:
    return lambda emit, *args: emit(operator, *args)


def _expm1(emit: Emitter, x: Any) -> Any:
    """tanh(x/2) · (exp(x) + 1): exact near 0, where exp(x) - 1 cancels."""
    half = emit("Tanh", emit("Mul", x, emit.number(0.5)))
    return emit("Mul", half, emit("Add", emit("Exp", x), emit.number(1.0)))


def _log1p(emit: Emitter, x: Any) -> Any:
    """log(u) · x / (u - 1) with u = 1 + x rounded, and x itself where u is 1 (Higham, Accuracy and Stability of
    Numerical Algorithms, 1.14.1); log(u) where nothing was rounded, so that infinity stays what it is."""
    one = emit.number(1.0)
    u = emit("Add", x, one)
    difference = emit("Sub", u, one)
    factor = emit("Where", emit("Equal", difference, x), one, emit("Div", x, difference))
    return emit("Where", emit("Equal", u, one), x, emit("Mul", emit("Log", u), factor))


def _relu(emit: Emitter, x: Any) -> Any:
    """Written out: runtimes disagree on the Relu of NaN."""
    zero = emit.number(0.0)
    return emit("Where", emit("Less", x, zero), zero, x)


ONNX: dict[str, Callable[..., Any]] = {
    "add": _node("Add"),
    "sub": _node("Sub"),
    "mul": _node("Mul"),
    "div": _node("Div"),
    "neg": _node("Neg"),
    "tanh": _node("Tanh"),
    "sigmoid": _node("Sigmoid"),
    "exp": _node("Exp"),
    "expm1": _expm1,
    "log": _node("Log"),
    "log1p": _log1p,
    "sqrt": _node("Sqrt"),
    "erf": _node("Erf"),
    "sin": _node("Sin"),
    "cos": _node("Cos"),
    "abs": _node("Abs"),
    "sign": _node("Sign"),
    "floor": _node("Floor"),
    "relu": _relu,
    "clamp": _node("Clip"),
    "minimum": _node("Min"),
    "maximum": _node("Max"),
    "gt": _node("Greater"),
    "ge": _node("GreaterOrEqual"),
    "lt": _node("Less"),
    "le": _node("LessOrEqual"),
    "eq": _node("Equal"),
    "ne": lambda emit, a, b: emit("Not", emit("Equal", a, b)),
    "and": _node("And"),
    "or": _node("Or"),
    "not": _node("Not"),
    "where": _node("Where"),
}
"""Of each row of `operations.OPERATIONS` its nodes. All of them are operators of opset 18."""


def emit_operations(emit: Emitter, ops: Iterable[Op], values: dict[str, Any]) -> None:
    """Operations in order; `values` holds what they take, by name, and receives what they make."""

    def value_of(arg: Argument) -> Any:
        return values[arg] if isinstance(arg, str) else emit.number(arg)

    for op in ops:
        values[op.result] = ONNX[op.name](emit, *map(value_of, op.args))
