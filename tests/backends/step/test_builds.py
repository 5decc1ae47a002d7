# SPDX-License-Identifier: Apache-2.0
"""The step loop's kernels built for an old and a new architecture, without a GPU: the launcher's own launches."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from benchmarks.simulating.no_device import NoDevice
from gpu_rnn.backends.step.gpu_buffers import BackwardSteps, ForwardSteps, Kind
from gpu_rnn.backends.tensors import OF_STATES
from tests.support import loops as support

KINDS = {
    "plain": Kind(True, False, 0, (), 0, False),
    "no bias": Kind(False, False, 0, (), 0, False),
    "flags": Kind(True, True, 0, (), 0, False),
    "reset values": Kind(True, True, 2, (), 0, False),
    "zone": Kind(True, False, 0, OF_STATES, 0, False),
    "drop": Kind(True, False, 0, (), 1, False),
    "everything": Kind(True, True, 1, OF_STATES, 4, True, save=True, inner=True),
}
CASES = [
    (cell, list(KINDS)[number % len(KINDS)], architecture, dtype)
    for number, (cell, architecture, dtype) in enumerate(
        product(support.RECURRENCES, (80, 120), (torch.bfloat16, torch.float32))
    )
] + [("gru_reset_before", kind, 90, torch.float16) for kind in KINDS]
PROJECTED = [("peephole_lstm", kind, 90, torch.bfloat16) for kind in KINDS]


@pytest.mark.compile
@pytest.mark.parametrize(("cell", "kind", "architecture", "dtype"), CASES, ids=str)
def test_builds(cell: str, kind: str, architecture: int, dtype: torch.dtype) -> None:
    build(cell, KINDS[kind], architecture, dtype)


@pytest.mark.compile
@pytest.mark.parametrize(("cell", "kind", "architecture", "dtype"), PROJECTED, ids=str)
def test_builds_with_a_projection(cell: str, kind: str, architecture: int, dtype: torch.dtype) -> None:
    build(cell, KINDS[kind]._replace(projection=24), architecture, dtype)


def build(cell: str, kind: Kind, architecture: int, dtype: torch.dtype) -> None:
    from triton.runtime.driver import driver

    program = support.RECURRENCES[cell].program
    if kind.drop > 1:
        kind = kind._replace(drop=len(program.gates))
    like = torch.empty(4, 3, 2, len(program.gates), 40, dtype=dtype, device="meta")
    forward, backward = ForwardSteps(program, like, 4, kind), BackwardSteps(program, like, 4, kind)
    before = driver._active
    driver.set_active(NoDevice(architecture))
    try:
        warm_up(forward, backward, forward.of_h.entering)
        if kind.projection:
            warm_up(forward.projection, backward.projection, forward.y[1].transpose(0, 1))
    finally:
        driver._active = before


def warm_up(forward: ForwardSteps, backward: BackwardSteps, entering: torch.Tensor) -> None:
    """The launches of one step."""
    from gpu_rnn.kernels.triton.step import step_backward, step_forward

    for shape, product_, d in zip(forward.shapes, forward.products, backward.d_products, strict=True):
        multiplied = product_.batched(entering)
        assert multiplied.shape == d.shape
        step_forward.warmup(grid=forward.grid, **forward.arguments(1, shape, multiplied))
        step_backward.warmup(grid=backward.grid, **backward.arguments(1, shape))
