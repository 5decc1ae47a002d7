# SPDX-License-Identifier: Apache-2.0
"""The decoder of control codes, and the model of a multiprocessor on programs whose cycles can be counted by hand."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks.simulating.instructions import NONE, Instruction, control, disassemble, loops, parse
from benchmarks.simulating.machines import Machine
from benchmarks.simulating.multiprocessor import Multiprocessor, Run
from benchmarks.simulating.tools import tool
from benchmarks.simulating.units import Unit, unit_of, waves

MACHINE = Machine(
    load=500, shared=29, matrix=33, constant=30, shuffle=24, special=22, special_busy=8, tensor=24, tensor_busy=7,
    operands=11, barrier=25, branch=8,
)  # fmt: skip

LISTING = """
.text.first:
.L_x_0:
        /*0000*/                   LDG.E.64 R2, [R4.64] ;       /* 0x0000000604027981 */
                                                                /* 0x000ea2000c1e1b00 */
.text.second:
        /*0000*/                   MOV R1, 0x1 ;                /* 0x0000000100017802 */
                                                                /* 0x000fe40000000f00 */
.L_x_1:
        /*0010*/               @!P0 FADD R0, R2, R3 ;           /* 0x0000000302007221 */
                                                                /* 0x004fca0000000000 */
        /*0020*/              @P1  BRA `(.L_x_1) ;              /* 0xffffffe000007947 */
                                                                /* 0x000fea000383ffff */
"""


def instruction(op: str, stall: int = 1, operands: str = "", **rest: object) -> Instruction:
    given = {"writes": NONE, "reads": NONE, "waits": ()} | rest
    return Instruction(0, "", op, operands, stall, **given)  # type: ignore[arg-type]


def run(*program: Instruction, warps: int = 1, steps: int = 2, machine: Machine = MACHINE) -> Run:
    paths = [range(len(program))] * warps
    return Multiprocessor(program, paths, machine).run(steps)


def times(result: Run, warp: int = 0, step: int = 0) -> list[float]:
    return [issue.time for issue in result.issues if (issue.warp, issue.step) == (warp, step)]


def test_control_codes() -> None:
    """Fields are those that the assembler CuAssembler prints as B------:R-:W2:Y:S01 and the like."""
    assert control(0x000EA2000C1E1B00) == control(0x000EA2 << 40)
    load = control(0x000EA2000C1E1B00)
    assert (load.stall, load.writes, load.reads, load.waits) == (1, 2, NONE, ())
    add = control(0x004FCA0000000000)
    assert (add.stall, add.writes, add.reads, add.waits) == (5, NONE, NONE, (2,))


def test_a_listing_is_read_by_kernel() -> None:
    (load,) = parse(LISTING)
    assert (load.op, load.operands, load.base, load.writes) == ("LDG.E.64", "R2, [R4.64]", "LDG", 2)
    move, add, branch = parse(LISTING, "second")
    assert (move.op, add.predicate, add.waits, add.address) == ("MOV", "@!P0", (2,), 16)
    assert branch.target == 1 and loops([move, add, branch]) == [range(1, 3)]
    with pytest.raises(ValueError, match="no machine code of a kernel third"):
        parse(LISTING, "third")


def test_units() -> None:
    assert unit_of(instruction("MUFU.EX2")) is Unit.SPECIAL and unit_of(instruction("UIADD3")) is Unit.UNIFORM
    with pytest.raises(ValueError, match="no unit is known for XYZ"):
        unit_of(instruction("XYZ.W"))
    assert [waves(instruction(op)) for op in ("LDS", "LDS.64", "STG.E.128", "LDSM.16.M88.4")] == [1, 2, 4, 4]


def test_stalls_are_the_compilers() -> None:
    result = run(instruction("FADD", 4), instruction("FADD", 2), instruction("FADD", 1))
    assert times(result) == [0, 4, 6]
    assert result.cycles == 7


@pytest.mark.parametrize(
    ("op", "cycles"), [("LDS", 29), ("LDSM.16.M88.4", 36), ("SHFL.BFLY", 26), ("LDG.E", 502), ("MUFU.RCP", 22)]
)
def test_a_scoreboard_waits_for_the_result(op: str, cycles: int) -> None:
    result = run(instruction(op, 1, writes=3), instruction("FADD", 1, waits=(3,)))
    assert times(result) == [0, cycles]
    waiting = result.issues[1]
    assert (waiting.reason, waiting.cause) == ("scoreboard", 0)
    assert [result.issues.index(issue) for issue in result.critical_path()][:1] == [1]


def test_operands_are_read_before_a_register_is_written_again() -> None:
    assert times(run(instruction("STG.E", 1, reads=1), instruction("MOV", 1, waits=(1,)))) == [0, 13]


def test_sub_cores_issue_side_by_side_and_warps_of_one_take_turns() -> None:
    program = [instruction("FFMA", 1)] * 8
    assert run(*program, warps=4).ends[0] == 7
    assert run(*program, warps=8, steps=1).ends[0] == 15
    assert {issue.warp for issue in run(*program, warps=8).issues[:64]} == {4, 5, 6, 7}  # who began goes on
    half_as_often = [instruction("LOP3", 1)] * 8
    assert times(run(*half_as_often)) == [*range(0, 16, 2)]
    assert run(*half_as_often).issues[1].reason in ("alu", "stall")


def test_special_functions_of_a_sub_core_queue() -> None:
    program = [*[instruction("MUFU.EX2", 1, writes=0)] * 3, instruction("FADD", 1, waits=(0,))]
    assert times(run(*program))[-1] == 2 * 8 + 22
    assert times(run(*program, warps=2))[-1] == 2 * 8 + 22  # another sub-core's


@pytest.mark.parametrize("warps", [2, 8])
def test_who_comes_last_to_a_barrier_lets_all_go_on(warps: int) -> None:
    late = [instruction("FADD", 15)] * 4
    program = [*late, instruction("BAR.SYNC", 1, "0x0"), instruction("FADD", 1)]
    paths = [range(6) if warp == 1 else range(4, 6) for warp in range(warps)]
    result = Multiprocessor(program, paths, MACHINE).run(2)
    after = [times(result, warp)[-1] for warp in range(warps)]
    late_by = 60 + (warps > 4)  # a younger warp of the sub-core begins
    assert min(after) == late_by + 25 and max(after) <= late_by + 25 + warps // 4
    waited = next(issue for issue in result.issues if issue.warp == 0 and issue.index == 5)
    assert waited.reason == "barrier" and result.issues[waited.cause].warp == 1


def test_blocks_that_share_a_multiprocessor_meet_at_barriers_of_their_own() -> None:
    program = [instruction("FADD", 15), instruction("BAR.SYNC", 1, "0x0"), instruction("FADD", 1)]
    paths = [range(1, 3), range(1, 3), range(3), range(3)]
    assert [times(Multiprocessor(program, paths, MACHINE, blocks=2).run(2), warp)[-1] for warp in range(4)] == [
        25, 25, 40, 40,
    ]  # fmt: skip
    assert [times(Multiprocessor(program, paths, MACHINE).run(2), warp)[-1] for warp in range(4)] == [40] * 4


def test_a_named_barrier_is_its_own_warps() -> None:
    program = [instruction("FADD", 15), instruction("BAR.SYNC", 1, "R1, 0x40"), instruction("FADD", 1)]
    paths = [range(1, 3), range(1, 3), range(3), range(3)]
    result = Multiprocessor(program, paths, MACHINE).run(2)
    assert [times(result, warp)[-1] for warp in range(4)] == [25, 25, 40, 40]


def test_warps_that_wait_for_ever_are_said() -> None:
    program = [instruction("BAR.SYNC", 1, "0x0"), instruction("FADD", 1)]
    with pytest.raises(RuntimeError, match="wait for each other for ever"):
        Multiprocessor(program, [range(2), range(1, 2)], MACHINE).run(2)


def test_asynchronous_copies_are_waited_for_by_group() -> None:
    """The first wait lets one group be under way, the second none."""
    copies = [instruction("LDGSTS.E.128", 1), instruction("LDGDEPBAR", 1)]
    wait = [instruction("DEPBAR.LE", 1, f"SB0, {count}") for count in ("0x1", "0x0")]
    result = run(*copies, instruction("FADD", 15), *copies, wait[0], wait[1], steps=2)
    first, second = times(result)[-2:]
    assert first == 2 + 500 and second == 17 + 2 + 500


def test_a_taken_branch_costs() -> None:
    program = [instruction("BRA", 5, target=2), instruction("FADD"), instruction("FADD")]
    result = Multiprocessor(program, [[0, 2]], replace(MACHINE, branch=8)).run(2)
    assert times(result) == [0, 8]


@pytest.mark.compile
def test_a_loop_of_the_compilers(tmp_path: Path) -> None:
    """Of machine code that ships: each instruction has a unit, and a step takes as long as all its instructions."""
    from tests.backends import test_resident_builds as builds

    nvdisasm = tool("nvdisasm")
    if nvdisasm is None:
        pytest.skip("not found: nvdisasm, which is in Triton's wheel and in CUDA's toolkit")
    builds.build(builds.problem("lstm", "fp16", "training", 90, 32), tmp_path)
    code = disassemble(tmp_path / "kernel.cubin", nvdisasm)
    loop = loops(code)[0]
    assert any(code[k].base == "HMMA" for k in loop)
    result = Multiprocessor(code, [list(loop)] * 4, MACHINE).run(6)
    assert len(loop) < result.cycles < 4 * len(loop) + 10 * MACHINE.load
    path = result.critical_path()
    assert all(first.time <= second.time for first, second in pairwise(path))
