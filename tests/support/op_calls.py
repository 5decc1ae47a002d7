# SPDX-License-Identifier: Apache-2.0
"""Calls of the registered operation `gpu_rnn::rnn` as its arguments, by name: one that fits, of each kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gpu_rnn import cells
from gpu_rnn.backends.tensors import (
    LayerControls,
    Weights,
)

T, B, I, H, P = 4, 3, 2, 5, 3  # noqa: E741
N, G, S, U = 2, 4, 2, 3  # a bidirectional LSTM with peepholes
TEXT = cells.lstm(peephole=True).program.text
ROW = ("x", *Weights._fields, *LayerControls._fields, "states", "reset_values")


def full() -> dict[str, Any]:
    """A call with every tensor that can stand beside the others."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape)

    return {
        "x": randn(T, B, I),
        "w_ih": randn(N, G, H, I),
        "w_hh": randn(N, G, H, H),
        "b_ih": randn(N, G, H),
        "b_hh": randn(N, G, H),
        "params": randn(N, U, H),
        "flags": torch.full((T, B, N), 2, dtype=torch.uint8),
        "drop": randn(B, N, G, H),
        "zone": torch.zeros(S, T, B, N, H, dtype=torch.bool),
        "states": [randn(B, N, H), randn(B, N, H)],
        "reset_values": [randn(T, B, N, H), randn(1, B, N, H)],
        "text": TEXT,
        "options": "reference 01 save y",
    }


def simple() -> dict[str, Any]:
    """One that every loop takes."""
    call = full()
    for name in ("params", "drop", "zone", "flags"):
        del call[name]
    return call | {"text": cells.lstm(activation="softsign").program.text, "reset_values": []}


def projected() -> dict[str, Any]:
    call = simple() | {"w_hh": torch.randn(N, G, H, P), "w_hr": torch.randn(N, P, H)}
    return call | {"states": [torch.randn(B, N, P), torch.randn(B, N, H)]}


def normalised() -> dict[str, Any]:
    return simple() | {"norm": torch.ones(N, G, H), "norm_ih": torch.ones(N, G, H)}


def with_lengths() -> dict[str, Any]:
    return simple() | {"lengths": torch.tensor([4, 0, 2])}


def stacked() -> dict[str, Any]:
    call = simple() | {"w_ih": torch.randn(1, G, H, I), "w_between": torch.randn(1, G, H, H)}
    return call | {
        "between": torch.ones(1, T, B, H),
        "options": "auto 00 save y",
        "flags": torch.zeros(T, B, 1, dtype=torch.uint8),
    }


CALLS: dict[str, Callable[[], dict[str, Any]]] = {
    each.__name__: each for each in (full, simple, projected, normalised, with_lengths, stacked)
}


def arguments(call: dict[str, Any]) -> list[Any]:
    return [*(call.get(name) for name in ROW), call["text"], call["options"]]
