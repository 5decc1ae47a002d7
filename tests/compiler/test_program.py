# SPDX-License-Identifier: Apache-2.0
"""Programs: their canonical text and its parser, their evaluation, and the derivative of every operation."""

from __future__ import annotations

import ast
import hashlib
import itertools
import os
import subprocess
import sys
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import Tensor

from gpu_rnn import activations, cells
from gpu_rnn.compiler import codegen
from gpu_rnn.compiler.builder import Builder
from gpu_rnn.compiler.derivative import differentiate
from gpu_rnn.compiler.evaluation import runner
from gpu_rnn.compiler.operations import OPERATIONS, REAL_ONLY
from gpu_rnn.compiler.program import Program, lookup
from gpu_rnn.recurrence import Recurrence
from tests.support import loops as support

TEXT = """program 1 tiny
state h 0.0
param p
stage f:sum n:split
t0 = sigmoid a_f
t1 = mul t0 r_n
t2 = add t1 p_p
return t2
"""


@pytest.mark.parametrize("name", support.RECURRENCES)
def test_text_is_read_back(name: str) -> None:
    program = support.RECURRENCES[name].program
    assert Program.parse(program.text) == program
    assert Program.parse(program.text).text == program.text
    assert len(program.text) < 500  # what a custom op carries with every call


@pytest.mark.parametrize("name", ["gates", "split", "state_names", "initial", "rows", "text"])
def test_what_follows_from_a_program_is_found_once(name: str) -> None:
    """A call of one step asks for each of them dozens of times."""
    program = Program.parse(cells.gru().program.text)
    assert getattr(program, name) is getattr(program, name)


def test_programs_are_equal_when_their_texts_are() -> None:
    one, other = (Recurrence.from_program(cells.lstm().program.text).program for _ in range(2))
    assert one == other and hash(one) == hash(other) and one != cells.gru().program != "text"
    zero, negative = (f"program 1 a\nstate h {value}\nstage h:sum\nreturn a_h\n" for value in ("0.0", "-0.0"))
    assert Program.parse(zero) != Program.parse(negative)


def test_text_of_an_lstm() -> None:
    assert cells.lstm().program.text == (
        "program 1 lstm\nstate h 0.0\nstate c 0.0\nstage i:sum f:sum g:sum o:sum\n"
        "t0 = sigmoid a_i\nt1 = sigmoid a_f\nt2 = tanh a_g\nt3 = sigmoid a_o\n"
        "t4 = mul t1 s_c\nt5 = mul t0 t2\nt6 = add t4 t5\nt7 = tanh t6\nt8 = mul t3 t7\nreturn t8 t6\n"
    )


def test_text_of_a_cell_with_two_products() -> None:
    program = cells.gru(reset_after=False).program
    assert [stage.gates for stage in program.stages] == [("r", "z"), ("n",)]
    assert program.text.count("\nproduct ") == 1
    assert program.split == ()
    assert cells.gru().program.split == ("n",)


def test_text_is_the_same_in_every_process() -> None:
    """Hash seeds differ between processes: nothing of a set's order may reach the text."""
    script = (
        "import hashlib; from tests.support import loops as s; "
        "print(hashlib.sha256(''.join(r.program.text for r in s.RECURRENCES.values()).encode()).hexdigest())"
    )
    here = "".join(r.program.text for r in support.RECURRENCES.values())
    environment = {"PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == hashlib.sha256(here.encode()).hexdigest()


REFUSED = [
    ("program 1", "program 2", 1, "this package reads version 1"),
    ("1 tiny", "1 __import__('os')", 1, "is not an identifier"),
    ("state h 0.0", "state h;x 0.0", 2, "is not an identifier"),
    ("state h 0.0", "state h low", 2, "is not a number"),
    ("state h 0.0", "state h 0.0\nstate h 0.0", 3, "defined already"),
    ("param p", "param µ", 3, "is not an identifier"),
    ("f:sum", "f:both", 4, "'sum' or 'split'"),
    ("f:sum", "f.x:sum", 4, "is not an identifier"),
    ("n:split", "n:split f:split", 4, "defined already"),
    ("sigmoid a_f", "system a_f", 5, "unknown operation 'system'"),
    ("sigmoid a_f", "sigmoid", 5, "sigmoid takes 1 argument"),
    ("t0 = sigmoid a_f", "t0 = sigmoid x_f", 5, "'x_f' is neither a value defined above nor a number"),
    ("t0 = sigmoid a_f", "tl = sigmoid a_f", 5, "is not the start of a line"),
    ("t0 = sigmoid a_f", "t0 := sigmoid a_f", 5, "unknown operation"),
    ("t1 = mul", "t0 = mul", 6, "t0 is defined already"),
    ("mul t0 r_n", "mul t0 t9", 6, "'t9' is neither"),
    ("t2 = add t1 p_p", "import os", 7, "is not the start of a line"),
    ("return t2", "return t2)", 8, "'t2)' is neither"),
]


@pytest.mark.parametrize(("old", "new", "line", "why"), REFUSED)
def test_parser_names_the_line_it_refuses(old: str, new: str, line: int, why: str) -> None:
    Program.parse(TEXT)
    with pytest.raises(ValueError, match=f"^line {line} of a recurrence's program") as caught:
        Program.parse(TEXT.replace(old, new))
    assert why in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "return 0.0", TEXT.replace("return t2", "return t2 t1"), TEXT.replace("state h 0.0\n", "")]
)
def test_parser_refuses_what_is_no_whole_program(text: str) -> None:
    with pytest.raises(ValueError, match="program"):
        Program.parse(text)


def test_nothing_of_the_users_text_reaches_generated_code() -> None:
    def treacherous_name(x, r, s):  # treacherous comment
        treacherous_variable = torch.tanh(x.g + r.g)
        return treacherous_variable * s.h

    recurrence = Recurrence(treacherous_name, gates=("g",), states=("h",), name="plain")
    assert "treacherous_variable" in recurrence.source("triton")  # to be read by people: with its origin
    module = codegen.module_text(recurrence.program)
    assert "treacherous" not in recurrence.program.text
    assert "treacherous" not in module
    assert "treacherous" not in codegen.source(recurrence.program, "cuda")
    assert [type(part).__name__ for part in ast.parse(module).body[1:]] == ["Import"] * 3 + ["FunctionDef"] * 2


def one_operation(name: str) -> Program:
    """A program of one operation; truth values come from comparisons with 0, clamp's bounds are constants."""
    gates = "abc"[: OPERATIONS[name].arity]
    args, before, after = [f"a_{gate}" for gate in gates], [], []
    result = "t8"
    if name in ("and", "or", "not", "where"):
        truths = args[:1] if name == "where" else args
        before = [f"t{k} = gt {arg} 0.0" for k, arg in enumerate(truths)]
        args = [*(f"t{k}" for k in range(len(truths))), *args[len(truths) :]]
    if name == "clamp":
        args[1:] = ["-0.5", "1.5"]
    if OPERATIONS[name].is_bool:
        after, result = ["t9 = where t8 1.0 0.0"], "t9"
    lines = ["program 1 one", "state h 0.0", "stage " + " ".join(f"{gate}:sum" for gate in gates), *before]
    return Program.parse("\n".join([*lines, f"t8 = {name} {' '.join(args)}", *after, f"return {result}"]))


def points(program: Program, positive: bool) -> dict[str, Tensor]:
    """Random numbers, and every combination of the places where something happens: ties, bounds, zero."""
    special = [0.5, 1.0, 1.5] if positive else [-2.0, -0.5, 0.0, 0.5, 1.5]
    corners = torch.tensor(list(itertools.product(special, repeat=len(program.gates))), dtype=torch.float64)
    anywhere = support.draw(200, len(program.gates), seed=1)
    columns = torch.cat([corners, anywhere.abs() + 0.1 if positive else anywhere]).T
    return {f"a_{gate}": column.clone().requires_grad_() for gate, column in zip(program.gates, columns, strict=True)}


def by_rules(program: Program, values: dict[str, Tensor], d: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The value, and the derivative by the program's own rules."""
    known = {name: value.detach() for name, value in values.items()} | {"s_h": torch.zeros_like(d), "d0": d}
    derivative = differentiate(program, 0)
    runner(program.stages[0].ops)(known)
    value = lookup(known, program.stages[0].outputs[0], d)
    runner(derivative.ops)(known)
    grads = dict(zip(derivative.wrt, derivative.outputs, strict=True))
    return value, {name: lookup(known, grads[name], d) for name in values}


@pytest.mark.parametrize("name", OPERATIONS)
def test_derivative_of_every_operation_is_autograds(name: str) -> None:
    program = one_operation(name)
    values = points(program, positive=name in ("log", "log1p", "sqrt", "div"))
    given = {**values, "s_h": torch.zeros(()).double()}
    runner(program.stages[0].ops)(given)
    expected = lookup(given, program.stages[0].outputs[0], next(iter(values.values())))
    d = support.draw(*expected.shape, seed=2)
    value, grads = by_rules(program, values, d)
    torch.testing.assert_close(value, expected.detach(), rtol=0, atol=0)
    if not expected.requires_grad:  # comparisons: no gradient on either side
        assert all(g.eq(0).all() for g in grads.values())
        return
    wanted = torch.autograd.grad(expected, list(values.values()), d, allow_unused=True, materialize_grads=True)
    for gate, truth in zip(values, wanted, strict=True):
        torch.testing.assert_close(grads[gate], truth, rtol=1e-13, atol=1e-13)


TINY = [0.0, 5e-324, 1e-300, 1e-30, 1e-12, 1e-8]
SPECIAL = [s * p for p in (*TINY, 0.5, 1.0, 1.5, 6.0, 1e10, 1e160, float("inf")) for s in (1, -1)] + [float("nan")]


@pytest.mark.parametrize("name", OPERATIONS)
def test_derivative_of_every_operation_is_autograds_at_infinity_and_nan(name: str) -> None:
    """In every combination: a run that diverges is seen where torch would show it."""
    program = one_operation(name)
    few = SPECIAL if len(program.gates) < 3 else SPECIAL[::3] + SPECIAL[-3:]
    if name == "div":  # d / b overflows for a denormal b; torch takes y / b, a second division
        few = [point for point in few if abs(point) != 5e-324]
    columns = torch.tensor(list(itertools.product(few, repeat=len(program.gates))), dtype=torch.float64).T
    values = {f"a_{gate}": column.clone().requires_grad_() for gate, column in zip(program.gates, columns, strict=True)}
    given = {**values, "s_h": torch.zeros(()).double()}
    runner(program.stages[0].ops)(given)
    expected = lookup(given, program.stages[0].outputs[0], columns[0])
    d = torch.full_like(expected, 1.25).detach()
    value, grads = by_rules(program, values, d)
    torch.testing.assert_close(value, expected.detach(), rtol=0, atol=0, equal_nan=True)
    if not expected.requires_grad:
        return
    wanted = torch.autograd.grad(expected, list(values.values()), d, allow_unused=True, materialize_grads=True)
    for gate, truth in zip(values, wanted, strict=True):
        torch.testing.assert_close(grads[gate], truth, rtol=1e-13, atol=1e-13, equal_nan=True)


# Bounds of the hard ones, softplus' threshold, and where exp overflows in float32 and in float64.
PLACES = [0.0, 1e-6, 0.5, 1.0, 2.0, 2.5, 3.0, 6.0, 20.0, 30.0, 100.0, 800.0]
MORE = {
    "celu": torch.nn.functional.celu,
    "logsigmoid": torch.nn.functional.logsigmoid,
    "mish": torch.nn.functional.mish,
    "hardsigmoid": torch.nn.functional.hardsigmoid,
    "hardswish": torch.nn.functional.hardswish,
    "relu6": torch.nn.functional.relu6,
    "softshrink": torch.nn.functional.softshrink,
    "hardshrink": torch.nn.functional.hardshrink,
    "tanhshrink": torch.nn.functional.tanhshrink,
    "softplus of beta 2": partial(torch.nn.functional.softplus, beta=2, threshold=10),
    "elu of 0.5": partial(torch.nn.functional.elu, alpha=0.5),
    "celu of 0.7": partial(torch.nn.functional.celu, alpha=0.7),
}
# Where torch itself takes a factor in float32: 1 / 0.7 and 1 / 6. Ours are exact.
ROUNDED_BY_TORCH = {"celu of 0.7": 3e-7, "hardsigmoid": 3e-8}


@pytest.mark.parametrize("name", [*activations.ACTIVATIONS, *MORE])
def test_activation_and_derivative_everywhere(name: str) -> None:
    """The traced program and its derivative against torch's own function, at ties and far out too."""
    function = MORE.get(name) or activations.ACTIVATIONS[name]
    program = cells.rnn(function).program
    places = PLACES[:-1] if name == "exp" else PLACES  # exp itself overflows there
    x = torch.tensor([sign * place for place in places for sign in (1, -1)], dtype=torch.float64)
    x = torch.cat([x, support.draw(200, seed=3, scale=3.0)]).requires_grad_()
    expected = function(x)
    d = support.draw(*x.shape, seed=4)
    value, grads = by_rules(program, {"a_h": x}, d)
    torch.testing.assert_close(value, expected.detach(), rtol=1e-13, atol=1e-15)
    wanted = torch.autograd.grad(expected, x, d)[0]
    torch.testing.assert_close(grads["a_h"], wanted, rtol=ROUNDED_BY_TORCH.get(name, 1e-12), atol=1e-14)


@pytest.mark.parametrize("name", [*activations.ACTIVATIONS, *MORE])
def test_activation_and_derivative_at_infinity_and_nan(name: str) -> None:
    """On dense grids, at each kink, ±0, ±tiny, ±inf and NaN."""
    function = MORE.get(name) or activations.ACTIVATIONS[name]
    program = cells.rnn(function).program
    corners = torch.tensor([*SPECIAL, *(s * p for p in PLACES for s in (1, -1))], dtype=torch.float64)
    grids = [torch.linspace(-size, size, 2001, dtype=torch.float64) for size in (0.1, 8.0, 40.0)]
    x = torch.cat([corners, *grids]).requires_grad_()
    expected = function(x)
    d = torch.full_like(expected, 1.25).detach()
    value, grads = by_rules(program, {"a_h": x}, d)
    wanted = torch.autograd.grad(expected, x, d)[0]
    torch.testing.assert_close(value, expected.detach(), rtol=1e-13, atol=1e-15, equal_nan=True)
    found, nan = grads["a_h"], x.isnan()
    rtol = ROUNDED_BY_TORCH.get(name, 1e-12)
    torch.testing.assert_close(found[~nan], wanted[~nan], rtol=rtol, atol=1e-14, equal_nan=True)
    alone = x.detach()[
        nan
    ].requires_grad_()  # there torch's vectors and its single elements differ, of hardtanh and others
    (of_one,) = torch.autograd.grad(function(alone), alone, d[nan])
    answers = {str(float(each)) for each in (*of_one, *wanted[nan])}
    shown = {str(1.25 / 6)} if name == "hardsigmoid" else set()  # torch: 0, which hides it
    assert {str(float(each)) for each in found[nan]} <= answers | shown


@pytest.mark.parametrize("name", support.RECURRENCES)
def test_derivative_of_every_stage_is_autograds(name: str) -> None:
    program = support.RECURRENCES[name].program
    words = {word for stage in program.stages for word in program.inputs(stage)}
    values = {word: support.draw(50, seed=k).requires_grad_() for k, word in enumerate(sorted(words))}
    if "s_n" in values:
        values["s_n"] = values["s_n"].detach().abs().requires_grad_()
    for number in range(len(program.stages)):
        derivative = differentiate(program, number)
        known = dict(values)
        for stage in program.stages[:number]:
            runner(stage.ops)(known)
        for word in derivative.carried:  # given, as from memory
            known[word] = known[word].detach().requires_grad_()
        given = {word: known[word] for word in derivative.wrt}
        runner(program.stages[number].ops)(known)
        last = number == len(program.stages) - 1
        handed_on = () if last else differentiate(program, number + 1).carried
        outputs = [known[str(out)] for out in (*program.stages[number].outputs, *handed_on)]
        seeds = [support.draw(50, seed=40 + k) for k in range(len(outputs))]
        wanted = torch.autograd.grad(outputs, list(given.values()), seeds, allow_unused=True, materialize_grads=True)
        found = {word: value.detach() for word, value in given.items()} | dict(
            zip(derivative.seeds, seeds, strict=True)
        )
        runner(derivative.ops)(found)
        for word, out, truth in zip(derivative.wrt, derivative.outputs, wanted, strict=True):
            torch.testing.assert_close(lookup(found, out, seeds[0]), truth, rtol=1e-12, atol=1e-12, msg=word)


def test_builder_folds_constants_and_shares_what_is_equal() -> None:
    builder = Builder()
    x = builder.value("x")
    assert (x * 1.0 + 0.0).name == "x"
    assert (x * 0.0).name == 0.0
    assert builder.emit("exp", 0.0).name == 1.0
    assert builder.emit("where", builder.emit("gt", 2.0, 1.0), x, 3.0).name == "x"
    assert (x * x).name == (x * x).name
    assert len(builder.ops) == 1


@pytest.mark.parametrize("name", OPERATIONS)
def test_what_takes_complex_numbers(name: str) -> None:
    z, yes = torch.tensor(0.3 + 0.2j, dtype=torch.complex128), torch.tensor(True)
    of_truths = {"where": (yes, z, z), "clamp": (z, -1.0, 1.0), "and": (yes, yes), "or": (yes, yes), "not": (yes,)}
    operation = OPERATIONS[name]
    expected = pytest.raises((NotImplementedError, RuntimeError)) if name in REAL_ONLY else nullcontext()
    with expected:
        operation.torch(*of_truths.get(name, (z,) * operation.arity))
