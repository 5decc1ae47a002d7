# SPDX-License-Identifier: Apache-2.0
"""The grammar of a program's text: what it refuses, its limits, and that whatever it reads can be run and printed."""

from __future__ import annotations

import ast
import time
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gpu_rnn
from gpu_rnn import Recurrence, TraceError, activations, cells
from gpu_rnn.backends.step.torch_operations import compiled
from gpu_rnn.compiler import codegen
from gpu_rnn.compiler.derivative import differentiate, stage_outputs
from gpu_rnn.compiler.evaluation import runner
from gpu_rnn.compiler.jacobian import jacobian
from gpu_rnn.compiler.operations import OPERATIONS
from gpu_rnn.compiler.program import LIMITS, Program
from tests.support import loops as support
from tests.support import native

KERNELS = [*(pytest.param(name, marks=pytest.mark.interpreter) for name in ("step", "resident")), native.BACKEND]

TEXT = """program 1 two
state h 0.0
state c -inf
param p
stage a:sum b:split
t0 = gt a_a 0.5
t1 = where t0 x_b r_b
product t1
stage n:sum
t2 = clamp a_n -1.0 1.0
t3 = mul t2 p_p
return t3 s_c
"""

# What stands where in TEXT, what in its place, the line that is refused, and why.
REFUSED = [
    ("program 1 two", "program 1 two\nprogram 1 two", 2, "'program' does not stand after 'program'"),
    ("program 1 two\n", "", 1, "'state' does not stand at the start"),
    ("program 1 two", "program 1", 1, "this line has version name after its first word"),
    ("state h 0.0\nstate c -inf\n", "", 2, "'param' does not stand after 'program'"),
    ("param p", "param p\nstate d 0.0", 5, "'state' does not stand after 'param'"),
    ("product t1", "product t1\nstate d 0.0", 9, "'state' does not stand after 'product'"),
    ("product t1\n", "", 8, "'stage' does not stand after 'operation'"),
    ("product t1", "product t1 t1", 8, "this line has value after its first word"),
    ("product t1", "return t1 t1", 9, "'stage' does not stand after 'return'"),
    ("stage n:sum", "stage", 9, "a stage has at least one gate"),
    ("stage n:sum\n", "", 9, "'operation' does not stand after 'product'"),
    ("return t3 s_c\n", "", 12, "the text ends before its return"),
    ("return t3 s_c\n", "return t3 s_c\n\n", 13, "'' is not the start of a line"),
    ("return t3 s_c\n", "return t3 s_c\nt4 = exp t3\n", 13, "'operation' does not stand after 'return'"),
    ("return t3 s_c", "return t3", 12, "a value for each of its 2 states"),
    ("return t3 s_c", "return t3 t0", 12, "t0 is a truth value where a real number stands"),
    ("\nstate h", "\r\nstate h", 1, "is not an identifier"),
    ("\nstate h", "\x0cstate h", 1, "this line has"),
    ("\nstate h", "\u2028state h", 1, "this line has"),
    ("program 1 two", " program 1 two", 1, "'' is not the start of a line"),
    ("t1 = where", "t1  = where", 7, "unknown operation"),
    ("t1 = where", "t1\t= where", 7, "is not the start of a line"),
    ("t2 = clamp a_n -1.0 1.0", "t2 =", 10, "unknown operation"),
    ("clamp a_n -1.0 1.0", "clamp a_n s_h 1.0", 10, "clamp's bounds are numbers"),
    ("clamp a_n -1.0 1.0", "clamp 0.5 -1.0 a_n", 10, "clamp's bounds are numbers"),
    ("mul t2 p_p", "mul 2.0 3.0", 11, "an operation takes at least one value"),
    ("mul t2 p_p", "mul t2 t0", 11, "t0 is a truth value where a real number stands"),
    ("where t0 x_b r_b", "where x_b x_b r_b", 7, "x_b is a real number where a truth value stands"),
    ("where t0 x_b r_b", "where 1.0 x_b r_b", 7, "neither a value defined above"),
    ("where t0 x_b r_b", "and t0 1.0", 7, "neither a value defined above"),
    ("state c -inf", "state c -Infinity", 3, "is not a number"),
    ("state c -inf", "state c 1_0", 3, "is not a number"),
    ("0.5", "\u0665", 6, "neither a value defined above nor a number"),
]


@pytest.mark.parametrize(("old", "new", "line", "why"), REFUSED)
def test_one_grammar_and_one_error(old: str, new: str, line: int, why: str) -> None:
    assert old in TEXT
    with pytest.raises(ValueError, match=f"^line {line} of a recurrence's program, ") as caught:
        Program.parse(TEXT.replace(old, new, 1))
    assert why in str(caught.value)


def test_the_last_newline_may_be_missing_and_numbers_are_written_anew() -> None:
    program = Program.parse(TEXT[:-1])
    assert program.text == TEXT and program == Program.parse(TEXT)
    assert Program.parse(TEXT.replace("0.5", "5e-1").replace("-1.0", "-1")).text == TEXT


def test_the_sign_of_zero_is_kept() -> None:
    texts = [TEXT.replace("clamp a_n -1.0 1.0", f"div a_n {zero}") for zero in ("0.0", "-0.0")]
    programs = [Program.parse(text) for text in texts]
    assert programs[0] != programs[1] and [program.text for program in programs] == texts
    found = []
    for program in programs:
        values = {word: torch.ones(1) for word in ("a_n", "p_p")}
        program.stages[1].run(values)
        found.append(float(values["t2"]))
    assert found == [float("inf"), -float("inf")]


VOCABULARY = [
    *OPERATIONS,
    *TEXT.split(),
    "t0",
    "t5",
    "a_i",
    "s_h",
    "0.0",
    "-0.0",
    "1e300",
    "nan",
    "inf",
    "x:sum",
    "=",
    "",
]


@st.composite
def mutated(draw: st.DrawFn) -> str:
    """A program's text with a few edits of words, lines or characters."""
    text = draw(st.sampled_from([TEXT, *(r.program.text for r in support.RECURRENCES.values())]))
    for _ in range(draw(st.integers(1, 4))):
        lines = text.split("\n")
        where = draw(st.integers(0, len(lines) - 1))
        kind = draw(st.sampled_from(["word", "word", "word", "copy", "drop", "swap", "character"]))
        if kind == "word":
            words = lines[where].split(" ")
            words[draw(st.integers(0, len(words) - 1))] = draw(st.sampled_from(VOCABULARY))
            lines[where] = " ".join(words)
        elif kind == "copy":
            lines.insert(draw(st.integers(0, len(lines))), lines[where])
        elif kind == "drop":
            del lines[where]
        elif kind == "swap":
            other = draw(st.integers(0, len(lines) - 1))
            lines[where], lines[other] = lines[other], lines[where]
        text = "\n".join(lines)
        if kind == "character":
            at = draw(st.integers(0, len(text)))
            text = text[:at] + draw(st.characters()) + text[at + draw(st.integers(0, 1)) :]
    return text


def use(program: Program) -> None:
    """Runs, differentiates and prints a program."""
    words = [word for number, stage in enumerate(program.stages) for word in program.inputs(stage)]
    values: dict[str, Any] = {word: torch.rand(3, dtype=torch.float64) for word in words}
    for number, stage in enumerate(program.stages):
        derivative, partials = differentiate(program, number), jacobian(program, number)
        found = dict(values) | {seed: torch.ones(3, dtype=torch.float64) for seed in derivative.seeds}
        runner(derivative.ops)(found)
        wanted = (*stage_outputs(program, number), *partials.results)
        compiled((*stage.ops, *partials.ops), wanted)(dict(values))
        stage.run(values)
        made = [values[op.result] for op in stage.ops]
        assert all(v.dtype in (torch.float64, torch.bool) and v.shape == (3,) for v in made)
    ast.parse(codegen.module_text(program))
    assert codegen.source(program, "cuda", backward=True)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(mutated())
def test_mutated_texts_are_read_or_refused(text: str) -> None:
    try:
        program = Program.parse(text)
    except ValueError as error:
        assert str(error).startswith("line ") and "of a recurrence's program, " in str(error)
        return
    assert Program.parse(program.text) == program and Program.parse(program.text).text == program.text
    use(program)


@settings(max_examples=50, deadline=None)
@given(st.text())
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^line \d+ of a recurrence's program, "):
        Program.parse(text)


def first(x: Any, r: Any, s: Any) -> Any:
    return torch.where(s.h > 0.1, x.a + r.a, s.h - r.a)


def second(x: Any, r: Any, s: Any, p: Any, values: Any) -> Any:
    return torch.where(s.h > 0.1, torch.tanh(x.n + r.n) * 0.5, s.h + x.n)


def two_stages() -> Recurrence:
    """Both stages ask whether h > 0.1, and the program asks once."""
    return Recurrence([(("a",), first), (("n",), lambda x, r, s, p: second(x, r, s, p, ()))], name="truth")


def test_a_truth_value_is_handed_on_as_a_number() -> None:
    program = two_stages().program
    assert program.text.count(" = gt ") == 1
    assert "t0 = v[0] != 0.0\n" in codegen.source(program, "triton")
    assert "const bool t0 = v[0] != 0.0f;" in codegen.source(program, "cuda", backward=True)


@pytest.mark.parametrize("backend", KERNELS)
def test_kernels_take_a_truth_value_of_the_stage_before(backend: str) -> None:
    found = []
    for name in ("reference", backend):
        torch.manual_seed(0)
        layer = gpu_rnn.Recurrent(two_stages(), 3, 4, backend=name)
        y = layer(torch.randn(5, 2, 3))[0]
        y.square().sum().backward()
        found.append([y.detach(), *(p.grad for p in layer.parameters())])
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)


def long(count: int, name: str = "maximum") -> str:
    lines = [f"t{k} = {name} {f't{k - 1}' if k else 'a_a'} s_h" for k in range(count)]
    return "\n".join(["program 1 long", "state h 0.0", "stage a:sum", *lines, f"return t{count - 1}", ""])


TOO_LARGE = {
    "operation": long(LIMITS["operation"] + 1),
    "state": "program 1 p\n" + "".join(f"state s{k} 0.0\n" for k in range(100)),
    "param": "program 1 p\nstate h 0.0\n" + "".join(f"param s{k}\n" for k in range(100)),
    "gate": "program 1 p\nstate h 0.0\nstage " + " ".join(f"g{k}:sum" for k in range(100)),
    "stage": "program 1 p\nstate h 0.0\n" + "".join(f"stage g{k}:sum\nproduct a_g{k}\n" for k in range(100)),
}


@pytest.mark.parametrize("kind", TOO_LARGE)
def test_texts_beyond_the_limits_are_refused(kind: str) -> None:
    with pytest.raises(ValueError, match=f"more than {LIMITS[kind]} {kind}s, the most that a recurrence may have"):
        Program.parse(TOO_LARGE[kind])


def test_steps_beyond_the_limits_are_refused() -> None:
    def step(x: Any, r: Any, s: Any) -> Any:
        value = x.a + r.a
        for _ in range(500):
            value = torch.maximum(value * 2, s.h)
        return value

    with pytest.raises(TraceError, match=r"cell: test_program_text.py:\d+ `step` has more than 448 operations"):
        Recurrence(step, gates=("a",), name="cell")


def test_the_librarys_cells_take_an_eighth_of_the_limits() -> None:
    largest = [cells.lstm(name, name, peephole=True).program for name in activations.ACTIVATIONS]
    for program in (*largest, *(r.program for r in support.RECURRENCES.values())):
        assert all(8 * count <= LIMITS[kind] or count <= 4 for kind, count in program.counts.items())


def test_the_longest_cell_trains_and_is_evaluated_with_zoneout() -> None:
    """Of the operation whose derivative is longest. It took seconds when each step looked through all others."""
    start = time.perf_counter()
    layer = gpu_rnn.Recurrent(Recurrence.from_program(long(448)), 2, 3, backend="step", zoneout=0.1)
    layer(torch.ones(2, 1, 2))[0].sum().backward()
    layer.eval()(torch.ones(2, 1, 2))
    assert time.perf_counter() - start < 20
