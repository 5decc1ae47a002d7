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

There is one grammar, and one error for what it does not read. Each line ends with a newline, which only the last one
may lack; one space stands between the words of a line::

    text      = "program 1 NAME", state+, param*, (stage, operation*, product)*, stage, operation*, return
    state     = "state NAME NUMBER"             what it starts from
    param     = "param NAME"
    stage     = "stage NAME:KIND ..."           its gates, at least one; KIND is sum or split
    operation = "RESULT = OPERATION ARG ..."    a row of operations.OPERATIONS with as many arguments as it takes
    product   = "product ARG"                   what enters the next stage's product
    return    = "return ARG ..."                the new states, in order
    NAME      = a letter, then up to 31 letters, digits and underscores
    RESULT    = "t" and one to four digits
    NUMBER    = as Python writes one: 0.5, -1e-06, inf, -inf, nan
    ARG       = a value that a line above defines, or a NUMBER

Values are real numbers or truth values. Comparisons make truth values, of which `where` takes its first argument and
`and`, `or` and `not` all; whatever else takes an argument takes a real number. At least one argument of an operation is
a value, and the bounds of `clamp` are numbers. No name is defined twice.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from gpu_rnn.compiler.evaluation import runner
from gpu_rnn.compiler.operations import OPERATIONS, Argument, Op, constant
from gpu_rnn.memo import memoize
from gpu_rnn.once import once

VERSION = "1"
IDENTIFIER = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,31}\Z")
RESULT = re.compile(r"t[0-9]{1,4}\Z")
NUMBER = re.compile(r"(-?([0-9]+(\.[0-9]+)?(e[+-]?[0-9]+)?|inf)|nan)\Z")
WORDS = ("program", "state", "param", "stage", "operation", "product", "return")
FOLLOWS: dict[str, tuple[str, ...]] = {
    "": ("program",),
    "program": ("state",),
    "state": ("state", "param", "stage"),
    "param": ("param", "stage"),
    "stage": ("operation", "product", "return"),
    "operation": ("operation", "product", "return"),
    "product": ("stage",),
    "return": (),
}


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
        """The operations in torch, see `evaluation.runner`."""
        return runner(self.ops)


@dataclass(frozen=True, eq=False)
class Program:
    """A traced recurrence. Two programs are equal when their texts are."""

    name: str
    states: tuple[tuple[str, float], ...]
    params: tuple[str, ...]
    stages: tuple[Stage, ...]
    summed: frozenset[str]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Program) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)

    @once
    def gates(self) -> tuple[str, ...]:
        """All gates, stage after stage: the order of the rows of the weights."""
        return tuple(gate for stage in self.stages for gate in stage.gates)

    @once
    def rows(self) -> tuple[slice, ...]:
        """Where each stage's gates stand among all gates."""
        ends = list(accumulate(len(stage.gates) for stage in self.stages))
        return tuple(slice(end - len(stage.gates), end) for stage, end in zip(self.stages, ends, strict=True))

    @once
    def split(self) -> tuple[str, ...]:
        """The gates whose recurrent product is kept beside the input part, as a GRU's candidate."""
        return tuple(gate for gate in self.gates if gate not in self.summed)

    @once
    def state_names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.states)

    @once
    def initial(self) -> tuple[float, ...]:
        return tuple(value for _, value in self.states)

    @once
    def h_only_enters_the_product(self) -> bool:
        """As that of an LSTM, so that it may have other units than the gates."""
        stage, *others = self.stages
        read = {*stage.outputs, *(arg for op in stage.ops for arg in op.args)}
        return not others and f"s_{self.state_names[0]}" not in read

    def gate_inputs(self, stage: Stage) -> tuple[str, ...]:
        """The inputs that belong to a stage's gates."""
        names = []
        for gate in stage.gates:
            names += [f"a_{gate}"] if gate in self.summed else [f"x_{gate}", f"r_{gate}"]
        return tuple(names)

    def inputs(self, stage: Stage) -> tuple[str, ...]:
        """What a stage reads: its gates, the states and the parameters, in this order."""
        return (
            *self.gate_inputs(stage),
            *(f"s_{name}" for name in self.state_names),
            *(f"p_{name}" for name in self.params),
        )

    @property
    def counts(self) -> dict[str, int]:
        """How many it has of what `LIMITS` names."""
        operations = sum(len(stage.ops) for stage in self.stages)
        numbers = len(self.states), len(self.params), len(self.gates), len(self.stages), operations
        return dict(zip(LIMITS, numbers, strict=True))

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
        """Reads a text of the grammar above.

        Raises:
            ValueError: not such a text, or one that is larger than `LIMITS`; the line is named.
        """
        return _parse(text)


def _print(value: Argument) -> str:
    return value if isinstance(value, str) else repr(float(value))


# How much a program may hold. The largest of the library's own, an LSTM with a peephole and the longest activation in
# every place, has 55 operations, 4 gates and 3 parameters; derivatives, printed code and compilers take time for each.
LIMITS = {"state": 16, "param": 32, "gate": 64, "stage": 16, "operation": 512}


def beyond(counts: dict[str, int], reserve: int = 0) -> str:
    """In words, what there is too much of."""
    for kind, limit in LIMITS.items():
        most = limit - reserve * (kind == "operation")
        if counts.get(kind, 0) > most:
            return f"more than {most} {kind}s, the most that a recurrence may have"
    return ""


class _Parser:
    """Reads a text line by line."""

    def __init__(self) -> None:
        self.name, self.before = "", ""
        self.states: list[tuple[str, float]] = []
        self.params: list[str] = []
        self.stages: list[Stage] = []
        self.summed: set[str] = set()
        self.gates: list[str] = []
        self.ops: list[Op] = []
        self.truths: dict[str, bool] = {}  # of every value that is defined, whether it is a truth value
        self.counts: dict[str, int] = dict.fromkeys(LIMITS, 0)

    def read(self, line: str) -> None:
        word, *words = line.split(" ")
        kind = "operation" if RESULT.match(word) else word
        if kind not in WORDS or (kind == "operation" and word == kind):
            raise ValueError(f"{word!r} is not the start of a line")
        if kind not in FOLLOWS[self.before]:
            after = f"after '{self.before}'" if self.before else "at the start"
            raise ValueError(f"{kind!r} does not stand {after}")
        self.before = kind
        self.count(kind)
        if kind == "operation":
            self.read_operation(word, words)
        else:
            getattr(self, f"read_{kind}")(words)

    def count(self, kind: str) -> None:
        if kind in self.counts:
            self.counts[kind] += 1
            too_large = beyond(self.counts)
            if too_large:
                raise ValueError(too_large)

    def take(self, words: list[str], what: str) -> list[str]:
        """The words of a line, as many as `what` names."""
        if len(words) != len(what.split()):
            raise ValueError(f"this line has {what.lower()} after its first word, with one space between two")
        return words

    def identifier(self, word: str) -> str:
        if not IDENTIFIER.match(word):
            raise ValueError(f"{word!r} is not an identifier")
        return word

    def number(self, word: str) -> float:
        if not NUMBER.match(word):
            raise ValueError(f"{word!r} is not a number")
        return constant(float(word))

    def define(self, name: str, is_truth: bool = False) -> None:
        if name in self.truths:
            raise ValueError(f"{name} is defined already")
        self.truths[name] = is_truth

    def argument(self, word: str, truth: bool = False) -> Argument:
        if word in self.truths:
            if self.truths[word] != truth:
                kinds = ("a real number", "a truth value")
                raise ValueError(f"{word} is {kinds[not truth]} where {kinds[truth]} stands")
            return word
        if truth or not NUMBER.match(word):
            raise ValueError(f"{word!r} is neither a value defined above nor a number")
        return self.number(word)

    def read_program(self, words: list[str]) -> None:
        version, name = self.take(words, "VERSION NAME")
        if version != VERSION:
            raise ValueError(f"version {version}, this package reads version {VERSION}")
        self.name = self.identifier(name)

    def read_state(self, words: list[str]) -> None:
        name, value = self.take(words, "NAME NUMBER")
        self.states.append((self.identifier(name), self.number(value)))
        self.define(f"s_{name}")

    def read_param(self, words: list[str]) -> None:
        (name,) = self.take(words, "NAME")
        self.params.append(self.identifier(name))
        self.define(f"p_{name}")

    def read_stage(self, words: list[str]) -> None:
        if not words:
            raise ValueError("a stage has at least one gate")
        self.gates, self.ops = [], []
        for word in words:
            gate, _, kind = word.partition(":")
            self.gates.append(self.identifier(gate))
            self.count("gate")
            if kind not in ("sum", "split"):
                raise ValueError(f"a gate is 'sum' or 'split', not {kind!r}")
            if f"a_{gate}" in self.truths or f"x_{gate}" in self.truths:
                raise ValueError(f"gate {gate} is defined already")
            if kind == "sum":
                self.summed.add(gate)
                self.define(f"a_{gate}")
            else:
                self.define(f"x_{gate}")
                self.define(f"r_{gate}")

    def read_operation(self, result: str, words: list[str]) -> None:
        equals, name, *operands = words if len(words) > 1 else ["", ""]
        if equals != "=" or name not in OPERATIONS:
            raise ValueError(f"unknown operation {name!r}")
        if len(operands) != OPERATIONS[name].arity:
            raise ValueError(f"{name} takes {OPERATIONS[name].arity} arguments")
        truths = len(operands) if name in ("and", "or", "not") else int(name == "where")
        args = tuple(self.argument(word, index < truths) for index, word in enumerate(operands))
        if not any(isinstance(arg, str) for arg in args):
            raise ValueError("an operation takes at least one value; write the number instead")
        if name == "clamp" and not (
            isinstance(args[0], str) and args[1:] == tuple(a for a in args if not isinstance(a, str))
        ):
            raise ValueError("clamp's bounds are numbers; use minimum and maximum")
        self.ops.append(Op(result, name, args))
        self.define(result, OPERATIONS[name].is_bool)

    def read_product(self, words: list[str]) -> None:
        self.close(self.take(words, "VALUE"))

    def read_return(self, words: list[str]) -> None:
        if len(words) != len(self.states):
            raise ValueError(f"a program returns a value for each of its {len(self.states)} states")
        self.close(words)

    def close(self, words: list[str]) -> None:
        outputs = tuple(self.argument(word) for word in words)
        self.stages.append(Stage(tuple(self.gates), tuple(self.ops), outputs))

    def end(self) -> None:
        if self.before != "return":
            raise ValueError("the text ends before its return")

    def program(self) -> Program:
        return Program(self.name, tuple(self.states), tuple(self.params), tuple(self.stages), frozenset(self.summed))


@memoize(256)
def _parse(text: str) -> Program:
    parser, lines = _Parser(), text.removesuffix("\n").split("\n")
    for count, line in enumerate([*lines, ""], 1):
        try:
            parser.read(line) if count <= len(lines) else parser.end()
        except ValueError as error:
            raise ValueError(f"line {count} of a recurrence's program, {line!r}: {error}") from error
    return parser.program()


def lookup(values: Mapping[str, Any], name: Argument, like: Any) -> Any:
    """A program's output as a tensor of the shape of `like`: a constant is spread, and so is a unit's parameter."""
    if not isinstance(name, str):
        return like.new_full(like.shape, name)
    value = values[name]
    return value if value.dim() == like.dim() else value.expand(like.shape)
