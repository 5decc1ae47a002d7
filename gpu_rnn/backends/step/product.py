# SPDX-License-Identifier: Apache-2.0
"""The recurrent products of one stage, there and back, with dropped copies of what enters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from gpu_rnn.backends import linear, onednn
from gpu_rnn.backends.normalisation import Normalised
from gpu_rnn.backends.tensors import Call, Result, chunks, state_dtype
from gpu_rnn.once import once


def masks(drop: Tensor | None, gates: slice) -> Tensor | None:
    """`StepControls.drop` of some gates as `Product.of` takes it, (N, 1 or gates, B, P)."""
    if drop is None:
        return None
    return (drop if drop.shape[2] == 1 else drop[:, :, gates]).permute(1, 2, 0, 3)


def cast(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Tensor.to, which takes as long as an addition where there is nothing to do."""
    return values if values.dtype == dtype else values.to(dtype)


class Product(ABC):
    """What enters a stage, (B, N, P), times the rows of W_hh of some of its gates: (B, N, gates, H).

    The loop on a GPU takes the products as one batched product leaves them, "batched" below: (N, B, gates, H), or with
    a mask for each gate (N, gates, B, H). Nothing is copied of weights and masks that are contiguous and of one dtype.
    """

    BY_GATE: ClassVar[bool]  # whether gates stand before rows in what is batched

    def __init__(self, weights: Tensor) -> None:
        """`weights` (N, gates, H, P)"""
        self.gates, self.hidden, self.dtype = *weights.shape[1:3], weights.dtype

    @staticmethod
    def of(weights: Tensor, drop: Tensor | None, rows: int = 0, times: int = 0) -> Product:
        """`weights` (N, gates, H, P), `drop` from `masks`; `rows` B, or 0 if the weights' values will change; `times`
        T."""
        drop = None if drop is None else drop.to(weights.dtype).contiguous()
        if drop is not None and drop.shape[1] > 1:
            return MaskByGate(weights, drop)
        return OneMask(weights, None if drop is None else drop[:, 0], rows, times)

    @abstractmethod
    def batched_shape(self, n: int, rows: int) -> tuple[int, ...]:
        """Of the products, batched, without H."""

    @abstractmethod
    def batched(self, entering: Tensor) -> Tensor:
        """(N, B, P) -> the products, batched."""

    @abstractmethod
    def batched_back(self, d_product: Tensor, out: Tensor | None = None) -> Tensor:
        """From the gradient of the products, batched, that of what entered, (N, B, P)."""

    @abstractmethod
    def from_batched(self, product: Tensor) -> Tensor:
        """Batched -> (..., B, N, gates, H), a view."""

    @abstractmethod
    def to_batched(self, product: Tensor) -> Tensor:
        """(..., B, N, gates, H) -> batched, a view."""

    @abstractmethod
    def __call__(self, entering: Tensor) -> Tensor:
        """(B, N, P) -> (B, N, gates, H)."""

    @abstractmethod
    def add_to(self, target: Tensor, entering: Tensor) -> None:
        """Adds the products of what entered to (B, N, gates·H) in place."""

    @abstractmethod
    def back(self, d_product: Tensor) -> Tensor:
        """(B, N, gates·H) -> (B, N, P)."""

    @abstractmethod
    def over_time(self, entering: Tensor) -> Tensor:
        """(T, B, N, P) -> (T, B, N, gates, H)."""

    def add_over_time(self, target: Tensor, entering: Tensor) -> None:
        """Adds the products of what entered, (T, B, N, P), to (T, B, N, gates, H) in place."""
        for part in chunks(target):
            target[part] += self.over_time(entering[part])


class OneMask(Product):
    """All gates in one product of what enters, times one mask or none."""

    BY_GATE = False

    def __init__(self, weights: Tensor, drop: Tensor | None, rows: int, times: int) -> None:
        """`drop` (N, B, P)"""
        super().__init__(weights)
        self.drop, self.rows, self.times = drop, rows, times
        self.weights = weights.flatten(1, 2)  # (N, gates·H, P)
        self.transposed = self.weights.transpose(1, 2)

    @once
    def there(self) -> onednn.Factor:
        return onednn.Factor(self.transposed, self.rows, self.times)

    @once
    def way_back(self) -> onednn.Factor:
        return onednn.Factor(self.weights, self.rows, self.times)

    def dropped(self, values: Tensor) -> Tensor:
        """(..., B, N, P) times the mask."""
        return values if self.drop is None else values * self.drop.transpose(0, 1)

    def batched_shape(self, n: int, rows: int) -> tuple[int, ...]:
        return n, rows, self.gates

    def batched(self, entering: Tensor) -> Tensor:
        left = entering if self.drop is None else entering * self.drop
        return self.there(left).unflatten(2, (self.gates, self.hidden))

    def batched_back(self, d_product: Tensor, out: Tensor | None = None) -> Tensor:
        if self.drop is not None:
            return torch.mul(self.way_back(d_product.flatten(2)), self.drop, out=out)
        if out is not None:
            return torch.bmm(d_product.flatten(2), self.weights, out=out)
        return self.way_back(d_product.flatten(2))

    def from_batched(self, product: Tensor) -> Tensor:
        return product.transpose(-3, -4)

    def to_batched(self, product: Tensor) -> Tensor:
        return product.transpose(-3, -4)

    def __call__(self, entering: Tensor) -> Tensor:
        product = self.there.by_row(self.dropped(cast(entering, self.dtype)))
        return product.view(*product.shape[:2], self.gates, self.hidden)

    def add_to(self, target: Tensor, entering: Tensor) -> None:
        left = self.dropped(cast(entering, self.dtype))
        if self.there.packed:
            target.add_(self.there.by_row(left))
        else:
            target.transpose(0, 1).baddbmm_(left.transpose(0, 1), self.transposed)

    def back(self, d_product: Tensor) -> Tensor:
        return self.dropped(self.way_back.by_row(d_product))

    def over_time(self, entering: Tensor) -> Tensor:
        left = self.dropped(entering.to(self.dtype)).flatten(0, 1)
        if self.there.packed:
            product = self.there.by_row(left)
        else:
            product = onednn.bmm(left.transpose(0, 1), self.transposed).transpose(0, 1)
        return product.unflatten(0, entering.shape[:2]).unflatten(3, (self.gates, self.hidden))

    def add_over_time(self, target: Tensor, entering: Tensor) -> None:
        steps, rows, n = entering.shape[:3]
        if onednn.takes(self.transposed, steps * rows):
            return super().add_over_time(target, entering)
        left = self.dropped(entering.to(self.dtype)).flatten(0, 1)
        target.view(steps * rows, n, self.gates * self.hidden).transpose(0, 1).baddbmm_(
            left.transpose(0, 1), self.transposed
        )
        return None


class MaskByGate(Product):
    """A product for each gate, of what enters times the gate's own mask."""

    BY_GATE = True

    def __init__(self, weights: Tensor, drop: Tensor) -> None:
        """`drop` (N, gates, B, P)"""
        super().__init__(weights)
        self.drop = drop
        self.weights = weights.flatten(0, 1)  # (N·gates, H, P)
        self.transposed = self.weights.transpose(1, 2)

    def dropped(self, entering: Tensor) -> Tensor:
        """(N, B, P) -> (N·gates, B, P)"""
        return (entering[:, None] * self.drop).flatten(0, 1)

    def batched_shape(self, n: int, rows: int) -> tuple[int, ...]:
        return n, self.gates, rows

    def batched(self, entering: Tensor) -> Tensor:
        return torch.bmm(self.dropped(entering), self.transposed).unflatten(0, (-1, self.gates))

    def batched_back(self, d_product: Tensor, out: Tensor | None = None) -> Tensor:
        d = torch.bmm(d_product.flatten(0, 1), self.weights).view_as(self.drop)
        return torch.sum(d.mul_(self.drop), 1, out=out)

    def from_batched(self, product: Tensor) -> Tensor:
        return product.movedim(-2, -4)

    def to_batched(self, product: Tensor) -> Tensor:
        return product.movedim(-4, -2)

    def __call__(self, entering: Tensor) -> Tensor:
        return self.from_batched(self.batched(cast(entering, self.dtype).transpose(0, 1)))

    def add_to(self, target: Tensor, entering: Tensor) -> None:
        batched = self.to_batched(target.view(*target.shape[:2], self.gates, self.hidden))
        left = self.dropped(cast(entering, self.dtype).transpose(0, 1))
        factors = left.split(self.gates), self.transposed.split(self.gates)
        for products, dropped, weights in zip(batched.unbind(0), *factors, strict=True):
            products.baddbmm_(dropped, weights)

    def back(self, d_product: Tensor) -> Tensor:
        d_gates = d_product.view(*d_product.shape[:2], self.gates, self.hidden)
        return self.batched_back(self.to_batched(d_gates)).transpose(0, 1)

    def over_time(self, entering: Tensor) -> Tensor:
        dropped = entering.to(self.dtype).permute(2, 0, 1, 3)[:, None] * self.drop[:, :, None]  # (N, gates, T, B, P)
        product = torch.bmm(dropped.flatten(2, 3).flatten(0, 1), self.transposed)
        return product.view(*dropped.shape[:4], product.shape[-1]).permute(2, 3, 0, 1, 4)


def normalised_products(call: Call, saved: Result) -> Normalised:
    """The recurrent products of all steps, normalised, in the dtype of states: as the forward pass kept them, or
    taken once more."""
    wide = state_dtype(saved.gates.dtype)
    if saved.kept is not None:
        return Normalised(*(both[1].to(wide).contiguous() for both in saved.kept))
    weights, drop = call.weights.w_hh.to(wide), call.controls.drop
    each = [
        Product.of(weights[:, rows], masks(drop, rows)).over_time(entering)
        for entering, rows in linear.entered_products(call, saved)
    ]
    return Normalised(*(values.contiguous() for values in call.normaliser.normalise(torch.cat(each, 3))))
