# SPDX-License-Identifier: Apache-2.0
"""Machine code as NVRTC gives it: an ELF file, of which this reads where it ends and what its kernels take."""

from __future__ import annotations

import struct
from typing import NamedTuple

MAGIC = b"\x7fELF\x02\x01"  # 64 bits, little-endian
NOBITS = 8  # the type of a section that has no bytes in the file


class _Section(NamedTuple):
    name: int  # where it stands in the section of names
    kind: int
    flags: int
    address: int
    offset: int
    size: int


class _Tables(NamedTuple):
    """Where the two tables of an ELF file end, and the sections."""

    ends: tuple[int, int]
    sections: list[_Section]
    names: int  # the section of names


def _tables(data: bytes) -> _Tables:
    if not data.startswith(MAGIC):
        raise ValueError("it is no 64-bit ELF file")
    try:
        segments, table = struct.unpack_from("<QQ", data, 0x20)
        segment, segment_count, entry, count, names = struct.unpack_from("<5H", data, 0x36)
        # The last entry may lack its last byte, which these first fields are not.
        sections = [_Section(*struct.unpack_from("<IIQQQQ", data, table + entry * k)) for k in range(count)]
    except (struct.error, OverflowError) as error:
        raise ValueError("the ELF file ends within its tables") from error
    return _Tables((segments + segment * segment_count, table + entry * count), sections, names)


def end(data: bytes) -> int:
    """The bytes that an ELF file has by its own headers.

    Raises:
        ValueError: it is none, or ends within its tables.
    """
    tables = _tables(data)
    return max(*tables.ends, *(s.offset + s.size for s in tables.sections if s.kind != NOBITS))


def completed(data: bytes) -> bytes:
    """A cubin with its last byte, which CuPy's binding takes for the end of a string and cuts off.

    It is the highest of an alignment of 64 bits, the last field of a table at the end of the file, hence 0.

    Raises:
        ValueError: more is missing, or too much is there.
    """
    whole = end(data)
    if len(data) == whole:
        return data
    if len(data) != whole - 1 or whole not in _tables(data).ends:
        raise ValueError(f"an ELF file of {whole} bytes came as {len(data)}")
    return data + b"\0"


class Usage(NamedTuple):
    """What a thread of a kernel takes: registers, and bytes of stack where those did not suffice."""

    registers: int
    stack: int


def usage(cubin: bytes) -> Usage:
    """The most that a thread of any kernel in a cubin takes.

    The ELF section .nv.info lists attributes as (format, number, size, value); those of format 4 hold a function and a
    figure, number 0x2f its registers and 0x11 its frame.
    """
    tables = _tables(cubin)
    most = {0x2F: 0, 0x11: 0}
    for section in tables.sections:
        if not cubin.startswith(b".nv.info\0", tables.sections[tables.names].offset + section.name):
            continue
        position = section.offset
        while position < section.offset + section.size:
            kind, attribute, length = struct.unpack_from("<BBH", cubin, position)
            if kind == 4 and attribute in most:
                most[attribute] = max(most[attribute], struct.unpack_from("<I", cubin, position + 8)[0])
            position += 4 + (length if kind == 4 else 0)  # else the value is `length` itself
    return Usage(most[0x2F], most[0x11])
