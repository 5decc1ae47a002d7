# SPDX-License-Identifier: Apache-2.0
"""How a recurrence is laid out over the blocks, warps, registers and shared memory of the group kernel.

`kernels/cuda/group.cuh` describes the parts; a `Layout` is what one compiled kernel is made for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any

import torch

from gpu_rnn.backends.tensors import OF_STATES
from gpu_rnn.compiler import codegen
from gpu_rnn.compiler.derivative import carried_values
from gpu_rnn.compiler.program import Program
from gpu_rnn.memo import memoize
from gpu_rnn.once import once

SCALARS = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "float"}
LANES = 32
UNITS = 16  # of a unit block: the rows of a tensor-core instruction's A operand
ARRIVALS = 8  # bytes that count what arrives in a slot of a tile
CHUNK_WORDS = (32, 64)  # registers of words under way at once, forward and backward
PERIOD = 5  # publications between two fences: of 16 slots a mask finds one; see group_exchange.cuh


def switches(controls: Mapping[str, int], values: int) -> dict[str, Any]:
    """The fields of a `Layout` that a call's controls set, from their description; `values` as there."""
    of_states = tuple(name for name in OF_STATES if controls[name])
    return {"flags": controls["flags"], "values": values, "drop": min(controls["drop"], 2), "of_states": of_states}


@dataclass(frozen=True)
class Layout:
    """What a kernel is compiled for.

    Attributes:
        program: the recurrence's canonical text.
        dtype, precision: of the weights, and of fp32 products ("ieee" or "tf32").
        backward: the direction.
        members: blocks of threads in a group.
        blocks: unit blocks of each.
        across, along: warps side by side over the unit blocks, and one behind another along the product's depth.
        columns: tensor-core columns (8 rows of the batch) in a tile.
        tiles: tiles that take turns within a step.
        held: of a warp's blocks of the depth, those whose weights are in registers.
        save: the forward kernel keeps what the backward one needs.
        paired: units lie in aligned pairs: H and all strides are even.
        counter: exchange by counters instead of by the data itself.
        period: publications between two fences.
        cluster: a group is one cluster of blocks, which exchange through each other's shared memory.
        joins: passes in which partial sums are joined: of more, each takes a smaller buffer.
        inner: the states other than h of all steps: forward, they are kept; backward, they have gradients.
        flags: rows skip steps, or their states are reset before a step.
        values: to what: 0 the recurrence's initial values, 1 given ones, 2 given ones for each step.
        drop: factors of what enters the products: 0 none, 1 for all gates, 2 for each gate.
        of_states: `tensors.OF_STATES` that there are.
        norm: products are normalised; rms: by their root mean square.
    """

    program: str
    dtype: torch.dtype
    precision: str
    backward: bool
    members: int
    blocks: int
    across: int
    along: int
    columns: int = 1
    tiles: int = 1
    held: int = 0
    save: bool = False
    paired: bool = False
    counter: bool = False
    period: int = PERIOD
    joins: int = 1
    inner: bool = False
    flags: bool = False
    values: int = 0
    drop: int = 0
    of_states: tuple[str, ...] = ()
    cluster: bool = False
    norm: bool = False
    rms: bool = False

    @once
    def parsed(self) -> Program:
        return Program.parse(self.program)

    @property
    def width(self) -> int:
        """Units of all members, padded."""
        return UNITS * self.members * self.blocks

    @property
    def threads(self) -> int:
        return LANES * self.across * self.along

    @property
    def rows(self) -> int:
        """Rows of the batch that a group works on at a time."""
        return 8 * self.columns * self.tiles

    @property
    def gates(self) -> int:
        return len(self.parsed.gates)

    @property
    def stages(self) -> int:
        """Products of a step, one after another, each with an exchange of its own."""
        return len(self.parsed.stages)

    @property
    def hops(self) -> int:
        """Exchanges of a step, one after another: of words for each product, and of sums where it is normalised."""
        return self.stages * (2 if self.norm else 1)

    @property
    def handed(self) -> int:
        """Values of a unit that the first part of a step hands on to the second, besides what enters its product."""
        return len(carried_values(self.parsed, 1)) if self.stages > 1 else 0

    @property
    def most(self) -> int:
        """Gates of the larger of a step's products."""
        return max(len(stage.gates) for stage in self.parsed.stages)

    @property
    def half(self) -> bool:
        return self.dtype.itemsize == 2

    @property
    def full(self) -> bool:
        """Products in full fp32, without tensor cores."""
        return not self.half and self.precision != "tf32"

    @property
    def share(self) -> int:
        """Blocks of the depth that one warp multiplies."""
        return -(-self.members * self.blocks // self.along)

    @property
    def owned(self) -> int:
        """Pairs of units of a thread."""
        return -(-(self.blocks // self.across) * 2 * self.columns // self.along)

    @property
    def fragment(self) -> int:
        """Registers of 16 x 16 weights."""
        return 4 if self.half else 8

    @property
    def drops(self) -> int:
        """Factors of a unit and row."""
        return self.gates if self.drop == 2 else self.drop

    @property
    def parts(self) -> int:
        """Words that enter a unit: h alone, or one for each gate, dropped h or d_gates."""
        return self.most if self.backward or self.drop == 2 else 1

    @property
    def results(self) -> int:
        """Sums of a unit and row: of each gate, or, backward, one of all."""
        return 1 if self.backward and self.drop < 2 else self.most

    @property
    def fragments(self) -> int:
        """Fragments of a warp for one block of the depth."""
        return self.gates * self.blocks // self.across

    @property
    def spots(self) -> int:
        """Pairs of units that the threads of a lane own in a tile, all warps along the depth together."""
        return self.blocks // self.across * (UNITS // 8) * self.columns

    @property
    def slot(self) -> int:
        """Words of one publication of a group."""
        return self.tiles * self.parts * self.members * self.blocks * 2 * self.columns * LANES

    @property
    def whole_slot(self) -> int:
        """With the place of sums, two numbers in fp32 for each unit block, gate and row."""
        sums = self.rows * self.most * self.members * self.blocks if self.norm else 0
        return self.slot + 8 * sums // self.word

    @property
    def collected(self) -> int:
        """Words that a block needs for a step of a tile."""
        parts = self.gates if self.backward or self.drop == 2 else self.stages
        return parts * self.members * self.blocks * 2 * self.columns * LANES

    @property
    def chunks(self) -> int:
        """In how many chunks a warp looks for its words; `chunk` of kernels/cuda/group_product.cuh."""
        words = self.parts * 2 * self.columns * self.word // 4  # of a block of the depth
        even = self.share * self.along == self.members * self.blocks
        many = CHUNK_WORDS[self.backward and not (self.full and self.held)]
        most = max(1, min(many // words, self.share)) if even else 1
        return self.share // next(blocks for blocks in range(most, 0, -1) if self.share % blocks == 0)

    @property
    def word(self) -> int:
        """Bytes of a word, two units of a row."""
        return 2 * self.dtype.itemsize

    @property
    def ring(self) -> int:
        """Slots of a group in memory."""
        return 0 if self.members == 1 or self.cluster else 2 if self.counter else 3 * self.period + 1

    @property
    def shared_bytes(self) -> int:
        """Shared memory: weights beyond the registers, two buffers of partial sums, and a lone block's or a cluster's
        words, which the latter counts."""
        weights = self.threads * 4 * self.fragment * self.fragments * (self.share - self.held)
        sums = self.threads * 4 * self.blocks // self.across * self.results * self.columns * 4 if self.along > 1 else 0
        words = self.word * (self.whole_slot if self.norm else 2 * self.slot)
        words = words if self.members == 1 or self.cluster else 0
        return weights + 2 * sums // self.joins + words + 2 * ARRIVALS * self.tiles * self.cluster

    def within(self, limit: int) -> Layout:
        """The same with sums joined in as many passes as it takes to need no more shared memory, if that can be."""
        layout = self
        if not (self.half or self.precision == "tf32") or self.hops > 1:  # no register is left for that
            return self
        while layout.shared_bytes > limit and layout.along > 1 and layout.spots % (2 * layout.joins) == 0:
            layout = replace(layout, joins=2 * layout.joins)
        return layout

    @property
    def defines(self) -> dict[str, object]:
        program = self.parsed
        split_numbers = [program.split.index(g) if g in program.split else -1 for g in program.gates]
        return {
            "SCALAR": SCALARS[self.dtype],
            "PRECISION": self.precision.upper(),
            "APPROXIMATE": int(not self.full),
            "GATES": self.gates,
            "SPLITS": len(program.split),
            "KEPT": "{" + ", ".join(map(str, split_numbers)) + "}",
            **self._shared,
            "STATES": len(program.states),
            "PARAMS": len(program.params),
            "MEMBERS": self.members,
            "BLOCKS": self.blocks,
            "ACROSS": self.across,
            "ALONG": self.along,
            "COLUMNS": self.columns,
            "TILES": self.tiles,
            "HELD": self.held,
            "BACKWARD": int(self.backward),
            "SAVE": int(self.save),
            "PAIRED": int(self.paired),
            "COUNTER": int(self.counter),
            "PERIOD": self.period,
            "CLUSTER": int(self.cluster),
            "JOINS": self.joins,
            "SHARED": self.shared_bytes,
            "INNER": int(self.inner),
            "FLAGS": int(self.flags),
            "VALUES": self.values,
            "DROP": self.drop,
            **{name.upper(): int(name in self.of_states) for name in OF_STATES},
            "INITIAL": "{" + ", ".join(map(_literal, program.initial)) + "}",
        }

    @property
    def _shared(self) -> dict[str, object]:
        """What a step's products share, and what follows the last."""
        program, last = self.parsed, self.stages - 1
        first = program.stages[0]
        return {
            "STAGES": self.stages,
            "NORM": self.norm + self.rms,
            "EARLY": len(first.gates),
            "EARLY_SPLITS": len(set(first.gates) - program.summed),
            "HANDED": self.handed,
            "STEP": f"step_{last}",
            "STEP_BACKWARD": f"step_{last}_backward",
        }

    @property
    def kernel(self) -> str:
        return "group_backward" if self.backward else "group_forward"


def _literal(value: float) -> str:
    """A number in CUDA C++."""
    return f"{'-' * (value < 0)}INFINITY" if math.isinf(value) else f"{value!r}f"


@memoize(256)
def source(layout: Layout) -> str:
    """The CUDA C++ text of a kernel: the layout, the generated step, then the kernel that both serve."""
    directions = (False, True) if layout.backward else (False,)
    steps = [codegen.source(layout.parsed, "cuda", backward=backward) for backward in directions]
    return "\n".join(
        [
            *(f"#define {name} {value}" for name, value in layout.defines.items()),
            '#include "device.cuh"',
            '#include "pointwise.cuh"',
            *steps,
            (files("gpu_rnn.kernels.cuda") / f"{layout.kernel}.cu").read_text(),
        ]
    )
