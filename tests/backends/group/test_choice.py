# SPDX-License-Identifier: Apache-2.0
"""What the group kernel's cost model predicts on an H100, beside the bound.

``python -m tests.backends.group.test_choice``, where CuPy is, writes the table of kernels/README.md.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import gpu_rnn
from gpu_rnn import cells
from gpu_rnn.backends import SOURCES, chains
from gpu_rnn.backends.group.choice import choose, floor, modelled
from gpu_rnn.backends.problem import Problem
from gpu_rnn.dispatch import choice
from tests.support import tables
from tests.support.paths import ROOT

PAGE, COMMAND = ROOT / "kernels" / "README.md", "python -m tests.backends.group.test_choice"
SHAPES = [(128, 32), (256, 64), (512, 64), (1024, 64), (1024, 1), (2048, 64)]  # H, B
# Calculated by hand from data sheets, with the same rates; activations, rounding and the barrier left out of the first.
FLOORS = [(0.1, 0.3), (0.2, 0.4), (0.3, 0.6), (1.4, 1.7), (0.8, 1.0), (4.0, 7.0)]  # µs a forward step
STEPS = 1000


def problem(hidden: int, batch: int, direction: str) -> Problem:
    sizes = {"T": STEPS, "B": batch, "N": 1, "I": hidden, "H": hidden}
    given = Problem(recurrence=cells.lstm(), **sizes, dtype=torch.bfloat16, direction=direction)
    return choice.described(given, "H100")


@pytest.mark.parametrize(("shape", "bounds"), list(zip(SHAPES, FLOORS, strict=True)))
def test_nothing_is_predicted_below_the_floor(shape: tuple[int, int], bounds: tuple[float, float]) -> None:
    forward, backward = problem(*shape, "inference"), problem(*shape, "backward")
    assert bounds[0] <= floor(forward) * 1e6 <= bounds[1]
    assert choose(forward).step >= floor(forward)
    assert choose(backward).step >= floor(backward) >= floor(forward)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("training", [False, True])
def test_explain_shows_the_choice_beside_the_floor(shape: tuple[int, int], training: bool, with_cupy: None) -> None:
    hidden, batch = shape
    layer = gpu_rnn.LSTM(hidden, hidden, dtype=torch.bfloat16, device="meta")
    with torch.set_grad_enabled(training):
        x = torch.empty(STEPS, batch, hidden, dtype=torch.bfloat16, device="meta")
        found = gpu_rnn.explain(layer, x, device="H100")
    predicted = {row.backend: row.predicted_us for row in found.rows if row.runs}
    assert predicted["group"] >= found.floor_us
    assert found.chosen == min(predicted, key=predicted.get)
    assert found.chosen == ("group" if hidden <= 1024 or not training else "aten")
    assert f"{found.floor_us:.2f}" in str(found) and f"{predicted['group']:.2f}" in str(found)


@pytest.mark.parametrize("hidden", [4096, 8192])
def test_no_floor_where_the_weights_do_not_fit(hidden: int) -> None:
    assert floor(problem(hidden, 64, "inference")) is None
    assert choose(problem(hidden, 64, "inference")) is None


def test_more_recurrences_than_fit_at_once_take_turns() -> None:
    one = problem(1024, 64, "inference")
    assert floor(replace(one, N=4)) >= 2 * floor(one)


def table() -> str:
    """µs a step of the time loop, as dispatch takes it, and the bound of each, as a table in Markdown."""
    lines = [
        "| H, B | S × groups, forward and backward | forward | bound | backward | bound | these are | chosen |",
        "|---" * 8 + "|",
    ]
    for shape in SHAPES:
        problems = problem(*shape, "training"), problem(*shape, "backward")
        choices = [choose(p) for p in problems]
        layouts = ", ".join(f"{c.layout.members} × {c.groups}" for c in choices)
        figures = [f"{s * 1e6:.1f}" for p in problems for s in (chains.step(p, "group", modelled), floor(p))]
        source, chosen = "/".join(dict.fromkeys(map(SOURCES["group"], problems))), choice.select(problems[0])
        lines.append(" | ".join(["| " + ", ".join(map(str, shape)), layouts, *figures, source, chosen]) + " |")
    return "\n".join([*lines, ""])


def test_the_table_is_what_dispatch_takes(with_cupy: None) -> None:
    assert tables.written(PAGE, COMMAND) == table()


if __name__ == "__main__":
    tables.write(PAGE, COMMAND, table())
