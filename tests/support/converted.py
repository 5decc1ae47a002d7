# SPDX-License-Identifier: Apache-2.0
"""Layers whose weights are converted, and their inputs."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

import gpu_rnn

INPUT, HIDDEN, STEPS, BATCH = 3, 4, 5, 2
TOLERANCE = {"rtol": 1e-12, "atol": 1e-12}
LAYERS = {
    "lstm": (gpu_rnn.LSTM, {}),
    "gru": (gpu_rnn.GRU, {}),
    "gru_reset_before": (gpu_rnn.GRU, {"reset_after": False}),
    "rnn": (gpu_rnn.RNN, {}),
}
GRID = list(itertools.product(LAYERS, (False, True), (False, True), (1, 2)))


def make(cell: str, bidirectional: bool = False, bias: bool = True, num_layers: int = 1, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    kind, own = LAYERS[cell]
    sizes = {"bidirectional": bidirectional, "bias": bias, "num_layers": num_layers, "dtype": torch.float64}
    return kind(INPUT, HIDDEN, **sizes, **own, **options)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)
