# SPDX-License-Identifier: Apache-2.0
"""What surrounds ATen's kernels: cuDNN's weight buffer, tried without cuDNN, and the row's reasons."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gpu_rnn
from gpu_rnn import cells
from gpu_rnn.launch import aten
from gpu_rnn.problem import Problem

GAP = 5  # elements that the stand-in for cuDNN leaves between two weights


def flatten(weights: list[Tensor], *layout: Any) -> Tensor:
    """As torch._cudnn_rnn_flatten_weight: makes the weights views of one buffer, here with gaps between them."""
    buffer = torch.zeros(sum(w.numel() + GAP for w in weights))
    start = 0
    for weight in weights:
        weight.set_(buffer[start : start + weight.numel()].view_as(weight))
        start += weight.numel() + GAP
    return buffer


def test_the_buffer_holds_what_the_weights_are_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after a change through .data, which leaves a tensor's version as it was."""
    monkeypatch.setattr(torch, "_cudnn_rnn_flatten_weight", flatten, raising=False)
    aten._cudnn_places.cache_clear()
    layer = nn.LSTM(3, 4)
    weights = list(layer.parameters())
    for change in (0.0, 1.0):
        for weight in weights:
            weight.data.add_(change)
        buffer = aten._cudnn_buffer(weights, 4, 3, (2, 4, 0, 1, False, False))
        start = 0
        for weight in weights:
            torch.testing.assert_close(buffer[start : start + weight.numel()].view_as(weight), weight.detach())
            start += weight.numel() + GAP
        assert all(weight.untyped_storage().data_ptr() != buffer.data_ptr() for weight in weights)
    aten._cudnn_places.cache_clear()


PROBLEM = Problem(cells.lstm(), 5, 2, 1, 3, 4)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"recurrence": cells.lstm("relu")}, "standard activations"),
        ({"transforms": True}, "torch.func"),
        ({"lengths": True}, "PackedSequence"),
        ({"dtype": torch.complex64}, "real"),
    ],
)
def test_reasons(change: dict[str, Any], word: str) -> None:
    assert aten.unsupported(PROBLEM) == []
    (reason,) = aten.unsupported(replace(PROBLEM, **change))
    assert word in reason


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}])
def test_cudnn_beside_torch_nn(name: str, options: dict[str, Any]) -> None:
    """First and second gradients, in training and in evaluation, with weights that change."""
    theirs = getattr(nn, name)(16, 32, **options).cuda()
    ours = getattr(gpu_rnn, name)(16, 32, **options, backend="aten").cuda().eval()
    for _ in range(2):
        ours.load_state_dict(theirs.state_dict())
        x = torch.randn(6, 4, 16, device="cuda", requires_grad=True)
        expected = torch.autograd.grad(theirs(x)[0].sin().sum(), [x, *theirs.parameters()])
        y = ours(x)[0]
        found = torch.autograd.grad(y.sin().sum(), [x, *ours.parameters()], create_graph=True)
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-3)  # tf32 products
        second = torch.autograd.grad(sum(g.square().sum() for g in found), x)[0]
        assert second.abs().max() > 0
        for weight in theirs.parameters():
            weight.data.mul_(0.5)
