# SPDX-License-Identifier: Apache-2.0
"""Which of torch.func's transforms, and whether forward-mode differentiation, are going on around a call."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack


def active() -> bool:
    """Whether a functorch transform or forward-mode differentiation is going on."""
    # Not peek_interpreter_stack: to Dynamo that is never None.
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def forward_levels() -> int:
    """How many forward-mode transforms are nested. torch takes what a Function's jvp returns for a constant of the
    outer ones, so from two on only plain operations are right."""
    return sum(level.key() == TransformType.Jvp for level in get_interpreter_stack() or ())


def functionalizes() -> bool:
    """Whether torch.func.functionalize is among the transforms that are going on."""
    return any(level.key() == TransformType.Functionalize for level in get_interpreter_stack() or ())


def only_functionalizes() -> bool:
    """Whether it is the only one: no autograd.Function passes it, but the registered operations do."""
    levels = get_interpreter_stack() or ()
    return bool(levels) and all(level.key() == TransformType.Functionalize for level in levels)


def without_views(outputs: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """What a Function returns while forward-mode differentiation goes on: to a view torch gives no tangent that is laid
    out in memory in another way than it, as one that `jvp` computes may be."""
    if torch.autograd.forward_ad._current_level < 0:
        return tuple(outputs)
    return tuple(out.clone() if out._is_view() else out for out in outputs)
