# SPDX-License-Identifier: Apache-2.0
"""Prints a program as Triton and as CUDA C++: the pointwise part only; products, tiling and waiting are hand-written.

For each stage two functions are printed. ``step_<k>(a, r, s, p, v)`` takes, one value per unit, the gates `a` (sums, or
input parts of split gates), the products `r` of the split gates, the states `s`, the parameters `p` and the values `v`
that earlier stages hand on; it returns the new states (an earlier stage: the next product's input, then what it hands
on). ``step_<k>_backward(a, r, s, p, v, d)`` takes the gradient of each of these results too and returns the gradients
of a, r, s, p, v.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
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

    def inputs(self, end: str = "") -> Iterable[tuple[str, str, str]]:
        """Of each input: its name, its kind in C and what it is read from."""
        for group, names in self.groups.items():
            for index, name in enumerate(names):
                is_truth = name in self.truths
                yield name, "bool" if is_truth else "float", f"{group}[{index}]" + (f" != 0.0{end}" if is_truth else "")


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
        ValueError: a language other than "triton" and "cuda".
    """
    printers: dict[str, Callable[[_Function, bool], str]] = {"triton": _triton, "cuda": _cuda}
    if language not in printers:
        raise ValueError(f"generated code is printed as 'triton' or 'cuda', not {language!r}")
    return "\n\n".join(printers[language](function, comments) for function in _functions(program, backward))


TRITON_HEADER = '''"""Generated: the pointwise part of a recurrence, forward and backward."""

import triton
import triton.language as tl

from gpu_rnn.kernels.triton import math as m


'''


def module_text(program: Program) -> str:
    """A Triton module with every function of a program."""
    bodies = [source(program, "triton"), source(program, "triton", backward=True)]
    return TRITON_HEADER + "\n\n".join(bodies)


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
    lines += [f"    {name} = {source}" for name, _, source in function.inputs()]
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


def _cuda(function: _Function, comments: bool) -> str:
    inputs = [f"const float *{group}" for group in function.groups]
    outputs = ["out"] if len(function.results) == 1 else [f"d_{group}" for group in GROUPS]
    arguments = ", ".join(inputs + [f"float *{name}" for name in outputs])
    lines = [f"__device__ __forceinline__ void {function.name}({arguments}) {{"]
    lines += [f"    const {kind} {name} = {source};" for name, kind, source in function.inputs("f")]
    for op in function.ops:
        operation = OPERATIONS[op.name]
        args = [arg if isinstance(arg, str) else _cuda_constant(arg) for arg in op.args]
        kind = "bool" if operation.is_bool else "float"
        text = operation.cuda.format(*args)
        lines.append(f"    const {kind} {op.result} = {text};{_comment(op, '//', comments)}")
    for output, names in zip(outputs, function.results, strict=True):
        for index, name in enumerate(names):
            value = name if isinstance(name, str) else _cuda_constant(name)
            lines.append(f"    {output}[{index}] = {value};")
    return "\n".join([*lines, "}", ""])
