# SPDX-License-Identifier: Apache-2.0
"""The scalar operations a recurrence may use, one row each: torch function, text in Triton, CUDA and C, derivative. And
`Op`, one of them with its arguments: a program is a list of these.

A derivative rule takes the gradient ``d`` of the result, the result ``y`` and the arguments, and returns the gradient
of each argument (None where there is none). Ties, boundaries and NaN follow torch's autograd: relu'(0) = 0, clamp
passes its bounds, minimum and maximum halve a tie; at NaN relu, minimum and maximum pass the gradient and clamp does
not.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

Rule = Callable[..., tuple[Any, ...]]
Argument = str | float  # a value by its name, or a number


class Operation(NamedTuple):
    """How one operation runs in torch, is printed for each language of kernels, and is differentiated."""

    torch: Callable[..., Any]
    triton: str
    cuda: str
    c: str
    derivative: Rule | None = None
    is_bool: bool = False

    @property
    def arity(self) -> int:
        """The number of arguments: every one stands in the text for Triton."""
        return 1 + max(int(index) for index in re.findall(r"{(\d)}", self.triton))


def _infix(symbol: str, derivative: Rule) -> Operation:
    """One that all languages write alike."""
    names = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
    text = f"{{0}} {symbol} {{1}}"
    return Operation(names[symbol], text, text, text, derivative)


def _bound(a_loses: str, b_loses: str) -> Rule:
    """minimum and maximum: the gradient goes to the argument that has not lost, half to each on a tie; to both at
    NaN."""

    def rule(d: Any, y: Any, a: Any, b: Any) -> tuple[Any, Any]:
        half, tied = d * 0.5, a.emit("eq", a, b)
        d_a = a.emit("where", tied, half, a.emit("where", a.emit(a_loses, a, b), 0.0, d))
        return d_a, a.emit("where", tied, half, a.emit("where", a.emit(b_loses, a, b), 0.0, d))

    return rule


def _clamp(d: Any, y: Any, x: Any, low: Any, high: Any) -> tuple[Any, None, None]:
    inside = x.emit("and", x.emit("ge", x, low), x.emit("le", x, high))
    return x.emit("where", inside, d, 0.0), None, None


def _unary(name: str, derivative: Rule, triton: str = "", cuda: str = "") -> Operation:
    """One that all languages call as a function: Triton of its own or of kernels/triton/math.py as `m`, CUDA with an f
    behind the name, C of kernels/native/functions.h."""
    texts = triton or f"tl.{name}({{0}})", cuda or f"{name}f({{0}})", f"{name}_({{0}})"
    return Operation(getattr(torch, name), *texts, derivative)


def _of_several(name: str, function: Callable[..., Any], arity: int, derivative: Rule) -> Operation:
    """Likewise, of several arguments."""
    args = ", ".join(f"{{{index}}}" for index in range(arity))
    return Operation(function, f"m.{name}({args})", f"{name}f({args})", f"{name}_({args})", derivative)


def _two_tensors(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.minimum and maximum take no Python numbers."""

    def both(a: Any, b: Any) -> Any:
        if isinstance(a, float):
            a = b.new_full((), a)
        return function(a, b if not isinstance(b, float) else a.new_full((), b))

    return both


def _compare(name: str, symbol: str) -> Operation:
    text = f"({{0}} {symbol} {{1}})"
    return Operation(getattr(operator, name), text, text, f"((truth){text})", is_bool=True)


def _both(name: str, symbol: str) -> Operation:
    text = f"({{0}} {symbol} {{1}})"
    return Operation(getattr(operator, f"{name}_"), text, text, text, is_bool=True)


TWO_OVER_SQRT_PI = 1.1283791670955126

OPERATIONS: dict[str, Operation] = {
    "add": _infix("+", lambda d, y, a, b: (d, d)),
    "sub": _infix("-", lambda d, y, a, b: (d, -d)),
    "mul": _infix("*", lambda d, y, a, b: (d * b, d * a)),
    "div": _infix("/", lambda d, y, a, b: (d / b, -(d / b) * y)),
    "neg": Operation(operator.neg, "-{0}", "-{0}", "-{0}", lambda d, y, x: (-d,)),
    "tanh": _unary("tanh", lambda d, y, x: (d * (1.0 - y * y),), "m.tanh({0})"),
    "sigmoid": _unary("sigmoid", lambda d, y, x: (d * (y * (1.0 - y)),), "m.sigmoid({0})", "sigmoidf({0})"),
    "exp": _unary("exp", lambda d, y, x: (d * y,)),
    "expm1": _unary("expm1", lambda d, y, x: (d * (y + 1.0),), "m.expm1({0})"),
    "log": _unary("log", lambda d, y, x: (d / x,)),
    "log1p": _unary("log1p", lambda d, y, x: (d / (x + 1.0),), "m.log1p({0})"),
    "sqrt": _unary("sqrt", lambda d, y, x: (d * 0.5 / y,), "tl.sqrt_rn({0})"),
    "erf": _unary("erf", lambda d, y, x: (d * TWO_OVER_SQRT_PI * x.emit("exp", -(x * x)),)),
    "sin": _unary("sin", lambda d, y, x: (d * x.emit("cos", x),)),
    "cos": _unary("cos", lambda d, y, x: (-(d * x.emit("sin", x)),)),
    "abs": _unary("abs", lambda d, y, x: (d * x.emit("sign", x),), cuda="fabsf({0})"),
    "sign": _unary("sign", lambda d, y, x: (None,), "m.sign({0})", "signf({0})"),
    "floor": _unary("floor", lambda d, y, x: (None,)),
    "relu": _unary(
        "relu",
        lambda d, y, x: (x.emit("where", x.emit("le", x, 0.0), 0.0, d),),
        "tl.where({0} < 0, 0.0, {0})",
        "({0} < 0.0f ? 0.0f : {0})",
    ),
    "clamp": _of_several("clamp", torch.clamp, 3, _clamp),
    "minimum": _of_several("minimum", _two_tensors(torch.minimum), 2, _bound("gt", "lt")),
    "maximum": _of_several("maximum", _two_tensors(torch.maximum), 2, _bound("lt", "gt")),
    "gt": _compare("gt", ">"),
    "ge": _compare("ge", ">="),
    "lt": _compare("lt", "<"),
    "le": _compare("le", "<="),
    "eq": _compare("eq", "=="),
    "ne": _compare("ne", "!="),
    "and": _both("and", "&"),
    "or": _both("or", "|"),
    "not": Operation(torch.logical_not, "({0} == 0)", "(!{0})", "(~{0})", is_bool=True),
    "where": Operation(
        torch.where,
        "tl.where({0}, {1}, {2})",
        "({0} ? {1} : {2})",
        "where_({0}, {1}, {2})",
        lambda d, y, c, a, b: (None, c.emit("where", c, d, 0.0), c.emit("where", c, 0.0, d)),
    ),
}

# What torch has for real numbers only: complex ones have no order.
REAL_ONLY = {"erf", "sign", "floor", "relu", "clamp", "minimum", "maximum", "gt", "ge", "lt", "le"}


@dataclass(frozen=True)
class Op:
    """``result = name(args)``; `line` is where it came from in the user's step, and no part of its identity."""

    result: str
    name: str
    args: tuple[Argument, ...]
    line: str = field(default="", compare=False)

    def __eq__(self, other: object) -> bool:
        """0.0 and -0.0 are two constants: what divides by them differs."""
        return isinstance(other, Op) and self.key == other.key

    @property
    def key(self) -> tuple[str, ...]:
        """What it is, in words."""
        return self.result, self.name, *map(str, self.args)


def constant(value: float) -> float:
    """A constant; of NaN always the same object, so that programs that hold it are equal."""
    return math.nan if value != value else float(value)


def live(ops: Iterable[Op], outputs: Iterable[Argument]) -> tuple[Op, ...]:
    """The operations that the outputs need, in order."""
    needed = {name for name in outputs if isinstance(name, str)}
    alive = []
    for op in reversed(list(ops)):
        if op.result in needed:
            alive.append(op)
            needed.update(arg for arg in op.args if isinstance(arg, str))
    return tuple(reversed(alive))
