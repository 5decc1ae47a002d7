# SPDX-License-Identifier: Apache-2.0
"""What `make lint` refuses as a backend. mypy names an ignored error that there is none of, so these lines hold it to
the protocols."""

from __future__ import annotations

from gpu_rnn.backends import Entry, aten
from gpu_rnn.backends.problem import Problem
from gpu_rnn.backends.rates import Rates
from tests.support import toy_backend, wrong_backend


def unsupported(problem: Problem) -> str:
    return ""


def cost(problem: Problem, constants: Rates | None = None) -> float:
    return 1.0


def prepare(problem: Problem) -> None:
    """Nothing is to be compiled."""


RIGHT = Entry(toy_backend, toy_backend)
WRONG_SIGNATURE = Entry(wrong_backend)  # type: ignore[arg-type]
NO_LOOP = Entry(aten, aten)  # type: ignore[arg-type]
