# SPDX-License-Identifier: Apache-2.0
"""Recurrences: cells as values, what a step may do, and how an error says what it may not."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import gpu_rnn
from gpu_rnn import Recurrence, TraceError, activations, cells
from tests.support import loops as support

Step = Callable[..., Any]


def cell(step: Step, **options: Any) -> Recurrence:
    """A cell of gates f and n, called "cell", whatever its function is called."""
    return Recurrence(step, **({"gates": ("f", "n"), "states": ("h",), "name": "cell"} | options))


@pytest.mark.parametrize("name", cells.CELLS)
def test_cells_know_themselves_before_they_are_traced(name: str) -> None:
    recurrence = cells.CELLS[name]()
    assert recurrence.name == name
    assert recurrence.gates == recurrence.program.gates
    assert recurrence.states == recurrence.program.state_names
    assert recurrence.initial == recurrence.program.initial
    assert recurrence.params == recurrence.program.params
    assert recurrence.states[0] == "h"
    assert name in repr(recurrence)


def test_gate_orders_are_torchs() -> None:
    assert cells.lstm().gates == ("i", "f", "g", "o")
    assert cells.gru().gates == cells.gru(reset_after=False).gates == ("r", "z", "n")


@pytest.mark.parametrize("name", support.RECURRENCES)
def test_a_recurrence_is_a_value(name: str) -> None:
    recurrence = support.RECURRENCES[name]
    for twin in (
        copy.copy(recurrence),
        copy.deepcopy(recurrence),
        pickle.loads(pickle.dumps(recurrence)),
        Recurrence.from_program(recurrence.program.text),
    ):
        assert twin.program.text == recurrence.program.text
        assert twin.states == recurrence.states and twin.params == recurrence.params
        assert twin.gates == recurrence.gates and twin.stage_gates == recurrence.stage_gates
    twin = pickle.loads(pickle.dumps(recurrence))
    assert twin == recurrence and hash(twin) == hash(recurrence) and twin.aten == recurrence.aten
    others = [other for other_name, other in support.RECURRENCES.items() if other_name != name]
    assert recurrence not in others and recurrence != recurrence.program.text


def test_equality_is_of_what_is_computed() -> None:
    slopes = [support.minimal_gated_unit(slope) for slope in (2.0, 2.0, 3.0)]
    assert slopes[0] == slopes[1] != slopes[2]
    assert cells.lstm() == cells.lstm("tanh", "sigmoid") != cells.lstm("relu")
    assert cells.lstm(torch.tanh).program == cells.lstm().program
    assert cells.gru(recurrent_activation="hard_sigmoid") != cells.gru(recurrent_activation="keras2_hard_sigmoid")


def test_only_standard_cells_are_atens() -> None:
    known = {name: make().aten for name, make in cells.CELLS.items()}
    assert {name: aten for name, aten in known.items() if aten} == {"rnn": "RNN_TANH", "lstm": "LSTM", "gru": "GRU"}
    assert cells.rnn("relu").aten == "RNN_RELU"
    assert cells.rnn("softsign").aten is cells.lstm("relu").aten is cells.gru(reset_after=False).aten is None


@pytest.mark.parametrize("name", activations.ACTIVATIONS)
def test_activation_by_name_and_by_function(name: str) -> None:
    assert cells.rnn(name).program == cells.rnn(activations.ACTIVATIONS[name]).program


def test_activations_refuse_what_is_none() -> None:
    with pytest.raises(ValueError, match=r"unknown activation 'tanhh'; use one of tanh, sigmoid, .* or a function"):
        cells.lstm("tanhh")
    with pytest.raises(TypeError, match=r"a plain torch function such as torch.tanh or torch.nn.Tanh\(\), not type"):
        cells.gru(torch.nn.Tanh)
    with pytest.raises(TypeError, match=r"a plain torch function, and a PReLU has weights"):
        cells.gru(torch.nn.PReLU())
    with pytest.raises(TypeError, match="not int"):
        cells.rnn(3)
    with pytest.raises(TypeError, match="Keras's None is 'linear' here"):
        cells.rnn(None)


def lines(recurrence: Recurrence) -> list[str]:
    """The operations, without the head."""
    return [line.partition(" = ")[2] for line in recurrence.program.text.splitlines() if " = " in line]


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
    assert any(f"test_recurrence.py:{first + k} " in text for k in range(len(source)))
    assert operation in text and advice in text
    assert isinstance(caught.value, ValueError)


def test_error_names_the_line_inside_a_function_that_the_step_calls() -> None:
    def helper(value):
        return torch.lgamma(value)

    with pytest.raises(
        TraceError, match=rf"test_recurrence.py:{helper.__code__.co_firstlineno + 1} `return torch.lgamma"
    ):
        cell(lambda x, r, s: helper(x.f) + 1)


WRONG: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    (torch.nn.Tanh(), {}, TypeError, "as a function step(x, r, s) of scalars, not as a Tanh"),
    (torch.nn.LSTMCell(2, 2), {}, TypeError, "not as a LSTMCell; a module's weights are the layer's"),
    (branch, {"gates": None}, TypeError, "name the gates"),
    ([(("f",), branch)], {}, TypeError, "each names its own gates"),
    (branch, {"gates": "fn"}, TypeError, "gates is a sequence of names"),
    (branch, {"states": "h"}, TypeError, "states is a sequence of names"),
    (branch, {"params": "p"}, TypeError, "params is a sequence of names"),
    (torch.tanh, {}, TypeError, "a step is a Python function"),
    (lambda x, r: x.f, {}, TypeError, "must take step(x, r, s), it takes (x, r)"),
    (lambda x, r, s: x.f, {"params": ("p",)}, TypeError, "must take step(x, r, s, p)"),
    (branch, {"gates": ("f", "lambda")}, ValueError, "gate is a short identifier such as 'f', not 'lambda'"),
    (branch, {"gates": ("f", "n; import os")}, ValueError, "gate is a short identifier"),
    (branch, {"gates": ("f" * 40,)}, ValueError, "gate is a short identifier"),
    (branch, {"gates": ("f", 2)}, ValueError, "gate is a short identifier"),
    (branch, {"gates": ("f", "f")}, ValueError, "gates of cell are not distinct"),
    (branch, {"gates": ()}, ValueError, "at least one gate"),
    ("tanh", {}, TypeError, "a step is a Python function step(x, r, s[, p]), not 'tanh'"),
    (3, {"gates": None}, TypeError, "a step is a Python function step(x, r, s[, p]), not 3"),
    (branch, {"gates": 1}, TypeError, "gates is a sequence of names such as ('f', 'n'), not 1"),
    (branch, {"params": None}, TypeError, "params is a sequence of names"),
    ([(None, branch)], {"gates": None}, TypeError, "gates is a sequence of names"),
    (branch, {"states": {"h": torch.zeros(3)}}, TypeError, "maps 'h' to the one number"),
    (branch, {"states": {"h": "zero"}}, TypeError, "maps 'h' to the one number"),
    (branch, {"states": ()}, ValueError, "at least one gate and one state"),
    (branch, {"states": {"h h": 0.0}}, ValueError, "state is a short identifier"),
    (branch, {"name": "__cell"}, ValueError, "name is a short identifier"),
]


@pytest.mark.parametrize(("step", "options", "kind", "message"), WRONG)
def test_wrong_arguments(step: Any, options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as caught:
        cell(step, **options)
    assert message in str(caught.value)


def in_default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


CONTEXTS: dict[str, Callable[[], Any]] = {
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "a device": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "fake tensors": FakeTensorMode,
    "forward mode": torch.autograd.forward_ad.dual_level,
    "default dtype": lambda: contextmanager(in_default_dtype)(torch.float16),
}
TRANSFORMS: dict[str, Callable[[Callable[[torch.Tensor], torch.Tensor]], Any]] = {
    "grad": torch.func.grad,
    "vmap": lambda f: lambda x: torch.vmap(f)(x[None]),
    "jvp": lambda f: lambda x: torch.func.jvp(f, (x,), (x,)),
    "hessian": torch.func.hessian,
    "functionalize": torch.func.functionalize,
    "make_fx": make_fx,
}


def untraced() -> Recurrence:
    """A cell of the library, as it is before its first call."""
    return cells.lstm.__wrapped__("softplus", "gelu", peephole=True)


@pytest.mark.parametrize("name", CONTEXTS)
def test_the_first_call_may_come_anywhere(name: str) -> None:
    recurrence = untraced()
    with CONTEXTS[name]():
        found = recurrence.program
    assert found == untraced().program


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is:DeprecationWarning")  # torch's own, in forward mode
@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_first_call_may_come_inside_a_transform(name: str) -> None:
    recurrence, texts = untraced(), []

    def function(x: torch.Tensor) -> torch.Tensor:
        texts.append(recurrence.program.text)
        return x.sin()

    TRANSFORMS[name](function)(torch.tensor(1.0))
    assert set(texts) == {untraced().program.text}


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


def test_layers_refuse_a_module_for_a_recurrence() -> None:
    with pytest.raises(TypeError, match=r"a gpu_rnn.Recurrence, .* got: LSTMCell"):
        gpu_rnn.Recurrent(torch.nn.LSTMCell(2, 3), 2, 3)


def test_a_steps_own_option_keeps_its_default() -> None:
    def step(x: Any, r: Any, s: Any, scale: float | None = None) -> Any:
        return torch.tanh(x.f + r.f) if scale is None else s.h

    assert Recurrence(step, gates=("f",)).program.stages[0].outputs == ("t0",)


def test_names_have_an_order() -> None:
    with pytest.raises(TypeError, match="not a set"):
        Recurrence(lambda x, r, s: x.f + x.n, gates={"f", "n"})  # type: ignore[arg-type]


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


@pytest.mark.interpreter
@pytest.mark.parametrize("what", ALONE)
@pytest.mark.parametrize("backend", ["step", "resident"])
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


@pytest.mark.parametrize("backend", ["reference", "step"])
@pytest.mark.parametrize("function", [F.hardsigmoid, F.hardswish, F.softplus, F.elu])
def test_torchs_functions_in_a_cell_have_second_derivatives(function: Step, backend: str) -> None:
    """ATen's own hardsigmoid has none."""
    own = cell(lambda x, r, s: function(x.f + r.f) * s.h + torch.tanh(x.n + r.n), states={"h": 0.5})
    layer = gpu_rnn.Recurrent(own, 2, 3, backend=backend, dtype=torch.float64)
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: layer(x)[0], (x,))


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("state", ["h", "c"])
def test_a_product_of_a_state_that_nothing_else_reads(state: str, layer_norm: bool) -> None:
    def first(x: Any, r: Any, s: Any) -> Any:
        return getattr(s, state), torch.sigmoid(x.z + r.z)

    def second(x: Any, r: Any, s: Any, p: Any, values: Any) -> Any:
        return values[0] * torch.tanh(x.n + r.n), values[0] - x.n

    cell = Recurrence([(("z",), first), (("n",), second)], states=("h", "c"))
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    found = {}
    for backend in ("reference", "step"):
        torch.manual_seed(0)
        layer = gpu_rnn.Recurrent(cell, 3, 5, layer_norm=layer_norm, backend=backend, dtype=torch.float64)
        found[backend] = torch.autograd.grad(layer(x)[0].square().sum(), list(layer.parameters()))
    for ours, truth in zip(found["step"], found["reference"], strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-13)


def test_cells_are_traced_in_threads() -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda k: Recurrence(lambda x, r, s: x.f * k + r.f, gates=("f",)), range(24)))
