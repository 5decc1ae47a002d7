# SPDX-License-Identifier: Apache-2.0
"""A user's step function as a cell, and the operations that it comes to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gpu_rnn import Recurrence

Step = Callable[..., Any]


def cell(step: Step, **options: Any) -> Recurrence:
    """A cell of gates f and n, called "cell", whatever its function is called."""
    return Recurrence(step, **({"gates": ("f", "n"), "states": ("h",), "name": "cell"} | options))


def lines(recurrence: Recurrence) -> list[str]:
    """The operations, without the head."""
    return [line.partition(" = ")[2] for line in recurrence.program.text.splitlines() if " = " in line]
