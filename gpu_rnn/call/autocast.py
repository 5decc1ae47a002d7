# SPDX-License-Identifier: Apache-2.0
"""torch.autocast: a call's tensors are cast once, here, before dispatch sees them, and nothing below casts again.

torch's own rules know cuDNN's kernels, oneDNN's LSTM and plain products, each in another way: a dtype would depend on
what runs. Here it follows from autocast alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def dtype_of(tensor: Tensor) -> torch.dtype:
    """The dtype that a call sees a tensor in: autocast's where it is on for its device and casts its dtype, else its
    own."""
    kind = tensor.device.type
    # There is no autocast for "meta"; torch.amp.is_autocast_available says so, but torch 2.11 cannot compile it.
    if kind == "meta" or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor.dtype
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


def cast(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The tensors in the dtype that a call sees them in."""
    return tuple(tensor.to(dtype_of(tensor)) for tensor in tensors)


def on(like: Tensor) -> bool:
    """Whether autocast would meet the operations on a tensor's device. What is compiled has only operations that it
    leaves alone, or turns it off as it runs."""
    kind = like.device.type
    return not torch.compiler.is_compiling() and kind != "meta" and torch.is_autocast_enabled(kind)


def off(like: Tensor) -> AbstractContextManager[None]:
    """No autocast on a tensor's device."""
    return torch.autocast(like.device.type, enabled=False) if on(like) else nullcontext()
