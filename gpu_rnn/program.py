# SPDX-License-Identifier: Apache-2.0
"""A recurrence as a short list of scalar operations: the canonical text, its parser, and its evaluation in torch.

The text is the identity of a cell. It travels through custom ops, torch.export and pickle, and is parsed against a
whitelist (`operations.OPERATIONS`), so nothing that a user wrote reaches generated source. An LSTM reads::

    program 1 lstm
    state h 0.0
    state c 0.0
    stage i:sum f:sum g:sum o:sum
    t0 = sigmoid a_i
    ...
    return t9 t8

Inputs: ``a_<gate>`` where the input part and the recurrent product of a gate meet only as a sum, else ``x_<gate>`` and
``r_<gate>``; ``s_<state>`` the states before the step; ``p_<param>`` per-unit parameters. A program with several stages
has a ``product`` line between them, which names the input of the next stage's product; later stages see every value.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch

from gpu_rnn.once import once
from gpu_rnn.operations import OPERATIONS

Argument = str | float
VERSION = "1"
IDENTIFIER = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,31}\Z")
RESULT = re.compile(r"t[0-9]{1,4}\Z")


@dataclass(frozen=True)
class Op:
    """``result = name(args)``; `line` is where it came from in the user's step, and no part of its identity."""

    result: str
    name: str
    args: tuple[Argument, ...]
    line: str = field(default="", compare=False)


@dataclass(frozen=True)
class Stage:
    """The gates whose products are taken together, the operations after them, and what the stage hands on.

    `outputs` holds the new states in the last stage, else the one input of the next stage's product.
    """

    gates: tuple[str, ...]
    ops: tuple[Op, ...]
    outputs: tuple[Argument, ...]

    @once
    def run(self) -> Callable[[dict[str, Any]], None]:
        """The operations in torch, see `runner`."""
        return runner(self.ops)


@dataclass(frozen=True)
class Program:
    """A traced recurrence. Two programs are equal when their texts are."""

    name: str
    states: tuple[tuple[str, float], ...]
    params: tuple[str, ...]
    stages: tuple[Stage, ...]
    summed: frozenset[str]

    @property
    def gates(self) -> tuple[str, ...]:
        """All gates, stage after stage: the order of the rows of the weights."""
        return tuple(gate for stage in self.stages for gate in stage.gates)

    @once
    def rows(self) -> tuple[slice, ...]:
        """Where each stage's gates stand among all gates."""
        ends = list(accumulate(len(stage.gates) for stage in self.stages))
        return tuple(slice(end - len(stage.gates), end) for stage, end in zip(self.stages, ends, strict=True))

    @property
    def split(self) -> tuple[str, ...]:
        """The gates whose recurrent product is kept beside the input part, as a GRU's candidate."""
        return tuple(gate for gate in self.gates if gate not in self.summed)

    @property
    def state_names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.states)

    @property
    def initial(self) -> tuple[float, ...]:
        return tuple(value for _, value in self.states)

    def gate_inputs(self, stage: Stage) -> tuple[str, ...]:
        """The inputs that belong to a stage's gates."""
        names = []
        for gate in stage.gates:
            names += [f"a_{gate}"] if gate in self.summed else [f"x_{gate}", f"r_{gate}"]
        return tuple(names)

    def inputs(self, stage: Stage) -> tuple[str, ...]:
        """What a stage reads: its gates, the states and the parameters, in this order."""
        return (*self.gate_inputs(stage), *(f"s_{name}" for name in self.state_names), *(f"p_{name}" for name in self.params))

    @once
    def text(self) -> str:
        """The canonical text; `Program.parse` reads it back."""
        lines = [f"program {VERSION} {self.name}"]
        lines += [f"state {name} {value!r}" for name, value in self.states]
        lines += [f"param {name}" for name in self.params]
        for number, stage in enumerate(self.stages):
            kinds = ["sum" if gate in self.summed else "split" for gate in stage.gates]
            lines.append(" ".join(["stage", *(f"{g}:{k}" for g, k in zip(stage.gates, kinds, strict=True))]))
            lines += [" ".join([op.result, "=", op.name, *map(_print, op.args)]) for op in stage.ops]
            verb = "return" if number == len(self.stages) - 1 else "product"
            lines.append(" ".join([verb, *map(_print, stage.outputs)]))
        return "\n".join(lines) + "\n"

    @staticmethod
    def parse(text: str) -> Program:
        """Reads a canonical text.

        Raises:
            ValueError: not such a text, or one that uses something outside the whitelist (the line is named).
        """
        return _parse(text)


def _number(value: float | str) -> float:
    """A number; of NaN always the same object, so that programs that hold it are equal."""
    number = float(value)
    return math.nan if number != number else number


def _print(value: Argument) -> str:
    return value if isinstance(value, str) else repr(float(value))


class _Parser:
    """Reads the lines of a program; every name must be an identifier and every value defined before its use."""

    def __init__(self) -> None:
        self.name = ""
        self.states: list[tuple[str, float]] = []
        self.params: list[str] = []
        self.stages: list[Stage] = []
        self.summed: set[str] = set()
        self.gates: list[str] = []
        self.ops: list[Op] = []
        self.known: set[str] = set()

    def identifier(self, word: str) -> str:
        if not IDENTIFIER.match(word):
            raise ValueError(f"{word!r} is not an identifier")
        return word

    def define(self, *names: str) -> None:
        again = self.known.intersection(names)
        if again:
            raise ValueError(f"{', '.join(again)} is defined already")
        self.known.update(names)

    def argument(self, word: str) -> Argument:
        if word in self.known:
            return word
        try:
            return _number(word)
        except ValueError:
            raise ValueError(f"{word!r} is neither a value defined above nor a number") from None

    def read(self, line: str) -> None:
        word, *rest = line.split()
        if RESULT.match(word):
            self.read_operation(word, *rest)
        elif word in ("program", "state", "param", "stage", "product", "return"):
            getattr(self, f"read_{word}")(*rest)
        else:
            raise ValueError(f"{word!r} is not the start of a line")

    def read_program(self, version: str, name: str) -> None:
        if version != VERSION:
            raise ValueError(f"version {version}, this package reads version {VERSION}")
        self.name = self.identifier(name)

    def read_state(self, name: str, value: str) -> None:
        self.states.append((self.identifier(name), float(value)))
        self.define(f"s_{name}")

    def read_param(self, name: str) -> None:
        self.params.append(self.identifier(name))
        self.define(f"p_{name}")

    def read_stage(self, *gates: str) -> None:
        self.gates, self.ops = [], []
        for word in gates:
            gate, _, kind = word.partition(":")
            self.gates.append(self.identifier(gate))
            if kind not in ("sum", "split"):
                raise ValueError(f"a gate is 'sum' or 'split', not {kind!r}")
            if kind == "sum":
                self.summed.add(gate)
            if f"a_{gate}" in self.known or f"x_{gate}" in self.known:
                raise ValueError(f"gate {gate} is defined already")
            self.define(*([f"a_{gate}"] if kind == "sum" else [f"x_{gate}", f"r_{gate}"]))

    def read_operation(self, result: str, equals: str, name: str, *args: str) -> None:
        if equals != "=" or name not in OPERATIONS:
            raise ValueError(f"unknown operation {name!r}")
        if len(args) != OPERATIONS[name].arity:
            raise ValueError(f"{name} takes {OPERATIONS[name].arity} arguments")
        self.ops.append(Op(result, name, tuple(self.argument(word) for word in args)))
        self.define(result)

    def read_product(self, *outputs: str) -> None:
        self.stages.append(Stage(tuple(self.gates), tuple(self.ops), tuple(self.argument(w) for w in outputs)))

    read_return = read_product

    def program(self) -> Program:
        if not self.name or not self.stages or len(self.stages[-1].outputs) != len(self.states) or not self.states:
            raise ValueError("a program has a name and at least one state, and returns a value for each")
        if any(len(stage.outputs) != 1 for stage in self.stages[:-1]):
            raise ValueError("a product has one input")
        return Program(
            self.name, tuple(self.states), tuple(self.params), tuple(self.stages), frozenset(self.summed)
        )


@lru_cache(maxsize=256)
def _parse(text: str) -> Program:
    parser = _Parser()
    for number, line in enumerate(text.strip().splitlines(), 1):
        try:
            parser.read(line)
        except (ValueError, TypeError) as error:
            raise ValueError(f"line {number} of a recurrence's program, {line!r}: {error}") from error
    return parser.program()


class Value:
    """A value under construction: the operators emit operations, so that derivative rules read as formulas."""

    __slots__ = ("builder", "name")

    def __init__(self, builder: Builder, name: Argument) -> None:
        self.builder = builder
        self.name = name

    def emit(self, op: str, *args: Value | float) -> Value:
        return self.builder.emit(op, *args)

    def __add__(self, other: Value | float) -> Value:
        return self.emit("add", self, other)

    def __sub__(self, other: Value | float) -> Value:
        return self.emit("sub", self, other)

    def __rsub__(self, other: float) -> Value:
        return self.emit("sub", other, self)

    def __mul__(self, other: Value | float) -> Value:
        return self.emit("mul", self, other)

    __radd__, __rmul__ = __add__, __mul__

    def __truediv__(self, other: Value | float) -> Value:
        return self.emit("div", self, other)

    def __neg__(self) -> Value:
        return self.emit("neg", self)


# What folds away when one side is a constant: (operation, which argument, its value) -> the other side, or a constant.
_IDENTITIES: dict[tuple[str, int, float], int | float] = {
    ("add", 0, 0.0): 1,
    ("add", 1, 0.0): 0,
    ("sub", 1, 0.0): 0,
    ("mul", 0, 1.0): 1,
    ("mul", 1, 1.0): 0,
    ("div", 1, 1.0): 0,
}


class Builder:
    """Collects operations, each distinct one once, with constants folded."""

    def __init__(
        self, prefix: str = "t", start: int = 0, given: Iterable[Op] = (), exact: bool = False
    ) -> None:
        """With `exact`, 0 times something is not 0: of infinity and NaN it is NaN."""
        self.prefix, self.start, self.exact = prefix, start, exact
        self.ops: list[Op] = []
        self.line = ""
        self._seen = {(op.name, op.args): op.result for op in given}

    def value(self, name: Argument) -> Value:
        return Value(self, name if isinstance(name, str) else _number(name))

    def emit(self, op: str, *args: Value | float) -> Value:
        names = tuple(a.name if isinstance(a, Value) else _number(a) for a in args)
        folded = self._fold(op, names)
        if folded is not None:
            return Value(self, folded)
        if (op, names) not in self._seen:
            result = f"{self.prefix}{self.start + len(self.ops)}"
            self.ops.append(Op(result, op, names, self.line))
            self._seen[op, names] = result
        return Value(self, self._seen[op, names])

    def _fold(self, op: str, names: tuple[Argument, ...]) -> Argument | None:
        constants = [name for name in names if isinstance(name, float)]
        if len(constants) == len(names) and op != "where":
            dtype = torch.bool if op in ("and", "or", "not") else torch.float64
            exact = [torch.tensor(value, dtype=dtype, device="cpu") for value in constants]
            return float(OPERATIONS[op].torch(*exact))
        if op == "where" and isinstance(names[0], float):
            return names[1] if names[0] else names[2]
        if op == "mul" and 0.0 in constants and not self.exact:
            return 0.0
        if op == "where" and names[1] == names[2]:
            return names[1]
        for position, name in enumerate(names):
            kept = _IDENTITIES.get((op, position, name)) if isinstance(name, float) else None
            if kept is not None:
                return names[int(kept)]
        return None


def live(ops: Iterable[Op], outputs: Iterable[Argument]) -> tuple[Op, ...]:
    """The operations that the outputs need, in order."""
    needed = {name for name in outputs if isinstance(name, str)}
    kept = []
    for op in reversed(list(ops)):
        if op.result in needed:
            kept.append(op)
            needed.update(arg for arg in op.args if isinstance(arg, str))
    return tuple(reversed(kept))


@lru_cache(maxsize=1024)
def runner(
    ops: tuple[Op, ...], wanted: tuple[Argument, ...] | None = None, **replaced: Callable[..., Any]
) -> Callable[[dict[str, Any]], None]:
    """Operations in torch as one function of a dict, which holds tensors of any one shape and receives the results.

    Interpreting them one by one takes longer than a small tensor's arithmetic. Of the results, the dict receives those
    that are `wanted`, by default all; others are freed after their last use, so that the next take their memory, which
    is in the cache. `replaced`: other functions for operations, or for some that only these operations have.
    Its text is made of names that the parser let through and of operations' names, nothing else.
    """
    made = [op.result for op in ops]
    kept = made if wanted is None else [name for name in made if name in wanted]
    taken = dict.fromkeys(arg for op in ops for arg in op.args if isinstance(arg, str) and arg not in made)
    last = {arg: op.result for op in ops for arg in op.args if arg in made and arg not in kept}
    done: dict[str, list[str]] = {}
    for name, reader in last.items():
        done.setdefault(reader, []).append(f"    del {name}")
    lines = [f"    {name} = values['{name}']" for name in taken]
    if any(_chooses_numbers(op) for op in ops):
        lines.insert(0, "    one = like(values)")
    for op in ops:
        args = list(map(str, op.args))
        if _chooses_numbers(op):
            args[1] = f"one * {args[1]}"
        lines.append(f"    {op.result} = {op.name}_({', '.join(args)})")
        lines += done.get(op.result, [])
    lines.append(f"    values.update({', '.join(f'{name}={name}' for name in kept)})")
    names: dict[str, Any] = {f"{name}_": operation.torch for name, operation in OPERATIONS.items()}
    names |= {"inf": float("inf"), "nan": float("nan"), "like": _one}
    names |= {f"{name}_": function for name, function in replaced.items()}
    exec("\n".join(["def run(values):", *lines]), names)
    return names["run"]


def _chooses_numbers(op: Op) -> bool:
    """Whether torch.where would choose between two plain numbers, which it makes tensors of its default dtype."""
    return op.name == "where" and not any(isinstance(arg, str) for arg in op.args[1:])


def _one(values: Mapping[str, Any]) -> Any:
    """A 1 of the dtype of a call's values, on their device."""
    return next(value for value in values.values() if value.is_floating_point()).new_ones(())


def lookup(values: Mapping[str, Any], name: Argument, like: Any) -> Any:
    """A program's output as a tensor of the shape of `like`: a constant is spread, and so is a unit's parameter."""
    if not isinstance(name, str):
        return like.new_full(like.shape, name)
    value = values[name]
    return value if value.dim() == like.dim() else value.expand(like.shape)
