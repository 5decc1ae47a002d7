# SPDX-License-Identifier: Apache-2.0
"""The group kernel's cubins for six architectures, built without a GPU: the layouts that the launcher chooses.

Asserted: no stack, and shared memory within a block's limit. At the largest H that fits, and at H = 128.

`tests/backends/test_budgets.py` writes what the builds take into kernels/budgets.md.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from gpu_rnn import devices
from gpu_rnn.backends.group import cubin, nvrtc
from gpu_rnn.backends.group import launch as group
from gpu_rnn.backends.group.choice import Choice, choose, largest
from gpu_rnn.backends.group.layout import source
from gpu_rnn.backends.problem import DIRECTIONS, Problem
from tests.support import loops as support
from tests.support.cuda.tools import opened
from tests.support.pairwise import pairwise, spread

DEVICES = {
    "sm_80": "A100",
    "sm_86": "RTX 3090",
    "sm_89": "RTX 4090",
    "sm_90a": "H100",
    "sm_100": "B200",
    "sm_120": "RTX 5090",
}
SHARED_MEMORY = {  # CUDA C++ programming guide, table of compute capabilities
    "sm_80": 166912, "sm_86": 101376, "sm_89": 101376, "sm_90a": 232448, "sm_100": 232448, "sm_120": 101376,
}  # fmt: skip
KINDS = {
    "fp16": (torch.float16, "ieee"),
    "bf16": (torch.bfloat16, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "fp32": (torch.float32, "ieee"),
}
CELLS = [name for name, recurrence in support.RECURRENCES.items() if len(recurrence.stage_gates) <= 2]


class Case(NamedTuple):
    arch: str
    direction: str
    kind: str
    cell: str
    H: int  # 0: the largest
    options: bool = False
    norm: bool = False

    @property
    def problem(self) -> Problem:
        dtype, precision = KINDS[self.kind]
        device = devices.describe(DEVICES[self.arch])
        given = Problem(
            recurrence=support.RECURRENCES[self.cell],
            T=100,
            B=64,
            N=1,
            I=64,
            H=self.H or 16,
            dtype=dtype,
            device_type="cuda",
            device=device,
            direction=self.direction,
            precision=precision,
        )
        given = replace(given, norm=self.norm)
        if self.options:
            given = replace(given, flags=True, reset_values=True, drop=given.G, zone=True, all_states=True)
        return given if self.H else replace(given, H=largest(given))

    @property
    def choice(self) -> Choice:
        choice = choose(self.problem)
        assert choice is not None
        return replace(choice, layout=replace(choice.layout, save=self.direction == "training", paired=True))


PAIRS = [Case(*case) for case in pairwise(list(DEVICES), DIRECTIONS, list(KINDS), CELLS, [0, 128])]
EVERY = [
    Case(*case)
    for case in product(
        DEVICES, ("training", "backward"), ("bf16", "tf32", "fp32"), ("lstm", "gru", "gru_reset_before"), [0]
    )
]

CLUSTERS = [
    Case(arch, direction, kind, cell, H)
    for k, arch in enumerate(["sm_90a", "sm_100"])
    for direction, kind, cell, H in [
        ("training", ("fp16", "bf16")[k], "lstm", 256),
        ("inference", ("bf16", "fp16")[k], "lstm", 512),
        ("training", "tf32", ("gru", "lstm")[k], 256),
        ("training", "fp32", ("lstm", "gru")[k], 128),
        ("backward", ("bf16", "tf32")[k], "gru", (256, 128)[k]),
    ]
]
STEERED = [  # with every option
    Case(arch, direction, list(KINDS)[(i + k) % 4], ("lstm", "gru", "gru_reset_before")[(i + k) % 3], 0, True)
    for i, arch in enumerate(DEVICES)
    for k, direction in enumerate(["training", "backward"])
]

NORMALISED = [
    Case(arch, direction, kind, cell, hidden, norm=True)
    for arch, direction, kind, cell, hidden in pairwise(
        list(DEVICES), ["training", "backward"], list(KINDS), ["lstm", "gru", "gru_reset_before"], [0, 256]
    )
]


def check(case: Case, folder: Path, disassemble: bool = False) -> None:
    layout = group.fit(case.choice.layout, case.arch)  # what ships
    code = nvrtc.compile_cubin(source(layout), case.arch)
    found = cubin.usage(code)
    assert found.stack == 0
    assert found.registers * layout.threads <= 65536 and found.registers <= 255
    assert layout.shared_bytes <= SHARED_MEMORY[case.arch]
    assert cubin.end(code) == len(code)
    file = folder / "kernel.cubin"
    file.write_bytes(code)
    said = opened(file, "cuobjdump", "-res-usage")
    assert f"REG:{found.registers} STACK:{found.stack} " in said and layout.kernel in said
    if disassemble:
        assert f".text.{layout.kernel}" in opened(file, "nvdisasm", "-c")


@pytest.mark.compile("nvrtc")
@pytest.mark.parametrize(
    "case", [*spread(PAIRS, 4), *STEERED, *spread(NORMALISED, 4)], ids=lambda case: "-".join(map(str, case))
)
def test_builds(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path, disassemble=case in STEERED[::2])  # once an architecture: it takes more than a second


@pytest.mark.compile("nvrtc")
@pytest.mark.parametrize("case", CLUSTERS, ids=lambda case: "-".join(map(str, case)))
def test_clusters_build(case: Case, tmp_path: Path) -> None:
    """With room for as many as are taken to run at once; the machine code sends, counts, and names the blocks."""
    assert case.choice.layout.cluster
    check(case, tmp_path)
    said = opened(tmp_path / "kernel.cubin", "nvdisasm", "-c")
    assert "STAS" in said and "SYNCS.PHASECHK" in said and "UCGABAR_WAIT" in said


@pytest.mark.compile("nvrtc")
@pytest.mark.slow
@pytest.mark.parametrize("case", EVERY, ids=lambda case: "-".join(map(str, case)))
def test_builds_everywhere(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path, disassemble=True)


@pytest.mark.compile("nvrtc")
def test_weights_that_do_not_fit_in_registers_go_to_shared_memory() -> None:
    layout = Case("sm_90a", "training", "bf16", "lstm", 1024).choice.layout
    full = replace(layout, held=layout.share)
    assert cubin.usage(nvrtc.compile_cubin(source(full), "sm_90a")).stack
    fitted = group.fit(full, "sm_90a")
    assert fitted.held < full.held and fitted.shared_bytes > full.shared_bytes
    assert not cubin.usage(nvrtc.compile_cubin(source(fitted), "sm_90a")).stack


@pytest.mark.parametrize(
    "cell, kind, direction, least", [("lstm", "bf16", "training", 2048), ("lstm", "tf32", "training", 1024)]
)
def test_what_an_h100_holds(cell: str, kind: str, direction: str, least: int) -> None:
    problem = Case("sm_90a", direction, kind, cell, 0).problem
    assert problem.H >= least
    assert any("fits up to H" in reason for reason in group.unsupported(replace(problem, H=problem.H + 16)))
