# SPDX-License-Identifier: Apache-2.0
"""kernels/budgets.md beside the compiler: what a thread and a block of each build take of a multiprocessor.

``python -m tests.backends.test_budgets`` builds all of them and writes the page.
"""

from __future__ import annotations

import re
from functools import cache
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import pytest

from gpu_rnn.backends import resident
from gpu_rnn.backends.group import cubin, nvrtc
from gpu_rnn.backends.group import launch as group
from gpu_rnn.backends.group.layout import source
from tests.backends import test_resident_builds as resident_builds
from tests.backends.group.test_builds import DEVICES as GROUP_ARCHITECTURES
from tests.backends.group.test_builds import Case
from tests.support.paths import ROOT

PAGE = ROOT / "kernels" / "budgets.md"
ROWS = 64  # of the batch
HALF = "projected"  # h, to half of the units
HEAD = "cell | kind | direction | architectures | H | blocks × groups | threads | registers | shared memory, KiB"
TEXT = f"""# Budgets

What each build takes: registers of a thread, shared memory of a block. At the largest H that its kernel takes, and
{ROWS} rows of a batch; "{HALF}": h is, to half of the units. `tests/backends/test_budgets.py` counts them in compiled
code, and its tests hold this page to the compiler; `python -m tests.backends.test_budgets` writes it.
[README.md](README.md) says what sets the limits.

Compilers: {{versions}}.
"""


class Build(NamedTuple):
    """Of a kernel, with whatever the launcher chooses."""

    kernel: str
    cell: str
    kind: str
    direction: str
    architecture: str


class Budget(NamedTuple):
    """What a build takes. `blocks` share a tile of the batch, in so many groups; `shared` is in KiB."""

    H: int
    blocks: int
    groups: int
    threads: int
    shared: int
    registers: range


KINDS = ("bf16", "tf32", "fp32")
DIRECTIONS = ("training", "backward")
SHIPPED = [
    *(Build("resident", *rest) for rest in product(
        ("lstm", "gru", "rnn"), KINDS, DIRECTIONS, map(str, resident_builds.ARCHITECTURES)
    )),
    *(Build("group", *rest) for rest in product(
        ("lstm", "gru", "gru_reset_before"), KINDS, DIRECTIONS, GROUP_ARCHITECTURES
    )),
    *(Build("resident", f"lstm {HALF}", *rest) for rest in product(
        KINDS[:2], DIRECTIONS, map(str, resident_builds.ARCHITECTURES)  # in full fp32 some touch local memory
    )),
]  # fmt: skip
FEW = [SHIPPED[k] for k in (3, 32, 64, 111, 138, 171)]  # of both kernels, each on another architecture


def measure(build: Build, folder: Path) -> Budget:
    """Raises AssertionError where a build leaves something in local memory: of `resident` within its time loop."""
    if build.kernel == "resident":
        cell, _, projected = build.cell.partition(" ")
        where = (cell, build.kind, build.direction, int(build.architecture))
        half = resident_builds.HALF if projected else ""
        problem = resident_builds.problem(*where, resident_builds.limit(*where, half), projected=half)
        compiled, tile = resident_builds.build(problem, folder), resident.tile(problem)
        assert compiled.spills == 0
        tiles, registers = -(-ROWS // tile.rows), compiled.registers
        return Budget(problem.H, 1, tiles, 32 * tile.warps, compiled.shared // 1024, range(registers, registers + 1))
    case = Case(build.architecture, build.direction, build.kind, build.cell, 0)
    assert case.problem.B == ROWS
    layout = group.fit(case.choice.layout, build.architecture)
    registers, stack = cubin.usage(nvrtc.compile_cubin(source(layout), build.architecture))
    assert stack == 0
    shared = layout.shared_bytes // 1024
    return Budget(
        case.problem.H, layout.members, case.choice.groups, layout.threads, shared, range(registers, registers + 1)
    )


def versions() -> str:
    import triton

    return f"Triton {triton.__version__}, NVRTC {nvrtc.version()}"


def page(budgets: dict[Build, Budget]) -> str:
    """Builds of all else alike share a row."""
    rows: dict[tuple[Build, Budget], list[tuple[str, int]]] = {}
    for build, budget in budgets.items():
        alike = build._replace(architecture=""), budget._replace(registers=range(0))
        rows.setdefault(alike, []).append((build.architecture.removeprefix("sm_"), budget.registers.start))
    lines = [TEXT.format(versions=versions())]
    for kernel in dict.fromkeys(build.kernel for build in budgets):
        lines += [f"## {kernel}", "", f"| {HEAD} |", "|---" * (HEAD.count("|") + 1) + "|"]
        for (build, budget), each in rows.items():
            if build.kernel != kernel:
                continue
            architectures, registers = ", ".join(name for name, _ in each), sorted({count for _, count in each})
            span = " to ".join(map(str, dict.fromkeys((registers[0], registers[-1]))))
            size = f"{budget.blocks} × {budget.groups}"
            cells = (build.cell, build.kind, build.direction, architectures, budget.H, size, budget.threads, span)
            lines.append("| " + " | ".join(map(str, [*cells, budget.shared])) + " |")
        lines.append("")
    return "\n".join(lines)


@cache
def written() -> dict[Build, Budget]:
    """What the page says."""
    found, kernel = {}, ""
    for line in PAGE.read_text().splitlines():
        if line.startswith("## "):
            kernel = line[3:]
        if not line.startswith("|") or line in (f"| {HEAD} |", "|---" * (HEAD.count("|") + 1) + "|"):
            continue
        cell, kind, direction, architectures, hidden, size, threads, span, shared = line.strip("| ").split(" | ")
        blocks, groups = map(int, size.split(" × "))
        first, last = int(span.split(" to ")[0]), int(span.split(" to ")[-1])
        budget = Budget(int(hidden), blocks, groups, int(threads), int(shared), range(first, last + 1))
        for name in architectures.split(", "):
            name = f"sm_{name}" if kernel == "group" else name
            found[Build(kernel, cell, kind, direction, name)] = budget
    return found


def hold(build: Build, folder: Path) -> None:
    said = re.search(r"^Compilers: (.*)\.$", PAGE.read_text(), re.M)
    assert said
    if said[1] != versions():
        pytest.skip(f"the page was written with {said[1]}, and here is {versions()}")
    found, budget = measure(build, folder), written()[build]
    assert found._replace(registers=budget.registers) == budget
    assert found.registers.start in budget.registers


def test_the_page_has_every_build() -> None:
    assert set(written()) == set(SHIPPED) >= set(FEW)


@pytest.mark.compile
@pytest.mark.compile("nvrtc")
@pytest.mark.parametrize("build", FEW, ids="-".join)
def test_budgets_are_the_compilers(build: Build, tmp_path: Path) -> None:
    hold(build, tmp_path)


@pytest.mark.compile
@pytest.mark.compile("nvrtc")
@pytest.mark.slow
@pytest.mark.parametrize("build", SHIPPED, ids="-".join)
def test_all_budgets_are_the_compilers(build: Build, tmp_path: Path) -> None:
    hold(build, tmp_path)


if __name__ == "__main__":
    with TemporaryDirectory() as scratch:
        PAGE.write_text(page({build: measure(build, Path(scratch)) for build in SHIPPED}))
