# SPDX-License-Identifier: Apache-2.0
"""What a step of the group kernel must not wait for, read in the machine code of LSTM, float16, H = 768, 16 rows, H100.

C++ says little of it: a value that is converted when it is loaded is waited for there, and a condition in a loop makes
a branch of each turn.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from benchmarks.simulating import builds, paths
from benchmarks.simulating.instructions import Instruction, disassemble, loops
from benchmarks.simulating.tools import tool
from gpu_rnn.backends.group import launch as group
from gpu_rnn.backends.group import nvrtc
from gpu_rnn.backends.group.choice import choose
from gpu_rnn.backends.group.layout import source
from tests.backends.group.test_builds import Case

pytestmark = pytest.mark.compile("nvrtc")
BRANCHES = ("BRA", "BSSY", "CALL")
PASSES = pytest.mark.parametrize("direction", ["training", "backward"])


@cache
def step(direction: str) -> list[Instruction]:
    """The time loop: of all loops with a barrier the shortest. Polls are loops in it."""
    nvdisasm = tool("nvdisasm")
    if nvdisasm is None:
        pytest.skip("not found: nvdisasm, which is in Triton's wheel and in CUDA's toolkit")
    choice = choose(replace(Case("sm_90a", direction, "fp16", "lstm", 768).problem, B=16))
    assert choice is not None and choice.layout.along == 8
    layout = group.fit(replace(choice.layout, save=direction == "training", paired=True), "sm_90a")
    with TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(nvrtc.compile_cubin(source(layout), "sm_90a"))
        code = disassemble(cubin, nvdisasm, layout.kernel)
    around = [loop for loop in loops(code) if any(code[k].base == "BAR" for k in loop)]
    return [code[k] for k in min(around, key=len)]


def first(code: list[Instruction], base: str) -> int:
    return next(k for k, each in enumerate(code) if each.base == base)


@PASSES
def test_sums_of_other_warps_come_as_vectors_and_in_one_region(direction: str) -> None:
    code = step(direction)
    reads = [k for k, each in enumerate(code) if each.base == "LDS" and k > first(code, "BAR")]
    assert {code[k].op for k in reads} <= {"LDS.64", "LDS.128"}
    assert not any(each.base in BRANCHES for each in code[reads[0] : reads[-1]])


@PASSES
def test_activations_call_no_division(direction: str) -> None:
    assert not any(each.base == "CALL" for each in step(direction))


@PASSES
def test_what_is_prefetched_is_not_looked_at_before_the_barrier(direction: str) -> None:
    code = step(direction)
    barrier = first(code, "BAR")
    loads = [k for k in range(barrier) if code[k].base == "LDG" and "STRONG" not in code[k].op]
    assert len(loads) >= 4
    for load in loads:
        register = re.match(r"R\d+", code[load].operands)
        assert register
        looked = [str(each) for each in code[load + 1 : barrier] if re.search(rf"\b{register[0]}\b", each.operands)]
        assert not looked, (str(code[load]), looked)


def test_the_first_look_at_words_is_unconditional() -> None:
    code = step("training")
    words = 768 // 16 // 8 * 2  # of a lane: two for each block of a warp's depth
    polls = [k for k, each in enumerate(code) if each.op.startswith("LDG.E.STRONG")][:words]
    assert len(polls) == words and not any(code[k].predicate for k in polls)
    assert not any(each.base in BRANCHES for each in code[polls[0] : polls[-1]])


def test_what_is_loaded_before_the_loop_is_not_waited_for_in_it() -> None:
    """A row's length: later loads count on its scoreboard too, so a wait for it is one for them (GRU, 1,024 units)."""
    problem = replace(Case("sm_90a", "training", "fp16", "gru", 1024).problem, B=16)
    (kernel,) = builds.kernels(problem, "group")
    assert not list(paths.early_waits(kernel.code, kernel.paths[0]))
