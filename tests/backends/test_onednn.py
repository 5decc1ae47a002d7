# SPDX-License-Identifier: Apache-2.0
"""oneDNN's products are torch's, in every layout of the factors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gpu_rnn import cells, functional
from gpu_rnn.backends import onednn

pytestmark = pytest.mark.skipif(onednn._linear is None, reason="this build of torch has no oneDNN")


@pytest.fixture(autouse=True)
def all_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "SMALL", 1)


def layouts(n: int, rows: int, columns: int) -> list[Tensor]:
    wide = torch.randn(n, rows, columns + 3)
    return [torch.randn(n, rows, columns), torch.randn(n, columns, rows).transpose(1, 2), wide[:, :, :columns]]


@pytest.mark.parametrize("n", [1, 2])
def test_products(n: int) -> None:
    for a in layouts(n, 7, 5):
        for b in layouts(n, 5, 9):
            assert onednn.takes(b, 7)
            torch.testing.assert_close(onednn.bmm(a, b), torch.bmm(a, b))
            for times in (1, onednn.MANY):
                torch.testing.assert_close(onednn.Factor(b, 7, times)(a), torch.bmm(a, b))


def test_linear() -> None:
    for weight in layouts(1, 6, 4):
        x, bias = torch.randn(3, 2, 4), torch.randn(6)
        expected = torch.nn.functional.linear(x, weight[0], bias)
        torch.testing.assert_close(onednn.linear(x, weight[0], bias), expected)


def test_a_factor_that_changes_is_read_anew() -> None:
    values = torch.randn(1, 5, 9)
    factor, a = onednn.Factor(values, 0), torch.randn(1, 7, 5)
    values.zero_()
    assert not factor(a).any()


@pytest.mark.parametrize("options", [{}, {"norm": True}, {"mask": True}, {"recurrent_mask": True}])
def test_the_step_loop(options: dict[str, bool]) -> None:
    x = torch.randn(6, 4, 5, requires_grad=True)
    weights = list(torch.nn.LSTM(5, 8).parameters())
    weights += [torch.rand(32, requires_grad=True) for _ in range(2 * ("norm" in options))]
    given = {
        "mask": torch.rand(6, 4) < 0.8,
        "recurrent_mask": torch.rand(1, 4, 1, 8),
        "norm": True,
    }

    def run(backend: str) -> tuple[Tensor, ...]:
        y = functional.rnn(x, None, weights, cells.lstm(), backend=backend, **{name: given[name] for name in options})[
            0
        ]
        return y, *torch.autograd.grad(y.square().sum(), [x, *weights])

    for found, expected in zip(run("step"), run("reference"), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
