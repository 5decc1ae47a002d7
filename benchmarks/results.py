# SPDX-License-Identifier: Apache-2.0
"""Reads what run.py wrote: the newest measurement of each case, as CSV rows."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

TORCH = "torch.nn"
NOISE = 0.97  # what the same call differs by between runs; a ratio below it is a loss

Row = dict[str, str]


@dataclass(frozen=True)
class Case:
    """A problem in one dtype and direction, with the rows of the newest run that measured it."""

    rows: tuple[Row, ...]

    @property
    def set(self) -> str:
        return self.rows[0]["set"]

    @property
    def problem(self) -> str:
        return self.rows[0]["problem"]

    @property
    def dtype(self) -> str:
        return self.rows[0]["dtype"]

    @property
    def direction(self) -> str:
        return self.rows[0]["direction"]

    def __str__(self) -> str:
        return f"{self.set}/{self.problem} {self.dtype} {self.direction}"

    @property
    def theirs(self) -> Row:
        """torch.nn's row."""
        return next(row for row in self.rows if row["variant"] == TORCH)

    @property
    def ours(self) -> Row | None:
        """The row of the backend that a layer takes by itself; None where the run left it out."""
        return next((row for row in self.rows if row["chosen"]), None)

    @property
    def fastest(self) -> Row | None:
        """The fastest of our backends."""
        timed = [row for row in self.rows if row["status"] == "ok" and row["variant"] != TORCH]
        return min(timed, key=lambda row: float(row["median_us"]), default=None)

    @property
    def ratio(self) -> float | None:
        """torch.nn's time by ours; None where one of them has none."""
        return float(self.ours["ratio"]) if self.ours and self.ours["ratio"] else None

    @property
    def hidden(self) -> int:
        return int(self.theirs["H"])


def per_step(row: Row) -> tuple[float, float, float]:
    """Microseconds a time step: 20th percentile, median, 80th percentile."""
    low, middle, high = (float(row[name]) / int(row["T"]) for name in ("p20_us", "median_us", "p80_us"))
    return low, middle, high


def read(files: Iterable[Path]) -> list[Case]:
    """The cases in results files of one device, each from the newest run that has it, in the order first seen.

    Raises:
        ValueError: results of several devices; no rows.
    """
    rows: list[Row] = []
    for path in sorted(files):
        with path.open(newline="") as file:
            rows += csv.DictReader(file)
    devices = {row["device"] for row in rows}
    if len(devices) != 1:
        found = ", ".join(sorted(devices)) or "none"
        raise ValueError(
            f"results of exactly one device make a report; {', '.join(map(str, files))} hold: {found}"
        )
    by_case: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        by_case.setdefault((row["set"], row["problem"], row["dtype"], row["direction"]), []).append(row)
    newest = {key: max(row["date"] for row in found) for key, found in by_case.items()}
    cases = [Case(tuple(r for r in found if r["date"] == newest[key])) for key, found in by_case.items()]
    sets, problems = (list(dict.fromkeys(row[name] for row in rows)) for name in ("set", "problem"))
    return sorted(cases, key=lambda case: (sets.index(case.set), problems.index(case.problem)))
