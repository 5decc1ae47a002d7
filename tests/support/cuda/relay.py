# SPDX-License-Identifier: Apache-2.0
"""The problems of relay.cu and relay_cluster.cu, and their solutions."""

import math
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.emulating.build import Argument

SOURCE = Path(__file__).with_name("relay.cu")
CLUSTERS = SOURCE.with_name("relay_cluster.cu")
STEPS = 5
BLOCKS = {
    "by_flag": 3,
    "by_counter": 3,
    "by_fence": 3,
    "by_word": 3,
    "by_stage": 1,
    "by_warp": 1,
}  # by kernel


class Problem(NamedTuple):
    grid: int
    block: int
    shared_bytes: int
    arguments: list[Argument]
    h: torch.Tensor  # (steps, blocks, threads), written by the kernel
    expected: torch.Tensor


def problem(kernel: str) -> Problem:
    rows, width = BLOCKS.get(kernel, 3), 32 if kernel == "by_warp" else 64
    x = torch.randn(STEPS, rows, width, generator=torch.Generator().manual_seed(0))
    h, expected = torch.full_like(x, math.nan), torch.zeros_like(x)
    for t in range(STEPS):
        before = expected[t - 1].roll(-1, 0).flip(1) if t else 0.0
        expected[t] = 0.5 * before + x[t]
    flags = [torch.zeros(STEPS * rows, dtype=torch.int32)] * (kernel in ("by_flag", "by_counter", "by_fence"))
    slots = 2 * max(2, rows) * width * x.element_size()  # two of each
    counts = 2 * 8
    return Problem(rows, width, slots + counts, [x, h, *flags, STEPS], h, expected)
