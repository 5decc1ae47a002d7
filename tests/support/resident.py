# SPDX-License-Identifier: Apache-2.0
"""The resident kernel beside the float64 reference, for its tests.

Outputs are allocated full of NaN, so an element that nobody writes fails.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from gpu_rnn.recurrence import Recurrence
from tests.support import loops as support

CELLS = list(support.RECURRENCES)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 1, 1), (5, 3, 20), (4, 17, 16), (3, 5, 33), (6, 2, 9), (2, 16, 48)]  # T, B, H
TIGHT = 2e-5  # float32 against float64, relative to the largest value


@pytest.fixture(autouse=True)
def settings(uninitialised_memory_is_nan: None) -> Iterator[None]:
    """Uninitialised memory is NaN; fp32 products in full precision."""
    before = torch.backends.cudnn.rnn.fp32_precision
    torch.backends.cudnn.rnn.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.rnn.fp32_precision = before


def errors(found: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """The largest error of each tensor, relative to its largest value; what is infinite is so in both, and NaN
    nowhere."""
    result = {}
    for name, exact in truth.items():
        value = found[name].double().cpu()
        scale = max([1.0, *exact[exact.isfinite()].abs().flatten().tolist()])
        wrong = torch.where(value == exact, 0.0, (value - exact).abs().nan_to_num(nan=float("inf")))
        result[name] = wrong.max().item() / scale if exact.numel() else 0.0
    return result


def compare(recurrence: Recurrence, inputs: support.Inputs, device: str, backend: str = "resident") -> None:
    """float32 within a tight tolerance of float64; 16 bits with at most twice the error of plain PyTorch."""
    dtype = inputs.x.dtype
    truth = support.values_and_gradients(recurrence, inputs.to(torch.float64), "reference")
    found = errors(support.values_and_gradients(recurrence, inputs.on(device), backend), truth)
    if dtype == torch.float32:
        assert max(found.values()) < TIGHT, found
        return
    plain = errors(support.values_and_gradients(recurrence, inputs, "reference"), truth)
    floor = 2 * torch.finfo(dtype).eps
    assert all(found[name] <= 2 * plain[name] + floor for name in truth), (found, plain)
