# SPDX-License-Identifier: Apache-2.0
"""A run that diverges: infinity and NaN stand where torch has them, in outputs and in gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import gpu_rnn
from gpu_rnn import activations

INF, NAN = float("inf"), float("nan")
VALUES = [INF, -INF, NAN, 1e308]


def run(layer: torch.nn.Module, value: float) -> list[Tensor]:
    """y, the states and all gradients of a call whose input holds the value once."""
    with torch.no_grad():
        for k, parameter in enumerate(layer.parameters()):
            parameter.copy_(torch.rand(parameter.shape, generator=torch.Generator().manual_seed(k)) - 0.5)
    x = torch.randn(5, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    x[2, 1, 0] = value
    y, states = layer(x.requires_grad_())
    states = states if isinstance(states, tuple) else (states,)
    y.sum().backward()
    return [y.detach(), *(s.detach() for s in states), x.grad, *(p.grad for p in layer.parameters())]


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("backend", ["reference", "step", "aten"])
@pytest.mark.parametrize(
    ("name", "options"), [("RNN", {"nonlinearity": "relu"}), ("RNN", {}), ("LSTM", {}), ("GRU", {})]
)
def test_as_torch(name: str, options: dict, backend: str, value: float) -> None:
    theirs = getattr(torch.nn, name)(2, 3, dtype=torch.float64, **options)
    ours = getattr(gpu_rnn, name)(2, 3, dtype=torch.float64, backend=backend, **options)
    for found, truth in zip(run(ours, value), run(theirs, value), strict=True):
        torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("name", activations.ACTIVATIONS)
def test_step_as_a_loop_in_torch(name: str, value: float) -> None:
    """The reference differentiates the same formula by autograd."""
    layers = [gpu_rnn.RNN(2, 3, activation=name, dtype=torch.float64, backend=b) for b in ("step", "reference")]
    for found, truth in zip(*(run(layer, value) for layer in layers), strict=True):
        torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-12, equal_nan=True)
