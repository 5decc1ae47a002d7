# SPDX-License-Identifier: Apache-2.0
"""Machine code of a cubin, with the control codes that the compiler wrote into it.

From sm_70 on an instruction is a word of 128 bits. Bits 105 to 125 say what the hardware does not find out by itself:
for how many cycles the warp stalls, and by which of six scoreboards it waits for what takes longer (Jia et al.,
"Dissecting the NVIDIA Volta GPU architecture via microbenchmarking", arXiv:1804.06826, section 2.1). So an instruction
of fixed latency needs no table.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

NONE = 7  # the number of no scoreboard
BOARDS = 6

_SECTION = re.compile(r"^\.text\.(\S+):")
_LABEL = re.compile(r"^(\.L_\w+):")
_FIRST = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);?\s*/\* 0x([0-9a-f]{16}) \*/")
_SECOND = re.compile(r"^\s+/\* 0x([0-9a-f]{16}) \*/")
_PREDICATE = re.compile(r"(@!?U?P\w+)\s+")
_TARGET = re.compile(r"`\((\.L_\w+)\)")


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        address: in bytes, from the kernel's begin.
        predicate: as "@!P0"; empty where it always runs.
        op, operands: as nvdisasm prints them, such as "LDG.E.64" and "R2, [R4]".
        stall: cycles until the warp may issue its next instruction.
        writes: the scoreboard that is free when the result is there, or `NONE`.
        reads: the scoreboard that is free when the operands were read, or `NONE`.
        waits: the scoreboards that it waits for.
        target: the index of the instruction that it branches to, if it is in this kernel.
    """

    address: int
    predicate: str
    op: str
    operands: str
    stall: int
    writes: int
    reads: int
    waits: tuple[int, ...]
    target: int | None = None

    @property
    def base(self) -> str:
        """The operation without what qualifies it."""
        return self.op.split(".")[0]

    def __str__(self) -> str:
        return f"{self.predicate} {self.op} {self.operands}".strip()


@dataclass(frozen=True)
class Control:
    stall: int
    writes: int
    reads: int
    waits: tuple[int, ...]


def control(high: int) -> Control:
    """What the upper 64 bits of an instruction say to the scheduler."""
    code = high >> (105 - 64)
    waits = code >> 11 & (1 << BOARDS) - 1
    return Control(code & 15, code >> 5 & 7, code >> 8 & 7, tuple(k for k in range(BOARDS) if waits >> k & 1))


def parse(listing: str, kernel: str = "") -> list[Instruction]:
    """The instructions of `nvdisasm -c -hex`, of the kernel of that name, or the first.

    Raises:
        ValueError: there is no such kernel.
    """
    lines = list(_lines(listing, kernel))
    if not lines:
        raise ValueError(f"no machine code of a kernel {kernel}".rstrip())
    labels = {label: index for index, (_, _, _, each) in enumerate(lines) for label in each}
    return [_instruction(address, text, high, labels) for address, text, high, _ in lines]


def _lines(listing: str, kernel: str) -> Iterator[tuple[int, str, int, list[str]]]:
    """(address, text, upper half, labels) of each instruction."""
    section, first, labels = "", None, []
    for line in listing.splitlines():
        if match := _SECTION.match(line):
            section, labels = match[1], []
            kernel = kernel or section
        elif match := _LABEL.match(line):
            labels.append(match[1])
        elif match := _FIRST.match(line):
            first = match
        elif (match := _SECOND.match(line)) and first:
            if section == kernel:
                yield int(first[1], 16), first[2].strip(), int(match[1], 16), labels
            first, labels = None, []


def _instruction(address: int, text: str, high: int, labels: dict[str, int]) -> Instruction:
    match = _PREDICATE.match(text)
    predicate, rest = (match[1], text[match.end() :]) if match else ("", text)
    op, _, operands = rest.partition(" ")
    target = _TARGET.search(operands)
    code = control(high)
    return Instruction(
        address,
        predicate,
        op,
        operands.strip(),
        code.stall,
        code.writes,
        code.reads,
        code.waits,
        labels.get(target[1]) if target else None,
    )


def disassemble(cubin: Path, nvdisasm: str, kernel: str = "") -> list[Instruction]:
    """The instructions of a kernel in a file.

    Raises:
        ValueError: there is no such kernel.
        subprocess.CalledProcessError: `nvdisasm`, the path of CUDA's tool, does not open the file.
    """
    done = subprocess.run([nvdisasm, "-c", "-hex", str(cubin)], capture_output=True, text=True, check=True)
    return parse(done.stdout, kernel)


def loops(code: Sequence[Instruction]) -> list[range]:
    """The loops, the longest first, each with the branch at its end."""
    ends = ((each.target, k) for k, each in enumerate(code) if each.base == "BRA" and each.target is not None)
    return sorted((range(begin, end + 1) for begin, end in ends if begin < end), key=len, reverse=True)
