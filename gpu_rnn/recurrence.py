# SPDX-License-Identifier: Apache-2.0
"""`Recurrence`: a recurrent cell written once, as a function of scalars."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from gpu_rnn.compiler.program import Program
from gpu_rnn.compiler.tracing import Step, trace
from gpu_rnn.once import once
from gpu_rnn.spelling import names_meant

_numbers = itertools.count()


class Recurrence:
    """A recurrent cell: its states, its gates, and one step as a plain function of scalars.

    ``step(x, r, s)`` (or ``step(x, r, s, p)``) is written for one unit of one sample. ``x.<gate>`` is the gate's input
    part W_ih x + b_ih, ``r.<gate>`` its recurrent product W_hh h + b_hh, ``s.<state>`` the states before the step and
    ``p.<param>`` the unit's own parameters. It returns the new states, in order; the first is h, the layer's output.
    Any torch arithmetic is allowed that works on each element by itself. It is traced once, so it may not branch on
    values: use ``torch.where``.

    Attributes:
        gates: all gates, in the order of the rows of the weights.
        states: the states; the first is h.
        initial: the value each state starts from.

    Args:
        step: the function, or for a cell with dependent products a sequence of ``(gates, function)`` stages: an
            earlier stage returns the input of the next stage's product, then values handed to the next function as a
            further argument ``step(x, r, s, p, values)``.
        gates: names of the gates, in the order of the rows of the weights. Left out when `step` is a sequence.
        states: names of the states; a mapping gives their initial values (0 otherwise).
        params: names of parameters with one value per unit, such as peepholes.
        name: how errors and generated code name the cell; by default the function's name, of a lambda "cell".

    Raises:
        TraceError: (a ValueError) the step cannot be traced; the message names operation, cell and line.
        TypeError: `step` is a Module, or does not take these arguments.

    Example: a minimal gated unit (Zhou et al., arXiv:1603.09420), usable in ``gpu_rnn.Recurrent``::

        >>> import gpu_rnn, torch
        >>> def mgu(x, r, s):
        ...     f = torch.sigmoid(x.f + r.f)
        ...     n = torch.tanh(x.n + f * r.n)
        ...     return (1 - f) * s.h + f * n
        >>> cell = gpu_rnn.Recurrence(mgu, gates=("f", "n"), states=("h",))
        >>> layer = gpu_rnn.Recurrent(cell, input_size=3, hidden_size=5)
        >>> layer(torch.randn(7, 2, 3))[0].shape
        torch.Size([7, 2, 5])
    """

    @names_meant
    def __init__(
        self,
        step: Step | Sequence[tuple[Sequence[str], Step]],
        *,
        gates: Sequence[str] | None = None,
        states: Sequence[str] | Mapping[str, float] = ("h",),
        params: Sequence[str] = (),
        name: str | None = None,
    ) -> None:
        if isinstance(step, torch.nn.Module):
            raise TypeError(
                f"a recurrence is written as a function step(x, r, s) of scalars, not as a {type(step).__name__}; "
                "a module's weights are the layer's, its arithmetic is the step"
            )
        stages = _stages(step, gates)
        for word, names in (("states", states), ("params", params), *(("gates", names) for names, _ in stages)):
            _check_sequence(word, names)
        initial = states if isinstance(states, Mapping) else dict.fromkeys(states, 0.0)
        self._start(
            name or getattr(stages[-1][1], "__name__", "cell").replace("<lambda>", "cell"),
            [(tuple(names), function) for names, function in stages],
            tuple((state, _number(state, value)) for state, value in initial.items()),
            tuple(params),
        )
        _ = self.program  # what cannot be traced is said here

    @classmethod
    def lazy(
        cls,
        stages: Sequence[tuple[tuple[str, ...], Step]],
        *,
        states: Sequence[str],
        params: tuple[str, ...] = (),
        name: str,
        aten: str | None = None,
    ) -> Recurrence:
        """One of the library's own cells: traced at first need, and known to ATen by `aten` (its mode) or not."""
        self = cls.__new__(cls)
        self._start(name, stages, tuple((state, 0.0) for state in states), params, aten)
        return self

    @classmethod
    def from_program(cls, text: str, aten: str | None = None) -> Recurrence:
        """The recurrence whose canonical text this is, in a process that need not have its function.

        Raises:
            ValueError: not a program's text.
        """
        program = Program.parse(text)
        self = cls.__new__(cls)
        self._start(program.name, program, program.states, program.params, aten)
        return self

    def _start(
        self,
        name: str,
        source: Program | Sequence[tuple[tuple[str, ...], Step]],
        initial: tuple[tuple[str, float], ...],
        params: tuple[str, ...],
        aten: str | None = None,
    ) -> None:
        """All there is to a recurrence; `source`: its program, or the stages to trace for it."""
        self.name = name
        self.identity = f"{name} {next(_numbers)}"
        stages = [(stage.gates, stage) for stage in source.stages] if isinstance(source, Program) else source
        self.stage_gates = tuple(gates for gates, _ in stages)
        self.params = params
        self.aten = aten
        self.gates = tuple(gate for gates in self.stage_gates for gate in gates)
        self.states = tuple(state for state, _ in initial)
        self.initial = tuple(value for _, value in initial)
        self._source = source

    @property
    def is_traced(self) -> bool:
        """Whether `program` is at hand."""
        return isinstance(self._source, Program)

    @once
    def program(self) -> Program:
        """The traced recurrence."""
        source = self._source
        if not isinstance(source, Program):
            source = trace(self.name, tuple(zip(self.states, self.initial, strict=True)), self.params, source)
            self._source = source  # the user's functions, and what they close over, are no longer needed
        return source

    def text(self, identity: str = "") -> str:
        """The program's canonical text: what custom ops, torch.export and pickle take for the cell.

        Under torch.compile the result is a constant of the graph. Dynamo does not look at the object that it came from,
        only at the arguments: ``recurrence.text(recurrence.identity)`` keeps the graph to this recurrence.
        """
        return self.program.text

    # What torch.compiler.assume_constant_result sets; calling it would import Dynamo with this package.
    text._dynamo_marked_constant = True  # type: ignore[attr-defined]

    @names_meant
    def source(self, language: str = "triton", *, backward: bool = False) -> str:
        """The pointwise device code generated for this cell, each line beside the line of `step` it comes from.

        Args:
            language: "triton", "cuda" or "c".
            backward: the derivative instead of the step.

        Raises:
            ValueError: another language.
        """
        from gpu_rnn.compiler import codegen

        return codegen.source(self.program, language, backward=backward, comments=True)

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (self.program.text, self.aten)

    @property
    def key(self) -> str:
        """What two equal recurrences share; ATen's own cells have it before they are traced."""
        return self.aten or self.program.text

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recurrence) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __repr__(self) -> str:
        gates = " | ".join(map(" ".join, self.stage_gates))
        params = f", params={' '.join(self.params)}" if self.params else ""
        return f"Recurrence({self.name}: gates={gates}, states={' '.join(self.states)}{params})"


def _stages(step: Any, gates: Sequence[str] | None) -> list[tuple[Sequence[str], Step]]:
    """The stages of a recurrence, each with its gates."""
    if callable(step):
        if gates is None:
            raise TypeError("name the gates: Recurrence(step, gates=('f', 'n'), ...)")
        return [(gates, step)]
    if isinstance(step, str) or not isinstance(step, Iterable):
        raise TypeError(f"a step is a Python function step(x, r, s[, p]), not {step!r}")
    if gates is not None:
        raise TypeError("with several stages each names its own gates: Recurrence([(gates, step), ...])")
    stages = list(step)
    if not stages:
        raise ValueError("a recurrence has at least one stage: Recurrence([(gates, step), ...])")
    for stage in stages:
        if not isinstance(stage, (tuple, list)) or len(stage) != 2:
            raise TypeError(f"a stage is a pair (gates, step), not {stage!r}")
    return stages


def _check_sequence(word: str, names: Any) -> None:
    if isinstance(names, str):
        raise TypeError(f"{word} is a sequence of names: ({names!r},)")
    if not isinstance(names, Iterable):
        raise TypeError(f"{word} is a sequence of names such as ('f', 'n'), not {names!r}")
    if isinstance(names, (set, frozenset)):
        raise TypeError(f"{word} have an order, that of the rows of the weights: a tuple of names, not a set")


def _number(state: str, value: Any) -> float:
    """A state's initial value, the same for all units."""
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"states maps {state!r} to the one number that all its units start from, not {value!r}; "
            "values for each unit are the initial state of the call"
        ) from error


def _restore(text: str, aten: str | None) -> Recurrence:
    """What pickles call, those of earlier versions too."""
    return Recurrence.from_program(text, aten)
