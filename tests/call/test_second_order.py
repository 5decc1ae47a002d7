# SPDX-License-Identifier: Apache-2.0
"""Second derivatives of ATen's kernels where these have none (cuDNN), tried with the CPU's, which have them."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpu_rnn import cells
from gpu_rnn.call import run
from gpu_rnn.call.stack import Stack

STACK = Stack(recurrence=cells.lstm(), num_layers=2, bidirectional=True)


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
        run._with_second_order(STACK, x, hx, list(theirs.parameters()), None),
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
    y, states = run._with_second_order(STACK, x, hx, list(theirs.parameters()), None)
    total(y, states).backward(retain_graph=True)
    once = x.grad.clone()
    total(y, states).backward()
    torch.testing.assert_close(x.grad, 2 * once)
    assert theirs.weight_hh_l0.grad is None
    assert theirs.weight_ih_l0.grad is not None


@pytest.mark.parametrize("keep", [False, True])
def test_nothing_is_kept_beyond_the_graph(keep: bool) -> None:
    """What a call saved goes with the graph, although its outputs live on."""
    theirs = nn.LSTM(3, 4, 2, bidirectional=True, dtype=torch.float64)
    x, hx = leaves(theirs)
    saved: list[weakref.ref[Kept]] = []

    def pack(tensor: Tensor) -> Kept:
        kept = Kept(tensor)
        saved.append(weakref.ref(kept))
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        y, states = run._with_second_order(STACK, x, hx, list(theirs.parameters()), None)
    loss = total(y, states)
    loss.backward(retain_graph=keep)
    assert saved and any(each() is not None for each in saved) == keep
    if keep:
        loss.backward()
        assert all(each() is None for each in saved)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        total(y, states).backward()


class Kept:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def by_hand(
    theirs: nn.LSTM, layers: list[nn.LSTM], x: Tensor, hx: tuple[Tensor, ...]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A stack with dropout, written out."""
    final = []
    for number, layer in enumerate(layers):
        x = F.dropout(x, theirs.dropout) if number else x
        x, after = layer(x, tuple(state[2 * number : 2 * number + 2] for state in hx))
        final.append(after)
    return x, tuple(torch.cat(parts) for parts in zip(*final, strict=True))


def test_dropout_repeats_and_is_derived_twice() -> None:
    """On a GPU: layer by layer, with torch's own dropout between them."""
    theirs = nn.LSTM(3, 4, 3, bidirectional=True, dropout=0.3, dtype=torch.float64)
    layers = [nn.LSTM(size, 4, bidirectional=True, dtype=torch.float64) for size in (3, 8, 8)]
    own = list(theirs.parameters())
    for number, layer in enumerate(layers):
        for name, weight in zip(
            [n for n, _ in layer.named_parameters()], own[8 * number : 8 * number + 8], strict=True
        ):
            layer._parameters[name] = weight
        layer._flat_weights = own[8 * number : 8 * number + 8]
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    hx = tuple(torch.randn(6, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    stack = replace(STACK, num_layers=3, dropout=0.3)
    inputs = [x, *hx, *own]

    def derived(call: Any, seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        y, states = call()
        first = torch.autograd.grad(total(y, states), inputs, create_graph=True)
        return [y, *first, *torch.autograd.grad(sum(g.square().sum() for g in first), inputs)]

    def ours() -> Any:
        return run._aten_on_gpu(stack, x, hx, own, None, True)

    expected = derived(lambda: by_hand(theirs, layers, x, hx), 0)
    for _ in range(2):
        torch.testing.assert_close(derived(ours, 0), expected, rtol=1e-10, atol=1e-10)
    assert not torch.equal(derived(ours, 1)[0], expected[0])


@pytest.mark.parametrize("training", [True, False])
def test_dropout_of_packed_rows_and_without_gradients(training: bool) -> None:
    layer = nn.LSTM(3, 4, 2, bidirectional=True, dtype=torch.float64)
    x, hx = leaves(layer)
    packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 3]))
    stack = replace(STACK, dropout=1.0)  # everything: the second layer sees zeros
    given = packed.data, hx, list(layer.parameters()), packed.batch_sizes
    with torch.set_grad_enabled(training):
        y, states = run._aten_on_gpu(stack, *given, training)
        z, expected = run._aten_on_gpu(STACK, *given, training)
    assert y.requires_grad == training and y.shape == z.shape
    torch.testing.assert_close([s[:2] for s in states], [s[:2] for s in expected])
    assert not torch.allclose(y, z)


def test_an_input_that_depends_on_another_counts_once() -> None:
    """The state of a first call enters a second one with the same weights, and one tensor stands for both states."""
    theirs = nn.LSTM(3, 4, 2, bidirectional=True, dtype=torch.float64)
    weights = list(theirs.parameters())
    x, (h, _) = leaves(theirs)
    found = []
    for call in (lambda *a: run._with_second_order(STACK, *a, weights, None), theirs):
        y, states = call(x, call(x, (h, h))[1])
        found.append(torch.autograd.grad(total(y, states), [x, h, *weights], create_graph=True))
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-10)
