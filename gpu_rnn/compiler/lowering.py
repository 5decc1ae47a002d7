# SPDX-License-Identifier: Apache-2.0
"""How torch's operations are written in the whitelist of `gpu_rnn.compiler.operations`: one row each."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from gpu_rnn.compiler.builder import Builder, Value
from gpu_rnn.compiler.operations import OPERATIONS


class Unsupported(Exception):
    """A form of an operation that has no meaning in a recurrence."""


def _integer_power(b: Builder, x: Any, exponent: int) -> Any:
    result = x
    for _ in range(abs(exponent) - 1):
        result = b.emit("mul", result, x)
    return result if exponent > 0 else b.emit("div", 1.0, result)


def _pow(b: Builder, x: Any, exponent: Any) -> Any:
    if isinstance(exponent, Value):
        if x == 1:  # to the power of everything, NaN too
            return b.value(1.0)
        if isinstance(x, (int, float)) and x > 0:
            return b.emit("exp", b.emit("mul", exponent, torch.tensor(float(x), dtype=torch.float64).log().item()))
        raise Unsupported("a power needs a constant exponent, or a positive constant base")
    if exponent == 0.5:
        return b.emit("sqrt", x)
    if exponent == 0:  # of everything, NaN too
        return b.value(1.0)
    if float(exponent).is_integer() and 1 <= abs(exponent) <= 8:
        return _integer_power(b, x, int(exponent))
    raise Unsupported(f"the exponent {exponent}; use whole numbers from -8 to 8, or 0.5")


def _scaled(name: str) -> Callable[..., Any]:
    """add and sub with torch's `alpha`."""

    def rule(b: Builder, x: Any, y: Any, alpha: float = 1) -> Any:
        return b.emit(name, x, y if alpha == 1 else b.emit("mul", y, alpha))

    return rule


def _add(b: Builder, x: Any, y: Any, alpha: float = 1) -> Any:
    """The sum; of two truth values torch's is true where either is."""
    if all(isinstance(each, bool) or (isinstance(each, Value) and _is_bool(b, each)) for each in (x, y)):
        return _logical("or")(b, x, y if alpha else False)
    return _scaled("add")(b, copy(b, x), copy(b, y), alpha)


def _sinc(b: Builder, x: Any) -> Any:
    """sin(πx) / πx. At 0 it divides by 1 instead, for 0/0 has no gradient, not even where nothing takes its value."""
    zero = b.emit("eq", x, 0.0)
    angle = b.emit("mul", b.emit("where", zero, 1.0, x), math.pi)
    return b.emit("where", zero, 1.0, b.emit("div", b.emit("sin", angle), angle))


def _elu(b: Builder, x: Any, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Any:
    """scale · (x if x > 0 else alpha · (exp(x · input_scale) − 1)), as aten::elu."""
    positive = b.emit("gt", x, 0.0)
    below = b.emit("where", positive, 0.0, x)  # not clamp, which has no gradient at NaN
    negative = b.emit("mul", b.emit("expm1", b.emit("mul", below, input_scale)), alpha * scale)
    return b.emit("where", positive, b.emit("mul", x, scale), negative)


def _gelu(b: Builder, x: Any, approximate: str = "none") -> Any:
    """x Φ(x), or its tanh form (Hendrycks & Gimpel, arXiv:1606.08415)."""
    if approximate == "tanh":
        cubed = b.emit("mul", b.emit("mul", x, x), x)
        inner = b.emit("mul", b.emit("add", x, b.emit("mul", cubed, 0.044715)), 0.7978845608028654)
        return b.emit("mul", b.emit("mul", x, 0.5), b.emit("add", b.emit("tanh", inner), 1.0))
    phi = b.emit("add", b.emit("erf", b.emit("mul", x, 0.7071067811865476)), 1.0)
    return b.emit("mul", b.emit("mul", x, 0.5), phi)


def _softplus(b: Builder, x: Any, beta: float = 1, threshold: float = 20) -> Any:
    """log(1 + exp(beta x)) / beta, and x itself above the threshold, as aten::softplus."""
    scaled = b.emit("mul", x, beta)
    above = b.emit("gt", scaled, threshold)
    soft = b.emit("log1p", b.emit("exp", b.emit("where", above, threshold, scaled)))
    return b.emit("where", above, x, b.emit("div", soft, beta))


def _div(b: Builder, x: Any, y: Any, rounding_mode: str | None = None) -> Any:
    if rounding_mode not in (None, "floor"):
        raise Unsupported(f"rounding_mode={rounding_mode!r}; it knows None and 'floor'")
    quotient = b.emit("div", x, y)
    return b.emit("floor", quotient) if rounding_mode else quotient


def _clamp(b: Builder, x: Any, low: Any = None, high: Any = None) -> Any:
    if isinstance(low, Value) or isinstance(high, Value):
        raise Unsupported("bounds that are values; use torch.minimum and torch.maximum")
    return b.emit("clamp", x, -float("inf") if low is None else low, float("inf") if high is None else high)


def copy(b: Builder, x: Any, *_: Any) -> Any:
    """A copy, or the real number that a truth value stands for."""
    return b.emit("where", x, 1.0, 0.0) if isinstance(x, Value) and _is_bool(b, x) else x


def _to(b: Builder, x: Any, dtype: torch.dtype | None = None, *_: Any) -> Any:
    """A change of dtype: in a recurrence all values are real numbers of one precision, float32 or float64."""
    if dtype in (None, torch.float32, torch.float64):
        return x
    if dtype.is_floating_point:
        raise Unsupported(f"a change to {dtype}; nothing is rounded to fewer bits within a step, so leave it out")
    if dtype == torch.bool:
        return b.emit("ne", x, 0.0)
    raise Unsupported(f"a change to {dtype}; its values are real numbers")


def _is_bool(b: Builder, x: Any) -> bool:
    return any(op.result == x.name and OPERATIONS[op.name].is_bool for op in b.ops)


def _detached(b: Builder, x: Any, *_: Any) -> Any:
    if not isinstance(x.name, str):  # torch itself detaches a number that it made a tensor of
        return x
    raise Unsupported("a gradient flows through every value of a recurrence, so detach has no meaning in it")


def _named(name: str) -> Callable[..., Any]:
    return lambda b, *args: b.emit(name, *args)


# Operations that take truth values as they are; for every other one they are first turned into 1.0 and 0.0.
TAKES_BOOL = {"where", "add", *(f"{kind}_{name}" for kind in ("logical", "bitwise") for name in ("and", "or", "not"))}


def _truth(b: Builder, x: Any) -> Any:
    """A truth value; of a number whether it is not 0."""
    return x if not isinstance(x, Value) or _is_bool(b, x) else b.emit("ne", x, 0.0)


def _logical(name: str) -> Callable[..., Any]:
    return lambda b, *args: b.emit(name, *(_truth(b, x) for x in args))


# What the tracer's decompositions leave of torch's arithmetic and activations, by ATen's name.
LOWERING: dict[str, Callable[..., Any]] = {
    **{name: _named(name) for name in ("mul", "neg", "tanh", "sigmoid", "exp", "expm1", "log", "log1p", "sqrt", "erf")},
    **{name: _named(name) for name in ("sin", "cos", "abs", "sign", "floor", "relu", "minimum", "maximum")},
    "where": lambda b, condition, x, y: b.emit("where", _truth(b, condition), copy(b, x), copy(b, y)),
    **{name: _named(name) for name in ("gt", "ge", "lt", "le", "eq", "ne")},
    **{f"{kind}_{name}": _logical(name) for kind in ("logical", "bitwise") for name in ("and", "or", "not")},
    **dict.fromkeys(("clone", "expand", "view"), copy),
    "_to_copy": _to,
    **dict.fromkeys(("alias", "detach"), _detached),
    **dict.fromkeys(("full", "full_like"), lambda b, like, value, *_: b.value(float(value))),
    "scalar_tensor": lambda b, value, *_: b.value(float(value)),
    "add": _add,
    "sinc": _sinc,
    "sub": _scaled("sub"),
    "rsub": lambda b, x, y, alpha=1: _scaled("sub")(b, y, x, alpha),
    "div": _div,
    "reciprocal": lambda b, x: b.emit("div", 1.0, x),
    "rsqrt": lambda b, x: b.emit("div", 1.0, b.emit("sqrt", x)),
    "square": lambda b, x: b.emit("mul", x, x),
    "pow": _pow,
    "elu": _elu,
    "celu": lambda b, x, alpha=1: _elu(b, x, alpha, 1, 1 / alpha),
    "gelu": _gelu,
    "softplus": _softplus,
    "leaky_relu": lambda b, x, slope=0.01: b.emit("where", b.emit("gt", x, 0.0), x, b.emit("mul", x, slope)),
    "hardtanh": lambda b, x, low=-1.0, high=1.0: _hardtanh(b, x, low, high),
    "hardsigmoid": lambda b, x: b.emit("div", _hardtanh(b, b.emit("add", x, 3.0), 0.0, 6.0), 6.0),
    "hardswish": lambda b, x: b.emit("div", b.emit("mul", x, _hardtanh(b, b.emit("add", x, 3.0), 0.0, 6.0)), 6.0),
    "clamp": _clamp,
    "clamp_min": lambda b, x, low: _clamp(b, x, low),
    "clamp_max": lambda b, x, high: _clamp(b, x, None, high),
}


def _hardtanh(b: Builder, x: Any, low: float, high: float) -> Any:
    """aten::hardtanh: unlike clamp's, its gradient is 0 at the bounds; NaN stays NaN."""
    below = b.emit("where", b.emit("ge", x, high), high, x)
    return b.emit("where", b.emit("le", x, low), low, below)


# Decomposed by torch the first two have NaN gradients where exp(x) overflows, the next two gradients at their bounds,
# and the last one a NaN gradient at 0.
KEPT = ("softplus", "celu", "hardsigmoid", "hardswish", "sinc")
