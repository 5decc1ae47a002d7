# SPDX-License-Identifier: Apache-2.0
"""Layer normalisation over the last dimension (Ba et al., arXiv:1607.06450), without scale and shift, there and back."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-5  # as torch.nn.LayerNorm's

WithStatistics = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


def normalised(values: Tensor) -> Tensor:
    """Differentiable."""
    return F.layer_norm(values, values.shape[-1:], eps=EPSILON)


def with_statistics(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The normalised values, and the means and deviations that `back` wants."""
    return torch.native_layer_norm(values, values.shape[-1:], None, None, EPSILON)


def centred(weights: Tensor) -> tuple[Tensor, WithStatistics]:
    """Weights (..., H, K) whose products have mean 0 over H, and `with_statistics` of such products, which is cheaper.

    A product less its mean over H is the product of the weights less theirs. In 16 bits the weights stay as they are:
    to round the differences would add an error.
    """
    if weights.dtype.itemsize < 4:
        return weights, with_statistics
    return weights - weights.mean(-2, keepdim=True), _of_mean_zero


def _of_mean_zero(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    length = torch.linalg.vector_norm(values, dim=-1, keepdim=True)
    rstd = torch.addcmul(length.new_full((), EPSILON), length, length, value=1 / values.shape[-1]).rsqrt_()
    return values * rstd, torch.zeros_like(rstd), rstd


def back(d: Tensor, values: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """The gradient of the values from that of the normalised ones."""
    which = [True, False, False]  # the values' only: scales are applied outside
    return torch.ops.aten.native_layer_norm_backward(d, values, values.shape[-1:], mean, rstd, None, None, which)[0]
