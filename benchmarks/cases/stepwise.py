# SPDX-License-Identifier: Apache-2.0
"""A cell that is called for each step, as a decoder does which feeds on its own output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Stepwise(nn.Module):
    """torch.nn's cell or ours over a sequence (T, B, I), in the form of a layer: its weights are the cell's."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        state, outputs = None, []
        for inputs in x.unbind():
            state = self.cell(inputs, state)
            outputs.append(state if isinstance(state, Tensor) else state[0])
        final = (state,) if isinstance(state, Tensor) else state
        return torch.stack(outputs), tuple(each[None] for each in final)
