# SPDX-License-Identifier: Apache-2.0
"""Activations by name, one row each; every one is a plain function of a tensor, differentiable twice.

A layer's ``activation`` and ``recurrent_activation`` take one of these names or any plain torch function, also as a
module
without weights such as ``torch.nn.Mish()``::

    >>> import gpu_rnn, torch
    >>> gpu_rnn.GRU(4, 8, activation="softsign", recurrent_activation=lambda x: torch.sigmoid(2 * x))
    GRU(4, 8, activation=softsign, recurrent_activation=<lambda>)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import chain
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Callable[[Tensor], Tensor]


def hard_sigmoid(x: Tensor) -> Tensor:
    """clip(x/6 + 1/2, 0, 1), as in torch and Keras 3. Written out: ATen's hardsigmoid has no second derivative."""
    return (x / 6 + 0.5).clamp(0, 1)


def keras2_hard_sigmoid(x: Tensor) -> Tensor:
    """clip(0.2 x + 1/2, 0, 1), as in Keras 1 and 2 and in ONNX's default."""
    return (0.2 * x + 0.5).clamp(0, 1)


def linear(x: Tensor) -> Tensor:
    """The identity."""
    return x


ACTIVATIONS: dict[str, Activation] = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "hard_sigmoid": hard_sigmoid,
    "keras2_hard_sigmoid": keras2_hard_sigmoid,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "selu": F.selu,
    "softsign": F.softsign,
    "softplus": F.softplus,
    "hard_tanh": F.hardtanh,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "exp": torch.exp,
    "linear": linear,
}


def clipped(activation: Activation, clip: float) -> Activation:
    """The activation of its argument cut to [-clip, clip]; beyond that its gradient is 0, as torch.clamp's."""

    def of_cut(x: Tensor) -> Tensor:
        return activation(x.clamp(-clip, clip))

    of_cut.__wrapped__ = activation  # type: ignore[attr-defined]  # whose name errors say
    return of_cut


def checked_clip(clip: Any) -> float | None:
    """A positive number, NumPy's too, or None.

    Raises:
        TypeError: neither.
        ValueError: a number that is not positive, or not finite.
    """
    if clip is None:
        return None
    if isinstance(clip, bool) or not isinstance(clip, Real):
        raise TypeError(f"clip should be a positive number or None, got: {clip!r}")
    if not 0 < float(clip) < math.inf:
        raise ValueError(f"clip should be a positive, finite number, got: {clip}; None cuts nothing")
    return float(clip)


def get(activation: str | Activation, clip: float | None = None) -> Activation:
    """The function behind a name; a function is returned as it is. With `clip`, `clipped`.

    Raises:
        ValueError: an unknown name (the known ones are listed).
        TypeError: neither a name nor a function; a module with weights.
    """
    if clip is not None:
        return clipped(get(activation), clip)
    if isinstance(activation, str):
        if activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}; use one of {', '.join(ACTIVATIONS)}, or a function")
        return ACTIVATIONS[activation]
    name = type(activation).__name__
    if activation is None:
        raise TypeError("an activation is a name or a plain torch function, not None; Keras's None is 'linear' here")
    if has_weights(activation):
        raise TypeError(
            f"an activation is a plain torch function, and a {name} has weights: write a gpu_rnn.Recurrence with "
            "params=, which are the layer's own"
        )
    if isinstance(activation, type) or not callable(activation):
        raise TypeError(
            f"an activation is a name or a plain torch function such as torch.tanh or torch.nn.Tanh(), not {name}"
        )
    return activation


def has_weights(value: Any) -> bool:
    """Whether it is a module with parameters or buffers."""
    return isinstance(value, torch.nn.Module) and any(True for _ in chain(value.parameters(), value.buffers()))


def name_of(activation: str | Activation) -> str:
    """The name that shows an activation in a layer's repr."""
    if isinstance(activation, str):
        return activation
    return getattr(activation, "__name__", type(activation).__name__)
