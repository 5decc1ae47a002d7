# SPDX-License-Identifier: Apache-2.0
"""Second derivatives of ATen's kernels where these have none (cuDNN), tried with the CPU's, which have them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gpu_rnn import cells, functional
from gpu_rnn.stack import Stack

STACK = Stack(cells.lstm(), num_layers=2, bidirectional=True)


def leaves(theirs: nn.LSTM) -> tuple[Tensor, tuple[Tensor, ...]]:
    torch.manual_seed(1)
    states = tuple(torch.randn(4, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    return torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True), states


def total(y: Tensor, states: tuple[Tensor, ...]) -> Tensor:
    return y.sin().sum() + states[0].exp().sum() + states[1].cos().sum()


def test_first_and_second_gradients() -> None:
    theirs = nn.LSTM(3, 4, 2, bidirectional=True, dtype=torch.float64)
    x, hx = leaves(theirs)
    inputs = [x, *hx, *theirs.parameters()]
    found = []
    for y, states in (
        functional._with_second_order(STACK, x, hx, list(theirs.parameters()), None),
        theirs(x, hx),
    ):
        first = torch.autograd.grad(total(y, states), inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
        found.append([*first, *second])
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-10)


def test_frozen_weights_and_two_passes_over_one_graph() -> None:
    theirs = nn.LSTM(3, 4, 2, bidirectional=True, dtype=torch.float64)
    theirs.weight_hh_l0.requires_grad_(False)
    x, hx = leaves(theirs)
    y, states = functional._with_second_order(STACK, x, hx, list(theirs.parameters()), None)
    total(y, states).backward(retain_graph=True)
    once = x.grad.clone()
    total(y, states).backward()
    torch.testing.assert_close(x.grad, 2 * once)
    assert theirs.weight_hh_l0.grad is None
    assert theirs.weight_ih_l0.grad is not None


def test_an_input_that_depends_on_another_counts_once() -> None:
    """The state of a first call enters a second one with the same weights, and one tensor stands for both states."""
    theirs = nn.LSTM(3, 4, 2, bidirectional=True, dtype=torch.float64)
    weights = list(theirs.parameters())
    x, (h, _) = leaves(theirs)
    found = []
    for call in (lambda *a: functional._with_second_order(STACK, *a, weights, None), theirs):
        y, states = call(x, call(x, (h, h))[1])
        found.append(torch.autograd.grad(total(y, states), [x, h, *weights], create_graph=True))
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-10)
