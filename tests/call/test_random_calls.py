# SPDX-License-Identifier: Apache-2.0
"""Random calls beside loops by hand: other ones at each run, with a seed that is printed; `make fuzz` runs more."""

from __future__ import annotations

import itertools
import os
from typing import Any

import pytest
import torch
from torch import Tensor

from gpu_rnn.backends import normalisation
from gpu_rnn.compiler.operations import OPERATIONS
from tests.fuzzing import cases

SEED = int(os.environ["GPU_RNN_FUZZ_SEED"])  # set by conftest.py
CALLS = 25  # of a test, so that workers share them
APART = 10_000  # between the first cases of two tests


def right(chunk: int) -> None:
    """So many calls, all of them right."""
    count = 0
    for number in itertools.count(chunk * APART):
        for _, said in cases.check(cases.draw(SEED, number)):
            assert not said, f"{said}\nagain: {cases.repeat(SEED, number)}"
            count += 1
        if count >= CALLS:
            return


@pytest.mark.cuda_cpu
@pytest.mark.parametrize("chunk", range(14))
def test_random_calls(chunk: int) -> None:
    right(chunk)


@pytest.mark.interpreter
@pytest.mark.parametrize("chunk", range(14, 20))
def test_random_calls_in_the_interpreter(chunk: int) -> None:
    right(chunk)


def test_every_operation_is_drawn() -> None:
    """An operation that no cell has is compared with nothing."""
    missing = {*OPERATIONS}
    for case in (cases.draw(0, number) for number in range(300)):
        if case.formula and missing:
            missing -= {op.name for stage in case.recurrence.program.stages for op in stage.ops}
    assert not missing


def test_every_drawn_call_is_one() -> None:
    drawn = [cases.draw(0, number) for number in range(300)]
    projected = [case.sizes.H for case in drawn if "proj_size" in case.options]
    assert projected and min(projected) > 1  # a projection is smaller than the layer


def test_a_bound_knows_the_condition(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer normalisation over two values: of one rounding alone plain PyTorch may be off by little."""
    truth = cases.Truth(cases.draw(505478397, 191544))
    assert "layer_norm" in truth.case.options and truth.case.sizes.H == 2
    assert not truth.wrong("step", torch.float32)
    assert any(cond > 3 * plain > 1e-5 for cond, plain in zip(truth.conditioned, truth.plain, strict=True))

    right = normalisation.Back.__call__

    def wrong(self: Any, d: Tensor, normal: Any, out: Tensor | None = None) -> Tensor:
        return right(self, d, normal._replace(values=normal.values * 0.999), out)

    monkeypatch.setattr(normalisation.Back, "__call__", wrong)
    assert truth.wrong("step", torch.float64) and truth.wrong("step", torch.float32)


@pytest.mark.parametrize("operation", ["sigmoid", "maximum"])
def test_a_wrong_derivative_is_found(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the step loop, whose backward pass is derived from the program; the loops by hand know nothing of it."""

    def wrong(d: Any, y: Any, *args: Any) -> tuple[Any, ...]:
        return (d * 0.99, *[None] * (len(args) - 1))

    drawn = (cases.draw(1, number) for number in itertools.count())
    case = next(c for c in drawn if operation in str(c.formula) and c.way == "first derivatives" and c.sizes.T > 2)
    monkeypatch.setitem(OPERATIONS, operation, OPERATIONS[operation]._replace(derivative=wrong))
    said = [said for _, said in cases.check(case) if said]
    assert said and "step float64" in said[0] and all("step" in each for each in said)
