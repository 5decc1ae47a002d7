# SPDX-License-Identifier: Apache-2.0
"""What a stack on the time loops hands out and takes in: without copies, yet nobody else's memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import gpu_rnn
from gpu_rnn import Recurrence, cells
from gpu_rnn.backends import linear, reference
from gpu_rnn.backends.tensors import Weights
from tests.support import native

LOOPS = ("reference", "step", native.BACKEND)
# Its second state is never changed, and its third is the first.
ECHO = Recurrence(
    name="echo",
    gates=("a",),
    states=("h", "kept", "same"),
    step=lambda x, r, s: (h := torch.tanh(x.a + r.a), s.kept, h),
)


def memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("backend", LOOPS)
@pytest.mark.parametrize("recurrence", [cells.lstm(), cells.gru(), ECHO], ids=lambda cell: cell.name)
def test_final_states_can_be_detached_in_place_and_share_no_memory(
    recurrence: Recurrence, backend: str, directions: int, steps: int, batch: int, grad: bool, monkeypatch: Any
) -> None:
    monkeypatch.setenv("GPU_RNN_BACKEND", backend)  # asked for by name, the reference would be recorded by autograd
    layer = gpu_rnn.Recurrent(recurrence, 4, 16, bidirectional=directions == 2)
    states = tuple(torch.randn(directions, batch, 16) for _ in recurrence.states)
    x = torch.randn(steps, batch, 4)
    with torch.set_grad_enabled(grad):
        y, final = layer(x, states if len(states) > 1 else states[0])
    final = final if isinstance(final, tuple) else (final,)
    assert len({memory(tensor) for tensor in (y, x, *states, *final)}) == 2 + 2 * len(states)
    for state in final:
        assert state.shape == (directions, batch, 16) and state.is_contiguous()
        state.detach_()


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_gradients_share_no_memory(name: str) -> None:
    """Whoever clips them in place would scale what is shared twice."""
    layer = getattr(gpu_rnn, name)(4, 8, backend="step")
    layer(torch.randn(3, 2, 4))[0].sum().backward()
    assert len({memory(parameter.grad) for parameter in layer.parameters()}) == 4


@pytest.mark.parametrize("x", [torch.randn(3, 2, 5), torch.randn(3, 2, 2, 5)], ids=["shared", "each"])
@pytest.mark.parametrize("cell", [cells.lstm(), cells.gru(), cells.gru(reset_after=False)], ids=lambda cell: cell.name)
def test_biases_are_added_as_the_reference_adds_them(cell: Recurrence, x: Tensor) -> None:
    gates = len(cell.gates)
    weights = Weights(torch.randn(2, gates, 4, 5), torch.randn(2, gates, 4, 4), *torch.randn(2, 2, gates, 4))
    weights.b_hh[..., 0] = torch.inf  # times nought it would be NaN
    assert linear.project(x, weights, cell.program).equal(reference.project(x, weights, cell.program))


@pytest.mark.parametrize("size", [16, 5])
def test_both_directions_weights_are_put_together_alike_with_and_without_gradients(size: int) -> None:
    layer = gpu_rnn.GRU(size, size, bidirectional=True, backend="step")
    stack, weights = layer._stack(), layer._weights()
    recorded = stack.canonical(weights, 0)
    with torch.no_grad():
        copied = stack.canonical(weights, 0)
    for one, other in zip(recorded, copied, strict=True):
        assert one is other is None or (one.equal(other) and other.is_contiguous() and other.data_ptr() % 64 == 0)


@pytest.mark.parametrize("initial", [0.0, 0.5])
@pytest.mark.parametrize("wanted", [0, 1], ids=["y", "final state"])
def test_initial_states_stand_for_zeros_only_where_they_are(initial: float, wanted: int) -> None:
    """What has no gradient in a backward pass has one of zeros, for which initial states serve."""
    cell = Recurrence(
        name="starts", gates=("a",), states={"h": initial}, step=lambda x, r, s: torch.tanh(x.a + r.a) + 0.5 * s.h
    )
    layer, x = gpu_rnn.Recurrent(cell, 4, 8, dtype=torch.float64), torch.randn(3, 2, 4, dtype=torch.float64)
    grads = []
    for layer.backend in ("reference", "step"):
        grads.append(torch.autograd.grad(layer(x)[wanted].sum(), list(layer.parameters())))
    for expected, found in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
