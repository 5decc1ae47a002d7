# SPDX-License-Identifier: Apache-2.0
"""From a user's step function to a program: torch's tracer on 0-d tensors, lowered to the whitelist of operations."""

from __future__ import annotations

import inspect
import keyword
import linecache
import sys
import threading
import traceback
from collections import namedtuple
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from gpu_rnn.lowering import KEPT, LOWERING, TAKES_BOOL, Unsupported, copy
from gpu_rnn.program import IDENTIFIER, Argument, Builder, Op, Program, Stage, Value, live

Step = Callable[..., Any]
_LIBRARY = (str(Path(torch.__file__).parent), str(Path(__file__).parent))


_one_at_a_time = threading.RLock()  # torch's tracer patches the process


class TraceError(ValueError):
    """A step that cannot become a program. The message names the operation, the cell and the line."""


@contextmanager
def _undisturbed() -> Iterator[None]:
    """A cell may meet its first call inside a torch.func transform, a tracer, fake tensors or inference_mode: its own
    trace takes no part in them. (A thread of its own would do the same, but a second one crashes fake tensors in CUDA
    builds of torch 2.11 on a machine without a GPU.)"""
    with temporarily_clear_interpreter_stack(), _disable_current_modes(), torch.inference_mode(False):
        yield


@_undisturbed()
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
    with _one_at_a_time:
        return _trace(name, states, params, stages)


def _trace(
    name: str,
    states: Sequence[tuple[str, float]],
    params: Sequence[str],
    stages: Sequence[tuple[Sequence[str], Step]],
) -> Program:
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
    hint = "; give another as name=..." if name not in (*gates, *states, *params) and not _is_word(name) else ""
    for kind, words in (("name", [name]), ("gate", gates), ("state", states), ("parameter", params)):
        for word in words:
            if not _is_word(word):
                raise ValueError(f"a recurrence's {kind} is a short identifier such as 'f', not {word!r}" + hint)
        if len(set(words)) != len(words):
            raise ValueError(f"the {kind}s of {name} are not distinct: {', '.join(words)}")
    if not gates or not states:
        raise ValueError(f"{name} needs at least one gate and one state")


def _is_word(word: Any) -> bool:
    return isinstance(word, str) and bool(IDENTIFIER.match(word)) and not keyword.iskeyword(word)


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


@cache
def _decompositions() -> dict[Any, Callable[..., Any]]:
    """torch's rules, which take as long to gather as the rest of a trace."""
    from torch._decomp import core_aten_decompositions

    return {op: rule for op, rule in core_aten_decompositions().items() if op._opname not in KEPT}


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
        # What a step does not need it is not given: a further argument may be an option of its own, with a default.
        wanted = (5, 4, 3) if carried else (4,) if self.groups[3][1] else (3, 4)
        taken = next((n for n in wanted if _accepts(signature, n)), 0)
        if not taken or (self.groups[3][1] and taken < 4):
            wanted = "step(x, r, s, p)" if self.groups[3][1] else "step(x, r, s)"
            raise TypeError(f"{self.cell}: {_where(self.step)} must take {wanted}, it takes {signature}")
        self.taken = taken
        return self.groups[: min(taken, 4)]

    def _graph(self, groups: list[tuple[str, Sequence[str]]], count: int, carried: int) -> torch.fx.Graph:
        from torch.func import functionalize
        from torch.fx.experimental.proxy_tensor import make_fx
        from torch.fx.traceback import preserve_node_meta

        shapes = [namedtuple(f"{kind}_values", words) if words else tuple for kind, words in groups]

        def flat(*tensors: torch.Tensor) -> tuple[Any, ...]:
            rest = [tensor.clone() for tensor in tensors]  # a step may work on its arguments in place
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
        tracer = make_fx(
            functionalize(flat),
            decomposition_table=_decompositions(),
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
        return copy(self.builder, known[arg])

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
            lifted = [copy(self.builder, a) if isinstance(a, Value) else a for a in lifted]
        try:
            return rule(self.builder, *lifted)
        except (Unsupported, TypeError) as error:
            raise TraceError(f"{self.cell}: {line} uses {overload}: {error}") from error


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
        while frame.f_back is not None and (
            frame.f_code.co_filename.startswith((_LIBRARY[0], __file__)) or frame.f_code.co_name == "__torch_function__"
        ):  # a mode inside this one calls for what somebody else called it for
            frame = frame.f_back
        torch.fx.traceback.set_stack_trace([_show(frame.f_code.co_filename, frame.f_lineno)])
        if not torch.is_grad_enabled() or func == torch.Tensor.data.__get__:  # type: ignore[attr-defined]
            raise ValueError("no_grad and .data stop gradients, and those flow through every value of a recurrence")
        return func(*args, **(kwargs or {}))
