# SPDX-License-Identifier: Apache-2.0
"""Prints a program as Triton, CUDA C++ and C: the pointwise part only; products, tiling and waiting are hand-written.

For each stage two functions are printed. ``step_<k>(a, r, s, p, v)`` takes, one value per unit, the gates `a` (sums, or
input parts of split gates), the products `r` of the split gates, the states `s`, the parameters `p` and the values `v`
that earlier stages hand on; it returns the new states (an earlier stage: the next product's input, then what it hands
on). ``step_<k>_backward(a, r, s, p, v, d)`` takes the gradient of each of these results too and returns the gradients
of a, r, s, p, v.

C computes many units at once, in the vectors of kernels/native/functions.h, float or double.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import torch

from gpu_rnn.compiler.derivative import carried_values, differentiate, stage_outputs
from gpu_rnn.compiler.operations import OPERATIONS, Argument, Op, live
from gpu_rnn.compiler.program import Program

GROUPS = "arspv"
SMALLEST_NORMAL = torch.finfo(torch.float32).smallest_normal


class _Function(NamedTuple):
    """One function to print: its grouped inputs, its operations, and its results, flat or grouped."""

    name: str
    groups: dict[str, tuple[str, ...]]
    ops: tuple[Op, ...]
    results: tuple[tuple[Argument, ...], ...]
    truths: frozenset[str]  # of all stages; between two they are 1.0 and 0.0

    @property
    def inputs(self) -> Iterable[tuple[str, str]]:
        """Of each input its name and what it is read from."""
        for group, names in self.groups.items():
            yield from ((name, f"{group}[{index}]") for index, name in enumerate(names))


def input_groups(program: Program, number: int) -> dict[str, tuple[str, ...]]:
    """The inputs of a stage by group, in the order in which generated code takes them."""
    stage = program.stages[number]
    return {
        "a": tuple(f"{'a' if gate in program.summed else 'x'}_{gate}" for gate in stage.gates),
        "r": tuple(f"r_{gate}" for gate in stage.gates if gate not in program.summed),
        "s": tuple(f"s_{name}" for name in program.state_names),
        "p": tuple(f"p_{name}" for name in program.params),
        "v": carried_values(program, number),
    }


def _functions(program: Program, backward: bool) -> Iterable[_Function]:
    truths = frozenset(op.result for stage in program.stages for op in stage.ops if OPERATIONS[op.name].is_bool)
    for number in range(len(program.stages)):
        groups = input_groups(program, number)
        if not backward:
            outputs = stage_outputs(program, number)
            yield _Function(f"step_{number}", groups, live(program.stages[number].ops, outputs), (outputs,), truths)
            continue
        derivative = differentiate(program, number)
        gradient = dict(zip(derivative.wrt, derivative.outputs, strict=True))
        results = tuple(tuple(gradient[name] for name in names) for names in groups.values())
        yield _Function(f"step_{number}_backward", groups | {"d": derivative.seeds}, derivative.ops, results, truths)


def source(program: Program, language: str, *, backward: bool = False, comments: bool = False) -> str:
    """The generated functions of one direction.

    Raises:
        ValueError: a language other than "triton", "cuda" and "c".
    """
    if language not in PRINTERS:
        raise ValueError(f"generated code is printed as {', '.join(map(repr, PRINTERS))}, not {language!r}")
    return "\n\n".join(PRINTERS[language](function, comments) for function in _functions(program, backward))


EXACT_FUNCTIONS = "gpu_rnn.kernels.triton.math"
TRITON_HEADER = '''"""Generated: the pointwise part of a recurrence, forward and backward."""

import triton
import triton.language as tl

import {functions} as m


'''


def module_text(program: Program, functions: str = EXACT_FUNCTIONS) -> str:
    """A Triton module with every function of a program, which takes scalar functions from the module of that name."""
    bodies = [source(program, "triton"), source(program, "triton", backward=True)]
    return TRITON_HEADER.format(functions=functions) + "\n\n".join(bodies)


def _comment(op: Op, mark: str, comments: bool) -> str:
    return f"  {mark} {op.line}" if comments and op.line else ""


def _single(value: float) -> float:
    """A constant as printed: what float32 cannot hold would make Triton compute in float64, and CUDA warn."""
    if value == 0.0 or not math.isfinite(value):
        return value
    nearest = torch.tensor(value, dtype=torch.float64).float().item()
    return (
        value
        if SMALLEST_NORMAL <= abs(nearest) < math.inf
        else math.copysign(0.0 if abs(nearest) < 1 else math.inf, value)
    )


def _triton_constant(value: float) -> str:
    value = _single(value)
    return repr(value) if math.isfinite(value) else f'float("{value}")'


def _triton(function: _Function, comments: bool) -> str:
    lines = ["@triton.jit", f"def {function.name}({', '.join(function.groups)}):"]
    lines += [f"    {name} = {source}{' != 0.0' * (name in function.truths)}" for name, source in function.inputs]
    for op in function.ops:
        args = [arg if isinstance(arg, str) else _triton_constant(arg) for arg in op.args]
        lines.append(f"    {op.result} = {OPERATIONS[op.name].triton.format(*args)}{_comment(op, '#', comments)}")
    like = function.groups["a"][0]

    def result(name: Argument) -> str:
        return name if isinstance(name, str) else f"tl.zeros_like({like}) + {_triton_constant(name)}"

    printed = ["(" + "".join(f"{result(name)}, " for name in names).rstrip() + ")" for names in function.results]
    lines.append(f"    return {', '.join(printed)}")
    return "\n".join(lines) + "\n"


def _cuda_constant(value: float) -> str:
    value = _single(value)
    if math.isnan(value):
        return "NAN"
    return f"{value!r}f" if math.isfinite(value) else "INFINITY" if value > 0 else "-INFINITY"


def _c_constant(value: float) -> str:
    if math.isnan(value):
        return "K(NAN)"
    return f"K({value!r})" if math.isfinite(value) else f"K({'-' * (value < 0)}INFINITY)"


class _Dialect(NamedTuple):
    """What CUDA C++ and C say differently."""

    language: str
    function: str  # what stands before its name
    kinds: tuple[str, str]  # the types of a number and of a truth value
    truth: str  # a number as a truth value
    number: str  # a truth value as a number
    constant: Callable[[float], str]


CUDA = _Dialect("cuda", "__device__ __forceinline__ void", ("float", "bool"), "{0} != 0.0f", "{0}", _cuda_constant)
C = _Dialect(
    "c", "static inline void", ("real", "truth"), "(truth)({0} != K(0.0))", "where_({0}, K(1.0), K(0.0))", _c_constant
)


def _c_like(dialect: _Dialect, function: _Function, comments: bool) -> str:
    real = dialect.kinds[0]
    outputs = ["out"] if len(function.results) == 1 else [f"d_{group}" for group in GROUPS]
    arguments = [*(f"const {real} *{group}" for group in function.groups), *(f"{real} *{name}" for name in outputs)]

    def printed(value: Argument) -> str:
        return value if isinstance(value, str) else dialect.constant(value)

    lines = [f"{dialect.function} {function.name}({', '.join(arguments)}) {{"]
    for name, source in function.inputs:
        is_truth = name in function.truths
        text = dialect.truth.format(source) if is_truth else source
        lines.append(f"    const {dialect.kinds[is_truth]} {name} = {text};")
    for op in function.ops:
        operation = OPERATIONS[op.name]
        text = getattr(operation, dialect.language).format(*map(printed, op.args))
        kind = dialect.kinds[operation.is_bool]
        lines.append(f"    const {kind} {op.result} = {text};{_comment(op, '//', comments)}")
    for output, names in zip(outputs, function.results, strict=True):
        for index, name in enumerate(names):
            text = dialect.number.format(name) if name in function.truths else printed(name)
            lines.append(f"    {output}[{index}] = {text};")
    return "\n".join([*lines, "}", ""])


PRINTERS: dict[str, Callable[[_Function, bool], str]] = {
    "triton": _triton,
    "cuda": partial(_c_like, CUDA),
    "c": partial(_c_like, C),
}
