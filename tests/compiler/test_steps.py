# SPDX-License-Identifier: Apache-2.0
"""What a step function may do, and how an error says what it may not."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import gpu_rnn
from gpu_rnn import Recurrence, TraceError
from tests.support import loops as support
from tests.support import native
from tests.support.steps import Step, cell, lines

KERNELS = [*(pytest.param(name, marks=pytest.mark.interpreter) for name in ("step", "resident")), native.SLOW_BACKEND]

ALLOWED: dict[str, tuple[Step, list[str]]] = {
    "numbers of a closure": (lambda x, r, s: 2.5 * (x.f + r.f) + 3, ["mul a_f 2.5", "add t0 3.0"]),
    "comparison": (
        lambda x, r, s: torch.where((x.f > 0) & ~(r.f < s.h), x.f, 0.0),
        ["gt x_f 0.0", "lt r_f s_h", "not t1", "and t0 t2", "where t3 x_f 0.0"],
    ),
    "truth as a number": (lambda x, r, s: (x.f > 0) * r.f, ["gt x_f 0.0", "where t0 1.0 0.0", "mul t1 r_f"]),
    "a truth value as the state": (lambda x, r, s: x.f > r.f, ["gt x_f r_f", "where t0 1.0 0.0"]),
    "another float type": (lambda x, r, s: x.f.double() * r.f.to(torch.float32), ["mul x_f r_f"]),
    "floor division": (lambda x, r, s: torch.div(x.f, 2, rounding_mode="floor"), ["div x_f 2.0", "floor t0"]),
    "powers": (lambda x, r, s: x.f**2 + r.f**-1, ["mul x_f x_f", "div 1.0 r_f", "add t0 t1"]),
    "dead code": (lambda x, r, s: (torch.exp(x.n), x.f.tanh())[1], ["tanh x_f"]),
    "the same twice": (lambda x, r, s: x.f.tanh() * x.f.tanh(), ["tanh x_f", "mul t0 t0"]),
    "a constant state": (lambda x, r, s: 1.0, []),
}


@pytest.mark.parametrize("what", ALLOWED)
def test_a_step_may_use(what: str) -> None:
    step, expected = ALLOWED[what]
    assert lines(cell(step)) == expected


def test_a_step_may_work_in_place() -> None:
    def step(x, r, s):
        f = x.f
        f += r.f
        f.mul_(2).tanh_()
        return f * x.f

    assert lines(cell(step)) == ["mul a_f 2.0", "tanh t0", "mul t1 t1"]
    assert "f:sum" in cell(step).program.text


def test_a_step_may_leave_out_parameters_or_take_them() -> None:
    assert lines(cell(lambda x, r, s, p: x.f)) == []
    assert lines(cell(lambda x, r, s, p: x.f * p.a, params=("a",))) == ["mul x_f p_a"]
    assert lines(cell(lambda x, r, s, *rest: x.f * rest[0].a, params=("a",))) == ["mul x_f p_a"]


def test_a_lambda_has_no_name_of_its_own() -> None:
    assert Recurrence(lambda x, r, s: x.f, gates=("f",)).name == "cell"


CLOSED_OVER = torch.tensor(2.0)


def branch(x, r, s):
    if x.f > 0:
        return x.n
    return r.n


def first_of_a_list(x, r, s):
    return [1.0, 2.0][x.f.int()] * r.f


# A step, the operation that its error names, and words of advice in it.
REFUSED: dict[str, tuple[Step, str, str]] = {
    "branch": (branch, "branches on a value", "use torch.where"),
    "number": (lambda x, r, s: x.f * r.f.item(), "takes a number out of a tensor", "use torch.where"),
    "index": (first_of_a_list, "takes a number out of a tensor", "use torch.where"),
    "closed-over tensor": (
        lambda x, r, s: x.f * CLOSED_OVER,
        r"closes over a tensor (CLOSED_OVER)",
        "params",
    ),
    "new tensor": (lambda x, r, s: x.f * torch.tensor([1.0, 2.0]), "closes over a tensor", "Python number"),
    "rand_like": (
        lambda x, r, s: x.f * torch.rand_like(x.f),
        "draws random numbers with aten.rand_like",
        "holds",
    ),
    "randn": (lambda x, r, s: x.f * torch.randn(()), "draws random numbers with aten.randn", "holds"),
    "bernoulli": (lambda x, r, s: torch.bernoulli(x.f), "draws random numbers with aten.bernoulli", "holds"),
    "dropout": (lambda x, r, s: F.dropout(x.f), "aten.empty", "holds arithmetic"),
    "lgamma": (lambda x, r, s: torch.lgamma(x.f), "aten.lgamma", "holds arithmetic"),
    "sum": (lambda x, r, s: x.f.sum(), "aten.sum", "holds arithmetic"),
    "softmax": (lambda x, r, s: torch.softmax(x.f, 0), "softmax", "holds arithmetic"),
    "stack": (lambda x, r, s: torch.stack([x.f, r.f])[0], "aten.", "holds arithmetic"),
    "matmul": (lambda x, r, s: x.f @ r.f, "arguments to matmul", "0D"),
    "detach": (lambda x, r, s: x.f.detach() * r.f, "aten.", "detach has no meaning"),
    "exponent": (lambda x, r, s: x.f**2.5, "aten.pow", "whole numbers from -8 to 8"),
    "power": (lambda x, r, s: x.f**r.f, "aten.pow", "constant exponent"),
    "bounds": (lambda x, r, s: torch.clamp(x.f, min=r.f), "aten.clamp", "torch.maximum"),
    "rounding": (lambda x, r, s: torch.div(x.f, 2, rounding_mode="trunc"), "aten.div", "'floor'"),
    "integers": (lambda x, r, s: x.f.long() * r.f, "torch.int64", "real numbers"),
    "complex": (lambda x, r, s: x.f * 1j, "aten.mul", "complex"),
    "no such gate": (lambda x, r, s: x.q, "has no attribute 'q'", "x_values"),
    "two values": (lambda x, r, s: (x.f, x.n), "returned 2 values for 1 states (h)", "in this order"),
    "nothing": (lambda x, r, s: None, "returned None", "one for each state"),
    "a dict": (lambda x, r, s: {"h": x.f}, "returned {'h'", "one for each state"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_error_names_the_cell_the_line_and_the_operation(what: str) -> None:
    step, operation, advice = REFUSED[what]
    with pytest.raises(TraceError) as caught:
        cell(step)
    text, (source, first) = str(caught.value), inspect.getsourcelines(step)
    assert text.startswith("cell: ")
    assert any(f"test_steps.py:{first + k} " in text for k in range(len(source)))
    assert operation in text and advice in text
    assert isinstance(caught.value, ValueError)


def test_error_names_the_line_inside_a_function_that_the_step_calls() -> None:
    def helper(value):
        return torch.lgamma(value)

    with pytest.raises(TraceError, match=rf"test_steps.py:{helper.__code__.co_firstlineno + 1} `return torch.lgamma"):
        cell(lambda x, r, s: helper(x.f) + 1)


def test_stages_hand_values_on() -> None:
    def first(x, r, s):
        return x.a * s.h, x.b + r.b, x.a

    def second(x, r, s, p, values):
        total, a = values
        return x.c + r.c + total * a

    recurrence = Recurrence([(("a", "b"), first), (("c",), second)], states=("h",), name="two")
    assert "product t0" in recurrence.program.text
    inputs = support.make(recurrence)
    expected = support.values_and_gradients(recurrence, inputs, "reference")
    support.assert_same(support.values_and_gradients(recurrence, inputs, "step"), expected, 1e-10)
    assert all(value.abs().sum() > 0 for name, value in expected.items())


def test_an_earlier_stage_hands_on_no_constant() -> None:
    stages = [(("a",), lambda x, r, s: (x.a, 1.0)), (("c",), lambda x, r, s, p, v: x.c * v[0])]
    with pytest.raises(TraceError, match=r"cell: .* hands on a constant"):
        Recurrence(stages, states=("h",))


def test_a_steps_own_option_keeps_its_default() -> None:
    def step(x: Any, r: Any, s: Any, scale: float | None = None) -> Any:
        return torch.tanh(x.f + r.f) if scale is None else s.h

    assert Recurrence(step, gates=("f",)).program.stages[0].outputs == ("t0",)


def test_stopped_gradients_are_refused() -> None:
    def without(x: Any, r: Any, s: Any) -> Any:
        with torch.no_grad():
            kept = x.f * 2
        return kept + r.f

    for step in (without, lambda x, r, s: x.f + s.h.data):
        with pytest.raises(TraceError, match="stop gradients"):
            Recurrence(step, gates=("f",), name="cell")


@pytest.mark.parametrize("backend", ["reference", "step"])
def test_a_parameter_as_a_state_and_numbers_as_truth(backend: str) -> None:
    def step(x: Any, r: Any, s: Any, p: Any) -> Any:
        return torch.where(torch.isfinite(x.f) * (x.f > 0), 1.0, 0.0) + r.f, p.a

    cell = Recurrence(step, gates=("f",), states=("h", "c"), params=("a",))
    layer = gpu_rnn.Recurrent(cell, 2, 3, backend=backend, dtype=torch.float64)
    y, (_, c) = layer(torch.randn(4, 5, 2, dtype=torch.float64))
    assert y.shape == (4, 5, 3)
    torch.testing.assert_close(c, layer.weight_unit_l0.expand(1, 5, 3))


ALONE: dict[str, Step] = {
    "as h": lambda x, r, s, p: (p.a, torch.tanh(x.f + r.f)),
    "as c": lambda x, r, s, p: (x.f * p.b + r.f, p.a),
    "as both": lambda x, r, s, p: (p.a * p.b, p.b),
    "beside a number": lambda x, r, s, p: (2.0, p.a),
}


@pytest.mark.parametrize("what", ALONE)
@pytest.mark.parametrize("backend", KERNELS)
def test_kernels_take_a_parameter_alone_as_a_state(what: str, backend: str) -> None:
    cell = Recurrence(ALONE[what], gates=("f",), states=("h", "c"), params=("a", "b"), name="cell")
    found = []
    for name in ("reference", backend):
        torch.manual_seed(0)
        layer = gpu_rnn.Recurrent(cell, 2, 3, backend=name)
        y, (_, c) = layer(torch.randn(4, 5, 2))
        (y.square().sum() + c.square().sum()).backward()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in layer.parameters()]
        found.append([y.detach(), c.detach(), *grads])
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "step", native.SLOW_BACKEND])
@pytest.mark.parametrize("function", [F.hardsigmoid, F.hardswish, F.softplus, F.elu])
def test_torchs_functions_in_a_cell_have_second_derivatives(function: Step, backend: str) -> None:
    """ATen's own hardsigmoid has none."""
    own = cell(lambda x, r, s: function(x.f + r.f) * s.h + torch.tanh(x.n + r.n), states={"h": 0.5})
    layer = gpu_rnn.Recurrent(own, 2, 3, backend=backend, dtype=torch.float64)
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: layer(x)[0], (x,))


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("state", ["h", "c"])
@pytest.mark.parametrize("loop", ["step", native.SLOW_BACKEND])
def test_a_product_of_a_state_that_nothing_else_reads(loop: str, state: str, layer_norm: bool) -> None:
    def first(x: Any, r: Any, s: Any) -> Any:
        return getattr(s, state), torch.sigmoid(x.z + r.z)

    def second(x: Any, r: Any, s: Any, p: Any, values: Any) -> Any:
        return values[0] * torch.tanh(x.n + r.n), values[0] - x.n

    cell = Recurrence([(("z",), first), (("n",), second)], states=("h", "c"))
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    found = {}
    for backend in ("reference", loop):
        torch.manual_seed(0)
        layer = gpu_rnn.Recurrent(cell, 3, 5, layer_norm=layer_norm, backend=backend, dtype=torch.float64)
        found[backend] = torch.autograd.grad(layer(x)[0].square().sum(), list(layer.parameters()))
    for ours, truth in zip(found[loop], found["reference"], strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-13)
