# SPDX-License-Identifier: Apache-2.0
"""Small calls to tune, and a clock that says what a test wants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from gpu_rnn.diagnostics import tuning
from gpu_rnn.diagnostics.timing import Timing

T, B, I = 5, 3, 2  # noqa: E741
QUICK = {"seconds": 1e-9}  # the fewest rounds


def x(steps: int = T, batch: int = B) -> torch.Tensor:
    return torch.randn(steps, batch, I)


def decide(monkeypatch: pytest.MonkeyPatch, fastest: str) -> None:
    """Has every backend called, and one found the fastest: no clock."""

    def once(calls: dict[str, Callable[[], object]], device: torch.device, **_: Any) -> dict[str, Timing]:
        for call in calls.values():
            call()
        return {name: Timing("clock", 1, [1e-3 if name == fastest else 2e-3]) for name in calls}

    monkeypatch.setattr(tuning, "interleave", once)
