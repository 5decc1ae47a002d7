# SPDX-License-Identifier: Apache-2.0
"""Recurrences: cells as values, what a step may do, and how an error says what it may not."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import gpu_rnn
from gpu_rnn import Recurrence, activations, cells
from tests.support import loops as support
from tests.support.steps import cell


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


def never(x, r, s):
    raise AssertionError("traced before its arguments were looked at")


WRONG: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    (torch.nn.Tanh(), {}, TypeError, "as a function step(x, r, s) of scalars, not as a Tanh"),
    (torch.nn.LSTMCell(2, 2), {}, TypeError, "not as a LSTMCell; a module's weights are the layer's"),
    (never, {"gates": None}, TypeError, "name the gates"),
    ([(("f",), never)], {}, TypeError, "each names its own gates"),
    (never, {"gates": "fn"}, TypeError, "gates is a sequence of names"),
    (never, {"states": "h"}, TypeError, "states is a sequence of names"),
    (never, {"params": "p"}, TypeError, "params is a sequence of names"),
    (torch.tanh, {}, TypeError, "a step is a Python function"),
    (lambda x, r: x.f, {}, TypeError, "must take step(x, r, s), it takes (x, r)"),
    (lambda x, r, s: x.f, {"params": ("p",)}, TypeError, "must take step(x, r, s, p)"),
    (never, {"gates": ("f", "lambda")}, ValueError, "gate is a short identifier such as 'f', not 'lambda'"),
    (never, {"gates": ("f", "n; import os")}, ValueError, "gate is a short identifier"),
    (never, {"gates": ("f" * 40,)}, ValueError, "gate is a short identifier"),
    (never, {"gates": ("f", 2)}, ValueError, "gate is a short identifier"),
    (never, {"gates": ("f", "f")}, ValueError, "gates of cell are not distinct"),
    (never, {"gates": ()}, ValueError, "at least one gate"),
    ("tanh", {}, TypeError, "a step is a Python function step(x, r, s[, p]), not 'tanh'"),
    (3, {"gates": None}, TypeError, "a step is a Python function step(x, r, s[, p]), not 3"),
    (never, {"gates": 1}, TypeError, "gates is a sequence of names such as ('f', 'n'), not 1"),
    (never, {"params": None}, TypeError, "params is a sequence of names"),
    ([(None, never)], {"gates": None}, TypeError, "gates is a sequence of names"),
    (never, {"states": {"h": torch.zeros(3)}}, TypeError, "maps 'h' to the one number"),
    (never, {"states": {"h": "zero"}}, TypeError, "maps 'h' to the one number"),
    (never, {"states": ()}, ValueError, "at least one gate and one state"),
    (never, {"states": {"h h": 0.0}}, ValueError, "state is a short identifier"),
    (never, {"name": "__cell"}, ValueError, "name is a short identifier"),
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


def test_layers_refuse_a_module_for_a_recurrence() -> None:
    with pytest.raises(TypeError, match=r"a gpu_rnn.Recurrence, .* got: LSTMCell"):
        gpu_rnn.Recurrent(torch.nn.LSTMCell(2, 3), 2, 3)


def test_names_have_an_order() -> None:
    with pytest.raises(TypeError, match="not a set"):
        Recurrence(lambda x, r, s: x.f + x.n, gates={"f", "n"})  # type: ignore[arg-type]


def test_cells_are_traced_in_threads() -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda k: Recurrence(lambda x, r, s: x.f * k + r.f, gates=("f",)), range(24)))
