# SPDX-License-Identifier: Apache-2.0
"""Normalisation over the last dimension, without scale and shift, there and back: by mean and deviation (Ba et al.,
arXiv:1607.06450) or by the root mean square alone (Zhang and Sennrich, arXiv:1910.07467).

What computes with either takes it as a `Normaliser`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-5  # as torch.nn.LayerNorm's; of both, so that an h of 0 has gradients of one size


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


def room_for(x: Tensor, gates: Sequence[int]) -> Normalised | None:
    """For the input and the recurrent products of all steps of x (T, B, I), (2, T, B, N, G, H) with (N, G, H) `gates`.

    On a CPU they are kept: to take them once more was a tenth of both passes (AMD EPYC). In 16 bits they are not.
    """
    if not x.is_cpu or x.dtype.itemsize < 4:
        return None
    values = x.new_empty(2, *x.shape[:2], *gates)
    return Normalised(values, values.new_empty(*values.shape[:-1], 1))


class Normalise(Protocol):
    def __call__(self, values: Tensor, out: Normalised | None = None, /) -> Normalised: ...


class Backwards(Protocol):
    """From the gradient of normalised values that of the values."""

    def __call__(self, d: Tensor, normal: Normalised, out: Tensor | None = None) -> Tensor: ...


def normalised(values: Tensor, rms: bool = False) -> Tensor:
    """Differentiable to any order.

    Raises:
        TypeError: complex numbers.
    """
    if values.is_complex():
        raise TypeError(f"{'RMS' if rms else 'layer'} normalisation takes real numbers, not {values.dtype}")
    if not rms:
        return F.layer_norm(values, values.shape[-1:], eps=EPSILON)
    wide = values.float() if values.dtype.itemsize < 4 else values
    # A quotient: second derivatives in float32 were off by four times as much with a product by rsqrt.
    return (wide / (wide.square().mean(-1, keepdim=True) + EPSILON).sqrt()).to(values.dtype)


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
    return weights - weights.mean(-2, keepdim=True), by_root_mean_square


def by_root_mean_square(values: Tensor, out: Normalised | None = None, /) -> Normalised:
    """Without a derivative: what `normalise` gives of values whose mean is 0."""
    wide = torch.float32 if values.dtype.itemsize < 4 else values.dtype
    into, rstd = out or (None if wide == values.dtype else torch.empty_like(values), None)
    length = torch.linalg.vector_norm(values, dim=-1, keepdim=True, dtype=wide)
    epsilon = length.new_full((), EPSILON)
    rstd = torch.addcmul(epsilon, length, length, value=1 / values.shape[-1], out=rstd).rsqrt_()
    return Normalised(torch.mul(values, rstd, out=into), rstd)


def uncentred(weights: Tensor) -> tuple[Tensor, Normalise]:
    """Weights as they are, and what takes their products' root mean squares."""
    return weights, by_root_mean_square


class Back:
    """Through `normalise`."""

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


class BackByRootMeanSquare:
    """Through `by_root_mean_square`: d_values = rstd · (d − n · mean(d ⊙ n)), n the normalised values."""

    def __init__(self, rstd: Tensor) -> None:
        """As `Back`'s."""

    def __call__(self, d: Tensor, normal: Normalised, out: Tensor | None = None) -> Tensor:
        along = (d * normal.values).mean(-1, keepdim=True)
        return torch.mul(torch.addcmul(d, normal.values, along, value=-1), normal.rstd, out=out)


class Normaliser(NamedTuple):
    """A way to normalise, as time loops take it: values; the products of weights, which may be changed for it; back."""

    normalise: Normalise
    of_products: Callable[[Tensor], tuple[Tensor, Normalise]]
    back: Callable[[Tensor], Backwards]

    @staticmethod
    def of(rms: bool) -> Normaliser:
        return RMS if rms else LAYER


LAYER = Normaliser(normalise, centred, Back)
RMS = Normaliser(by_root_mean_square, uncentred, BackByRootMeanSquare)
