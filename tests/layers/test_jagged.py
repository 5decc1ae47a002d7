# SPDX-License-Identifier: Apache-2.0
"""Jagged nested tensors in and out: each row is what it is by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import gpu_rnn

LENGTHS = (4, 0, 7, 1)
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "LSTM": ("LSTM", {}),
    "both directions": ("GRU", {"num_layers": 2, "bidirectional": True, "batch_first": True}),
    "options": ("LSTM", {"peephole": True, "layer_norm": True, "proj_size": 2}),
    "the last step": ("RNN", {"return_sequences": False, "bidirectional": True}),
}


def draw(*lengths: int) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(length, 3, dtype=torch.float64, requires_grad=True) for length in lengths]


def jagged(rows: list[Tensor]) -> Tensor:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def leaves(states: Any) -> tuple[Tensor, ...]:
    return states if isinstance(states, tuple) else (states,)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", [LENGTHS, (3, 3)], ids=str)
def test_each_row_is_what_it_is_by_itself(kind: str, lengths: tuple[int, ...]) -> None:
    name, options = KINDS[kind]
    torch.manual_seed(0)
    layer = getattr(gpu_rnn, name)(3, 4, dtype=torch.float64, **options)
    rows, alone = draw(*lengths), draw(*lengths)
    x = jagged(rows)
    y, states = layer(x)
    loss, expected_loss = sum(state.square().sum() for state in leaves(states)), torch.zeros((), dtype=torch.float64)
    for index, row in enumerate(alone):
        if not len(row):
            assert all(not state[:, index].any() for state in leaves(states))
            continue
        expected, final = layer(row)
        torch.testing.assert_close(y[index], expected, rtol=1e-12, atol=1e-12)
        for state, own in zip(leaves(states), leaves(final), strict=True):
            torch.testing.assert_close(state[:, index], own, rtol=1e-12, atol=1e-12)
            expected_loss = expected_loss + own.square().sum()
        expected_loss = expected_loss + expected.square().sum()
    if not options.get("return_sequences", True):
        assert not y.is_nested
        loss = loss + y.square().sum()
    else:
        assert y.layout == torch.jagged and y.shape[1] == x.shape[1], "torch takes both for alike"
        loss = loss + y.values().square().sum()
    wanted = [row for row in rows if len(row)], [row for row in alone if len(row)]
    grads = torch.autograd.grad(loss, [*wanted[0], *layer.parameters()], allow_unused=True)
    others = torch.autograd.grad(expected_loss, [*wanted[1], *layer.parameters()], allow_unused=True)
    torch.testing.assert_close(grads, others, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_may_all_be_empty(kind: str) -> None:
    name, options = KINDS[kind]
    layer, rows = getattr(gpu_rnn, name)(3, 4, dtype=torch.float64, **options), draw(0, 0)
    y, states = layer(jagged(rows))
    if options.get("return_sequences", True):
        assert y.offsets().tolist() == [0, 0, 0] and y.values().shape[0] == 0
    assert not any(state.any() for state in leaves(states))


def test_states_before_and_of_every_step() -> None:
    layer, x = gpu_rnn.LSTM(3, 4, dtype=torch.float64), jagged(draw(2, 5))
    hx = tuple(torch.randn(1, 2, 4, dtype=torch.float64) for _ in "hc")
    y, states, every = layer(x, hx, return_all_states=True)
    padded, lengths = x.to_padded_tensor(0.0).transpose(0, 1), x.offsets().diff()
    expected = layer(padded, hx, lengths=lengths, return_all_states=True)
    torch.testing.assert_close((states, every), expected[1:], rtol=0, atol=0)
    torch.testing.assert_close(y.to_padded_tensor(0.0).transpose(0, 1), expected[0], rtol=0, atol=0)


def test_rows_with_holes_between_them() -> None:
    layer, whole = gpu_rnn.GRU(3, 4, dtype=torch.float64), torch.randn(3, 6, 3, dtype=torch.float64)
    starts, lengths = torch.tensor([1, 0, 2]), torch.tensor([3, 6, 1])
    narrow = torch.nested.narrow(whole, 1, starts, lengths, layout=torch.jagged)
    y, _ = layer(narrow)
    for row, start, length, found in zip(whole, starts, lengths, y.unbind(), strict=True):
        torch.testing.assert_close(found, layer(row[start : start + length])[0], rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_what_is_not_taken_is_said() -> None:
    layer, rows = gpu_rnn.GRU(3, 4, dtype=torch.float64), draw(2, 5)
    with pytest.raises(TypeError, match=r"made with layout=torch\.jagged, \(B, j, I\)"):
        layer(torch.nested.as_nested_tensor(rows))
    with pytest.raises(TypeError, match=r"a jagged input is \(B, j, I\)"):
        layer(jagged(rows).transpose(1, 2))
    with pytest.raises(ValueError, match="cannot come with a jagged input"):
        layer(jagged(rows), lengths=[1, 2])
    with pytest.raises(RuntimeError, match="hidden size"):
        layer(jagged(rows), torch.zeros(1, 3, 4, dtype=torch.float64))


@pytest.mark.skipif(
    torch.__version__ < (2, 12), reason="torch 2.11's Dynamo loses named tuples after a break: needs 2.12"
)
def test_compiled() -> None:
    """With a break where the lengths are asked for."""
    layer, x = gpu_rnn.LSTM(3, 4, dtype=torch.float64), jagged(draw(2, 5)).detach()
    torch._dynamo.reset()
    found, _ = torch.compile(layer, backend="aot_eager")(x)
    expected, _ = layer(x)
    torch.testing.assert_close(found.values(), expected.values(), rtol=1e-12, atol=1e-12)
    parameters = list(layer.parameters())
    grads = torch.autograd.grad(found.values().sum(), parameters)
    torch.testing.assert_close(grads, torch.autograd.grad(expected.values().sum(), parameters), rtol=1e-9, atol=1e-9)
