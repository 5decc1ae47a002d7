# SPDX-License-Identifier: Apache-2.0
"""Tracing beside other threads and before a fork, and what a step may not do, in words."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

import gpu_rnn
from gpu_rnn import Recurrence, TraceError, activations, cells
from gpu_rnn.compiler.program import Program
from tests.support.waiting import PATIENCE


def another_thread(function: Callable[[], Any]) -> Any:
    """What a function returns or raises there."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result(timeout=PATIENCE)


def traced_while(function: Callable[[], Any]) -> list[Any]:
    """What a function finds that another thread calls in the middle of a trace, once before and once after an
    operation."""
    found = []

    def step(x: Any, r: Any, s: Any) -> Any:
        found.append(another_thread(function))
        value = torch.sigmoid(x.f + r.f)
        found.append(another_thread(function))
        return value

    assert Recurrence(step, gates=("f",), name="cell").program.text.endswith("t0 = sigmoid a_f\nreturn t0\n")
    return found


def test_compiled_models_run_while_another_thread_traces() -> None:
    compiled = torch.compile(
        torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh()), backend="eager", fullgraph=True
    )
    x = torch.randn(4, 2)
    expected = compiled(x)
    fresh = torch.compile(lambda value: value.sin() * 2, backend="eager", fullgraph=True)

    def serve() -> bool:
        return torch.equal(compiled(x), expected) and torch.equal(fresh(x), x.sin() * 2)

    assert traced_while(serve) == [True, True]


def test_nothing_of_the_process_changes_during_a_trace() -> None:
    def state() -> list[Any]:
        python_dispatch = torch.utils._python_dispatch
        flags = [v for k, v in vars(python_dispatch).items() if k.startswith("_is_in_") and isinstance(v, bool)]
        tracing = torch.fx._symbolic_trace
        return [
            torch.fx._symbolic_trace.is_fx_tracing(),
            flags,
            torch.nn.Module.__call__,
            torch.nn.Module.__getattr__,
            {k: v for k, v in vars(tracing).items() if isinstance(v, bool)},
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
        ]

    before = state()
    assert traced_while(state) == [before, before]
    assert before[1] and before[4], "torch keeps these flags elsewhere now"


def test_many_threads_trace_at_once() -> None:
    """Also the same cell of the library, which is traced at its first use."""
    together = threading.Barrier(8)
    shared = cells.lstm.__wrapped__("softplus", "gelu", peephole=True)

    def trace(k: int) -> tuple[str, str]:
        together.wait()
        own = Recurrence(lambda x, r, s: torch.tanh(x.f * k) + r.f, gates=("f",), name="cell")
        return shared.program.text, own.program.text

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(trace, range(2, 10)))
    assert {text for text, _ in found} == {shared.program.text}
    assert [f"mul x_f {float(k)}" in text for k, (_, text) in zip(range(2, 10), found, strict=True)] == [True] * 8


def exits(child: int, seconds: float = 30) -> int | None:
    """The exit status of a process, None if it had to be killed."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def in_a_child(function: Callable[[], Any]) -> int | None:
    child = os.fork()
    if not child:
        status = 1
        try:
            function()
            status = 0
        finally:
            os._exit(status)
    return exits(child)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no os.fork on this platform")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_child_forked_while_another_thread_traces_traces_too() -> None:
    """In the middle of a new cell, and of a library's own cell's first use, whose property must hold no lock."""
    lazy, inside, go_on = cells.gru.__wrapped__("softsign"), threading.Event(), threading.Event()

    def waits(x: torch.Tensor) -> torch.Tensor:
        inside.set()
        go_on.wait(60)
        return torch.tanh(x)

    waiting = cells.rnn.__wrapped__(waits)

    def work() -> None:
        assert "gru" in lazy.program.text
        assert cells.rnn.__wrapped__("softplus").program.gates
        assert Recurrence(lambda x, r, s: x.f * 3 + r.f, gates=("f",)).program.text

    thread = threading.Thread(target=lambda: waiting.program)
    thread.start()
    try:
        assert inside.wait(30)
        assert in_a_child(work) == 0
    finally:
        go_on.set()
        thread.join(30)
    assert "tanh" in waiting.program.text


def dropout_module(p: float) -> Callable[..., Any]:
    module = torch.nn.Dropout(p)
    return lambda x, r, s: module(x.f)


def linear_module() -> Callable[..., Any]:
    scale = torch.nn.PReLU()
    return lambda x, r, s: scale(x.f + r.f)


def remembers() -> Callable[..., Any]:
    norm = torch.nn.BatchNorm1d(1)
    return lambda x, r, s: norm(x.f.view(1, 1)).view(())


TENSOR = torch.tensor(2.0)


class Straight(torch.autograd.Function):
    """A derivative of its own, in the older form and in the newer one."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, d: torch.Tensor) -> torch.Tensor:
        return d


class Through(Straight):
    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return x.sign()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass


# A step, and what its error says beside the line.
MISUSE: dict[str, tuple[Callable[..., Any], str]] = {
    "dropout": (lambda x, r, s: torch.nn.functional.dropout(x.f), "draws random numbers with aten.bernoulli"),
    "a dropout module": (dropout_module(0.5), "draws random numbers with aten.bernoulli"),
    "a module with weights": (linear_module(), "closes over a tensor (scale)"),
    "a module with state": (remembers(), "closes over a tensor (norm)"),
    "a closed-over tensor": (lambda x, r, s: x.f * TENSOR, "closes over a tensor (TENSOR)"),
    "a tensor of a number": (lambda x, r, s: x.f * torch.tensor(2.0), "a constant is a Python number"),
    "numpy": (lambda x, r, s: torch.as_tensor(np.tanh(x.f)), "use torch.where, so that every unit"),
    "numpy's arrays": (lambda x, r, s: np.array(2.0) * x.f, "torch's functions"),
    "numpy()": (lambda x, r, s: x.f.numpy() * r.f, "as NumPy and math do"),
    "tolist": (lambda x, r, s: x.f.tolist() * r.f, "as NumPy and math do"),
    "float": (lambda x, r, s: float(x.f) * r.f, "takes a number out of a tensor"),
    "an assertion": (lambda x, r, s: x.f / (x.f > 0).all().item(), "use torch.where"),
    "a gate that is none": (lambda x, r, s: x.q, "has no attribute 'q'; it has f, n"),
    "a state that is none": (lambda x, r, s: s.c, "has no attribute 'c'; it has h"),
    "by name": (lambda x, r, s: x["f"], "tuple indices must be integers"),
    "no such key": (lambda x, r, s: {"g": x.f}["f"], "'f'"),
    "a derivative of its own": (lambda x, r, s: Straight.apply(x.f), "a recurrence's follows from its arithmetic"),
    "the newer form of it": (lambda x, r, s: Through.apply(x.f), "a recurrence's follows from its arithmetic"),
    "half": (lambda x, r, s: x.f.half() * r.f, "nothing is rounded to fewer bits within a step"),
    "bfloat16": (lambda x, r, s: x.f.to(torch.bfloat16), "leave it out"),
    "a loop without end": (lambda x, r, s: sum((x.f for _ in range(100_000)), x.f), "does more than 10000 operations"),
}


@pytest.mark.parametrize("what", MISUSE)
def test_misuse_is_named_with_its_line(what: str) -> None:
    step, words = MISUSE[what]
    with pytest.raises(TraceError) as caught:
        Recurrence(step, gates=("f", "n"), name="cell")
    text = str(caught.value)
    assert text.startswith("cell: test_tracing.py:") and words in text


def test_a_long_line_is_shortened() -> None:
    with pytest.raises(TraceError) as caught:
        Recurrence(lambda x, r, s: s.c, gates=("f", "a_gate_that", "makes_the_line", "a_long_one"), name="cell")
    shown = str(caught.value).split("`")[1]
    assert shown.startswith("Recurrence(lambda x, r, s: s.c") and shown.endswith("…") and len(shown) == 100


def test_a_parameter_that_no_params_name() -> None:
    with pytest.raises(TraceError, match="has no attribute 'g'; it has none: name it in `params`"):
        Recurrence(lambda x, r, s, p: x.f * p.g, gates=("f",))


def test_a_step_may_call_a_compiled_function() -> None:
    """And Dynamo does not look into the recording, of which it would warn."""
    doubled = torch.compile(lambda value: torch.tanh(value) * 2, backend="eager")
    assert cells.rnn(doubled).program == cells.rnn(lambda value: torch.tanh(value) * 2).program


def test_an_earlier_stage_returns_something() -> None:
    with pytest.raises(TraceError, match=r"returned nothing; return what enters the next stage's product"):
        Recurrence([(("a",), lambda x, r, s: ()), (("b",), lambda x, r, s: x.b)], name="cell")


def test_stages_have_gates_and_are_pairs() -> None:
    with pytest.raises(ValueError, match="at least one stage"):
        Recurrence([])
    with pytest.raises(ValueError, match="a gate in each stage"):
        Recurrence([((), lambda x, r, s: s.h), (("f",), lambda x, r, s, p, v: x.f)], name="cell")
    with pytest.raises(TypeError, match=r"a stage is a pair \(gates, step\), not <function"):
        Recurrence([lambda x, r, s: s.h])


def test_a_value_prints_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    def step(x: Any, r: Any, s: Any) -> Any:
        print(x.f, f"{r.f}")
        print(x)
        return x.f + r.f

    assert Recurrence(step, gates=("f",), name="cell").program.text.endswith("return a_f\n")
    shown = "<a value of a step, which is recorded once, without numbers>"
    assert capsys.readouterr().out == f"{shown} {shown}\nx_values(f={shown})\n"


def lines(step: Callable[..., Any]) -> list[str]:
    program = Recurrence(step, gates=("f",), name="cell").program
    return [f"{op.name} {' '.join(map(str, op.args))}" for op in program.stages[0].ops] + [
        str(program.stages[0].outputs[0])
    ]


def test_what_is_folded_keeps_nan() -> None:
    assert lines(lambda x, r, s: x.f * 0 + r.f) == ["mul x_f 0.0", "add t0 r_f", "t1"]
    assert lines(lambda x, r, s: x.f**0 + r.f * 1) == ["add 1.0 r_f", "t0"]
    shrink = Recurrence(lambda x, r, s: torch.nn.functional.softshrink(x.f + r.f), gates=("f",)).program
    values = {"a_f": torch.tensor([float("nan"), 0.2, 2.0], dtype=torch.float64)}
    shrink.stages[0].run(values)
    found = values[str(shrink.stages[0].outputs[0])]
    torch.testing.assert_close(found, torch.nn.functional.softshrink(values["a_f"]), equal_nan=True)


def test_wider_types_and_dead_code_are_left_out() -> None:
    assert lines(lambda x, r, s: x.f.double().float() + r.f.to(torch.float32)) == ["a_f"]
    assert lines(lambda x, r, s: (torch.lgamma(x.f), torch.rand(()), r.f)[2]) == ["r_f"]
    assert lines(lambda x, r, s: torch.add(x.f, 1, out=torch.empty_like(x.f))) == ["add x_f 1.0", "t0"]


def test_programs_with_nan_are_equal_too() -> None:
    step = lambda x, r, s: torch.where(x.f > 0, x.f + r.f, float("nan"))  # noqa: E731
    first, second = (Recurrence(step, gates=("f",), name="cell").program for _ in range(2))
    assert first == second == Program.parse(first.text[:-1])


@pytest.mark.alone
def test_a_trace_takes_no_longer_than_it_did() -> None:
    """8 ms when torch's tracer did it; a twentieth of a second leaves room for a busy machine."""
    torch_functions = list(activations.ACTIVATIONS)[:8]
    cells.lstm.__wrapped__("softplus", "gelu", peephole=True).program  # noqa: B018, gathers torch's rules
    times = []
    for name in torch_functions:
        start = time.perf_counter()
        cells.lstm.__wrapped__(name).program  # noqa: B018
        times.append(time.perf_counter() - start)
    assert min(times) < 0.05


def test_layers_of_any_activation_train_in_threads() -> None:
    def run(k: int) -> float:
        layer = gpu_rnn.GRU(2, 3, activation=lambda value: torch.tanh(value) * k)
        layer(torch.ones(2, 1, 2))[0].sum().backward()
        return float(layer.weight_hh_l0.grad.sum())

    with ThreadPoolExecutor(8) as pool:
        assert all(np.isfinite(list(pool.map(run, range(1, 17)))))


FORMULAS: dict[str, Callable[[Any], Any]] = {
    "truth values add up to one": lambda a: ((a > 0) + (a > 1)) * 2.0,
    "a truth value and True": lambda a: ((a > 0) + True) * 2.0,
    "a truth value and a number": lambda a: (a > 0) + 1.5,
    "a truth value and a whole number": lambda a: ((a > 0) + 1) * 1.0,
    "a power of 1": lambda a: 1**a,
    "sinc": torch.sinc,
}


@pytest.mark.parametrize("what", FORMULAS)
def test_formulas_are_torchs_everywhere(what: str) -> None:
    """Values and gradients, at 0, infinity and NaN too."""

    def value(x: Any, r: Any, s: Any) -> Any:
        return FORMULAS[what](x.a)

    layer = gpu_rnn.Recurrent(Recurrence(value, gates=("a",), name="value"), 1, 1, bias=False, dtype=torch.float64)
    torch.nn.init.ones_(layer.weight_ih_l0)
    x = torch.tensor([-2.0, -0.5, 0.0, 0.5, 1.0, 2.5, float("inf"), float("nan")], dtype=torch.float64)
    theirs, ours = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected, found = FORMULAS[what](theirs), layer(ours.view(1, -1, 1))[0].flatten()
    torch.testing.assert_close(found, expected.double(), equal_nan=True)
    expected_grad = torch.autograd.grad(expected.sum(), theirs)[0] if expected.requires_grad else torch.zeros_like(x)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), ours)[0], expected_grad, equal_nan=True)
