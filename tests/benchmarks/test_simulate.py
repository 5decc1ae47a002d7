# SPDX-License-Identifier: Apache-2.0
"""The way through a time loop, the words between blocks, and the command that simulates what a problem gets."""

from __future__ import annotations

import re
import sys
from dataclasses import fields, replace

import pytest

from benchmarks import simulate
from benchmarks.simulating import builds, machines, paths, published, report
from benchmarks.simulating.exchange import Exchange
from benchmarks.simulating.instructions import NONE, Instruction
from benchmarks.simulating.multiprocessor import Multiprocessor
from benchmarks.simulating.paths import Lost, Turn
from benchmarks.simulating.tools import tool
from gpu_rnn import devices
from tests.support.paths import ROOT

H100 = machines.of("H100")
HOP = 1000


def instruction(op: str, operands: str = "", **rest: object) -> Instruction:
    given = {"predicate": "", "stall": 1, "writes": NONE, "reads": NONE, "waits": (), "target": None} | rest
    return Instruction(address=0, op=op, operands=operands, **given)  # type: ignore[arg-type]


def branch(target: int, predicate: str = "@P0") -> Instruction:
    return instruction("BRA", predicate=predicate, target=target)


ADD, POLL, PUBLISH = instruction("FADD"), "LDG.E.STRONG.GPU", instruction("STG.E.STRONG.GPU")
LOOK, USE = instruction(POLL, writes=0), instruction("FADD", waits=(0,))


def through(*program: Instruction, owner: bool = True, rounds: int | None = None) -> list[int]:
    return paths.through([*program, branch(0)], Turn(range(len(program) + 1), owner, rounds))


@pytest.mark.parametrize(
    "rare",
    [
        [instruction("CALL.REL"), branch(4, "")],
        [PUBLISH, instruction("MEMBAR.ALL.GPU")],
        [instruction("CS2R", "R2, SR_GLOBALTIMERLO"), ADD],
        [instruction(POLL), branch(2)],
    ],
    ids=["slow path", "fence", "clock", "poll again"],
)
def test_what_hardly_ever_happens_is_skipped(rare: list[Instruction]) -> None:
    assert through(ADD, branch(4), *rare, ADD) == [0, 1, 4, 5]


def test_what_happens_in_every_step_is_followed() -> None:
    assert through(branch(3), ADD, PUBLISH, ADD) == [*range(5)]
    assert through(branch(3, ""), ADD, PUBLISH, ADD) == [0, 3, 4]
    assert through(branch(99), ADD) == [*range(3)]  # out of the loop
    assert through(LOOK, branch(0), ADD) == [*range(4)]  # looks again


def test_a_first_look_is_followed_where_only_some_warps_look() -> None:
    """Of layer normalisation's sums, which owners collect: a look, and a loop that looks again."""
    sums = branch(6), LOOK, branch(5), LOOK, branch(3), USE, ADD
    assert through(*sums) == [0, 1, 2, 5, 6, 7]


def test_who_owns_nothing_skips_the_work_after_the_barrier() -> None:
    program = branch(2), PUBLISH, instruction("BAR.SYNC"), branch(6), ADD, PUBLISH, ADD
    assert through(*program) == [*range(8)]
    assert through(*program, owner=False) == [0, 1, 2, 3, 6, 7]


def test_who_owns_nothing_takes_part_in_the_next_tile() -> None:
    tile = [branch(4), LOOK, instruction("HMMA.16816.F32"), instruction("LDS")]
    program = instruction("BAR.SYNC"), branch(5), *tile[1:], branch(7), PUBLISH
    assert through(*program, owner=False) == [0, 1, 2, 3, 4, 5, 7]
    assert through(*program) == [*range(8)]


def test_products_go_round_as_often_as_they_must() -> None:
    product = instruction("HMMA.16816.F32")
    program = product, ADD, product, product, branch(2), ADD
    code, loop = [*program, branch(0)], range(7)
    assert paths.time_loop(code) == loop
    assert paths.rounds(code, loop, total=7) == 3
    assert through(*program, rounds=3) == [0, 1, 2, 3, 4, 2, 3, 4, 2, 3, 4, 5, 6]
    with pytest.raises(Lost, match="make no 6 a step"):
        paths.rounds(code, loop, total=6)
    with pytest.raises(Lost, match="a loop of products"):
        through(*program)


def test_products_one_by_one_go_round_too() -> None:
    """Full fp32: fused multiply-adds, of which the activations have some. Its loop is the one with the barrier."""
    product, other = instruction("FFMA"), instruction("FFMA")
    program = LOOK, product, product, product, branch(1), instruction("BAR.SYNC"), other
    code, loop = [*program, branch(0), branch(0)], range(8)
    assert paths.time_loop(code) == loop
    assert paths.rounds(code, loop, total=6, operation="FFMA") == 2
    path = through(*program, rounds=2)
    assert path == [0, 1, 2, 3, 4, 1, 2, 3, 4, 5, 6, 7]
    paths.complete(code, path, 6, "FFMA")


def test_a_loop_of_all_products_is_within_the_time_loop() -> None:
    """None of them stands outside where shared memory holds all weights."""
    product = instruction("HMMA.16816.F32")
    for end in (instruction("BAR.SYNC"), PUBLISH):
        code = [LOOK, product, branch(0), end, branch(0)]
        assert paths.time_loop(code) == range(5)
    error = replace(PUBLISH, predicate="@P0")
    assert paths.time_loop([LOOK, product, error, branch(0), PUBLISH, branch(0)]) == range(6)
    assert paths.time_loop([LOOK, product, branch(0), ADD, branch(0)]) == range(3)


def test_a_way_that_misses_products_is_lost() -> None:
    product = instruction("HMMA.16816.F32")
    paths.complete([product, ADD, product], range(3), 2)
    for path in (range(2), [0, 0, 2]):
        with pytest.raises(Lost, match="where a step has 2"):
            paths.complete([product, ADD, product], path, 2)


def test_lost_where_no_rule_speaks() -> None:
    with pytest.raises(Lost, match="BRX at 0x0"):
        through(ADD, instruction("BRX"))
    with pytest.raises(Lost, match="no loop"):
        paths.time_loop([ADD])
    with pytest.raises(Lost, match="a loop within"):
        paths.straight([ADD, ADD, branch(1), branch(0)], range(4))


def run(program: list[Instruction], warps: list[list[int]], hops: int = 1) -> Multiprocessor:
    return Multiprocessor(program, warps, replace(H100, l2=100), Exchange(program, warps, HOP, hops))


def test_a_word_takes_a_hop() -> None:
    """Publication of one step, hop, and what is done with the word until the next."""
    program = [LOOK, USE, PUBLISH]
    result = run(program, [[0, 1, 2]]).run(6)
    assert result.cycles == HOP + 1
    assert HOP in [round(wait.cycles) for wait in report.waits(report.Simulation(kernel(program), H100, result))]


def kernel(program: list[Instruction]) -> builds.Kernel:
    return builds.Kernel("test", program, [range(len(program))], hops=1)


@pytest.mark.parametrize("busy", [1, 400])
def test_tiles_take_turns(busy: int) -> None:
    """While one tile's words travel the other is worked on: a step is a hop, or both tiles' work."""
    work = [instruction("FADD", stall=10)] * busy
    tile = [LOOK, USE, *work, PUBLISH, instruction("BAR.SYNC", "0x0")]
    program = [*tile, *tile]
    result = run(program, [[*range(len(program))]]).run(8)
    wanted = max(HOP + 10 * busy, 2 * 10 * busy)
    assert wanted <= result.cycles <= wanted + 300  # two loads from L2 and two barriers


@pytest.mark.parametrize("joins", [1, 2])
@pytest.mark.parametrize("busy", [1, 400])
def test_tiles_look_ahead(busy: int, joins: int) -> None:
    """The same where the next tile's words are sent for before a tile's sums are joined; one warp owns nothing."""
    product, work = [USE, instruction("HMMA.16816.F32"), LOOK], [instruction("FADD", stall=10)] * busy
    tile = [*product, *[instruction("BAR.SYNC", "0x0")] * joins, *work, PUBLISH]
    program = [*tile, *tile]
    idle = [k for k in range(len(program)) if k % len(tile) < len(product) + joins]
    result = run(program, [[*range(len(program))], idle]).run(8)
    wanted = max(HOP + 10 * busy, 2 * 10 * busy)
    assert wanted <= result.cycles <= wanted + 300


@pytest.mark.parametrize("tiles", [1, 2])
def test_a_second_product_waits_for_the_first_ones_words(tiles: int) -> None:
    """Two hops a step, though each tile's words may travel while another is worked on."""
    tile = [LOOK, USE, PUBLISH, instruction("BAR.SYNC", "0x0")]
    program = 2 * tiles * tile
    result = run(program, [[*range(len(program))]], hops=2).run(8)
    assert 2 * HOP <= result.cycles <= 2 * HOP + 200 * tiles


def test_a_loop_may_begin_with_its_stores() -> None:
    assert run([PUBLISH, LOOK, USE], [[0, 1, 2]]).run(6).cycles == HOP + 1


def test_all_wait_for_who_publishes_last() -> None:
    """Also a warp that looks for the word long before, and owns nothing."""
    program = [LOOK, USE, instruction("FADD", stall=15), PUBLISH]
    result = run(program, [[0, 1, 3], [0, 1, 2, 3], [0, 1]]).run(6)
    assert result.cycles == pytest.approx(HOP + 2 + 15, abs=2)
    used = [issue.time for issue in result.issues if (issue.index, issue.step) == (1, 4)]
    assert len(used) == 3 and max(used) - min(used) <= 2


SEND, COME = instruction("STAS"), instruction("SYNCS.PHASECHK.TRANS64.TRYWAIT", "P2, [R1+URZ], R2", writes=0)


def test_a_word_to_a_clusters_blocks_takes_the_way_to_them() -> None:
    """As often as there are blocks, one after another through the same door; then all of them have seen all."""
    wave = 128 / H100.remote_bytes
    for blocks in (1, 16):
        program = [COME, USE, *[SEND] * blocks]
        cycles = run(program, [[*range(len(program))]]).run(6).cycles
        assert cycles == pytest.approx(H100.remote + blocks * wave, abs=6)


def test_the_look_whether_words_have_come_is_not_skipped() -> None:
    clock = instruction("CS2R", "R2, SR_GLOBALTIMERLO")
    program = branch(5), COME, branch(5), clock, branch(1), ADD
    assert through(*program) == [0, 1, 2, 5, 6]


def test_no_cluster_on_a_device_without(monkeypatch: pytest.MonkeyPatch) -> None:
    program = [COME, USE, SEND]
    with pytest.raises(Lost, match="from block to block"):
        report.simulate(kernel(program), replace(H100, remote=None))
    assert report.simulate(kernel(program), replace(H100, hop=None)).cycles < HOP


def test_every_branch_between_barrier_and_publication_is_counted() -> None:
    program = [branch(1), instruction("BAR.SYNC"), branch(3), ADD, PUBLISH, branch(6), ADD]
    assert [*paths.regions(program, range(7))] == [2]


def test_loads_that_are_waited_for_before_the_first_poll_are_counted() -> None:
    load = instruction("LDG.E", writes=3)
    early = [load, instruction("FADD", waits=(3,)), LOOK]
    late = [load, LOOK, instruction("FADD", waits=(3,))]
    assert ([*paths.early_waits(early, range(3))], [*paths.early_waits(late, range(3))]) == ([1], [])


def test_simulated_beside_published(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The command's table without the package; the one in the README has a row for each published figure."""
    program = [instruction("FADD"), branch(0)]
    result = Multiprocessor(program, [[0, 1]], H100).run(4)
    simulation = report.Simulation(kernel(program), H100, result)
    monkeypatch.setattr(published, "fetch", lambda folder: None)
    monkeypatch.setattr(published, "simulated", lambda module, hidden, heads: simulation)
    asked(monkeypatch, "--validate")
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("| 32 ", "| 64 ", "| 128 "))]
    readme = (ROOT / "benchmarks" / "README.md").read_text()
    for row, each in zip(rows, published.PUBLISHED, strict=True):
        assert f"| {each.us:.2f} |" in row
        assert re.search(rf"^\| {each.hidden} \| {each.heads} \| [0-9.]+ \| {each.us:.2f} \| [0-9.]+ \|$", readme, re.M)


def test_figures_are_entered_for_devices_that_are_described() -> None:
    with pytest.raises(ValueError, match=r"no published latencies are entered for B200.*H100, H200"):
        machines.of("B200")
    assert {each.name for each in fields(H100)} >= {"clock", "hop"} and None not in vars(H100).values()


@pytest.mark.parametrize("device", ["A100", "RTX 4090"])
def test_a_hop_that_nobody_published_is_called_predicted(device: str) -> None:
    """As many latencies of L2 as an H100's."""
    machine = machines.of(device)
    assert machine.hop and machine.l2 and H100.hop and H100.l2
    assert machine.hop * machine.clock / machine.l2 == pytest.approx(H100.hop * H100.clock / H100.l2)
    program = [LOOK, USE, PUBLISH]
    exchange = Exchange(program, [[0, 1, 2]], machine.hop * machine.clock * 1e9)
    result = Multiprocessor(program, [[0, 1, 2]], machine, exchange).run(6)
    said = [[*report.lines(report.Simulation(kernel(program), each, result))] for each in (machine, H100)]
    assert ["is predicted for this device" in " ".join(lines) for lines in said] == [True, False]


def asked(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["simulate.py", *arguments])
    simulate.main()


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("--backend", "aten"), "aten is not followed: aten launches no kernel of this library"),
        (("--device", "B200"), "no published latencies are entered for B200"),
        (("--device", "none"), "no description of a device 'none'"),
    ],
)
def test_the_command_says_where_it_cannot_follow(
    monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], said: str
) -> None:
    with pytest.raises(SystemExit, match=said):
        asked(monkeypatch, "--hidden", "64", "--batch", "16", *arguments)


def test_the_command_asks_for_sizes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        asked(monkeypatch, "--hidden", "64")
    assert "give --hidden and --batch" in capsys.readouterr().err


@pytest.mark.compile
@pytest.mark.parametrize("backend, names", [("resident", "resident_backward"), ("step", "step_backward")])
def test_the_command_reports(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], backend: str, names: str
) -> None:
    if tool("nvdisasm") is None:
        pytest.skip("not found: nvdisasm, which is in Triton's wheel and in CUDA's toolkit")
    arguments = ("--hidden", "32", "--batch", "16", "--pass", "backward", "--backend", backend)
    asked(monkeypatch, *arguments)
    said = capsys.readouterr().out
    assert report.LABEL in said and f"{names}: " in said and "critical path" in said
    asked(monkeypatch, *arguments, "--csv")
    *_, last = capsys.readouterr().out.strip().split(",")
    assert (last == "") == (backend == "step") and (backend == "step" or 0.5 < float(last) < 10)


@pytest.mark.compile
def test_blocks_side_by_side(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """As many as fit work side by side, in less time than one after the other; the rest comes after them."""
    if tool("nvdisasm") is None:
        pytest.skip("not found: nvdisasm, which is in Triton's wheel and in CUDA's toolkit")
    arguments = ("--hidden", "32", "--backend", "resident", "--batch")
    asked(monkeypatch, *arguments, str(16 * 132), "--csv")
    alone = float(capsys.readouterr().out.strip().rpartition(",")[2])
    asked(monkeypatch, *arguments, str(16 * 132 * 3))
    said = capsys.readouterr().out
    assert "3 blocks on a multiprocessor" in said
    beside = float(re.search(r"([0-9.]+) µs at", said)[1])  # type: ignore[index]
    assert alone < beside < 3 * alone


def test_how_many_blocks_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """By registers in units of eight, by shared memory and what the system takes of it, by threads."""
    monkeypatch.setattr(builds, "registers_of", lambda file: 123)
    h100, ada = devices.describe("H100"), devices.describe("RTX 4090")
    assert builds.together(b"", 8, 1000, h100) == 65536 // (128 * 256)
    assert builds.together(b"", 4, 50 << 10, h100) == 4
    monkeypatch.setattr(builds, "registers_of", lambda file: 16)
    assert [builds.together(b"", 8, 1000, device) for device in (h100, ada)] == [8, 6]
    assert builds.together(b"", 8, 99 << 10, ada) == 1


@pytest.mark.compile("nvrtc")
def test_group_is_followed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """An exchange of words, which costs a hop at least."""
    if tool("nvdisasm") is None:
        pytest.skip("not found: nvdisasm, which is in Triton's wheel and in CUDA's toolkit")
    asked(monkeypatch, "--hidden", "512", "--batch", "16", "--backend", "group", "--pass", "training", "--csv")
    assert 0.6 < float(capsys.readouterr().out.strip().rpartition(",")[2]) < 6
