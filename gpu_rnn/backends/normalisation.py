# SPDX-License-Identifier: Apache-2.0
"""Layer normalisation over the last dimension (Ba et al., arXiv:1607.06450), without scale and shift, there and
back."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-5  # as torch.nn.LayerNorm's


class Normalised(NamedTuple):
    """Normalised values (..., H), and 1 over the deviations of those that they were, (..., 1), which `Back` wants."""

    values: Tensor
    rstd: Tensor

    def at(self, index: Any) -> Normalised:
        """A part of both, by what indexes their first dimensions."""
        return Normalised(self.values[index], self.rstd[index])

    @property
    def each(self) -> list[Normalised]:
        """Along the first dimension."""
        return [Normalised(*pair) for pair in zip(self.values.unbind(0), self.rstd.unbind(0), strict=True)]


class Normalise(Protocol):
    def __call__(self, values: Tensor, out: Normalised | None = None, /) -> Normalised: ...


def normalised(values: Tensor) -> Tensor:
    """Differentiable.

    Raises:
        TypeError: complex numbers.
    """
    if values.is_complex():
        raise TypeError(f"layer normalisation takes real numbers, not {values.dtype}")
    return F.layer_norm(values, values.shape[-1:], eps=EPSILON)


def normalise(values: Tensor, out: Normalised | None = None, /) -> Normalised:
    """Without a derivative."""
    normal, _, rstd = torch.native_layer_norm(values, values.shape[-1:], None, None, EPSILON)
    if out is None:
        return Normalised(normal, rstd)
    return Normalised(out.values.copy_(normal), out.rstd.copy_(rstd))


def centred(weights: Tensor) -> tuple[Tensor, Normalise]:
    """Weights (..., H, K) whose products have mean 0 over H, and `normalise` of such products, which is cheaper.

    A product less its mean over H is the product of the weights less theirs. In 16 bits the weights stay as they are:
    to round the differences would add an error.
    """
    if weights.dtype.itemsize < 4:
        return weights, normalise
    epsilon = weights.new_full((), EPSILON)

    def of_mean_zero(values: Tensor, out: Normalised | None = None, /) -> Normalised:
        into, rstd = out or (None, None)
        length = torch.linalg.vector_norm(values, dim=-1, keepdim=True)
        rstd = torch.addcmul(epsilon, length, length, value=1 / values.shape[-1], out=rstd).rsqrt_()
        return Normalised(torch.mul(values, rstd, out=into), rstd)

    return weights - weights.mean(-2, keepdim=True), of_mean_zero


class Back:
    """From the gradient of normalised values that of the values."""

    def __init__(self, rstd: Tensor) -> None:
        """`rstd`: as those will be that it is called with."""
        self.mean, self.rstd = torch.zeros_like(rstd), torch.ones_like(rstd)

    def __call__(self, d: Tensor, normal: Normalised, out: Tensor | None = None) -> Tensor:
        """`normal`: the normalised values"""
        which = [True, False, False]  # the values' only: scales are applied outside
        values, (mean, rstd) = normal.values, (self.mean, self.rstd)
        backward = torch.ops.aten.native_layer_norm_backward
        d_values, *_ = backward(d, values, values.shape[-1:], mean, rstd, None, None, which)
        return torch.mul(d_values, normal.rstd, out=out)
