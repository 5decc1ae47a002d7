# SPDX-License-Identifier: Apache-2.0
"""The C text of a time loop: the functions, the generated step, what is known of the program, the hand-written loop."""

from __future__ import annotations

from importlib.resources import files

import torch

from gpu_rnn.backends.native import arguments
from gpu_rnn.backends.native.building import InstructionSet
from gpu_rnn.backends.normalisation import EPSILON
from gpu_rnn.compiler.codegen import C, source
from gpu_rnn.compiler.derivative import carried_values
from gpu_rnn.compiler.program import Program
from gpu_rnn.memo import memoize

C_TYPES = {torch.float32: "float", torch.float64: "double"}


@memoize(256)
def of(text: str, dtype: torch.dtype, backward: bool, target: InstructionSet) -> str:
    """Everything that is compiled for a program in one direction."""
    own = ("backward.c", "gradients.c") if backward else ("inputs.h", "forward.c")
    return "\n".join([*_before(text, dtype, backward, target), *map(_file, ("normalisation.h", *own))])


@memoize(256)
def of_step(text: str, dtype: torch.dtype, target: InstructionSet) -> str:
    """Everything that is compiled for one step of a program, forward and backward."""
    return "\n".join([*_before(text, dtype, True, target), arguments.STEP.declared(), _file("step.c")])


def _before(text: str, dtype: torch.dtype, backward: bool, target: InstructionSet) -> list[str]:
    """What stands before the hand-written functions of a direction."""
    program = Program.parse(text)
    return [
        _constants(program, dtype, backward, target),
        _file("functions.h"),
        _tables(program),
        _turns(target.bytes // dtype.itemsize),
        arguments.LOOP.declared(),
        source(program, "c"),
        source(program, "c", backward=True) if backward else "",
        _switch("step", _ARGUMENTS, ("out",), len(program.stages)),
        _switch("step_backward", (*_ARGUMENTS, "d"), _GRADIENTS, len(program.stages)) if backward else "",
        _file("memory.h"),
        _file("share.h"),
        _file("loop.h"),
    ]


def _file(name: str) -> str:
    body = (files("gpu_rnn.kernels.native") / name).read_text()
    return f'#line 1 "{name}"\n{body}'


_ARGUMENTS = tuple("arspv")
_GRADIENTS = tuple(f"d_{name}" for name in _ARGUMENTS)


def _switch(name: str, arguments: tuple[str, ...], results: tuple[str, ...], stages: int) -> str:
    """A function that calls that of a stage."""
    first, _, rest = name.partition("_")
    taken = ", ".join(
        ["int stage", *(f"const real *{each}" for each in arguments), *(f"real *{each}" for each in results)]
    )
    given = ", ".join((*arguments, *results))
    each = ["_".join(filter(None, (first, str(stage), rest))) for stage in range(stages)]
    calls = [f"  if (stage == {stage}) {called}({given});" for stage, called in enumerate(each)]
    return "\n".join([f"static inline void {name}({taken}) {{", *calls, "}"])


def vectors(program: Program, backward: bool, target: InstructionSet) -> int:
    """Vectors of weights that a product takes side by side: enough sums in flight for one row, all gates of a unit
    together."""
    gates = max(len(stage.gates) for stage in program.stages)
    return target.across if backward else gates * max(1, target.across // gates)


def _constants(program: Program, dtype: torch.dtype, backward: bool, target: InstructionSet) -> str:
    across = vectors(program, backward, target)
    values = {
        "SCALAR": C_TYPES[dtype],
        "LANES": target.bytes // dtype.itemsize,
        "STATES": len(program.states),
        "PARAMS": len(program.params),
        "GATES": len(program.gates),
        "RECURRENT": len(program.split),
        "STAGES": len(program.stages),
        "CARRIED": max(_carried(program)),
        "EPSILON": EPSILON,
        "VECTORS": across,
        "ROWS": min(8, max(1, target.sums // across)),  # the most that loop.h has a case for
    }
    return "\n".join(f"#define {name} {value}" for name, value in values.items())


def _carried(program: Program) -> list[int]:
    """Of each stage, and of what comes after the last one, how many values it takes from those before."""
    return [*(len(carried_values(program, number)) for number in range(len(program.stages))), 0]


def _tables(program: Program) -> str:
    places = [program.split.index(gate) if gate in program.split else -1 for gate in program.gates]
    first = [0, *(rows.stop for rows in program.rows)]
    split = [sum(gate in program.split for gate in program.gates[:start]) for start in first]
    initial = ", ".join(C.constant(value).removeprefix("K") for value in program.initial)
    return (
        f"static const int FIRST[] = {{{', '.join(map(str, first))}}};\n"
        f"static const int FIRST_SPLIT[] = {{{', '.join(map(str, split))}}};\n"
        f"static const int CARRIED_OF[] = {{{', '.join(map(str, _carried(program)))}}};\n"
        f"static const int PLACES[] = {{{', '.join(map(str, places))}}};\n"
        f"static const scalar INITIAL[] = {{{initial}}};"
    )


def _turns(lanes: int) -> str:
    """How a square of vectors is turned: in each step, lines so far apart exchange every other so many lanes. From
    which lanes of both the upper one takes its own, and the lower one."""
    steps = []
    for apart in (1 << step for step in range(lanes.bit_length() - 1)):
        upper = [lane + lanes - apart if lane & apart else lane for lane in range(lanes)]
        lower = [lane + lanes if lane & apart else lane + apart for lane in range(lanes)]
        steps.append(f"{{{{{', '.join(map(str, upper))}}}, {{{', '.join(map(str, lower))}}}}}")
    return f"static const bits TURNS[][2][LANES] = {{{', '.join(steps)}}};"
