# SPDX-License-Identifier: Apache-2.0
"""The recurrent products of one stage, there and back: dropped copies of what enters, and layer normalisation."""

from __future__ import annotations

import torch
from torch import Tensor

from gpu_rnn.layout import Call
from gpu_rnn.reference import NORM_EPSILON


class Product:
    """(B, N, P) -> (B, N, gates, H): what enters a stage, times the rows of W_hh of some of its gates."""

    def __init__(self, call: Call, gates: slice) -> None:
        weights, drop = call.weights.w_hh[:, gates], call.control.drop  # (N, gates, H, P)
        self.by_gate = drop is not None and drop.shape[2] > 1
        self.drop: Tensor | None = None  # (N, B, P), by gate (N, gates, B, P)
        if drop is not None:
            own = drop[:, :, gates].permute(1, 2, 0, 3) if self.by_gate else drop[:, :, 0].transpose(0, 1)
            self.drop = own.to(weights.dtype).contiguous()
        self.weights = weights.flatten(0, 1) if self.by_gate else weights.flatten(1, 2)  # (N·gates, H, P), (N, gates·H, P)
        self.transposed = self.weights.transpose(1, 2)
        self.gates, self.dtype = weights.shape[1], weights.dtype

    def left(self, entering: Tensor) -> Tensor:
        """(B, N, P) -> the first factor of the batched product."""
        entering = entering.to(self.dtype).transpose(0, 1)
        if self.drop is None:
            return entering
        return (entering[:, None] * self.drop).flatten(0, 1) if self.by_gate else entering * self.drop

    def add_to(self, target: Tensor, entering: Tensor) -> None:
        """Adds to (B, N, gates, H) in place."""
        if self.by_gate:
            target.add_(self(entering))
        else:
            target.flatten(2).transpose(0, 1).baddbmm_(self.left(entering), self.transposed)

    def __call__(self, entering: Tensor) -> Tensor:
        found = torch.bmm(self.left(entering), self.transposed)
        if self.by_gate:
            return found.unflatten(0, (-1, self.gates)).permute(2, 0, 1, 3)
        return found.unflatten(2, (self.gates, -1)).transpose(0, 1)

    def back(self, d_product: Tensor) -> Tensor:
        """The gradient of what entered, (B, N, P), from that of the product."""
        if not self.by_gate:
            d = torch.bmm(d_product.flatten(2).transpose(0, 1), self.weights)
            return (d if self.drop is None else d.mul_(self.drop)).transpose(0, 1)
        assert self.drop is not None
        d = torch.bmm(d_product.permute(1, 2, 0, 3).flatten(0, 1), self.weights)
        return d.unflatten(0, (-1, self.gates)).mul_(self.drop).sum(1).transpose(0, 1)

    def over_time(self, entering: Tensor) -> Tensor:
        """(T, B, N, P) -> (T, B, N, gates, H)."""
        steps = entering.to(self.dtype).permute(2, 0, 1, 3)  # (N, T, B, P)
        if not self.by_gate:
            steps = steps if self.drop is None else steps * self.drop[:, None]
            found = torch.bmm(steps.flatten(1, 2), self.transposed).unflatten(1, steps.shape[1:3])
            return found.unflatten(3, (self.gates, -1)).permute(1, 2, 0, 3, 4)
        assert self.drop is not None
        dropped = steps[:, None] * self.drop[:, :, None]  # (N, gates, T, B, P)
        found = torch.bmm(dropped.flatten(2, 3).flatten(0, 1), self.transposed)
        return found.view(*dropped.shape[:4], -1).permute(2, 3, 0, 1, 4)


class Normalisation:
    """Layer normalisation of a stage's products over H, gate by gate, times a scale; of one step or of many."""

    def __init__(self, scale: Tensor) -> None:
        self.scale = scale  # (N, gates, H)

    def __call__(self, product: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The normalised products, unscaled, and what `back` wants."""
        return torch.native_layer_norm(product, product.shape[-1:], None, None, NORM_EPSILON)

    def back(self, d: Tensor, product: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
        """The gradient of the products from that of the scaled, normalised ones."""
        d = d * self.scale
        shape = list(product.shape[-1:])
        found, _, _ = torch.ops.aten.native_layer_norm_backward(
            d, product, shape, mean, rstd, None, None, [True, False, False]
        )
        return found
