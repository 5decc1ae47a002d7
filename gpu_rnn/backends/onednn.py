# SPDX-License-Identifier: Apache-2.0
"""Products of fp32 matrices on a CPU by oneDNN, which torch's own recurrent layers use, where torch would ask MKL.

On an AMD EPYC (one core; 3200 rows, 64 inputs, 128 units) oneDNN took half of MKL's time for the products over all
steps, and two thirds of it for a step's, 32 rows, with its weights in oneDNN's own order. The operation is the one that
torch.compile puts in the place of nn.Linear; it has no derivative. Whatever it does not take, torch does.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SMALL = 1 << 23  # multiplications; below, MKL takes less (an AMD EPYC with AVX-512, one thread)
# Uses of a factor; for fewer its order costs more than it gains. There, both passes of an LSTM of 128 units and 32 rows
# took a ninth less without over 10 steps, a twenty-fifth over 60, the same over 100.
MANY = 80


def _operation(name: str) -> Any:
    """None where a build of torch has none: it is not a public one."""
    packet = getattr(torch.ops.mkldnn, name, None) if torch.backends.mkldnn.is_available() else None
    return None if packet is None else packet.default


_linear, _reordered = _operation("_linear_pointwise"), _operation("_reorder_linear_weight")


def takes(b: Tensor, rows: int) -> bool:
    """Whether products of (N, rows, K) and b (N, K, X) go to oneDNN, one of N after the other."""
    return (
        b.dtype == torch.float32
        and b.is_cpu
        and rows * b.shape[1] * b.shape[2] >= SMALL
        and _linear is not None
        and _reordered is not None
        and bool(torch.backends.mkldnn.enabled)
        and not (torch.is_grad_enabled() and b.requires_grad)
    )


def _dense(values: Tensor) -> Tensor:
    """A matrix without gaps: for others oneDNN has but a plain loop, fifty times slower."""
    return values.contiguous() if values.stride(1) == 1 else values.T.contiguous().T


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """(M, K) times (K, X). oneDNN wants the rows of its first factor contiguous: if one is to be copied, the
    smaller."""
    if a.stride(1) != 1 and a.numel() >= b.numel():
        return _linear(b.T.contiguous(), _dense(a), None, "none", [], "").T.contiguous()
    return _linear(a.contiguous(), _dense(b).T, None, "none", [], "")


def bmm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """torch.bmm of factors without derivatives."""
    if not takes(b, a.shape[1]):
        return torch.bmm(a, b) if out is None else torch.bmm(a, b, out=out)
    products = [_matmul(*pair) for pair in zip(a, b, strict=True)]
    if out is not None:
        return torch.stack(products, out=out)
    return products[0][None] if len(products) == 1 else torch.stack(products)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch.nn.functional.linear of x (T, B, I) without a derivative."""
    if not takes(weight.T[None], x.shape[0] * x.shape[1]):
        return F.linear(x, weight, bias)
    return _linear(x, _dense(weight), bias, "none", [], "")


class Factor:
    """The second factor, (N, K, X), of many products: kept in oneDNN's order where it stays as it is and is used
    often."""

    def __init__(self, values: Tensor, rows: int, times: int = MANY) -> None:
        """`rows` of each first factor, or 0 for values that will change; `times` it is used."""
        self.values = values
        self.packed: list[Tensor] = []
        if rows and takes(values, rows):
            self.packed = [_dense(one.T) for one in values]
        if times >= MANY:
            self.packed = [_reordered(one, rows) for one in self.packed]

    def __call__(self, a: Tensor) -> Tensor:
        """torch.bmm(a, self.values)"""
        if len(self.packed) == 1:
            return _linear(a[0], self.packed[0], None, "none", [], "")[None]
        if self.packed:
            pairs = zip(a, self.packed, strict=True)
            return torch.stack([_linear(one, packed, None, "none", [], "") for one, packed in pairs])
        return torch.bmm(a, self.values)

    def by_row(self, a: Tensor) -> Tensor:
        """The same with what is multiplied before the recurrences, (B, N, K) -> (B, N, X)."""
        if len(self.packed) == 1:
            return _linear(a, self.packed[0], None, "none", [], "")
        return self(a.transpose(0, 1)).transpose(0, 1)
