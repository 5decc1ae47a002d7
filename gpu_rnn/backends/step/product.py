# SPDX-License-Identifier: Apache-2.0
"""The recurrent products of one stage, there and back, with dropped copies of what enters."""

from __future__ import annotations

import torch
from torch import Tensor

from gpu_rnn.backends import onednn
from gpu_rnn.once import once


def masks(drop: Tensor | None, gates: slice) -> Tensor | None:
    """`LayerControls.drop` of some gates as `Product` takes it, (N, 1 or gates, B, P)."""
    if drop is None:
        return None
    return (drop if drop.shape[2] == 1 else drop[:, :, gates]).permute(1, 2, 0, 3)


def cast(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Tensor.to, which takes as long as an addition where there is nothing to do."""
    return values if values.dtype == dtype else values.to(dtype)


class Product:
    """What enters a stage, (B, N, P), times the rows of W_hh of some of its gates: (B, N, gates, H).

    The products themselves lie as (N, B, gates, H), or as (N, gates, B, H) where each gate has a mask of its own: that
    is the "own layout" below. Nothing is copied of weights and masks that are contiguous and of one dtype.
    """

    def __init__(self, weights: Tensor, drop: Tensor | None, rows: int = 0, times: int = 0) -> None:
        """`weights` (N, gates, H, P), `drop` from `masks`; `rows` B, or 0 if the weights' values will change; `times`
        T."""
        self.gates, self.hidden, self.dtype = *weights.shape[1:3], weights.dtype
        self.by_gate = drop is not None and drop.shape[1] > 1
        self.drop = None if drop is None else drop.to(self.dtype).contiguous()
        if self.drop is not None and not self.by_gate:
            self.drop = self.drop[:, 0]
        self.weights = (
            weights.flatten(0, 1) if self.by_gate else weights.flatten(1, 2)
        )  # (N·gates, H, P), (N, gates·H, P)
        self.transposed = self.weights.transpose(1, 2)
        self.rows, self.times = 0 if self.by_gate else rows, times

    @once
    def there(self) -> onednn.Factor:
        return onednn.Factor(self.transposed, self.rows, self.times)

    @once
    def way_back(self) -> onednn.Factor:
        return onednn.Factor(self.weights, self.rows, self.times)

    def left(self, entering: Tensor) -> Tensor:
        """(N, B, P) -> the first factor of the batched product."""
        if self.drop is None:
            return entering
        return (entering[:, None] * self.drop).flatten(0, 1) if self.by_gate else entering * self.drop

    def own(self, entering: Tensor) -> Tensor:
        """(N, B, P) -> the products in their own layout."""
        found = self.there(self.left(entering))
        return found.unflatten(0, (-1, self.gates)) if self.by_gate else found.unflatten(2, (self.gates, self.hidden))

    def own_back(self, d_product: Tensor, out: Tensor | None = None) -> Tensor:
        """From the gradient of the products, in their own layout, that of what entered, (N, B, P)."""
        if self.drop is None:
            if out is not None:
                return torch.bmm(d_product.flatten(2), self.weights, out=out)
            return self.way_back(d_product.flatten(2))
        if not self.by_gate:
            return torch.mul(self.way_back(d_product.flatten(2)), self.drop, out=out)
        d = torch.bmm(d_product.flatten(0, 1), self.weights).view_as(self.drop)
        return torch.sum(d.mul_(self.drop), 1, out=out)

    def turned(self, product: Tensor) -> Tensor:
        """From the own layout to (..., B, N, gates, H)."""
        return product.movedim(-2, -4) if self.by_gate else product.transpose(-3, -4)

    def own_layout(self, product: Tensor) -> Tensor:
        """From (..., B, N, gates, H) to the own layout."""
        return product.movedim(-4, -2) if self.by_gate else product.transpose(-3, -4)

    def __call__(self, entering: Tensor) -> Tensor:
        entering = cast(entering, self.dtype)
        if self.by_gate:
            return self.turned(self.own(entering.transpose(0, 1)))
        found = self.there.by_row(self.dropped(entering))
        return found.view(*found.shape[:2], self.gates, self.hidden)

    def add_to(self, target: Tensor, entering: Tensor) -> None:
        """Adds the products of what entered to (B, N, gates·H) in place."""
        entering = cast(entering, self.dtype)
        if self.by_gate:
            own = self.own_layout(target.view(*target.shape[:2], self.gates, self.hidden))
            factors = self.left(entering.transpose(0, 1)).split(self.gates), self.transposed.split(self.gates)
            for products, left, weights in zip(own.unbind(0), *factors, strict=True):
                products.baddbmm_(left, weights)
        elif self.there.packed:
            target.add_(self.there.by_row(self.dropped(entering)))
        else:
            target.transpose(0, 1).baddbmm_(self.dropped(entering).transpose(0, 1), self.transposed)

    def back(self, d_product: Tensor) -> Tensor:
        """(B, N, gates·H) -> (B, N, P)."""
        if self.by_gate:
            return self.own_back(
                self.own_layout(d_product.view(*d_product.shape[:2], self.gates, self.hidden))
            ).transpose(0, 1)
        return self.dropped(self.way_back.by_row(d_product))

    def dropped(self, values: Tensor) -> Tensor:
        """(B, N, P) times the one mask, if there is one."""
        return values if self.drop is None else values * self.drop.transpose(0, 1)

    def over_time(self, entering: Tensor) -> Tensor:
        """(T, B, N, P) -> (T, B, N, gates, H)."""
        entering = entering.to(self.dtype)
        if not self.by_gate:
            rows = self.dropped(entering).flatten(0, 1)
            packed = bool(self.there.packed)
            found = (
                self.there.by_row(rows) if packed else onednn.bmm(rows.transpose(0, 1), self.transposed).transpose(0, 1)
            )
            return found.unflatten(0, entering.shape[:2]).unflatten(3, (self.gates, self.hidden))
        assert self.drop is not None
        dropped = entering.permute(2, 0, 1, 3)[:, None] * self.drop[:, :, None]  # (N, gates, T, B, P)
        found = torch.bmm(dropped.flatten(2, 3).flatten(0, 1), self.transposed)
        return found.view(*dropped.shape[:4], found.shape[-1]).permute(2, 3, 0, 1, 4)
