# SPDX-License-Identifier: Apache-2.0
"""The layout that a problem gets beside others that it could get: simulated cycles of a step on an H100.

Of all that the model of `choice.py` takes for at most FAR times as long as the best. Tiles and columns take turns or go
together, depending on what the words' way, the weights and the activations take; the table says which is shorter.

``python -m tests.backends.group.test_ranking`` writes tests/data/group_layouts.csv.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import pytest

from benchmarks import simulate
from benchmarks.simulating import builds, machines, report
from benchmarks.simulating.paths import Lost
from benchmarks.simulating.tools import tool
from gpu_rnn.backends.group.choice import Choice, choose, fitting
from gpu_rnn.backends.problem import Problem
from tests.backends import test_simulated_steps as page
from tests.backends.test_budgets import versions
from tests.support.paths import ROOT

TABLE = ROOT / "tests" / "data" / "group_layouts.csv"
FAR, NEAR, SAME = 1.5, 1.05, 0.05
STEPS = [step for step in page.STEPS if step.backend == "group" and step.cell in ("lstm", "gru")]  # one product a step


class Row(NamedTuple):
    """A layout of a step of `kernels/simulated.md`, by what distinguishes it."""

    cell: str
    dtype: str
    direction: str
    hidden: int
    batch: int
    heads: int
    members: int
    blocks: int
    across: int
    columns: int
    tiles: int
    groups: int
    cluster: int
    cycles: int = 0

    @property
    def step(self) -> tuple[object, ...]:
        return self[:6]


def problem(step: page.Step) -> Problem:
    return simulate.problem_of(simulate.parser().parse_args(page.arguments(step)))


def row(step: page.Step, choice: Choice) -> Row:
    layout = choice.layout
    shape = layout.members, layout.blocks, layout.across, layout.columns, layout.tiles
    return Row(*step[1:], *shape, choice.groups, int(layout.cluster))


def candidates(step: page.Step) -> Iterator[tuple[Row, Choice]]:
    """The layouts worth a look, the best by the model first."""
    ranked = sorted(fitting(problem(step)), key=lambda choice: choice.step)
    for choice in ranked:
        if choice.step <= FAR * ranked[0].step:
            yield row(step, choice), choice


def cycles(step: page.Step, choice: Choice) -> int:
    """Simulated; 0 where the simulator does not follow it."""
    try:
        return round(report.simulate(builds.group_kernel(problem(step), choice), machines.H100).cycles)
    except Lost:
        return 0


@cache
def written() -> dict[Row, int]:
    with TABLE.open(newline="") as file:
        rows = [Row(*(int(x) if x.isdigit() else x for x in line)) for line in list(csv.reader(file))[1:]]
    return {each._replace(cycles=0): each.cycles for each in rows}


@pytest.mark.parametrize("step", STEPS, ids=lambda step: "-".join(map(str, step)))
def test_the_layout_is_the_shortest_that_is_known(step: page.Step) -> None:
    known = [count for each, count in written().items() if each.step == step[1:] and count]
    choice = choose(problem(step))
    assert choice is not None and known
    assert 0 < written()[row(step, choice)] <= NEAR * min(known)


@pytest.mark.parametrize("step", STEPS, ids=lambda step: "-".join(map(str, step)))
def test_the_table_has_all_that_the_model_ranks_high(step: page.Step) -> None:
    assert {each for each, _ in candidates(step)} == {each for each in written() if each.step == step[1:]}


@pytest.mark.compile("nvrtc")
@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS, ids=lambda step: "-".join(map(str, step)))
def test_the_table_is_what_the_simulator_says(step: page.Step) -> None:
    if tool("nvdisasm") is None:
        pytest.skip("not found: nvdisasm, which is in Triton's wheel and in CUDA's toolkit")
    if f"Compilers: {versions()}." not in page.PAGE.read_text():
        pytest.skip(f"the table was written with other compilers than {versions()}")
    for each, choice in candidates(step):
        assert cycles(step, choice) == pytest.approx(written()[each], rel=SAME)


if __name__ == "__main__":
    with TABLE.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Row._fields)
        for step in STEPS:
            for each, choice in candidates(step):
                writer.writerow(each._replace(cycles=cycles(step, choice)))
                file.flush()
