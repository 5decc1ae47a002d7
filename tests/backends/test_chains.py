# SPDX-License-Identifier: Apache-2.0
"""The simulated steps that cost models start from: what the table says, what lies between, and what follows for others.

``python -m benchmarks.simulating.chains`` writes the table.
"""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise

import pytest

from benchmarks.simulating import chains as simulating
from benchmarks.simulating.tools import tool
from gpu_rnn import cells, devices
from gpu_rnn.backends import SOURCES, chains, resident
from gpu_rnn.backends.chains import Chain
from gpu_rnn.backends.group import choice as group
from gpu_rnn.backends.group import projecting
from gpu_rnn.backends.problem import Problem
from gpu_rnn.backends.step import launch as step
from tests.backends import test_simulated_steps as page
from tests.backends.test_budgets import versions

NEAR = 0.05
MODELS = {"resident": resident.modelled, "group": group.modelled, "step": step.pointwise_pass}
ROWS = list(chains.rows())
LSTM = Chain("H100", "group", "lstm", chains.PLAIN, "16-bit", "training")
NORM = LSTM._replace(option=chains.NORM)
FEW = [
    (LSTM, 512, 64),
    (LSTM._replace(backend="resident", kind="bf16", direction="inference"), 64, 16),
    (NORM._replace(direction="inference"), 256, 16),
    (LSTM._replace(kind="fp32", direction="backward"), 64, 16),
]


def seconds(build: Chain, hidden: int, batch: int) -> float:
    return chains.step(simulating.problem(build, hidden, batch), build.backend, MODELS[build.backend])


def test_every_row_is_what_the_model_predicts() -> None:
    """So the model is as near to the simulator as the table."""
    assert {build.backend for build, _ in ROWS} == set(MODELS)
    for build, row in ROWS:
        assert seconds(build, row.hidden, row.batch) == pytest.approx(row.cycles / row.clock / 1e9, rel=1e-9)
        problem = simulating.problem(build, row.hidden, row.batch)
        assert chains.simulated(problem, build.backend)


@pytest.mark.parametrize("build", chains.table(), ids=lambda build: "-".join(build))
def test_between_two_rows_time_goes_from_one_to_the_other(build: Chain) -> None:
    grid = chains.table()[build]
    for hidden, points in grid.seconds.items():
        for low, high in pairwise(sorted(points)):
            walk = [grid.at(hidden, low * (high / low) ** (k / 7)) for k in range(8)]
            assert walk in (sorted(walk), sorted(walk, reverse=True))
            assert (walk[0], walk[-1]) == (points[low], pytest.approx(points[high]))
    for low, high in pairwise(sorted(grid.seconds)):
        for batch in grid.seconds[low]:
            walk = [grid.at(low * (high / low) ** (k / 7), batch) for k in range(8)]
            assert walk in (sorted(walk), sorted(walk, reverse=True))


def test_beyond_the_table_the_models_say_how_much_more() -> None:
    known = simulating.problem(LSTM, 512, 128)
    larger = replace(known, B=512)
    share = group.modelled(larger) / group.modelled(known)
    assert share > 2
    assert chains.step(larger, "group", group.modelled) == pytest.approx(share * seconds(LSTM, 512, 128))
    assert not chains.simulated(larger, "group")


@pytest.mark.parametrize(
    "changed",
    [
        {"recurrence": cells.lstm(peephole=True)},
        {"flags": True},
        {"N": 2, "reverse": "01"},
        {"device": devices.DEVICES["RTX 5090"]},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_what_the_table_lacks_is_in_proportion(changed: dict[str, object]) -> None:
    plain = simulating.problem(LSTM, 256, 16)
    other = replace(plain, **changed)
    share = group.modelled(other) / group.modelled(plain)
    assert chains.step(other, "group", group.modelled) == pytest.approx(share * seconds(LSTM, 256, 16))
    assert SOURCES["group"](other) == "modelled" and SOURCES["group"](plain) == "simulated"


def test_options_and_second_products_have_rows_of_their_own() -> None:
    """Layer normalisation, a GRU that resets before the product, and full fp32 are simulated, and not scaled."""
    two = LSTM._replace(cell="gru_reset_before")
    plain = seconds(LSTM, 256, 16)
    for build in (NORM, two, LSTM._replace(kind="fp32")):
        problem = simulating.problem(build, 256, 16)
        assert (problem.norm, len(problem.program.stages)) == (build == NORM, 1 + (build == two))
        assert SOURCES["group"](problem) == "simulated"
        assert seconds(build, 256, 16) > 1.3 * plain  # a second hop, or 32 multiply-adds for a matrix instruction


def test_a_normalised_cell_without_rows_is_in_proportion_to_a_normalised_one() -> None:
    """For the second hop weighs more than what the cell computes."""
    known = simulating.problem(NORM, 256, 16)
    other = replace(known, recurrence=cells.lstm(peephole=True))
    share = group.modelled(other) / group.modelled(known)
    assert chains.step(other, "group", group.modelled) == pytest.approx(share * seconds(NORM, 256, 16))
    assert SOURCES["group"](other) == "modelled"


@pytest.mark.parametrize("build", [LSTM, NORM], ids=lambda build: build.option or "plain")
def test_a_projected_layer_has_the_rows_of_the_kernel_that_runs(build: Chain) -> None:
    """Whose products with W_hr and W_hh are one, normalised or not; `group` has no rows of projections."""
    alone = simulating.problem(build, 256, 16)
    projected = replace(alone, proj_size=128)
    assert SOURCES["group"](projected) == SOURCES["group"](alone) == "simulated"
    assert group.cost(projected) - projecting.around(projected) == pytest.approx(group.cost(alone))


def test_no_table_leaves_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = simulating.problem(LSTM, 256, 16)
    assert chains.step(problem, "nothing of that name", lambda problem: 3.0) == 3.0
    assert not chains.simulated(problem, "nothing of that name")


def test_another_name_of_the_same_chip_is_the_same() -> None:
    problem = simulating.problem(LSTM, 256, 16)
    there = replace(problem, device=replace(problem.device, name="NVIDIA H100 80GB HBM3", memory_rate=3000.0))
    assert chains.simulated(there, "group")
    assert not chains.simulated(replace(there, device=replace(there.device, sms=114)), "group")


def test_the_table_is_as_near_as_the_page_of_simulated_steps() -> None:
    """kernels/simulated.md, which the tests hold to the compiler, has some of the same builds."""
    table = {(*build, row.hidden, row.batch): row.cycles for build, row in ROWS}
    compared = 0
    for said, chain in page.written().items():
        cell, option = (*said.cell.split(), chains.PLAIN)[:2]
        for kind in {"ieee": ("fp32",), "fp32": ("tf32",)}.get(said.dtype, (said.dtype, "16-bit")):
            key = ("H100", said.backend, cell, option, kind, said.direction, said.hidden, said.batch)
            if said.heads == 1 and key in table:
                assert table[key] == pytest.approx(chain.cycles, rel=NEAR), key
                compared += 1
    assert compared > 10


def check(build: Chain, hidden: int, batch: int) -> None:
    if tool("nvdisasm") is None:
        pytest.skip("not found: nvdisasm, which is in Triton's wheel and in CUDA's toolkit")
    said = re.search(r"^Compilers: (.*)\.$", page.PAGE.read_text(), re.M)
    assert said
    if said[1] != versions():
        pytest.skip(f"the table was written with {said[1]}, and here is {versions()}")
    row = simulating.simulate(build, hidden, batch)
    assert row is not None
    assert seconds(build, hidden, batch) == pytest.approx(row.cycles / row.clock / 1e9, rel=NEAR)


@pytest.mark.compile
@pytest.mark.compile("nvrtc")
@pytest.mark.parametrize("point", FEW, ids=lambda point: "-".join(map(str, (*point[0], *point[1:]))))
def test_predictions_are_near_the_simulator(point: tuple[Chain, int, int]) -> None:
    check(*point)


@pytest.mark.compile
@pytest.mark.compile("nvrtc")
@pytest.mark.slow
@pytest.mark.parametrize("build", chains.table(), ids=lambda build: "-".join(build))
def test_all_predictions_are_near_the_simulator(build: Chain) -> None:
    for each, row in ROWS:
        if each == build:
            check(build, row.hidden, row.batch)


def test_the_problems_are_those_that_dispatch_sees() -> None:
    assert isinstance(simulating.problem(LSTM, 64, 16), Problem)
    assert all(build.cell in cells.CELLS and build.device in devices.DEVICES for build, _ in ROWS)
