# SPDX-License-Identifier: Apache-2.0
"""Heads: a layer whose W_hh is block-diagonal runs as recurrences side by side, along N.

A direction of k heads is k recurrences of H/k units each. They read one x, and what they give stands in a row, so a
user's tensors have D directions with all H units, and a loop's have N = D·k recurrences with H/k.
"""

from __future__ import annotations

from torch import Tensor


def apart(values: Tensor, heads: int) -> Tensor:
    """(..., D, H) -> (..., N, H/k): a view, but of two directions that lie apart."""
    return values if heads == 1 else values.unflatten(-1, (heads, -1)).flatten(-3, -2)


def together(values: Tensor, heads: int) -> Tensor:
    """(..., N, H/k) -> (..., D, H), the inverse."""
    return values if heads == 1 else values.unflatten(-2, (-1, heads)).flatten(-2)


def masks_apart(values: Tensor, heads: int) -> Tensor:
    """(B, D, 1 or G, P) -> (B, N, 1 or G, P/k)."""
    return values if heads == 1 else values.unflatten(-1, (heads, -1)).movedim(-2, 2).flatten(1, 2)
