# SPDX-License-Identifier: Apache-2.0
"""One description of a call: a stack of one layer asks dispatch the question that its layer asks."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import gpu_rnn
from gpu_rnn import cells
from gpu_rnn.backends import building
from gpu_rnn.backends.problem import Problem
from gpu_rnn.backends.step.gpu_buffers import Kind
from gpu_rnn.call.stack import Stack
from gpu_rnn.dispatch import choice
from gpu_rnn.layers.base import LayerBase

T, B, F, H = 5, 3, 4, 6


def own_step(x: Any, r: Any, s: Any) -> Any:
    return torch.tanh(x.h + r.h) + s.h


CELLS = {
    "lstm": cells.lstm(),
    "gru": cells.gru(),
    "rnn": cells.rnn(),
    "relu": cells.rnn("relu"),
    "reset_before": cells.gru(reset_after=False),
    "peephole": cells.lstm(peephole=True),
    "own": gpu_rnn.Recurrence(own_step, gates=("h",)),
}
MADE: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "both directions": {"bidirectional": True},
    "batch first": {"batch_first": True},
    "norm": {"layer_norm": True},
    "rms": {"rms_norm": True, "heads": 2},
    "zoneout": {"zoneout": 0.3},
    "drop": {"recurrent_dropout": 0.3},
    "drop per gate": {"recurrent_dropout": 0.3, "recurrent_dropout_per_gate": True},
    "double": {"dtype": torch.float64},
    "half": {"dtype": torch.bfloat16},
}
CALLED = ("nothing", "lengths", "mask", "resets", "reset_state", "return_all_states", "lengths, return_all_states")


def arguments(layer: LayerBase, x: Tensor, called: str) -> dict[str, Any]:
    """Those of a call, by name."""
    shape, rows = x.shape[:2], 2 if layer.bidirectional else 1
    states = tuple(x.new_ones(rows, B, H) for _ in layer.recurrence.states)
    every: dict[str, Any] = {
        "lengths": torch.tensor([5, 2, 0]),
        "mask": torch.ones(shape, dtype=torch.bool),
        "resets": torch.zeros(shape, dtype=torch.bool),
        "reset_state": states if len(states) > 1 else states[0],
        "return_all_states": True,
    }
    names = ("resets", "reset_state") if called == "reset_state" else called.split(", ")
    return {name: every[name] for name in names if name in every}


def questions(layer: LayerBase, *args: Any, **call: Any) -> set[Problem]:
    """The forward passes that a call asks dispatch for, while "auto" is the step loop."""
    with choice.trial("step") as asked:
        layer(*args, **call)
    return {problem for problem, _ in asked if problem.direction != "backward"}


@pytest.mark.parametrize(
    ("cell", "made"), [*product(("lstm", "reset_before"), MADE), *((cell, "plain") for cell in CELLS)]
)
def test_one_question_by_stack_and_layer(cell: str, made: str) -> None:
    layer = gpu_rnn.Recurrent(CELLS[cell], F, H, **MADE[made])
    x = torch.randn((B, T, F) if layer.batch_first else (T, B, F), dtype=layer.weight_ih_l0.dtype)
    for called, grad in product(CALLED, (True, False)):
        with torch.set_grad_enabled(grad):
            asked = questions(layer, x, **arguments(layer, x, called))
        assert len(asked) == 1, (called, grad, asked)
        assert asked.pop().direction == ("training" if grad else "inference")


def test_one_question_with_a_projection() -> None:
    assert len(questions(gpu_rnn.LSTM(F, H, proj_size=2), torch.randn(T, B, F))) == 1


def test_one_question_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        (asked,) = questions(gpu_rnn.LSTM(F, H), torch.randn(T, B, F))
    assert asked.dtype == torch.bfloat16


def test_one_question_of_packed_input_but_that_its_layer_is_padded() -> None:
    packed = torch.nn.utils.rnn.pack_sequence([torch.randn(length, F) for length in (5, 3, 2)])
    stack, layer = sorted(questions(gpu_rnn.LSTM(F, H), packed), key=lambda problem: not problem.packed)
    assert stack.packed and layer == replace(stack, packed=False)


@pytest.mark.usefixtures("one_thread")
def test_explain_asks_what_the_call_asks() -> None:
    """Where `tune` kept an answer, `explain` finds it."""
    layer, x = gpu_rnn.GRU(F, H, bias=False), torch.randn(T, B, F)
    assert {gpu_rnn.explain(layer, x).problem} == questions(layer, x)
    assert choice.described(gpu_rnn.explain(layer, x).problem, "CPU") in questions(layer, x)


@pytest.mark.parametrize("kind", [Problem, Stack])
def test_a_description_names_what_it_says(kind: Any) -> None:
    """Two dozen values in a row would be read wrong sooner or later."""
    with pytest.raises(TypeError, match="takes 1 positional argument"):
        kind(cells.lstm(), 5)


@pytest.mark.parametrize("bias", [True, False])
def test_what_is_built_beforehand_has_the_biases_of_the_layer(bias: bool) -> None:
    """Else the first launch without biases would build a kernel once more, in the middle of a call."""
    (asked,) = questions(gpu_rnn.LSTM(F, H, bias=bias, activation="relu"), torch.randn(T, B, F))
    assert Kind.of(building.example(asked).call).bias is bias


@pytest.mark.interpreter
def test_a_layer_runs_what_it_runs_compiled() -> None:
    """100 units on the resident backend, at the precision that torch has for recurrent layers."""
    torch.manual_seed(0)
    layer, x = gpu_rnn.RNN(F, 100, backend="resident"), torch.randn(2, 1, F)
    with torch.no_grad():
        expected = gpu_rnn.RNN(F, 100, backend="step")
        expected.load_state_dict(layer.state_dict())
        torch.testing.assert_close(layer(x), expected(x))
