# SPDX-License-Identifier: Apache-2.0
"""The precision of fp32 products on a GPU: recurrent layers have a setting of their own, and torch's products another.

torch keeps both for the whole process. A call sets what products go by, and puts back what was there.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from gpu_rnn.forking import renewed

# Of products, of everything on a GPU, of everything. Each goes by the next where it says "none" itself.
LEVELS = (("cuda", "matmul"), ("cuda", "all"), ("generic", "all"))


class _Setting:
    """torch's setting for products, while calls of this package want another: the last one restores it."""

    lock = renewed(threading.Lock)
    calls = 0
    before = ""
    ours = ""


def of_rnn() -> str:
    """What torch's setting for recurrent layers says: "tf32" (the default) or "ieee"."""
    # What torch.backends.cudnn.rnn.fp32_precision asks, without the three Python calls on its way.
    return "tf32" if torch._C._get_fp32_precision_getter("cuda", "rnn") == "tf32" else "ieee"


def differs(precision: str, like: Tensor) -> bool:
    """Whether fp32 products on a GPU do not follow that setting by themselves."""
    return like.is_cuda and like.dtype == torch.float32 and (bool(_Setting.calls) or _effective(0) != precision)


@contextmanager
def of_products(precision: str, like: Tensor) -> Iterator[None]:
    """Makes fp32 products on a GPU follow the recurrent layers' own setting ("ieee" or "tf32")."""
    if not differs(precision, like):
        yield
        return
    with _Setting.lock:
        if not _Setting.calls:
            _Setting.before = _own(0)
        _Setting.calls += 1
        _Setting.ours = precision
        _set(0, precision)
    try:
        yield
    finally:
        with _Setting.lock:
            _Setting.calls -= 1
            # Somebody else's newer setting stays.
            if not _Setting.calls and _effective(0) == _Setting.ours:
                _set(0, _Setting.before)


def _own(level: int) -> str:
    """What a level says itself. torch tells only what comes of it: "none" put back as that would no longer follow the
    next."""
    value = _effective(level)
    if value == "none" or level + 1 == len(LEVELS) or _effective(level + 1) != value:
        return value
    # It says the same as the next, or nothing: then it follows.
    above, other = _own(level + 1), "ieee" if value == "tf32" else "tf32"
    _set(level + 1, other)
    follows = _effective(level) == other
    _set(level + 1, above)
    return "none" if follows else value


def _effective(level: int) -> str:
    return str(torch._C._get_fp32_precision_getter(*LEVELS[level]))


def _set(level: int, precision: str) -> None:
    torch._C._set_fp32_precision_setter(*LEVELS[level], precision)
