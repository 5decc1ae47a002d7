# SPDX-License-Identifier: Apache-2.0
"""kernels/simulated.md beside the compiler: the cycles of a step, simulated from the machine code of what ships.

A step that grows by more than 5 % fails, as does a branch more between barrier and publication, a wait more for memory
before the first poll, and any access to local memory: in the loop of `resident`, anywhere in the others.

``python -m tests.backends.test_simulated_steps`` writes the page.
"""

from __future__ import annotations

import re
from functools import cache
from typing import NamedTuple

import pytest

from benchmarks import simulate
from benchmarks.simulating import machines, paths
from benchmarks.simulating.published import PUBLISHED, SOURCE
from benchmarks.simulating.tools import tool
from tests.backends.test_budgets import versions
from tests.support.paths import ROOT

PAGE = ROOT / "kernels" / "simulated.md"
BESIDE = PUBLISHED[1:]
TIMES = " and ".join(f"{each.us} µs with {each.heads} heads of {each.hidden} units" for each in BESIDE)
LONGER = 1.05  # of what is committed: compilers of one version differ by less where only the source's shape changes
HEAD = "backend | cell | dtype | pass | H | B | heads | cycles | µs | branches | early waits"
TEXT = f"""# Simulated steps

Cycles of a step on an H100, simulated from the machine code of the builds that ship, and microseconds at
{machines.H100.clock} GHz: no GPU ran them, nothing here was measured. Of `step` it is the pass of our kernel,
without its launch. In `ieee` fp32 multiplies in full. `branches` are regions between barrier and
publication, each of which waits by itself; `early waits` are for memory before the first look for the others' words.
[benchmarks/README.md](../benchmarks/README.md) says what is modelled. `python -m tests.backends.test_simulated_steps`
writes this page, and its tests hold it to the compiler: they fail where a step is more than 5 % longer, or where a
branch or an early wait is new.

Beside the rows of an LSTM in bf16, simulated: FlashRNN's Triton kernel takes
{TIMES}, measured by its authors
({SOURCE}).

Compilers: {{versions}}.
"""


class Step(NamedTuple):
    backend: str
    cell: str  # and its options
    dtype: str
    direction: str
    hidden: int
    batch: int
    heads: int = 1


class Chain(NamedTuple):
    cycles: int
    branches: int
    early: int


FLASHRNN = ((64, 12), (128, 6), (256, 3), (768, 1))  # units of a head and heads, as its authors time them
STEPS = [
    *(Step("group", "lstm", "fp16", direction, 768, 16) for direction in ("training", "backward")),
    *(Step("group", "lstm", "fp16", direction, 256, 64) for direction in ("training", "backward")),
    *(Step("group", "lstm", "fp16", direction, 512, 16) for direction in ("training", "backward")),
    *(Step("group", "lstm", "fp16", direction, 512, 64) for direction in ("training", "backward")),
    *(Step("group", "lstm", "fp16", direction, 1024, 64) for direction in ("training", "backward")),
    Step("group", "lstm", "fp16", "training", 2048, 64),
    Step("group", "gru", "fp16", "backward", 512, 64),
    *(Step("group", "gru_reset_before", "fp16", direction, 512, 64) for direction in ("training", "backward")),
    *(Step("group", "lstm", "fp16", "training", hidden, 16, 12) for hidden in (64, 128)),
    *(Step("group", "lstm", "bf16", "training", each.hidden, 16, each.heads) for each in BESIDE),
    *(Step("group", "slstm", "bf16", "training", hidden, 16, heads) for hidden, heads in FLASHRNN),
    *(Step("group", "slstm", "bf16", "backward", hidden, 16, heads) for hidden, heads in FLASHRNN),
    *(Step("group", "gru rms_norm", "bf16", direction, 512, 16, 8) for direction in ("training", "backward")),
    *(Step("group", "lstm layer_norm", "fp16", direction, 256, 64) for direction in ("training", "backward")),
    *(Step("group", "lstm", "ieee", direction, 256, 16) for direction in ("training", "backward")),
    *(Step("resident", "lstm", "bf16", "inference", hidden, 16) for hidden in (32, 64, 128)),
    *(Step("resident", "lstm", "bf16", "training", hidden, 16) for hidden in (64, 128)),
    *(Step("resident", "lstm", "bf16", "backward", hidden, 16) for hidden in (64, 128)),
    *(Step("step", "lstm", "fp16", direction, 1024, 64) for direction in ("training", "backward")),
]
FEW = [STEPS[0], STEPS[2], *(next(each for each in STEPS if each.backend == name) for name in ("resident", "step"))]


def arguments(step: Step) -> list[str]:
    """Of `benchmarks/simulate.py`."""
    cell, *options = step.cell.split()
    sizes = {"--cell": cell, "--dtype": step.dtype, "--hidden": step.hidden, "--batch": step.batch}
    sizes |= {"--heads": step.heads, "--pass": step.direction, "--backend": step.backend}
    words = [str(word) for pair in sizes.items() for word in pair]
    return words + [f"--{option.replace('_', '-')}" for option in options]


def measure(step: Step) -> Chain:
    """Raises AssertionError where the loop accesses local memory: how long that takes nobody knows."""
    _, (found,) = simulate.simulations(simulate.parser().parse_args(arguments(step)))
    kernel = found.kernel
    code, path = kernel.code, kernel.paths[0]
    assert paths.spills(code, path if step.backend == "resident" else range(len(code))) == 0
    if not kernel.hops:
        return Chain(round(found.cycles), 0, 0)
    return Chain(round(found.cycles), len(list(paths.regions(code, path))), len(list(paths.early_waits(code, path))))


def page(chains: dict[Step, Chain]) -> str:
    lines = [TEXT.format(versions=versions()), f"| {HEAD} |", "|---" * (HEAD.count("|") + 1) + "|"]
    for step, chain in chains.items():
        us = f"{chain.cycles / machines.H100.clock / 1e3:.2f}"
        lines.append("| " + " | ".join(map(str, [*step, chain.cycles, us, chain.branches, chain.early])) + " |")
    return "\n".join([*lines, ""])


@cache
def written() -> dict[Step, Chain]:
    """What the page says."""
    found = {}
    for line in PAGE.read_text().splitlines():
        cells = line.strip("| ").split(" | ")
        if cells[0] in ("group", "resident", "step"):
            sizes, (cycles, _, branches, early) = [int(cell) for cell in cells[4:7]], cells[7:]
            found[Step(*cells[:4], *sizes)] = Chain(int(cycles), int(branches), int(early))
    return found


def hold(chain: Chain, committed: Chain) -> None:
    """Whether a step is as good as the page says; it may be better."""
    assert chain.cycles <= LONGER * committed.cycles
    assert chain.branches <= committed.branches
    assert chain.early <= committed.early


def check(step: Step) -> None:
    if tool("nvdisasm") is None:
        pytest.skip("not found: nvdisasm, which is in Triton's wheel and in CUDA's toolkit")
    said = re.search(r"^Compilers: (.*)\.$", PAGE.read_text(), re.M)
    assert said
    if said[1] != versions():
        pytest.skip(f"the page was written with {said[1]}, and here is {versions()}")
    hold(measure(step), written()[step])


@pytest.mark.parametrize("worse", [Chain(1051, 2, 1), Chain(1000, 3, 1), Chain(1000, 2, 2)])
def test_what_is_worse_fails(worse: Chain) -> None:
    hold(Chain(1050, 2, 0), Chain(1000, 2, 1))
    with pytest.raises(AssertionError):
        hold(worse, Chain(1000, 2, 1))


def test_the_page_has_every_step() -> None:
    assert set(written()) == set(STEPS) >= set(FEW)


@pytest.mark.compile
@pytest.mark.compile("nvrtc")
@pytest.mark.parametrize("step", FEW, ids=lambda step: "-".join(map(str, step)))
def test_steps_are_no_longer(step: Step) -> None:
    check(step)


@pytest.mark.compile
@pytest.mark.compile("nvrtc")
@pytest.mark.slow
@pytest.mark.parametrize("step", [step for step in STEPS if step not in FEW], ids=lambda step: "-".join(map(str, step)))
def test_all_steps_are_no_longer(step: Step) -> None:
    check(step)


if __name__ == "__main__":
    PAGE.write_text(page({step: measure(step) for step in STEPS}))
