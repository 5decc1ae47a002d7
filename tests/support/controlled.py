# SPDX-License-Identifier: Apache-2.0
"""A small float64 layer with reproducible weights, and a mask for its calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import gpu_rnn

STEPS, BATCH, INPUT, HIDDEN = 6, 4, 3, 5
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def layer(name: str = "LSTM", **options: Any) -> gpu_rnn.LSTM:
    torch.manual_seed(0)
    return getattr(gpu_rnn, name)(INPUT, HIDDEN, dtype=torch.float64, **options)


def mask() -> Tensor:
    found = torch.rand(STEPS, BATCH, generator=torch.Generator().manual_seed(1)) > 0.4
    found[:, 0] = False  # one row counts nowhere
    return found
