# SPDX-License-Identifier: Apache-2.0
"""What other libraries' authors published of a step of an LSTM, and what the simulator makes of the same kernels.

`validation.csv` has a row for each figure. ``python -m benchmarks.simulating.published`` writes the simulated ones and
needs the library's package; where a kernel's machine code is not to be had without a GPU there is none. A backward pass
is published as both passes less the forward one.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import NamedTuple

FILE = Path(__file__).with_name("validation.csv")
SOURCE = "Pöppel, Beck, Hochreiter: FlashRNN, arXiv:2412.07752, on an H100: forward pass, bf16, batch 16, 1,024 steps"
TRITON = "FlashRNN (Triton)"  # whose package holds what the compiler needs


class Published(NamedTuple):
    """Microseconds of a step; `hidden` is of each head. `simulated` is None where no machine code is at hand."""

    library: str
    device: str
    dtype: str
    direction: str
    hidden: int
    heads: int
    batch: int
    us: float
    simulated: float | None


def read() -> list[Published]:
    """All rows, in the order of the file."""
    with FILE.open(newline="") as file:
        return [
            Published(
                *(row[name] for name in ("library", "device", "dtype", "direction")),
                *(int(row[name]) for name in ("hidden", "heads", "batch")),
                float(row["published_us"]),
                float(row["simulated_us"]) if row["simulated_us"] else None,
            )
            for row in csv.DictReader(file)
        ]


def write(rows: list[Published]) -> None:
    with FILE.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow((*Published._fields[:-2], "published_us", "simulated_us"))
        for row in rows:
            writer.writerow((*row[:-1], "" if row.simulated is None else f"{row.simulated:.2f}"))


def checked() -> list[Published]:
    """The rows that have both figures."""
    return [row for row in read() if row.simulated is not None]


def shares() -> tuple[float, float]:
    """The lowest and the highest of simulated by published."""
    found = [row.simulated / row.us for row in checked() if row.simulated is not None]
    return min(found), max(found)
