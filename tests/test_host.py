# SPDX-License-Identifier: Apache-2.0
"""Functions that NumPy computes in the place of torch."""

from __future__ import annotations

import pytest
import torch

from gpu_rnn.launch import host

ULPS = 4  # NumPy promises no more; found: 1.8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tanh_is_exact_for_small_arguments_too(dtype: torch.dtype) -> None:
    sizes = torch.logspace(-30, 1.2, 20_000, dtype=torch.float64).to(dtype)
    x = torch.cat([sizes, -sizes])
    exact = torch.tanh(x.double())
    error = (host.tanh(x).double() - exact).abs() / exact.abs()
    assert error.max() <= ULPS * torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_tanh_of_any_tensor(dtype: torch.dtype) -> None:
    x = torch.linspace(-3, 3, 24).to(dtype).view(2, 3, 4).requires_grad_()
    inf, nan = float("inf"), float("nan")
    special = torch.tensor([0.0, -0.0, inf, -inf, nan], dtype=dtype)
    for each in (x, x[:, 1], x.transpose(0, 2), x[0, 0, 0], x[:0], special):
        with torch.no_grad():
            torch.testing.assert_close(host.tanh(each), torch.tanh(each), equal_nan=True)
    assert host.tanh(special)[1].signbit()
