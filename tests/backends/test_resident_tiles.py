# SPDX-License-Identifier: Apache-2.0
"""How the resident kernel cuts a problem: the table of simulated builds, and what holds where it has no row."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gpu_rnn import cells, devices
from gpu_rnn.backends import chains, resident, resident_launch, resident_tiles
from gpu_rnn.backends.problem import DIRECTIONS, Problem
from gpu_rnn.backends.resident_tiles import Build, Schedule, Tile, available, build_of, shared_memory, tile
from tests.support import loops as support
from tests.support.resident import compare, settings  # noqa: F401

LONGER = 1.05  # times the cycles of the table: more fails
SIMULATED = [("lstm", "inference", 128), ("lstm", "backward", 32), ("lstm", "training", 64)]
BARRIERS = 10  # of a step, at most; 14 while each saved gate took two


def written_here(given: Problem) -> Schedule:
    """The row of a plain build like this, if it was simulated with the compiler that is here."""
    triton = pytest.importorskip("triton")
    written = resident_tiles.schedules()[build_of(given)]
    if written.compiler != triton.__version__:
        pytest.skip(f"the row was simulated with Triton {written.compiler}, and here is {triton.__version__}")
    return written


def slow(value: str) -> Any:
    return pytest.param(value, marks=pytest.mark.slow)


def problem(hidden: int = 64, device: str = "H100", **changes: Any) -> Problem:
    sizes = {"T": 8, "B": 16, "N": 1, "I": 8, "H": hidden}
    plain = {"recurrence": cells.lstm(), "dtype": torch.bfloat16, "device": devices.describe(device)}
    return Problem(**plain | sizes | {"device_type": "cuda"} | changes)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> dict[Build, Schedule]:
    """A table of the test's own."""
    rows: dict[Build, Schedule] = {}
    monkeypatch.setattr(resident_tiles, "schedules", lambda: rows)
    resident_tiles._nearest.cache_clear()
    yield rows
    resident_tiles._nearest.cache_clear()


def test_every_row_can_be_launched() -> None:
    rows = resident_tiles.schedules()
    assert {build.direction for build in rows} == set(DIRECTIONS)
    for build, choice in rows.items():
        assert build.kind in ("bf16", "fp16", "tf32", "fp32")
        assert build.width == resident_tiles.padded(build.width)
        assert choice.warps in (1, 2, 4, 8)
        assert choice.stages in (2, 3, 4)
        assert choice.registers in (0, 168)
        assert choice.held in (0, build.gates, build.gates - 1)
        assert choice.cycles > 0


def test_a_build_takes_its_row(table: dict[Build, Schedule]) -> None:
    table[build_of(problem())] = Schedule(8, 3, 168, 4, 1, "")
    assert tile(problem(56)) == Tile(16, 64, 8, 3, 168, 4)


def test_a_projection_has_rows_of_its_own(table: dict[Build, Schedule]) -> None:
    """By the padded units that enter the products."""
    table[build_of(problem(proj_size=32))] = Schedule(8, 3, 168, 4, 1, "")
    assert tile(problem(proj_size=24)) == Tile(16, 64, 8, 3, 168, 4)
    for other in (problem(), problem(proj_size=40), problem(proj_size=25)):
        assert not tile(other).held


@pytest.mark.parametrize(
    "other",
    [
        {"hidden": 50},  # whose rows have an address each
        {"flags": True},
        {"lengths": True, "packed": True},
        {"drop": 1},
        {"recurrence": cells.lstm(peephole=True)},
        {"recurrence": cells.slstm()},
        {"dtype": torch.float16},
        {"device": "B200"},
        {"proj_size": 24},
    ],
    ids=str,
)
def test_what_is_like_a_build_takes_its_row_but_for_its_registers(
    table: dict[Build, Schedule], other: dict[str, Any]
) -> None:
    table[build_of(problem())] = Schedule(8, 3, 168, 4, 1, "")
    assert tile(problem(**other)) == Tile(16, 64, 8, 3)


@pytest.mark.parametrize(
    ("recurrence", "warps"), [(cells.lstm(), 4), (cells.lstm(peephole=True), 8), (cells.slstm(), 8)]
)
def test_more_states_and_parameters_than_a_row_is_for_take_more_warps(
    table: dict[Build, Schedule], recurrence: Any, warps: int
) -> None:
    """Backward, where their gradients stay in registers: on 4 warps they spill."""
    for hidden, direction in ((64, "backward"), (64, "training"), (32, "backward")):
        table[build_of(problem(hidden, direction=direction))] = Schedule(4, 3, 0, 0, 1, "")
    resident_tiles._nearest.cache_clear()
    assert tile(problem(recurrence=recurrence, direction="backward")).warps == warps
    assert tile(problem(recurrence=recurrence, direction="training")).warps == 4
    assert tile(problem(32, recurrence=recurrence, direction="backward")).warps == 4


def test_the_row_most_like_a_build(table: dict[Build, Schedule]) -> None:
    """Of its dtype first, then of its cell, then of its architecture."""
    ours = build_of(problem())
    rows = [
        ours._replace(kind="fp16"),
        ours._replace(states=4),
        ours._replace(architecture=89),
        ours,
    ]
    for build in rows:
        table[build] = Schedule(8, 3, 0, 0, 1, "")
        resident_tiles._nearest.cache_clear()
        assert resident_tiles._nearest(ours) == build


@pytest.mark.parametrize(
    "other",
    [
        {"hidden": 32},
        {"recurrence": cells.gru()},
        {"direction": "training"},
        {"dtype": torch.float32},
        {"dtype": torch.float32, "precision": "tf32"},
    ],
    ids=str,
)
def test_what_has_no_row_takes_the_rule(table: dict[Build, Schedule], other: dict[str, Any]) -> None:
    table[build_of(problem())] = Schedule(1, 4, 0, 0, 1, "")
    without = problem(**other)
    assert tile(without) == Tile(16, resident_tiles.padded(without.H), resident_tiles.usual_warps(without), 2)


def test_an_architecture_without_rows_takes_those_of_the_nearest(table: dict[Build, Schedule]) -> None:
    table[build_of(problem())] = Schedule(8, 3, 0, 0, 1, "")
    table[build_of(problem(device="A100"))] = Schedule(2, 2, 0, 0, 1, "")
    assert [tile(problem(device=name)).warps for name in ("A100", "RTX 3090", "RTX 4090", "H100", "B200")] == [
        2, 8, 8, 8, 8,
    ]  # fmt: skip


@pytest.mark.parametrize("device", ["A100", "RTX 4090", "H100", "B200", "RTX 5090"])
@pytest.mark.parametrize("hidden", [32, 64, 96, 128])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_loads_under_way_fit_the_device(table: dict[Build, Schedule], device: str, hidden: int, direction: str) -> None:
    """As many steps as the device's shared memory holds, and no more than the table says."""
    given = problem(hidden, device, direction=direction)
    table[build_of(problem(hidden, direction=direction))] = Schedule(8, 4, 0, 0, 1, "")
    stages = tile(given).stages
    assert stages == 1 or shared_memory(given, stages) <= available(given)
    assert stages == 4 or shared_memory(given, stages + 1) > available(given)


@pytest.mark.interpreter
@pytest.mark.parametrize(("width", "proj"), [(16, 0), (32, 8)])
def test_what_registers_hold_are_the_weights(monkeypatch: pytest.MonkeyPatch, width: int, proj: int) -> None:
    monkeypatch.setattr(resident_launch, "tile", lambda problem: Tile(16, width, 4, 2, held=problem.G))
    monkeypatch.setattr(resident_launch, "_fixed", resident_launch._fixed.__wrapped__)  # nothing of it is kept
    inputs = support.make(cells.lstm(), T=5, B=2, H=12, reverse="01", bias=True, lengths=None, scale=0.3, proj=proj)
    compare(cells.lstm(), inputs.to(torch.bfloat16), "cpu")


def test_what_registers_hold_of_the_weights_leaves_shared_memory() -> None:
    """But for one gate at a time before the loop."""
    given, gate = problem(128), 2 * 128**2
    assert shared_memory(given, 3) - shared_memory(given, 3, held=3) == 3 * gate
    assert shared_memory(given, 1, held=4) == gate


@pytest.mark.compile
@pytest.mark.parametrize("held", [0, 3, 4])
def test_weights_in_registers_are_not_read_again(held: int) -> None:
    """A warp reads its columns of a gate by eight loads of four matrices, besides h and what the step loads."""
    from benchmarks.simulating import builds, paths

    given = problem(128)
    (launch,) = resident_launch.launches(given)
    launch = launch._replace(arguments=launch.arguments | {"HELD": held, "num_warps": 8, "STAGES": 3, "maxnreg": None})
    binary = builds.built(launch, given.device)
    code = builds.code_of(binary.asm["cubin"])
    names = [code[index].base for index in paths.straight(code, paths.time_loop(code))]
    assert names.count("LDSM") == 12 + 8 * (4 - held)
    assert binary.metadata.shared <= shared_memory(given, 3, held)
    assert not {"LDL", "STL"} & set(names)


@pytest.mark.compile
@pytest.mark.parametrize("direction", ["training", "backward"])
def test_a_projection_computes_no_activation_twice(direction: str) -> None:
    """In another order, as what is stored lies in another than what is multiplied."""
    from benchmarks.simulating import builds, paths

    counts = []
    for proj in (0, 32):
        given = problem(64, direction=direction, proj_size=proj)
        written_here(
            problem(64, direction=direction)
        )  # with 3.6 a backward pass computes some of them twice in any case
        (launch,) = resident_launch.launches(given)
        launch = launch._replace(arguments=launch.arguments | {"HELD": 0, "num_warps": 4, "STAGES": 3, "maxnreg": None})
        code = builds.code_of(builds.built(launch, given.device).asm["cubin"])
        counts.append([code[index].base for index in paths.straight(code, paths.time_loop(code))].count("MUFU"))
    assert counts[0] == counts[1] > 0


@pytest.mark.compile
@pytest.mark.parametrize(("proj_size", "near", "source"), [(32, 0.05, "simulated"), (48, 0.25, "modelled")])
@pytest.mark.parametrize("direction", [*map(slow, DIRECTIONS[:2]), "backward"])
def test_a_projection_is_priced_about_as_it_is_simulated(
    direction: str, proj_size: int, near: float, source: str
) -> None:
    from benchmarks.simulating import machines
    from benchmarks.simulating import resident as simulating

    given = problem(64, direction=direction, proj_size=proj_size)
    written_here(problem(64, direction=direction))
    cut = tile(given)
    simulated = simulating.simulate(given, simulating.Choice(cut.warps, cut.stages, cut.registers, cut.held)).cycles
    priced = chains.step(resident._one_tile(given), "resident", resident.modelled) * machines.H100.clock * 1e9
    assert priced == pytest.approx(simulated, rel=near)
    assert resident.source(given) == source


@pytest.mark.compile
@pytest.mark.parametrize(("cell", "direction", "width"), SIMULATED)
def test_no_time_loop_grew(cell: str, direction: str, width: int) -> None:
    from benchmarks.simulating import resident as simulating

    given = simulating.problem(cell, "bf16", direction, width)
    written = written_here(given)
    simulated = simulating.simulate(given, simulating.Choice(*written[:4]))
    assert not simulated.spills
    assert simulated.cycles <= LONGER * written.cycles
    assert simulated.barriers <= BARRIERS
