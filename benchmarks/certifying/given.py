# SPDX-License-Identifier: Apache-2.0
"""The tensors of a call with any options, as they are given; nothing of the package is used in here."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

Step = Callable[..., list[Tensor]]


@dataclass
class Given:
    """A call: sizes as in the package, time first. Weights of a layer and direction by torch's names without _l0."""

    cell: str
    x: Tensor  # (T, B, I)
    weights: list[dict[str, Tensor]]  # for each layer and direction
    states: list[Tensor]  # (L·D, B, ·)
    directions: int = 1
    mask: Tensor | None = None
    lengths: Tensor | None = None
    resets: Tensor | None = None
    reset_state: list[Tensor] | None = None
    recurrent_mask: Tensor | None = None
    zone: Tensor | None = None
    clip: float = math.inf
    rms: bool = False  # products with scales are normalised by their root mean square
    heads: int = 1  # with more each weight has them in front
    formula: tuple[Step, int] | None = None  # of a cell that is not in CELLS: its step and how many gates it has
    initial: list[float] = field(default_factory=lambda: [0.0, 0.0])

    def to(self, dtype: torch.dtype) -> Given:
        """The same values in another precision, as new leaves."""

        def cast(tensor: Tensor) -> Tensor:
            return tensor.detach().to(dtype).requires_grad_()

        return replace(
            self,
            x=cast(self.x),
            weights=[{name: cast(w) for name, w in own.items()} for own in self.weights],
            states=[cast(s) for s in self.states],
            reset_state=self.reset_state and [cast(s) for s in self.reset_state],
            recurrent_mask=None if self.recurrent_mask is None else self.recurrent_mask.to(dtype),
        )

    def length(self, row: int) -> int:
        return self.x.shape[0] if self.lengths is None else int(self.lengths[row])
