# SPDX-License-Identifier: Apache-2.0
"""Generated code: as it was (tests/golden), and computing what the program computes, in Triton, CUDA C++ and C.

``python -m tests.compiler.test_codegen`` writes the golden files anew; look at the difference before committing it.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import pytest
import torch
from torch import Tensor

import gpu_rnn
from gpu_rnn import cells
from gpu_rnn.backends import triton_interpreter
from gpu_rnn.compiler import codegen, triton_module
from gpu_rnn.compiler.derivative import differentiate, stage_outputs
from gpu_rnn.compiler.evaluation import runner
from gpu_rnn.compiler.program import Program, lookup
from tests.support import loops as support
from tests.support import native
from tests.support.paths import TESTS

GOLDEN = TESTS / "golden"
GOLDEN_CELLS = ("lstm", "gru", "gru_reset_before", "slstm")
NOT_FINITE = float("inf"), -float("inf"), float("nan")
POINTS = 128  # per function; a power of two, as Triton's blocks are


def golden(cell: str, language: str) -> str:
    recurrence = cells.CELLS[cell]()
    return recurrence.program.text + "".join(
        f"\n--- {direction}\n{codegen.source(recurrence.program, language, backward=direction == 'backward')}"
        for direction in ("forward", "backward")
    )


@pytest.mark.parametrize("language", codegen.PRINTERS)
@pytest.mark.parametrize("cell", GOLDEN_CELLS)
def test_generated_code_is_as_it_was(cell: str, language: str) -> None:
    assert golden(cell, language) == (GOLDEN / f"{cell}.{language}.txt").read_text()


@pytest.mark.parametrize(("language", "mark"), [("triton", "#"), ("cuda", "//"), ("c", "//")])
@pytest.mark.parametrize("backward", [False, True])
def test_source_names_the_line_of_each_operation(language: str, mark: str, backward: bool) -> None:
    def step(x, r, s):
        gate = torch.sigmoid(x.g + r.g)
        return gate * s.h

    first = step.__code__.co_firstlineno
    recurrence = gpu_rnn.Recurrence(step, gates=("g",), states=("h",))
    source = recurrence.source(language, backward=backward)
    lines = [line for line in source.splitlines() if re.search(r"[tg]\d+ = ", line)]
    expected = [
        f"{mark} test_codegen.py:{first + 1} `gate = torch.sigmoid(x.g + r.g)`",
        f"{mark} test_codegen.py:{first + 2} `return gate * s.h`",
    ]
    assert lines and all(any(line.endswith(origin) for origin in expected) for line in lines)
    assert all(any(line.endswith(origin) for line in lines) for origin in expected)
    bare = codegen.source(recurrence.program, language, backward=backward)
    assert bare == re.sub(rf"  {mark} test_codegen.*", "", source)


def test_source_in_another_language() -> None:
    with pytest.raises(ValueError, match="'triton', 'cuda', 'c', not 'metal'"):
        cells.lstm().source("metal")


def test_source_of_a_cell_without_its_function() -> None:
    program = cells.gru().program
    assert gpu_rnn.Recurrence.from_program(program.text).source("cuda") == codegen.source(program, "cuda")


def constants(x, r, s):
    """Infinite constants, a constant state, and one that is a whole number."""
    unknown = torch.where(x.g > 1, x.g + r.g, float("nan"))
    bound = torch.where(s.low < -1, -float("inf"), float("inf"))
    return unknown, bound, 2


TRACED: dict[str, gpu_rnn.Recurrence] = {
    **support.RECURRENCES,
    **{f"{cell}_{first}_{second}": recurrence for cell, first, second, recurrence in support.pairs()},
    "size": gpu_rnn.Recurrence(lambda x, r, s: torch.abs(x.g + r.g), gates=("g",), name="size"),
    "constants": gpu_rnn.Recurrence(constants, gates=("g",), states=("h", "low", "two")),
}  # by the test, not by every process that collects it


@dataclass(frozen=True)
class Function:
    """One generated function: the names that it takes, by group, and the names of what it gives back."""

    program: Program
    number: int
    backward: bool

    @property
    def name(self) -> str:
        return f"step_{self.number}{'_backward' if self.backward else ''}"

    @property
    def groups(self) -> list[tuple[str, ...]]:
        groups = list(codegen.input_groups(self.program, self.number).values())
        return [*groups, differentiate(self.program, self.number).seeds if self.backward else ()]

    @property
    def sizes(self) -> list[int]:
        return [len(names) for names in self.groups]

    def inputs(self) -> Tensor:
        """(inputs, POINTS): random numbers, and columns that are all 0, ±1, ±2.5, ±3, ±20, ±100, ±inf or NaN."""
        rows = support.draw(sum(self.sizes), POINTS, seed=self.number, scale=1.5).float()
        special = torch.tensor([0.0, 1.0, -1.0, 2.5, -2.5, 3.0, -3.0, 20.0, -20.0, 100.0, -100.0, *NOT_FINITE])
        rows[: self.sizes[0], : len(special)] = special
        return rows

    def expected(self, inputs: Tensor, **replaced: Callable[[Tensor], Tensor]) -> Tensor:
        """(results, POINTS) by the program itself, in the inputs' precision; `replaced` as for `runner`."""
        names = [name for group in self.groups for name in group]
        values = dict(zip(names, inputs, strict=True))
        like = inputs[0]
        if not self.backward:
            runner(self.program.stages[self.number].ops, **replaced)(values)
            return torch.stack([lookup(values, out, like) for out in stage_outputs(self.program, self.number)])
        derivative = differentiate(self.program, self.number)
        runner(derivative.ops, **replaced)(values)
        found = dict(zip(derivative.wrt, derivative.outputs, strict=True))
        return torch.stack([lookup(values, found[name], like) for group in self.groups[:-1] for name in group])

    def check(self, actual: Tensor, inputs: Tensor) -> None:
        """Of one precision both; the absolute part is for sums of terms of size 10 that cancel. In float64 a result may
        also be what four roundings of sigmoid make it: of 1 - sigmoid(20) they are 2e-7, whatever it is multiplied by.
        """
        rtol, atol = (2e-5, 1e-5) if inputs.dtype == torch.float32 else (2e-13, 1e-13)
        expected = self.expected(inputs)
        rounded = self.expected(inputs, sigmoid=lambda x: torch.sigmoid(x) * (1 - 2**-51))  # in float32 the same
        of_sigmoid = (actual - expected).abs() <= (rounded - expected).abs()
        torch.testing.assert_close(actual.where(~of_sigmoid, expected), expected, rtol=rtol, atol=atol, equal_nan=True)


def functions(program: Program) -> Iterator[Function]:
    for number in range(len(program.stages)):
        yield from (Function(program, number, False), Function(program, number, True))


def entry(name: str, function: Function) -> str:
    """A C function that applies a generated one to every point, in memory laid out point by point."""
    starts = [sum(function.sizes[:k]) for k in range(7)]
    count = sum(function.sizes[:5]) if function.backward else len(stage_outputs(function.program, function.number))
    takes = [f"in + {start}" for start in starts[: 6 if function.backward else 5]]
    gives = [f"out + {start}" for start in starts[:5]] if function.backward else ["out"]
    return (
        f'extern "C" void {name}_{function.name}(int n, const float *in, float *out) {{\n'
        f"    for (; n > 0; n--, in += {starts[6]}, out += {count})\n"
        f"        {name}::{function.name}({', '.join(takes + gives)});\n}}\n"
    )


@pytest.fixture(scope="module")
def on_the_host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Every program's CUDA text, each in a namespace of its own, built as C++ for this machine."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed; it builds the generated CUDA for the CPU")
    folder = tmp_path_factory.mktemp("cuda")
    header = files("gpu_rnn.kernels.cuda").joinpath("pointwise.cuh").read_text()
    parts = ["#define __device__", "#define __forceinline__ inline", header.replace("#pragma once", "")]
    for name, recurrence in TRACED.items():
        program = recurrence.program
        bodies = "".join(codegen.source(program, "cuda", backward=backward) for backward in (False, True))
        parts.append(f"namespace {name} {{\n{bodies}}}\n")
        parts += [entry(name, function) for function in functions(program)]
    (folder / "generated.cpp").write_text("\n".join(parts))
    command = [
        "g++",
        "-std=c++17",
        "-O1",
        "-Werror",
        "-shared",
        "-fPIC",
        "-o",
        "generated.so",
        "generated.cpp",
    ]
    built = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return ctypes.CDLL(str(folder / "generated.so"))


@pytest.mark.cuda_cpu
@pytest.mark.parametrize("name", TRACED)
def test_cuda_computes_what_the_program_computes(on_the_host: ctypes.CDLL, name: str) -> None:
    for function in functions(TRACED[name].program):
        inputs = function.inputs()
        in_order, found = inputs.T.contiguous(), torch.full_like(function.expected(inputs).T, 7).contiguous()
        call = getattr(on_the_host, f"{name}_{function.name}")
        call(POINTS, ctypes.c_void_p(in_order.data_ptr()), ctypes.c_void_p(found.data_ptr()))
        function.check(found.T, inputs)


def native_entry(name: str, function: Function) -> str:
    """A C function that applies a generated one to every point, in memory laid out value by value."""
    starts = [sum(function.sizes[:k]) for k in range(7)]
    count = sum(function.sizes[:5]) if function.backward else len(stage_outputs(function.program, function.number))
    takes = [f"in + {start}" for start in starts[: 6 if function.backward else 5]]
    gives = [f"out + {start}" for start in starts[:5]] if function.backward else ["out"]
    return f"""
void {name}_{function.name}_of(long n, const scalar *from, scalar *to) {{
  for (long k = 0; k < n; k += LANES) {{
    real in[{starts[6]}], out[{count}];
    for (int i = 0; i < {starts[6]}; i++) __builtin_memcpy(in + i, from + i * n + k, sizeof(real));
    {name}_{function.name}({", ".join(takes + gives)});
    for (int i = 0; i < {count}; i++) __builtin_memcpy(to + i * n + k, out + i, sizeof(real));
  }}
}}
"""


@cache
def in_c(scalar: str, compiler: str) -> ctypes.CDLL:
    """Every program's C text, the names of its functions with the program's in front."""
    parts = []
    for name, recurrence in TRACED.items():
        program = recurrence.program
        bodies = "".join(codegen.source(program, "c", backward=backward) for backward in (False, True))
        parts.append(bodies.replace(" step_", f" {name}_step_"))
        parts += [native_entry(name, function) for function in functions(program)]
    return native.build("".join(parts), scalar, compiler, "plain", "-O0")


@pytest.mark.parametrize("scalar, dtype", [("float", torch.float32), ("double", torch.float64)])
@pytest.mark.parametrize("compiler", native.COMPILERS)
def test_c_computes_what_the_program_computes(scalar: str, dtype: torch.dtype, compiler: str) -> None:
    native.needs(compiler, "plain")
    for name, recurrence in TRACED.items():
        for function in functions(recurrence.program):
            inputs = function.inputs().to(dtype)
            actual = torch.full_like(function.expected(inputs), 7)
            call = getattr(in_c(scalar, compiler), f"{name}_{function.name}_of")
            call(ctypes.c_long(POINTS), ctypes.c_void_p(inputs.data_ptr()), ctypes.c_void_p(actual.data_ptr()))
            function.check(actual, inputs)


@pytest.mark.interpreter
@pytest.mark.parametrize("name", TRACED)
def test_triton_computes_what_the_program_computes(name: str) -> None:
    from tests.support.generated_kernel import apply

    program = TRACED[name].program
    module = triton_module.triton_module(program)
    for function in functions(program):
        inputs = function.inputs()
        found = torch.full_like(function.expected(inputs), 7)
        step = getattr(module, function.name)
        with triton_interpreter.arithmetic():
            apply[(1,)](inputs, found, step, *function.sizes, SIZE=POINTS)
        function.check(found, inputs)


@pytest.mark.cuda_cpu
def test_nan_is_passed_on(on_the_host: ctypes.CDLL) -> None:
    """minimum, maximum, clamp and relu of a NaN are NaN, as in torch and unlike CUDA's fminf."""
    bounded = [name for name in TRACED if name.startswith("rnn_")]
    for name in bounded:
        point, found = torch.full((2,), float("nan")), torch.zeros(1)
        call = getattr(on_the_host, f"{name}_step_0")
        call(1, ctypes.c_void_p(point.data_ptr()), ctypes.c_void_p(found.data_ptr()))
        assert found.isnan().all(), name
    assert bounded


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for cell in GOLDEN_CELLS:
        for language in codegen.PRINTERS:
            (GOLDEN / f"{cell}.{language}.txt").write_text(golden(cell, language))
