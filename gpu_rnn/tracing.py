# SPDX-License-Identifier: Apache-2.0
"""From a user's step function to a program: torch's tracer on 0-d tensors, lowered to the whitelist of operations."""

from __future__ import annotations

import inspect
import keyword
import linecache
import sys
import traceback
from collections import namedtuple
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from gpu_rnn.operations import OPERATIONS
from gpu_rnn.program import IDENTIFIER, Argument, Builder, Op, Program, Stage, Value, live

Step = Callable[..., Any]
_LIBRARY = (str(Path(torch.__file__).parent), str(Path(__file__).parent))


class TraceError(ValueError):
    """A step that cannot become a program. The message names the operation, the cell and the line."""


def trace(
    name: str,
    states: Sequence[tuple[str, float]],
    params: Sequence[str],
    stages: Sequence[tuple[Sequence[str], Step]],
) -> Program:
    """Traces the step functions of a recurrence into its program.

    Raises:
        TraceError: the step branches on values, closes over a tensor, draws random numbers, uses an operation outside
            `gpu_rnn.operations`, or returns something else than one value for each state.
    """
    gates = [gate for stage_gates, _ in stages for gate in stage_gates]
    _check_names(name, gates, [state for state, _ in states], params)
    traced = []
    carried: tuple[str, ...] = ()
    builder = Builder()
    for number, (stage_gates, step) in enumerate(stages):
        last = number == len(stages) - 1
        before = len(builder.ops)
        results = _Stage(name, builder, stage_gates, [s for s, _ in states], params, step).run(carried, last)
        if last and len(results) != len(states):
            raise TraceError(
                f"{name}: {_where(step)} returned {len(results)} values for {len(states)} states "
                f"({', '.join(s for s, _ in states)}); return the new states in this order"
            )
        outputs = results if last else results[:1]
        carried = tuple(r for r in results[1:] if isinstance(r, str)) if not last else ()
        if not last and len(carried) != len(results) - 1:
            raise TraceError(f"{name}: {_where(step)} hands on a constant; write it in the later stage instead")
        traced.append((tuple(stage_gates), outputs, builder.ops[before:]))
    return _finish(name, tuple(states), tuple(params), traced)


def _check_names(name: str, gates: Sequence[str], states: Sequence[str], params: Sequence[str]) -> None:
    for kind, words in (("name", [name]), ("gate", gates), ("state", states), ("parameter", params)):
        for word in words:
            if not isinstance(word, str) or not IDENTIFIER.match(word) or keyword.iskeyword(word):
                raise ValueError(f"a recurrence's {kind} is a short identifier such as 'f', not {word!r}")
        if len(set(words)) != len(words):
            raise ValueError(f"the {kind}s of {name} are not distinct: {', '.join(words)}")
    if not gates or not states:
        raise ValueError(f"{name} needs at least one gate and one state")


def _finish(
    name: str,
    states: tuple[tuple[str, float], ...],
    params: tuple[str, ...],
    traced: list[tuple[tuple[str, ...], tuple[Argument, ...], list[Op]]],
) -> Program:
    """Drops dead code, joins x + r where a gate's two parts meet only there, and renumbers."""
    outputs = {out for _, outs, _ in traced for out in outs}
    kept = set(live((op for _, _, ops in traced for op in ops), outputs))
    joined = _joined([gate for gates, _, _ in traced for gate in gates], kept, outputs)
    renamed: dict[Argument, Argument] = dict(joined)
    stages, count = [], 0
    for gates, results, ops in traced:
        renumbered = []
        for op in ops:
            if op not in kept or op.result in joined:
                continue
            renamed[op.result] = f"t{count}"
            args = tuple(renamed.get(arg, arg) for arg in op.args)
            renumbered.append(Op(f"t{count}", op.name, args, op.line))
            count += 1
        stages.append(Stage(gates, tuple(renumbered), tuple(renamed.get(r, r) for r in results)))
    summed = frozenset(str(a)[2:] for a in joined.values())
    return Program(name, states, params, tuple(stages), summed)


def _joined(gates: list[str], ops: set[Op], outputs: set[Argument]) -> dict[Argument, Argument]:
    """The results x + r of the gates whose two parts are used nowhere else, each with its new name a_<gate>."""
    uses: dict[Argument, list[Op]] = {}
    for op in ops:
        for arg in op.args:
            uses.setdefault(arg, []).append(op)
    joined: dict[Argument, Argument] = {}
    for gate in gates:
        x, r = f"x_{gate}", f"r_{gate}"
        meet = uses.get(x, [])
        if len(meet) == 1 and uses.get(r) == meet and meet[0].name == "add" and outputs.isdisjoint((x, r)):
            joined[meet[0].result] = f"a_{gate}"
    return joined


class _Stage:
    """The tracing of one step function."""

    def __init__(
        self,
        cell: str,
        builder: Builder,
        gates: Sequence[str],
        states: Sequence[str],
        params: Sequence[str],
        step: Step,
    ) -> None:
        self.cell, self.builder, self.step = cell, builder, step
        self.groups = [("x", gates), ("r", gates), ("s", states), ("p", params)]

    def run(self, carried: tuple[str, ...], last: bool) -> tuple[Argument, ...]:
        groups = self._groups_taken(len(carried))
        names = [f"{kind}_{word}" for kind, words in groups for word in words] + list(carried)
        graph = self._graph(groups, len(names), len(carried))
        known: dict[Any, Value] = {}
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        for node, name in zip(placeholders, names, strict=True):
            known[node] = self.builder.value(name)
        for node in graph.nodes:
            if node.op == "output":
                return tuple(self._result(known, arg).name for arg in node.args[0])
            if node.op != "placeholder":
                known[node] = self._lower(node, known)
        raise AssertionError("a graph ends with its output")

    def _groups_taken(self, carried: int) -> list[tuple[str, Sequence[str]]]:
        """A step may leave out the trailing arguments it does not need: step(x, r, s) or step(x, r, s, p)."""
        try:
            signature = inspect.signature(self.step)
        except (TypeError, ValueError) as error:
            raise TypeError(f"{self.cell}: a step is a Python function step(x, r, s[, p]), not {self.step!r}") from error
        most = 4 + (carried > 0)
        taken = next((n for n in range(most, 2, -1) if _accepts(signature, n)), 0)
        if not taken or (self.groups[3][1] and taken < 4):
            wanted = "step(x, r, s, p)" if self.groups[3][1] else "step(x, r, s)"
            raise TypeError(f"{self.cell}: {_where(self.step)} must take {wanted}, it takes {signature}")
        self.taken = taken
        return self.groups[: min(taken, 4)]

    def _graph(self, groups: list[tuple[str, Sequence[str]]], count: int, carried: int) -> torch.fx.Graph:
        from torch._decomp import core_aten_decompositions
        from torch.func import functionalize
        from torch.fx.experimental.proxy_tensor import make_fx
        from torch.fx.traceback import preserve_node_meta

        shapes = [namedtuple(f"{kind}_values", words) if words else tuple for kind, words in groups]

        def flat(*tensors: torch.Tensor) -> tuple[Any, ...]:
            rest = list(tensors)
            args: list[Any] = []
            for shape, (_, words) in zip(shapes, groups, strict=True):
                args.append(shape(*rest[: len(words)]) if words else ())
                del rest[: len(words)]
            if self.taken > 4:
                args.append(tuple(rest))
            with preserve_node_meta(), _Lines():
                result = self.step(*args)
            return tuple(result) if isinstance(result, (tuple, list)) else (result,)

        examples = [torch.tensor(0.25 + 0.01 * n, dtype=torch.float64, device="cpu") for n in range(count)]
        # torch's own softplus decomposition has a NaN gradient where exp(x) overflows; _softplus has none.
        table = {op: rule for op, rule in core_aten_decompositions().items() if op is not torch.ops.aten.softplus.default}
        tracer = make_fx(
            functionalize(flat),
            decomposition_table=table,
            tracing_mode="real",
            _error_on_data_dependent_ops=True,
        )
        try:
            with torch.enable_grad():
                return tracer(*examples).graph
        except (RuntimeError, AttributeError, IndexError, TypeError, ValueError) as error:
            if "data-dependent control flow" not in str(error):
                raise TraceError(f"{self.cell}: {self._frame(error)}: {_first_line(error)}") from error
            raise TraceError(
                f"{self.cell}: {self._frame(error)} branches on a value or takes a number out of a tensor; "
                "use torch.where, so that every unit takes its own branch"
            ) from error

    def _frame(self, error: BaseException) -> str:
        frames = traceback.extract_tb(error.__traceback__)
        own = [f for f in frames if not f.filename.startswith(_LIBRARY)]
        return _show(own[-1].filename, own[-1].lineno) if own else _where(self.step)

    def _result(self, known: dict[Any, Value], arg: Any) -> Value:
        if isinstance(arg, (int, float)):
            return self.builder.value(float(arg))
        if arg not in known:
            raise TraceError(f"{self.cell}: {_where(self.step)} returned {arg!r}; return tensors, one for each state")
        return known[arg]

    def _lower(self, node: Any, known: dict[Any, Value]) -> Value:
        line = node.meta.get("stack_trace") or _where(self.step)
        if node.op == "get_attr":
            raise TraceError(
                f"{self.cell}: {_where(self.step)} closes over a tensor{_closed_over(self.step)}; "
                "a constant is a Python number, a learnt value is one of the recurrence's params"
            )
        overload = node.target
        rule = LOWERING.get(getattr(overload, "_opname", ""))
        arguments = _arguments(overload, node.args, node.kwargs)
        if rule is None:
            what = "draws random numbers with" if _is_random(overload) else "uses"
            raise TraceError(
                f"{self.cell}: {line} {what} {overload}, which a recurrence cannot hold; "
                "it holds arithmetic, comparisons, torch.where, clamp, minimum, maximum and the usual activations"
            )
        self.builder.line = line
        lifted = [known.get(a, a) if isinstance(a, torch.fx.Node) else a for a in arguments]
        if overload._opname not in TAKES_BOOL:
            lifted = [_copy(self.builder, a) if isinstance(a, Value) else a for a in lifted]
        try:
            return rule(self.builder, *lifted)
        except _Unsupported as error:
            raise TraceError(f"{self.cell}: {line} uses {overload}: {error}") from None


def _accepts(signature: inspect.Signature, count: int) -> bool:
    try:
        signature.bind(*range(count))
    except TypeError:
        return False
    return True


def _is_random(overload: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(overload, "tags", ())


def _closed_over(step: Step) -> str:
    """The names of the tensors that a closure holds, for the error message."""
    held = inspect.getclosurevars(step) if inspect.isfunction(step) else None
    names = [n for n, v in ({**held.nonlocals, **held.globals} if held else {}).items() if torch.is_tensor(v)]
    return f" ({', '.join(names)})" if names else ""


def _arguments(overload: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    """All arguments by position, defaults filled in."""
    schema = getattr(overload, "_schema", None)
    if schema is None:
        return list(args)
    filled = list(args)
    for argument in schema.arguments[len(args) :]:
        filled.append(kwargs.get(argument.name, argument.default_value))
    return filled


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _show(filename: str, number: int | None) -> str:
    text = linecache.getline(filename, number or 0).strip()
    return f"{Path(filename).name}:{number}" + (f" `{text}`" if text else "")


def _where(step: Step) -> str:
    code = getattr(step, "__code__", None)
    return f"{Path(code.co_filename).name}:{code.co_firstlineno} `{step.__name__}`" if code else repr(step)


class _Lines(TorchFunctionMode):
    """Notes in each traced node the innermost line outside torch that called for it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        frame = sys._getframe(1)
        while frame.f_back is not None and frame.f_code.co_filename.startswith((_LIBRARY[0], __file__)):
            frame = frame.f_back
        torch.fx.traceback.set_stack_trace([_show(frame.f_code.co_filename, frame.f_lineno)])
        return func(*args, **(kwargs or {}))


class _Unsupported(Exception):
    """A form of an operation that has no meaning in a recurrence."""


def _integer_power(b: Builder, x: Any, exponent: int) -> Any:
    result = x
    for _ in range(abs(exponent) - 1):
        result = b.emit("mul", result, x)
    return result if exponent > 0 else b.emit("div", 1.0, result)


def _pow(b: Builder, x: Any, exponent: Any) -> Any:
    if isinstance(exponent, Value):
        if isinstance(x, (int, float)) and x > 0:
            return b.emit("exp", b.emit("mul", exponent, torch.tensor(float(x), dtype=torch.float64).log().item()))
        raise _Unsupported("a power needs a constant exponent, or a positive constant base")
    if exponent == 0.5:
        return b.emit("sqrt", x)
    if float(exponent).is_integer() and 1 <= abs(exponent) <= 8:
        return _integer_power(b, x, int(exponent))
    raise _Unsupported(f"the exponent {exponent}; use whole numbers from -8 to 8, or 0.5")


def _scaled(name: str) -> Callable[..., Any]:
    """add and sub with torch's `alpha`."""

    def rule(b: Builder, x: Any, y: Any, alpha: float = 1) -> Any:
        return b.emit(name, x, y if alpha == 1 else b.emit("mul", y, alpha))

    return rule


def _elu(b: Builder, x: Any, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Any:
    """scale · (x if x > 0 else alpha · (exp(x · input_scale) − 1)), as aten::elu."""
    negative = b.emit("mul", b.emit("expm1", b.emit("mul", _clamp(b, x, None, 0.0), input_scale)), alpha * scale)
    return b.emit("where", b.emit("gt", x, 0.0), b.emit("mul", x, scale), negative)


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
    soft = b.emit("log1p", b.emit("exp", _clamp(b, scaled, None, threshold)))
    return b.emit("where", b.emit("gt", scaled, threshold), x, b.emit("div", soft, beta))


def _clamp(b: Builder, x: Any, low: Any = None, high: Any = None) -> Any:
    return b.emit("clamp", x, -float("inf") if low is None else low, float("inf") if high is None else high)


def _copy(b: Builder, x: Any, *_: Any) -> Any:
    """A copy, alias or change of dtype: in a recurrence all values are real numbers of one precision."""
    return b.emit("where", x, 1.0, 0.0) if _is_bool(b, x) else x


def _is_bool(b: Builder, x: Any) -> bool:
    return any(op.result == x.name and OPERATIONS[op.name].is_bool for op in b.ops)


def _detached(b: Builder, x: Any, *_: Any) -> Any:
    raise _Unsupported("a gradient flows through every value of a recurrence, so detach has no meaning in it")


def _named(name: str) -> Callable[..., Any]:
    return lambda b, *args: b.emit(name, *args)


# Operations that take truth values as they are; for every other one they are first turned into 1.0 and 0.0.
TAKES_BOOL = {"where", *(f"{kind}_{name}" for kind in ("logical", "bitwise") for name in ("and", "or", "not"))}

# aten operation -> how it is written in the whitelist. What core_aten_decompositions leaves of torch's activations.
LOWERING: dict[str, Callable[..., Any]] = {
    **{name: _named(name) for name in ("mul", "neg", "tanh", "sigmoid", "exp", "expm1", "log", "log1p", "sqrt", "erf")},
    **{name: _named(name) for name in ("sin", "cos", "abs", "sign", "floor", "relu", "minimum", "maximum", "where")},
    **{name: _named(name) for name in ("gt", "ge", "lt", "le", "eq", "ne")},
    **{f"logical_{name}": _named(name) for name in ("and", "or", "not")},
    **{f"bitwise_{name}": _named(name) for name in ("and", "or", "not")},
    **dict.fromkeys(("clone", "_to_copy", "expand", "view"), _copy),
    **dict.fromkeys(("alias", "detach"), _detached),
    **dict.fromkeys(("full", "full_like"), lambda b, like, value, *_: b.value(float(value))),
    "scalar_tensor": lambda b, value, *_: b.value(float(value)),
    "add": _scaled("add"),
    "sub": _scaled("sub"),
    "rsub": lambda b, x, y, alpha=1: _scaled("sub")(b, y, x, alpha),
    "div": lambda b, x, y: b.emit("div", x, y),
    "reciprocal": lambda b, x: b.emit("div", 1.0, x),
    "rsqrt": lambda b, x: b.emit("div", 1.0, b.emit("sqrt", x)),
    "square": lambda b, x: b.emit("mul", x, x),
    "pow": _pow,
    "elu": _elu,
    "gelu": _gelu,
    "softplus": _softplus,
    "leaky_relu": lambda b, x, slope=0.01: b.emit("where", b.emit("gt", x, 0.0), x, b.emit("mul", x, slope)),
    "hardtanh": lambda b, x, low=-1.0, high=1.0: _hardtanh(b, x, low, high),
    "clamp": _clamp,
    "clamp_min": lambda b, x, low: _clamp(b, x, low),
    "clamp_max": lambda b, x, high: _clamp(b, x, None, high),
}


def _hardtanh(b: Builder, x: Any, low: float, high: float) -> Any:
    """aten::hardtanh: unlike clamp, its gradient is 0 at the bounds."""
    above = b.emit("where", b.emit("lt", x, high), x, high)
    return b.emit("where", b.emit("gt", x, low), above, low)
