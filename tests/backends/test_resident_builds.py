# SPDX-License-Identifier: Apache-2.0
"""The resident kernel built for six architectures, without a GPU, at the largest size that it claims to run.

What is built is the launcher's own launch with tensors that have no memory. Triton's compiler accepts what does not
fit, so the budgets are asserted here: shared memory within a block's limit and within what the launcher predicts, and
no access to local memory in the time loop. (ptxas now and then keeps an integer or two aside before the loop and takes
them back after it, to stay at 128 registers, of which two blocks have room: two accesses a sequence.)

`test_budgets.py` writes what the builds take into kernels/budgets.md.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.simulating.no_device import NoDevice
from gpu_rnn import devices
from gpu_rnn.backends import building, resident, resident_launch
from gpu_rnn.backends.problem import DIRECTIONS, Problem
from gpu_rnn.backends.tensors import Call, LayerControls, Result, Weights
from tests.support import loops as support
from tests.support.cuda.tools import opened
from tests.support.pairwise import pairwise, spread

ARCHITECTURES = {80: "A100", 86: "RTX 3090", 89: "RTX 4090", 90: "H100", 100: "B200", 120: "RTX 5090"}
SHARED_MEMORY = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}  # CUDA C++ programming guide
KINDS = {
    "fp16": (torch.float16, "ieee"),
    "bf16": (torch.bfloat16, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "fp32": (torch.float32, "ieee"),
}
CELLS = list(support.RECURRENCES)
MISSING = [0, 4, 1]  # units below the limit: rows of any alignment that matters
SPILLS = 1  # accesses to local memory in a step: none with Triton 3.7, one in two builds for sm_100 with 3.6's ptxas
LARGE_SPILLS = 16  # likewise of the cells of most states and parameters, with lengths and options: 11 is the most
LARGE = ("slstm", "peephole_lstm")
ODD_SPILLS = (
    160  # what an odd H is granted, where each value has its own address; and a mask for each gate in full fp32
)
STACK = 16  # bytes around a loop that does not touch them: integers kept from before it to after it
ODD_STACK = 160  # likewise where H is odd: 152 is the most
GATES = -1  # stands for a cell's number of gates
PROJECTED = ("lstm", "peephole_lstm", "coupled_lstm", "slstm")
HALF, MOST = "half", "most"  # of the units: to how many h is projected
PROJECTED_SPILLS = 24  # as `LARGE_SPILLS`, with a projection and all options or full fp32
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "lengths": {"lengths": True},
    "flags": {"flags": True},
    "values": {"flags": True, "reset_values": True},
    "drop": {"drop": 1},
    "gates": {"drop": GATES},
    "zone": {"zone": True},
    "states": {"all_states": True},
    "everything": {"flags": True, "reset_values": True, "drop": GATES, "zone": True, "all_states": True},
}


@dataclass(frozen=True)
class Build:
    """What a kernel takes on a device."""

    registers: int
    stack: int
    shared: int
    spills: int  # accesses to local memory in the time loop


def problem(
    cell: str, kind: str, direction: str, architecture: int, hidden: int, options: str = "plain", projected: str = ""
) -> Problem:
    dtype, precision = KINDS[kind]
    device = devices.describe(ARCHITECTURES[architecture])
    recurrence = support.RECURRENCES[cell]
    changes = dict(OPTIONS[options])
    if changes.get("drop") == GATES:
        changes["drop"] = len(recurrence.gates)
    return Problem(
        recurrence=recurrence,
        T=100,
        B=64,
        N=2,
        I=8,
        H=hidden,
        dtype=dtype,
        device_type="cuda",
        device=device,
        direction=direction,
        precision=precision,
        reverse="01",
        proj_size={"": 0, HALF: hidden // 2, MOST: hidden - 4}[projected],
        **changes,
    )


def limit(cell: str, kind: str, direction: str, architecture: int, projected: str = "") -> int:
    """The largest number of units that the launcher takes."""
    given = [problem(cell, kind, direction, architecture, 16 << k, projected=projected) for k in range(10)]
    return max(each.H for each in given if not resident.unsupported(each))


def launch(given: Problem) -> building.TritonLaunch:
    """The launcher's launch, of tensors without memory."""

    def empty(*shape: int, dtype: torch.dtype = given.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    program, T, B, N, H = given.program, given.T, given.B, given.N, given.H
    G, R, P = len(program.gates), len(program.split), len(program.params)
    params, W = empty(N, P, H) if P else None, given.proj_size or H
    w_hr = empty(N, W, H) if given.proj_size else None
    weights = Weights(empty(N, G, H, given.I), empty(N, G, H, W), empty(N, G, H), empty(N, G, H), params, w_hr)
    states = [empty(B, N, H if k else W) for k, _ in enumerate(program.states)]
    gates, y = empty(T, B, N, G, H), empty(T, B, N, W)
    controls = LayerControls(
        empty(B, dtype=torch.int64) if given.lengths else None,
        empty(T, B, N, dtype=torch.uint8) if given.flags else None,
        empty(B, N, given.drop, W) if given.drop else None,
        empty(len(states), T, B, N, H, dtype=torch.bool) if given.zone else None,
    )
    # Per step where all else is there: their gradients are then stored, else summed in registers.
    values = [empty(T if given.zone else 1, *state.shape) for state in states if given.reset_values]
    joined = not resident.adds_b_hh(given)
    call = Call(program, weights, states, controls, values, given.reverse, given, joined)
    if given.direction != "backward":
        return resident_launch.prepare_forward(call, gates, given.direction == "training", given.all_states)[0]
    inner = empty(len(states) - 1, T, B, N, H, dtype=torch.float32)
    saved = Result(y, states, gates, empty(T, B, N, R, H), inner)
    return resident_launch.prepare_backward(call, saved, y, states, inner if given.all_states else None)[0]


def time_loop(assembly: str) -> list[str]:
    """The instructions of the longest loop."""
    lines = assembly.splitlines()
    labels = {match[1]: k for k, line in enumerate(lines) if (match := re.match(r"(\.L_\w+):", line))}
    loops = []
    for k, line in enumerate(lines):
        match = re.search(r"BRA\S* .*`\((\.L_\w+)\)", line)
        if match and labels.get(match[1], k) < k:
            loops.append(lines[labels[match[1]] : k])
    return max(loops, key=len)


def compiled(given: Problem) -> Any:
    """What would be launched, as Triton compiles it."""
    from triton.runtime.driver import driver

    prepared, architecture = launch(given), 10 * given.device.capability[0] + given.device.capability[1]
    before = driver._active
    driver.set_active(NoDevice(architecture))
    try:
        return prepared.kernel.warmup(grid=prepared.grid, **prepared.arguments)
    finally:
        driver._active = before


def build(given: Problem, folder: Path) -> Build:
    made = compiled(given)
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(made.asm["cubin"])
    usage = opened(cubin, "cuobjdump", "-res-usage")
    found = {name: int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK")}  # type: ignore[index]
    loop = time_loop(opened(cubin, "nvdisasm", "-c"))
    spills = sum(bool(re.search(r"\b(LDL|STL)\b", line)) for line in loop)
    return Build(found["REG"], found["STACK"], made.metadata.shared, spills)


Case = tuple[int, str, str, str, str, int]  # architecture, direction, kind, cell, options, missing
PAIRS = pairwise(list(ARCHITECTURES), DIRECTIONS, list(KINDS), CELLS, list(OPTIONS), MISSING)
PROJECTIONS = pairwise(
    list(ARCHITECTURES), DIRECTIONS, list(KINDS), PROJECTED, ["plain", "lengths", "everything"], [0, 4, 1], [HALF, MOST]
)
EVERY = list(product(ARCHITECTURES, DIRECTIONS, KINDS, ("lstm", "gru", "minimal"), ["plain", "everything"], [0]))


def spills(kind: str, cell: str, options: str, missing: int) -> int:
    """The most accesses to local memory in a step."""
    if missing == 1 or (kind == "fp32" and options in ("gates", "everything")):
        return ODD_SPILLS
    return LARGE_SPILLS if cell in LARGE else SPILLS


def check(case: Case, folder: Path, projected: str = "") -> None:
    architecture, direction, kind, cell, options, missing = case
    hidden = limit(cell, kind, direction, architecture, projected) - missing
    given = problem(cell, kind, direction, architecture, hidden, options, projected)
    found, most = build(given, folder), spills(kind, cell, options, missing)
    if projected and (cell in LARGE or kind == "fp32"):
        most = max(most, PROJECTED_SPILLS)
    assert found.spills <= most
    assert found.spills or found.stack <= (ODD_STACK if missing == 1 else STACK)
    tile = resident.tile(given)
    assert found.shared <= resident.shared_memory(given, tile.stages, tile.held) <= SHARED_MEMORY[architecture]


@pytest.mark.compile
@pytest.mark.parametrize("case", spread(PAIRS), ids=lambda case: "-".join(map(str, case)))
def test_builds_at_the_limit(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path)


@pytest.mark.compile
@pytest.mark.parametrize("case", spread(PROJECTIONS, 8), ids=lambda case: "-".join(map(str, case)))
def test_builds_with_a_projection(case: tuple[Any, ...], tmp_path: Path) -> None:
    *rest, projected = case
    check(tuple(rest), tmp_path, projected)


@pytest.mark.compile
@pytest.mark.slow
@pytest.mark.parametrize("case", EVERY, ids=lambda case: "-".join(map(str, case)))
def test_builds_everywhere(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path)


@pytest.mark.compile
@pytest.mark.parametrize(("cell", "kind", "architecture"), [("lstm", "bf16", 90), ("lstm", "tf32", 86)])
def test_one_step_adds_its_biases_without_spilling(cell: str, kind: str, architecture: int, tmp_path: Path) -> None:
    many = problem(cell, kind, "inference", architecture, limit(cell, kind, "inference", architecture))
    one = replace(many, T=1)
    assert [launch(each).arguments["SUMMED"] for each in (many, one)] == [False, True]
    assert [launch(each).arguments["p_b_hh"] is None for each in (many, one)] == [True, False]
    assert build(one, tmp_path).spills <= SPILLS
