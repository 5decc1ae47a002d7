# SPDX-License-Identifier: Apache-2.0
"""Markdown tables, and how figures are written in them."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

from benchmarks.reporting.results import NOISE, Row, per_step, timed

WIDTH = 118


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """A table without the columns that are empty throughout, or nothing; a head that ends with ":" is of numbers."""
    cells = [[str(cell) for cell in row] for row in rows]
    kept = [k for k in range(len(heads)) if any(row[k] for row in cells)]
    if not kept:
        return []
    lines = [[heads[k].removesuffix(":") for k in kept], ["--:" if heads[k].endswith(":") else "---" for k in kept]]
    return [f"| {' | '.join(line)} |" for line in lines + [[row[k] for k in kept] for row in cells]]


def paragraph(text: str) -> list[str]:
    """A text in lines of a document's width."""
    return textwrap.wrap(" ".join(text.split()), WIDTH, break_long_words=False, break_on_hyphens=False)


def ratio(value: float | None) -> str:
    """Bold where it is a loss."""
    if value is None:
        return ""
    return f"{value:.2f}×" if value >= NOISE else f"**{value:.2f}×**"


def time(row: Row | None) -> str:
    """Microseconds a step: the median with the 20th and 80th percentile, or why there is none."""
    if row is None:
        return "not measured"
    if not timed(row):
        return row["status"]
    low, middle, high = (number(per_step(row, name)) for name in ("p20_us", "median_us", "p80_us"))
    return f"{middle} ({low} to {high})"


def number(value: float) -> str:
    """Three digits, never as a power of ten."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"
