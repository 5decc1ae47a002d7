# SPDX-License-Identifier: Apache-2.0
"""What the compiler's codes do not say of a GPU, by device: published figures, none of them fitted.

Sources by letter:
    A: Luo et al., "Benchmarking and Dissecting the Nvidia Hopper GPU Architecture", arXiv:2402.13499: latencies of the
       memories of RTX 4090, A100 and H100, what instructions for tensor cores reach of their peak, and copies from
       block to block of a cluster: 2.65 TB/s round 4 blocks, 3.27 round 2, by 114 multiprocessors at 1.755 GHz.
    B: Jia et al., "Dissecting the NVIDIA Volta GPU Architecture via Microbenchmarking", arXiv:1804.06826: barriers,
       shuffles and operands of a V100. Nobody has published them for later ones.
    C: NVIDIA's whitepapers of A100, Ada and H100: lanes of units, clocks.
    D: published pointer chases on an H100 SXM.
    E: Luo et al., "Dissecting the NVIDIA Hopper Architecture through Microbenchmarking and Multiple Level Analysis",
       arXiv:2501.12084: shared memory of other blocks of a cluster, from 180 (A) to 213 cycles.
    F: github.com/smallscientist1/cuda_microbenchmark: slices of L2, 80 of an A100 and 48 of an RTX 4090, of which each
       hands out 32 bytes a cycle; loads of an A100 reach that.

A100 and RTX 4090 have no published time from block to block. Theirs is predicted as so many latencies of L2 as an
H100's takes, four: a store travels there, and the others' looks come back.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Machine:
    """Cycles of what the compiler's codes do not say. None: nobody has published it.

    Attributes:
        load: of a load from the device's memory, until the result can be used.
        shared, matrix: of one from shared memory, and of LDSM.
        constant: of one from constant memory, and of a special register.
        shuffle, special, tensor: of a shuffle, a special function, a matrix instruction.
        special_busy, tensor_busy: that one such instruction takes its unit; the latter for a product of 16 x 8 x 16.
        operands: until a memory instruction has read its operands.
        barrier: from the last arrival to the release of all.
        branch: that a taken branch takes besides.
        clock: GHz.
        l2: of a load that L2 answers.
        l2_bytes: in a cycle that reach one multiprocessor while all read.
        hop: seconds from a store to its sight in another block.
        remote: cycles from a store into another block's shared memory until that block has seen it.
        remote_bytes: of such stores that leave one multiprocessor in a cycle.
        predicted: figures that are published for another device only.
    """

    load: float
    shared: float
    matrix: float
    constant: float
    shuffle: float
    special: float
    special_busy: float
    tensor: float
    tensor_busy: float
    operands: float
    barrier: float
    branch: float
    clock: float = 1.0
    l2: float | None = None
    l2_bytes: float | None = None
    hop: float | None = None
    remote: float | None = None
    remote_bytes: float | None = None
    predicted: tuple[str, ...] = ()


H100 = Machine(
    load=570,  # D
    shared=29,  # A
    matrix=33,  # published for an A100
    constant=30,  # predicted: constant cache's second level, B
    shuffle=24,  # B
    special=22,  # published for an A100: 18 to 23, with what converts its operand
    special_busy=8,  # C: 4 lanes a sub-core
    tensor=24,  # predicted; most waits for it are the compiler's own stall counts
    tensor_busy=6.5,  # A: such instructions reach 0.62 of 512 multiply-adds a cycle and sub-core
    operands=11,  # B
    barrier=25,  # B: 22 for one warp
    branch=8,  # predicted: of the pipeline's front
    clock=1.755,  # C: boost clock of the PCIe board, below that of SXM
    l2=260,  # A, D
    l2_bytes=37,  # as gpu_rnn/backends/rates.py has it
    hop=6e-7,  # likewise
    remote=213,  # E: of a load, there and back; a store goes one way, and nobody has published how long
    remote_bytes=21,  # of stores, not confirmed: A's copies round clusters of 4 blocks of an H800 reach 13.2, of 2 16.3
)


def _like_h100(*, clock: float, l2: float, **figures: float) -> Machine:
    """A device without clusters, of which no time from block to block is published."""
    assert H100.l2 is not None and H100.hop is not None
    hop = H100.hop * H100.clock / H100.l2 * l2 / clock
    return replace(H100, clock=clock, l2=l2, hop=hop, remote=None, remote_bytes=None, predicted=("hop",), **figures)


MACHINES: dict[str, Machine] = {
    "H100": H100,
    "H200": H100,  # the same chip; nobody has published the latency of its memory
    "A100": _like_h100(
        load=466,  # A
        tensor_busy=8,  # C: 256 multiply-adds a cycle and sub-core, of which all are reached (A)
        clock=1.41,  # C
        l2=262,  # A
        l2_bytes=2560 / 108,  # F
    ),
    "RTX 4090": _like_h100(
        load=542,  # A
        shared=30,  # A
        tensor_busy=32,  # C: 64 multiply-adds a cycle and sub-core where sums are in fp32
        clock=2.52,  # C
        l2=273,  # A
        l2_bytes=1536 / 128,  # F
    ),
}


def of(device: str) -> Machine:
    """The figures of a device that `gpu_rnn.devices` describes under that name.

    Raises:
        ValueError: there are none; the message lists the devices that have some.
    """
    if device not in MACHINES:
        raise ValueError(f"no published latencies are entered for {device}; there are some for {', '.join(MACHINES)}")
    return MACHINES[device]
