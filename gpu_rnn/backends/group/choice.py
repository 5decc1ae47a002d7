# SPDX-License-Identifier: Apache-2.0
"""Which layout of the group kernel a problem gets: what fits, and of that the fastest by a model of one step.

The model adds up what kernels/README.md names: tensor cores, weights read from shared memory, words that come in, and
what synchronisation takes, as simulated steps show them (tests/data/group_layouts.csv). Layouts are ranked by it. What
a call takes is compared with other backends by the simulated step of the layout so chosen (`backends/chains.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count, product
from typing import Any

from gpu_rnn.backends import chains, rates
from gpu_rnn.backends.group import clusters
from gpu_rnn.backends.group.layout import UNITS, Layout, switches
from gpu_rnn.backends.group.projecting import around, plain
from gpu_rnn.backends.problem import Problem
from gpu_rnn.backends.throughput import (
    FP32_PER_CYCLE,
    SHARED_BYTES_PER_CYCLE,
    SPECIAL_PER_CYCLE,
    multiplications,
    projection,
    special,
)
from gpu_rnn.devices import Device
from gpu_rnn.memo import memoize

MOST_WARPS = 8  # of a block: each thread may then use 255 registers of a multiprocessor's 65,536
REGISTERS = 255  # of a thread: CUDA C++ programming guide, table of compute capabilities
# Registers beside weights, sums, words and the pairs of units, so that no build needs a stack: forward, backward in 16
# bits, where NVRTC keeps more addresses, and backward in fp32.
WORKING = (90, 112, 100)
WORKING_OF_TWO = 24  # more of them for a second exchange of a step: of another product, or of sums
SPLIT = 4  # more of them backward in 16 bits where split gates have arrays of their own, and there is one exchange
NEXT_TILE = 12  # for where a pair's projection of the next tile lies, beside itself
# Of a thread's weights, in 16 bits, where a pass keeps what the next one needs and loops over weights in shared memory:
# with more of them NVRTC's builds need a stack.
WEIGHTS_OF_A_LOOP = 96
COLUMNS = (1, 2, 4)
TILES = (1, 2, 4)

# To be taken, clusters have to be predicted this much shorter: nobody has run them beside words through L2.
SHORTER = 0.94
SENDING = 2.0  # cycles of a warp to send a word to a member: two addresses and the store
SHORTEST_WAY = 300.0  # cycles of the fewest words from a warp, into a product

WEIGHT_REGISTERS = 128 << 10  # bytes of weights in a multiprocessor's registers, half of them

# Cycles of a load that L2 answers, and of one from memory: as benchmarks/simulating/machines.py has them.
LOOK, MEMORY = 260.0, 570.0
# Cycles that nothing hides, read off simulated steps: for each pair of units after a thread's first; for the first
# weights from shared memory; from a publication to the first look for the next; of a turn beside other tiles, which
# backward waits for its own loads; and at least. And the share of the time that sums take shared memory.
PAIR, SPILLED, JOINING, SHORTEST_TURN = 360.0, 60.0, 0.65, 1000.0
FIRST_LOOK, TURN = (0.0, 200.0), (100.0, 1100.0)

RANKING = rates.GROUP


@dataclass(frozen=True)
class Choice:
    """A layout and how many groups each of N gets; `step` is the predicted time of a step of all rows."""

    layout: Layout
    groups: int
    at_once: int  # of N, in one launch
    step: float


def _working(layout: Layout) -> int:
    """Registers of a thread beside what `_held` counts one by one."""
    if layout.backward:
        return WORKING[2 - layout.half] + SPLIT * (layout.half and bool(layout.parsed.split) and layout.hops == 1)
    if layout.tiles > 1 and not layout.half and (not layout.full or layout.parsed.split):  # else there is room for it
        return WORKING[0] + layout.owned * (layout.gates * layout.word // 4 + NEXT_TILE)
    return WORKING[0]


def _between(layout: Layout, owned: int) -> int:
    """Registers of a thread that a step of more than one exchange needs besides, for so many pairs of units."""
    two, norm, states = layout.stages > 1, layout.norm, len(layout.parsed.states)
    handed = owned * layout.tiles * 2 * (layout.handed + states * layout.backward) + WORKING_OF_TWO
    normal = owned * layout.gates * (2 + 6 * layout.backward) + WORKING_OF_TWO
    if layout.full:  # sums of one gate at a time
        normal = 2 * owned * (layout.gates + states)
    return handed * two + normal * norm


def _held(layout: Layout) -> int:
    """The blocks of the depth whose weights fit in registers beside all else; negative where not even that does."""
    states, gates = len(layout.parsed.states), layout.gates
    sums = layout.fragments * layout.columns * (16 if layout.full else 4)
    pairs = (
        layout.owned * 2 * (gates + len(layout.parsed.split) + states) * (2 if layout.backward else 1)
    )  # and gradients
    words = 2 * layout.columns * layout.parts * layout.word // 4  # of a block of the depth
    rows = layout.owned * layout.tiles * (2 * states + 4 + 2 * layout.drops)
    free = REGISTERS - _working(layout) - sums - pairs - _between(layout, layout.owned) - rows
    free -= min(32, layout.share * words)
    if layout.half and layout.inner and not (layout.backward or layout.cluster):
        weights = layout.fragments * layout.fragment
        return layout.share if layout.share <= free // weights else min(free, WEIGHTS_OF_A_LOOP) // weights
    return min(layout.share, free // (layout.fragments * layout.fragment))


def _shapes(total: int) -> Iterator[tuple[int, int, int, int]]:
    """(members, blocks, across, along) for so many unit blocks: warps share the depth evenly."""
    for blocks in sorted({*range(1, min(total, 8) + 1), total if total <= 16 else 1}):
        across = max(a for a in range(1, min(blocks, MOST_WARPS) + 1) if blocks % a == 0)
        wanted = MOST_WARPS // across
        members = -(-total // blocks)
        even = next(m for m in count(members) if m * blocks % wanted == 0)  # idle members, for more warps
        for m in {members, even}:
            along = max(a for a in range(1, wanted + 1) if m * blocks % a == 0)
            yield m, blocks, across, along


def _layouts(problem: Problem) -> Iterator[Layout]:
    """Every layout worth a look, whatever it needs."""
    precision = "ieee" if problem.dtype.itemsize == 2 else problem.precision
    backward = problem.direction == "backward"
    # Between two exchanges the tiles' second part would wait for memory: simulated, one tile takes less in all builds.
    tiles_of_a_group = (1,) if len(problem.program.stages) > 1 or problem.norm else TILES
    options: dict[str, Any] = {
        "norm": problem.norm,
        "rms": problem.norm and problem.rms,
        "inner": problem.direction == "training" or problem.all_states,
        **switches(problem.controls, int(problem.reset_values)),
    }
    for members, blocks, across, along in _shapes(-(-problem.H // UNITS)):
        for columns, tiles in product(COLUMNS, tiles_of_a_group if members > 1 else (1,)):
            sizes = (members, blocks, across, along, columns, tiles)
            alone = Layout(problem.program.text, problem.dtype, precision, backward, *sizes, **options)
            # In a cluster words are not long on their way, so tiles take no turns; and there is one hop a step. What
            # two blocks could do one alone does, simulated, in less time.
            both = 2 < members <= clusters.LARGEST and tiles == 1 and alone.hops == 1
            for bare in [alone, replace(alone, cluster=True)][: 1 + both]:
                held = _held(bare)
                if held >= 0:
                    yield replace(bare, held=held)


def choose(problem: Problem) -> Choice | None:
    """The fastest layout that fits on the problem's device, or None. The number of steps does not matter."""
    return _choose(replace(plain(problem), T=1, I=1, layers=1), bool(clusters.at_once(problem.device, 2)))


@memoize(1024)
def _choose(problem: Problem, in_clusters: bool) -> Choice | None:
    layouts = (choice for choice in fitting(problem) if in_clusters or not choice.layout.cluster)
    return min(layouts, key=lambda choice: choice.step / (SHORTER if choice.layout.cluster else 1.0), default=None)


def fitting(problem: Problem) -> Iterator[Choice]:
    """Every layout that fits on the problem's device."""
    device = problem.device
    for layout in _layouts(problem):
        layout = layout.within(device.shared_memory)
        together = clusters.at_once(device, layout.members) if layout.cluster else device.sms // layout.members
        if layout.shared_bytes > device.shared_memory or not together:
            continue
        wanted = max(1, -(-problem.B // layout.rows))
        if layout.members == 1:
            at_once, groups = problem.N, wanted
        else:
            at_once = min(problem.N, together)
            groups = min(wanted, together // at_once)
        yield Choice(layout, groups, at_once, _step(problem, layout, groups, at_once, RANKING))


def _step(problem: Problem, layout: Layout, groups: int, at_once: int, known: rates.GroupModel) -> float:
    """Seconds for a step of all rows of all of N.

    One tile waits while its words hop. Of tiles that take turns each one's words travel during the others' turns, but
    what a turn has to look for, and its own chain, take their time for each of them.
    """
    device = problem.device
    product, arriving, chain = _tile(problem, layout, known)
    rounds = -(-problem.B // (layout.rows * groups)) * -(-problem.N // at_once)
    if layout.members == 1:  # blocks that wait for nobody; several may share a multiprocessor
        together = device.sms * max(1, min(MOST_WARPS * 32 // layout.threads, _blocks_by_memory(device, layout)))
        rounds = -(-groups * problem.N // together)
        cycles = max((product + arriving) * -(-groups * problem.N // (device.sms * rounds)), product + MEMORY)
    elif layout.cluster:
        reading = product + arriving if layout.backward else max(product, arriving)
        cycles = known.remote + max(_sending(layout, known) + reading, SHORTEST_WAY)
    else:
        hop = layout.hops * (known.hop * device.clock * 1e9 + FIRST_LOOK[layout.backward])
        cycles = max(hop, arriving) + product
        if layout.tiles > 1:
            late = (layout.chunks - 1) * (LOOK + arriving / layout.chunks) / 2
            turn = max(product + late + chain + TURN[layout.backward], arriving, SHORTEST_TURN)
            cycles = max(cycles, layout.tiles * turn - chain)
    return rounds * (cycles + chain) / (device.clock * 1e9)


def _blocks_by_memory(device: Device, layout: Layout) -> int:
    return device.shared_memory // max(layout.shared_bytes, 1)


def _sending(layout: Layout, known: rates.GroupModel) -> float:
    """Cycles until the words of a cluster have left: each member sends as many bytes as it gets."""
    words = layout.collected * layout.word / known.remote_bytes
    return words + SENDING * layout.members * layout.parts * layout.owned


def _tile(problem: Problem, layout: Layout, known: rates.GroupModel) -> tuple[float, float, float]:
    """Cycles of one tile's product, of its words' way from L2 or shared memory, and of what follows the product."""
    program = problem.program
    warps = layout.across * layout.along
    instructions = layout.share * layout.fragments * layout.columns  # of a warp, each 16 x 8 x 16
    chains = layout.fragments * layout.columns
    multiplying = warps * instructions * 16 * 8 * 16 / multiplications(problem, known.tensor_share, known.shuffled)
    chained = instructions / min(chains, 4) * known.tensor_latency / 2
    spilled = layout.threads * 4 * layout.fragment * layout.fragments * (layout.share - layout.held)
    sums = 2 * layout.threads * 16 * layout.stages * layout.results * layout.blocks // layout.across * layout.columns
    words = layout.collected * layout.word * layout.across
    arriving = words / (known.l2_bytes if layout.members > 1 and not layout.cluster else SHARED_BYTES_PER_CYCLE)
    operations = [op for stage in program.stages for op in stage.ops]
    units = UNITS * layout.blocks * 8 * layout.columns
    passes = 2 if layout.backward else 1
    pointwise = units * max(
        special(operations) / SPECIAL_PER_CYCLE, passes * known.instructions * len(operations) / FP32_PER_CYCLE
    )
    chain = layout.stages * known.latency + max((layout.owned - 1) * PAIR, pointwise - PAIR, 0.0)
    chain += SPILLED if spilled else 0.0
    if layout.along > 1:
        chain += JOINING * sums / SHARED_BYTES_PER_CYCLE
    return max(multiplying, chained, spilled / SHARED_BYTES_PER_CYCLE), arriving, chain


def floor(problem: Problem) -> float | None:
    """Seconds that a step's time loop takes at least with W_hh on chip, whoever wrote it; None where it does not fit.

    Of tensor cores, weights read from shared memory and h (backward: d_gates) read from L2 or sent in a cluster the
    slowest, and a hop for each product where a tile's blocks are more than one; the best over all ways to share
    multiprocessors between tiles. Of an h that is projected, its width in place of H.
    """
    device, gates, width = problem.device, problem.G, problem.proj_size or problem.H
    weights = gates * problem.H * width * problem.dtype.itemsize
    stages = len(problem.program.stages)
    parts = gates if problem.direction == "backward" else stages
    per_cycle = multiplications(problem, RANKING.tensor_share, RANKING.shuffled)
    seconds = []
    for groups in range(1, min(-(-problem.B // 8), device.sms) + 1):
        rows = 8 * -(-problem.B // (8 * groups))
        for members in {1, min(device.sms // groups, -(-problem.H // UNITS))}:
            if weights / members > WEIGHT_REGISTERS + device.shared_memory:
                continue
            multiplying = gates * problem.H * width * rows / members / per_cycle
            reading = max(weights / members - WEIGHT_REGISTERS, 0) / SHARED_BYTES_PER_CYCLE
            words = parts * width * rows * problem.dtype.itemsize
            rounds = -(-problem.N // max(1, device.sms // (groups * members)))
            for rate, hop in _ways(device, members):
                busy = max(multiplying, reading, words / rate) / (device.clock * 1e9)
                seconds.append(rounds * (busy + stages * hop))
    return min(seconds, default=None)


def _ways(device: Device, members: int) -> Iterator[tuple[float, float]]:
    """How words can travel between so many blocks: bytes in a cycle, and the seconds of a hop."""
    if members == 1:
        yield math.inf, 0.0
        return
    yield RANKING.l2_bytes, RANKING.hop
    if clusters.at_once(device, members):
        yield RANKING.remote_bytes, RANKING.remote / (device.clock * 1e9)


def largest(problem: Problem) -> int:
    """The largest H that fits on the problem's device, whatever T and B are."""
    return _largest(replace(plain(problem), T=1, B=1, I=1, layers=1))


@memoize(256)
def _largest(problem: Problem) -> int:
    """From above, and the first layout answers: a size that fits may have smaller ones below that do not."""
    on_chip = problem.device.sms * (WEIGHT_REGISTERS + problem.device.shared_memory)
    for hidden in range(4096, 0, -UNITS):
        if problem.G * hidden**2 * problem.dtype.itemsize > on_chip:
            continue
        if next(fitting(replace(problem, H=hidden)), None) is not None:
            return hidden
    return 0


def cost(problem: Problem, constants: rates.Rates | None = None) -> float:
    """Seconds of a call by the cost model, of a problem that `choose` finds a layout for."""
    choice, device = choose(problem), problem.device
    assert choice is not None
    known = (constants or rates.of(device)).group
    gates = len(problem.recurrence.gates)
    weights = gates * (UNITS * choice.layout.blocks) * choice.layout.width * problem.dtype.itemsize
    loading = weights / RANKING.l2_bytes / (device.clock * 1e9)
    alone = plain(problem)
    steps = problem.layers * problem.T * known.step * chains.step(alone, "group", modelled)
    return known.start + loading + steps + known.projection * projection(alone) + around(problem)


def source_of_cost(problem: Problem) -> str:
    """Where its time a step comes from: see `gpu_rnn.backends.Entry`."""
    return "simulated" if chains.simulated(plain(problem), "group") else "modelled"


def modelled(problem: Problem) -> float:
    """Seconds of a step of all rows by the model that ranks layouts."""
    choice = choose(problem)
    assert choice is not None
    return choice.step
