# SPDX-License-Identifier: Apache-2.0
"""Which stacks run as a wavefront, and in chunks of how many steps, by the cost models.

``python -m tests.dispatch.test_wavefront_plan`` writes the table of kernels/README.md.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

import gpu_rnn
from gpu_rnn.backends import resident
from gpu_rnn.backends.group import launch as group
from gpu_rnn.backends.problem import Problem
from gpu_rnn.dispatch import choice, wavefront_plan
from gpu_rnn.dispatch.lines import Line
from tests.support import tables
from tests.support.paths import ROOT


def described(layers: int = 5, hidden: int = 384, steps: int = 1600, **options: Any) -> Problem:
    layer = gpu_rnn.LSTM(hidden, hidden, layers, dtype=torch.float16, device="meta", **options)
    x = torch.empty(steps, 64, hidden, dtype=torch.float16, device="meta")
    return gpu_rnn.explain(layer, x, device="H100").problem


def test_the_chunk_is_the_best_by_the_model() -> None:
    problem = described()

    def cost(part: Problem) -> float:  # a launch of 10 µs, 1 µs a step; nothing for input products
        return 1e-5 + 1e-6 * part.T

    chunk, seconds = wavefront_plan.Staggered(problem, partial(Line, cost)).plan(1600)
    assert 1600 % chunk == 0  # no odd steps, so that the formula is exact

    def total(count: int) -> float:
        return (count + 4) * (wavefront_plan.BETWEEN + 1e-5 + 1e-6 * 1600 / count)

    assert seconds == pytest.approx(total(1600 // chunk))
    assert seconds <= 1.01 * min(total(count) for count in range(1, 1601))


def test_where_a_stack_is_staggered() -> None:
    """Long and narrow stacks are; what has no room beside one layer, or no second layer to wait, is not."""
    assert choice.staggers(described())
    assert not choice.staggers(described(layers=1))
    assert not choice.staggers(described(bidirectional=True))
    assert not choice.staggers(described(proj_size=128))
    assert not choice.staggers(described(layer_norm=True))
    assert not choice.staggers(described(), "reference")
    assert not choice.staggers(replace(described(), device=gpu_rnn.devices.CPU))
    assert not choice.staggers(described(hidden=1024, layers=3), "group")
    inference = replace(described(), direction="inference")
    name, chunk = choice.wavefront(inference)
    assert 1 < chunk < 1600 and name in choice.KERNELS
    staggered = wavefront_plan.Staggered(inference, partial(Line, choice.BACKENDS[name].cost))
    assert choice.total_cost(inference, name) == staggered.plan(1600)[1]


def test_explain_says_so() -> None:
    layer = gpu_rnn.LSTM(384, 384, 5, dtype=torch.float16, device="meta")
    x = torch.empty(1600, 64, 384, dtype=torch.float16, device="meta")
    found = gpu_rnn.explain(layer, x, device="H100")
    assert len(found.chunks) == 2 and all(1 < chunk < 1600 for chunk in found.chunks)
    assert f"layers run as a wavefront, steps at a time: {found.chunks[0]} forward, {found.chunks[1]} backward" in str(
        found
    )
    assert gpu_rnn.explain(layer, x).chunks == gpu_rnn.explain(layer, x, device="CPU").chunks == ()


PAGE, COMMAND = ROOT / "kernels" / "README.md", "python -m tests.dispatch.test_wavefront_plan"
# Of the applications in benchmarks/cases/problems.py: (input, hidden, layers, T, B), LSTM, fp16.
STACKS = {
    "nanopore": (384, 384, 5, 1600, 64),
    "RNN-T encoder, lower": (240, 1024, 2, 500, 32),
    "RNN-T prediction": (320, 320, 2, 100, 32),
    "GNMT encoder": (1024, 1024, 4, 50, 128),
    "four small layers": (64, 64, 4, 1000, 16),
}


def table() -> str:
    """Predicted µs a step of whole stacks, layer after layer and as a wavefront, as a table in Markdown."""
    lines = [
        "| stack | I, H, layers, T, B | forward, one by one | wavefront, chunk | backward, one by one | wavefront, "
        "chunk | training runs |"
    ]
    lines.append("|---" * 7 + "|")
    for name, (features, hidden, layers, steps, batch) in STACKS.items():
        problem = replace(described(layers, hidden, steps), I=features, B=batch)
        figures = []
        for direction in ("training", "backward"):
            of_pass = replace(problem, direction=direction)
            loops = [loop for loop in (group, resident) if not loop.unsupported(of_pass)]
            ways = (wavefront_plan.Staggered(of_pass, partial(Line, loop.cost)).plan(steps) for loop in loops)
            chunk, seconds = min(ways, key=lambda plan: plan[1])
            one_by_one = layers * min(loop.cost(replace(of_pass, layers=1)) for loop in loops)
            figures += [f"{1e6 * one_by_one / steps:.2f}", f"{1e6 * seconds / steps:.2f}, {chunk}"]
        way = "as a wavefront" if choice.staggers(problem) else "one by one"
        sizes = ", ".join(map(str, (features, hidden, layers, steps, batch)))
        lines.append(f"| {name} | {sizes} | {' | '.join(figures)} | {way} |")
    return "\n".join([*lines, ""])


def test_the_table_is_what_the_models_predict(with_cupy: None) -> None:
    assert tables.written(PAGE, COMMAND) == table()


if __name__ == "__main__":
    tables.write(PAGE, COMMAND, table())
