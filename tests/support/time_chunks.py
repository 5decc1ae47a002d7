# SPDX-License-Identifier: Apache-2.0
"""Calls that run in chunks of steps side by side, whatever is predicted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import gpu_rnn
from gpu_rnn import memo
from gpu_rnn.backends.problem import Problem
from gpu_rnn.call import passes
from gpu_rnn.dispatch import relaxation_plan
from gpu_rnn.dispatch.relaxation_plan import Outcome, TimePlan

EXACT = 1e-13  # the tolerance with which all chunks run until nothing moves


@contextmanager
def in_chunks(count: int, most: int = 64) -> Iterator[list[tuple[str, int]]]:
    """Every pass of a call with a tolerance runs in so many chunks. Yields the direction and rows of each launch."""
    launches = []

    def plan(problem: Problem, backend: str, tolerance: float) -> TimePlan:
        steps = -(-problem.T // count)
        return TimePlan(-(-problem.T // steps), steps, most, 0.0, 1.0)

    def loop(backend: str, problem: Problem) -> Any:
        launches.append((problem.direction, problem.B))
        return of_backend(backend, problem)

    of_backend = passes._loop
    memo.clear(relaxation_plan.__name__)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(relaxation_plan, "plan", plan)
        patch.setattr(relaxation_plan, "against", lambda problem, backend, tolerance: "")
        patch.setattr(passes, "_loop", loop)
        yield launches
    memo.clear(relaxation_plan.__name__)


def outcomes() -> list[Outcome]:
    return list(relaxation_plan._outcomes.values())


def outputs(layer: Any, x: Tensor, **call: Any) -> list[Tensor]:
    y, states, *every = layer(x, **call)
    return [y, *(t for group in (states, *every) for t in (group if isinstance(group, tuple) else (group,)))]


def forgetful(cell: str = "LSTM", **options: Any) -> Any:
    """A layer in float64 with torch.nn's initial weights, on a loop."""
    torch.manual_seed(0)
    return getattr(gpu_rnn, cell)(3, 6, dtype=torch.float64, backend="step", **options)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()


def same(found: list[Tensor], expected: list[Tensor], atol: float) -> None:
    for value, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(value, truth, rtol=0, atol=atol)
