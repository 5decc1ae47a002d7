# SPDX-License-Identifier: Apache-2.0
"""From a user's step function to a program: what `recording` saw of it, lowered to the whitelist of operations."""

from __future__ import annotations

import inspect
import itertools
import keyword
import traceback
from collections import namedtuple
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from gpu_rnn.activations import ACTIVATIONS, has_weights, name_of
from gpu_rnn.compiler.builder import Builder, Value
from gpu_rnn.compiler.lowering import LOWERING, TAKES_BOOL, Unsupported, copy
from gpu_rnn.compiler.operations import Argument, Op, live
from gpu_rnn.compiler.program import IDENTIFIER, LIMITS, Program, Stage, beyond
from gpu_rnn.compiler.recording import LIBRARY, Node, Refused, record, show

Step = Callable[..., Any]
OWN_DERIVATIVE = (
    "; an autograd.Function has a derivative of its own, but a recurrence's follows from its arithmetic: write that"
)

ROLES = {"phi": "activation", "sigma": "recurrent_activation"}  # what the library's own steps call them
LISTED = {"x": "gates", "r": "gates", "s": "states", "p": "params"}  # the argument that names a group's values


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
            `gpu_rnn.compiler.operations`, or returns something else than one value for each state.
    """
    _check_names(name, [gates for gates, _ in stages], [state for state, _ in states], params)
    traced = []
    carried: tuple[str, ...] = ()
    builder = Builder(exact=True)
    for number, (stage_gates, step) in enumerate(stages):
        last = number == len(stages) - 1
        before = len(builder.ops)
        stage = _StageTrace(name, builder, stage_gates, [s for s, _ in states], params, step)
        results = stage.run(carried, last)
        if last and len(results) != len(states):
            raise TraceError(
                f"{stage.cell}: {stage.place} returned {len(results)} values for {len(states)} states "
                f"({', '.join(s for s, _ in states)}); return the new states in this order"
            )
        if not results:
            raise TraceError(f"{name}: {_where(step)} returned nothing; return what enters the next stage's product")
        outputs = results if last else results[:1]
        carried = tuple(r for r in results[1:] if isinstance(r, str)) if not last else ()
        if not last and len(carried) != len(results) - 1:
            raise TraceError(f"{name}: {_where(step)} hands on a constant; write it in the later stage instead")
        traced.append((tuple(stage_gates), outputs, builder.ops[before:]))
    program = _finish(name, tuple(states), tuple(params), traced)
    too_large = beyond(program.counts, reserve=4 * LIMITS["state"])  # for expectations, which evaluation adds
    if too_large:
        raise TraceError(f"{name}: {_where(stages[-1][1])} has {too_large}")
    return program


def _check_names(name: str, stages: Sequence[Sequence[str]], states: Sequence[str], params: Sequence[str]) -> None:
    gates = [gate for stage_gates in stages for gate in stage_gates]
    hint = "; give another as name=..." if name not in (*gates, *states, *params) and not _is_word(name) else ""
    for kind, words in (("name", [name]), ("gate", gates), ("state", states), ("parameter", params)):
        bad = [word for word in words if not _is_word(word)]
        if bad:
            raise ValueError(f"a recurrence's {kind} is a short identifier such as 'f', not {bad[0]!r}" + hint)
        if len(set(words)) != len(words):
            raise ValueError(f"the {kind}s of {name} are not distinct: {', '.join(words)}")
    if not states or not all(stages):
        raise ValueError(f"{name} needs at least one gate and one state, and a gate in each stage")


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
    alive = set(live((op for _, _, ops in traced for op in ops), outputs))
    joined = _joined([gate for gates, _, _ in traced for gate in gates], alive, outputs)
    renamed: dict[Argument, Argument] = dict(joined)
    numbers = itertools.count()
    stages = []
    for gates, results, ops in traced:
        remaining = [op for op in ops if op in alive and op.result not in joined]
        renamed |= {op.result: f"t{next(numbers)}" for op in remaining}
        renumbered = [Op(str(renamed[op.result]), op.name, _renamed(op.args, renamed), op.line) for op in remaining]
        stages.append(Stage(gates, tuple(renumbered), _renamed(results, renamed)))
    summed = frozenset(str(a)[2:] for a in joined.values())
    return Program(name, states, params, tuple(stages), summed)


def _renamed(values: tuple[Argument, ...], names: dict[Argument, Argument]) -> tuple[Argument, ...]:
    return tuple(names.get(value, value) for value in values)


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


class _StageTrace:
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
        self.builder, self.step = builder, step
        self.activations = activations = _activations(step)
        options = " or ".join(f"{role} {name_of(phi)}" for role, phi in activations.items())
        self.cell = f"{cell}: {options}" if options else cell
        self.place = " or ".join(_where(phi) for phi in activations.values()) or _where(step)
        self.groups = [("x", gates), ("r", gates), ("s", states), ("p", params)]

    def run(self, carried: tuple[str, ...], last: bool) -> tuple[Argument, ...]:
        groups = self._groups_taken(len(carried))
        names = [f"{kind}_{word}" for kind, words in groups for word in words] + list(carried)
        nodes, results = self._record(groups, names)
        known: dict[Any, Value] = {}
        for node in _live(nodes, results):
            known[node] = self.builder.value(node.args[0]) if node.operation == "input" else self._lower(node, known)
        return tuple(self._result(known, result).name for result in results)

    def _groups_taken(self, carried: int) -> list[tuple[str, Sequence[str]]]:
        """A step may leave out the trailing arguments it does not need: step(x, r, s) or step(x, r, s, p)."""
        try:
            signature = inspect.signature(self.step)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"{self.cell}: a step is a Python function step(x, r, s[, p]), not {self.step!r}"
            ) from error
        # What a step does not need it is not given: a further argument may be an option of its own, with a default.
        wanted = (5, 4, 3) if carried else (4,) if self.groups[3][1] else (3, 4)
        taken = next((n for n in wanted if _accepts(signature, n)), 0)
        if not taken or (self.groups[3][1] and taken < 4):
            wanted = "step(x, r, s, p)" if self.groups[3][1] else "step(x, r, s)"
            raise TypeError(f"{self.cell}: {_where(self.step)} must take {wanted}, it takes {signature}")
        self.taken = taken
        return self.groups[: min(taken, 4)]

    def _record(self, groups: list[tuple[str, Sequence[str]]], names: list[str]) -> tuple[list[Node], tuple[Any, ...]]:
        shapes = [namedtuple(f"{kind}_values", words) for kind, words in groups]

        def flat(*scalars: torch.Tensor) -> Any:
            values, args = list(scalars), []
            for shape, (_, words) in zip(shapes, groups, strict=True):
                args.append(shape(*values[: len(words)]))
                del values[: len(words)]
            if self.taken > 4:
                args.append(tuple(values))
            return self.step(*args)

        try:
            return record(flat, names)
        except Refused as error:
            raise TraceError(f"{self.cell}: {self._frame(error)} {error}") from error
        except (
            ArithmeticError,
            AssertionError,
            AttributeError,
            LookupError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            names = _held(self.step)
            more = _has(error, groups) or (f"; it {_closes_over(names)}" if names else "")
            if self.activations and isinstance(error, TypeError):
                more = "; an activation takes one argument, a value of one unit"
            more = OWN_DERIVATIVE if "custom_function_call" in str(error) or "setup_context" in str(error) else more
            raise TraceError(f"{self.cell}: {self._frame(error)}: {_first_line(error)}{more}") from error

    def _frame(self, error: BaseException) -> str:
        frames = traceback.extract_tb(error.__traceback__)
        outside = [f for f in frames if not f.filename.startswith(LIBRARY)]
        return show(outside[-1].filename, outside[-1].lineno) if outside else self.place

    def _result(self, known: dict[Any, Value], result: Any) -> Value:
        if isinstance(result, (int, float)):
            return self.builder.value(float(result))
        if not isinstance(result, Node):
            raise TraceError(f"{self.cell}: {self.place} returned {result!r}; return tensors, one for each state")
        return copy(self.builder, known[result])

    def _lower(self, node: Node, known: dict[Any, Value]) -> Value:
        overload = node.operation
        line = node.line if node.frame and not node.frame[0].startswith(LIBRARY) else self.place
        if overload == "constant" or overload._opname.startswith("lift_fresh"):
            raise TraceError(f"{self.cell}: {line} {_closes_over(_held(self.step))}")
        rule = LOWERING.get(overload._opname)
        if rule is None:
            what = "draws random numbers with" if _is_random(overload) else "uses"
            raise TraceError(
                f"{self.cell}: {line} {what} {overload}, which a recurrence cannot hold; "
                "it holds arithmetic, comparisons, torch.where, clamp, minimum, maximum and the usual activations"
            )
        self.builder.line = node.line or self.place
        lifted = [
            known.get(a, a) if isinstance(a, Node) else a for a in _arguments(overload, node.args, node.kwargs or {})
        ]
        if overload._opname not in TAKES_BOOL:
            lifted = [copy(self.builder, a) if isinstance(a, Value) else a for a in lifted]
        try:
            return rule(self.builder, *lifted)
        except (Unsupported, TypeError) as error:
            raise TraceError(f"{self.cell}: {line} uses {overload}: {error}") from error


def _live(nodes: list[Node], results: tuple[Any, ...]) -> list[Node]:
    """The nodes that the results need, in order; the random ones first, so that an error names them."""
    needed = set(map(id, results))
    alive = []
    for node in reversed(nodes):
        if id(node) in needed:
            alive.append(node)
            needed.update(id(arg) for arg in (*node.args, *(node.kwargs or {}).values()))
    alive.reverse()
    return sorted(alive, key=lambda node: not _is_random(node.operation))


def _accepts(signature: inspect.Signature, count: int) -> bool:
    try:
        signature.bind(*range(count))
    except TypeError:
        return False
    return True


def _is_random(overload: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(overload, "tags", ())


def _held(step: Step) -> str:
    """The names of the tensors, and of the modules with some, that a closure holds."""
    held = inspect.getclosurevars(step) if inspect.isfunction(step) else None
    variables = {**held.nonlocals, **held.globals} if held else {}
    return ", ".join(name for name, value in variables.items() if isinstance(value, torch.Tensor) or has_weights(value))


def _closes_over(names: str) -> str:
    names = f" ({names})" if names else ""
    return (
        f"closes over a tensor{names}; a constant is a Python number, a learnt value is one of the recurrence's params"
    )


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


def _has(error: BaseException, groups: list[tuple[str, Sequence[str]]]) -> str:
    """What a group of arguments has, and how it gets more, for the error message of one that it lacks."""
    wanted = type(getattr(error, "obj", None)).__name__
    return "".join(
        f"; it has {', '.join(words) or 'none'}: name it in `{LISTED[kind]}`"
        for kind, words in groups
        if wanted == f"{kind}_values"
    )


def _activations(step: Step) -> dict[str, Step]:
    """The user's activations within one of the library's own steps, by the option that takes them."""
    if not inspect.isfunction(step) or not step.__code__.co_filename.startswith(LIBRARY[1]):
        return {}
    cells = zip(step.__code__.co_freevars, step.__closure__ or (), strict=True)
    held = {name: inspect.unwrap(cell.cell_contents) for name, cell in cells if name in ROLES}
    known = set(map(id, ACTIVATIONS.values()))
    return {role: held[name] for name, role in ROLES.items() if name in held and id(held[name]) not in known}


def _where(step: Step) -> str:
    code = getattr(step, "__code__", None)
    return f"{Path(code.co_filename).name}:{code.co_firstlineno} `{step.__name__}`" if code else f"`{name_of(step)}`"
