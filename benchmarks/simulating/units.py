# SPDX-License-Identifier: Apache-2.0
"""Which unit of a multiprocessor executes an instruction."""

from __future__ import annotations

import re
from enum import Enum

from benchmarks.simulating.instructions import Instruction


class Unit(Enum):
    """Each sub-core has one of each, but for `MEMORY`, which all four share."""

    FMA = "fp32 multiply-add"
    ALU = "integers, comparisons and selections"
    WIDE = "integer multiply-add"
    UNIFORM = "uniform registers"
    TENSOR = "tensor core"
    SPECIAL = "special functions and conversions"
    MEMORY = "loads, stores and shuffles"
    CONTROL = "branches, barriers and what only waits"


_NAMES = {
    Unit.FMA: "FADD FMUL FFMA FADD2 FFMA2 FMUL2 HFMA2 HMUL2",
    Unit.ALU: (
        "BMSK CS2R F2FP FCHK FMNMX FMNMX3 FSEL FSET FSETP HADD2 HMNMX2 HSET2 HSETP2 I2FP IABS IADD IADD3 IMNMX ISETP "
        "LEA LOP LOP3 MOV P2R PLOP3 PRMT R2P SEL SGXT SHF SHL SHR VABSDIFF VIADD VIADDMNMX VIMNMX VIMNMX3 VOTE"
    ),
    Unit.WIDE: "IDP IMAD IMUL",
    Unit.UNIFORM: "R2UR S2UR VOTEU",
    Unit.TENSOR: "HMMA IMMA",
    Unit.SPECIAL: "BREV F2F F2I FLO FRND I2F MUFU POPC",
    Unit.MEMORY: (
        "ATOM ATOMG ATOMS LD LDC LDCU LDG LDGSTS LDL LDS LDSM MATCH RED REDG REDUX REDAS S2R SHFL ST STAS STG STL STS "
        "STSM SYNCS"
    ),
    Unit.CONTROL: (
        "BAR BRA BREAK BSSY BSYNC CALL CCTL CGAERRBAR DEPBAR ELECT ERRBAR EXIT LDGDEPBAR MEMBAR NANOSLEEP NOP RET "
        "WARPSYNC YIELD"
    ),
}
UNITS = {name: unit for unit, names in _NAMES.items() for name in names.split()}
BUSY = {Unit.FMA: 1, Unit.ALU: 2, Unit.WIDE: 2, Unit.UNIFORM: 2}  # cycles that one instruction of a warp takes a unit


def unit_of(instruction: Instruction) -> Unit:
    """The unit that executes an instruction.

    Raises:
        ValueError: no row of the table names its operation.
    """
    unit = UNITS.get(instruction.base)
    if unit is None and instruction.base.startswith("U"):
        unit = Unit.UNIFORM
    if unit is None:
        raise ValueError(f"no unit is known for {instruction.op} at {instruction.address:#x}: enter it in units.py")
    return unit


def waves(instruction: Instruction) -> int:
    """How often a memory instruction of a warp passes through the unit: 32 bits of each thread at a time."""
    matrices = re.search(r"(?:LDSM|STSM)\S*\.([124])$", instruction.op)
    if matrices:
        return int(matrices[1])
    return 4 if ".128" in instruction.op else 2 if ".64" in instruction.op else 1
