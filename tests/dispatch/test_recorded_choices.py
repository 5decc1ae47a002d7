# SPDX-License-Identifier: Apache-2.0
"""tests/data/choices_h100.csv: what dispatch takes on an H100, for a grid of problems.

A change of a cost model, a layout or the simulated steps shows here which calls will run on another backend.

``python -m tests.dispatch.test_recorded_choices`` writes the file.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import torch

from gpu_rnn import cells
from gpu_rnn.backends.problem import Problem
from gpu_rnn.dispatch import choice
from tests.support.paths import DATA

FILE = DATA / "choices_h100.csv"
PROJECTED = "lstm projected"  # to half of its units
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32}


class Point(NamedTuple):
    cell: str
    dtype: str
    direction: str
    hidden: int
    batch: int


def points() -> Iterator[Point]:
    for cell, dtype, direction in product(("lstm", "gru", PROJECTED), DTYPES, ("inference", "training")):
        for hidden, batch in ((32, 16), (64, 64), (128, 16), (256, 64), (512, 64), (768, 16), (1024, 1), (2048, 64)):
            yield Point(cell, dtype, direction, hidden, batch)


def chosen(point: Point) -> str:
    """Of a call as `explain` sees it, but that no kernel is built."""
    problem = Problem(
        recurrence=cells.CELLS[point.cell.split()[0]](),
        T=1024, B=point.batch, N=1, I=point.hidden, H=point.hidden,
        proj_size=point.hidden // 2 * (point.cell == PROJECTED), dtype=DTYPES[point.dtype], direction=point.direction,
    )  # fmt: skip
    there = choice.described(problem, "H100")
    able = [name for name, backend in choice.BACKENDS.items() if not backend.unsupported(there)]
    return min(able, key=lambda name: choice.total_cost(there, name))


def recorded() -> dict[Point, str]:
    with FILE.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {
        Point(row["cell"], row["dtype"], row["direction"], int(row["hidden"]), int(row["batch"])): row["chosen"]
        for row in rows
    }


def test_what_is_chosen_is_what_was_recorded(with_cupy: None) -> None:
    assert {point: chosen(point) for point in points()} == recorded(), "python -m tests.dispatch.test_recorded_choices"


if __name__ == "__main__":
    with FILE.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*Point._fields, "chosen"])
        writer.writerows([*point, chosen(point)] for point in points())
