# SPDX-License-Identifier: Apache-2.0
"""Gradients of weights that the short way in C takes itself, beside those of a library's products."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import gpu_rnn
from gpu_rnn.backends.native import launch, limits, sizes
from tests.call.test_direct import BOTH, LAYERS, a_compiler  # noqa: F401

SEVENTH = torch.arange(150).view(50, 3) % 7 == 0
LONG: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"bias": False}, {}),
    (BOTH, {"lengths": [50, 0, 17]}),
    (BOTH | {"layer_norm": True}, {"lengths": [50, 0, 17]}),
    ({"rms_norm": True, "recurrent_dropout": 0.4}, {}),
    (BOTH | {"recurrent_dropout": 0.4, "recurrent_dropout_per_gate": True}, {"resets": SEVENTH}),
    ({"proj_size": 7}, {"mask": ~SEVENTH}),
    (BOTH | {"proj_size": 7}, {"lengths": [50, 0, 17]}),
]


PROJECTED = ("LSTM", "peephole")


@pytest.mark.parametrize(
    "name, options, given",
    [(name, *each) for name in LAYERS for each in LONG if "proj_size" not in each[0] or name in PROJECTED],
    ids=lambda each: each if isinstance(each, str) else "-".join(each) or "plain",
)
def test_gradients_of_more_steps_than_are_taken_at_once(
    name: str, options: dict[str, Any], given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a library's products, and of the loop's own."""
    layer = LAYERS[name](5, 20, backend="native", dtype=torch.float64, **options)
    x = torch.randn(50, 3, 5, dtype=torch.float64, requires_grad=True)

    def found() -> list[Tensor]:
        torch.manual_seed(1)
        y, hx = layer(x, **given)
        outputs = [y, *(hx if isinstance(hx, tuple) else (hx,))]
        return torch.autograd.grad([out.sin().sum() for out in outputs], [x, *layer.parameters()])

    own = found()
    monkeypatch.setattr(limits, "OWN_GRADIENTS", 0)
    gpu_rnn.clear_caches()
    for each, other in zip(own, found(), strict=True):
        torch.testing.assert_close(each, other, rtol=1e-12, atol=1e-12)
    gpu_rnn.clear_caches()


EXTENTS = [(100, 1, 37, 41), (30, 4, 64, 48), (9, 33, 65, 97)]  # T, B, I, H


@pytest.mark.parametrize("extent", EXTENTS, ids=str)
@pytest.mark.parametrize(
    "name, options",
    [
        ("LSTM", BOTH),
        ("GRU", {"layer_norm": True}),
        ("GRU", {"recurrent_dropout": 0.4, "recurrent_dropout_per_gate": True}),
        ("RNN", {"rms_norm": True}),
        ("LSTM", {"proj_size": 23}),
    ],
    ids=lambda each: each if isinstance(each, str) else "-".join(each),
)
def test_no_result_depends_on_the_number_of_threads(
    name: str, options: dict[str, Any], extent: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what is computed in C, nor does which products are: those of a library have one thread here."""
    steps, batch, features, hidden = extent
    layer = LAYERS[name](features, hidden, backend="native", **options)
    x = torch.randn(steps, batch, features, requires_grad=True)
    lengths = [max(1, (7 * row + 3) % (steps + 1)) for row in range(batch)]
    monkeypatch.setattr(launch, "OF_A_THREAD", 1.0)

    def found(threads: int) -> list[Tensor]:
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        torch.manual_seed(1)
        y, _ = layer(x, lengths=lengths)
        return [y, *torch.autograd.grad(y.sin().sum(), [x, *layer.parameters()])]

    alone = found(1)
    for threads in (2, 3, 16):
        assert all(torch.equal(*pair) for pair in zip(found(threads), alone, strict=True)), threads


@pytest.mark.parametrize("name", LAYERS)
def test_normalised_input_products_of_a_library(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are kept apart from the rest of what is saved, of which a plain RNN has nothing."""
    monkeypatch.setattr(sizes, "ALONE", 0)
    gpu_rnn.clear_caches()
    layer = LAYERS[name](5, 6, backend="native", dtype=torch.float64, layer_norm=True)
    other = copy.deepcopy(layer)
    other.backend = "reference"
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    for each, truth in zip(
        *(torch.autograd.grad(one(x)[0].sin().sum(), [*one.parameters()]) for one in (layer, other)), strict=True
    ):
        torch.testing.assert_close(each, truth, rtol=1e-12, atol=1e-12)
    gpu_rnn.clear_caches()


def test_the_loops_own_gradients_are_accurate() -> None:
    """As many steps as there may be: sums in float32 of 64 at a time, and of these."""
    layer = gpu_rnn.LSTM(1, 16, backend="native")
    exact = gpu_rnn.LSTM(1, 16, backend="reference", dtype=torch.float64)
    exact.load_state_dict(layer.state_dict())
    x = torch.randn(1000, 2, 1)
    wrong = [
        (each.double() - other).norm() / other.norm()
        for each, other in zip(
            torch.autograd.grad(layer(x)[0].sum(), [*layer.parameters()]),
            torch.autograd.grad(exact(x.double())[0].sum(), [*exact.parameters()]),
            strict=True,
        )
    ]
    assert max(wrong) < 2e-6


def test_second_derivatives_where_y_is_silent() -> None:
    """What comes in for an output that is 0 goes nowhere, however the gradient is taken."""
    layer = gpu_rnn.LSTM(3, 4, backend="native", dtype=torch.float64)
    x = torch.randn(50, 3, 3, dtype=torch.float64, requires_grad=True)
    y = layer(x, mask=~SEVENTH)[0]
    d_y = torch.randn_like(y)
    (first,) = torch.autograd.grad(y, x, d_y, retain_graph=True)
    (again,) = torch.autograd.grad(y, x, d_y, create_graph=True)
    torch.testing.assert_close(first, again, rtol=1e-12, atol=1e-12)
