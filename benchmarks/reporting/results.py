# SPDX-License-Identifier: Apache-2.0
"""Reads what run.py wrote: the newest measurement of each case, as CSV rows."""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from benchmarks.cases.names import PEERS, TORCH

NOISE = 0.97  # what the same call differs by between runs; a ratio below it is a loss
OPTION_LIMIT = 1.10  # an option may take this many times the default's time; more is a loss
DTYPES = ("bf16", "fp16", "fp32", "ieee")
DIRECTIONS = ("forward", "training")

KEY = ("set", "problem", "dtype", "direction", "threads")  # threads: of a CPU
SHAPE = ("cell", "T", "B", "I", "H", "layers", "bidirectional", "heads")
STEP_BY_STEP = (
    "True",
    "streams",
)  # in the column stepwise: a cell called for each step, a layer for each of many streams
NEEDED = (*KEY[:4], *SHAPE, "variant", "chosen", "status", "median_us", "ratio", "device", "date")

Row = defaultdict[str, str]  # by column; empty where an older file lacks the column


@dataclass(frozen=True)
class Case:
    """A problem in one dtype and direction, with the rows of the newest run that measured it."""

    rows: tuple[Row, ...]

    def __getitem__(self, column: str) -> str:
        """A column that all rows share, such as "set", "dtype" or "H"."""
        return self.rows[0][column]

    def __str__(self) -> str:
        threads = f" threads {self['threads']}" if self["threads"] else ""
        return f"{self['set']}/{self['problem']} {self['dtype']} {self['direction']}{threads}"

    @cached_property
    def theirs(self) -> Row | None:
        """torch.nn's row, without the option where there is one; None where the run left it out."""
        return next((row for row in self.rows if row["variant"] == TORCH), None)

    @cached_property
    def ours(self) -> Row | None:
        """The row of the backend that a layer takes by itself; None where the run left it out."""
        return next((row for row in self.rows if row["chosen"]), None)

    @cached_property
    def fastest(self) -> Row | None:
        """The fastest of our backends."""
        own = [row for row in self.rows if timed(row) and row["variant"] not in (TORCH, *PEERS)]
        return min(own, key=per_step, default=None)

    @cached_property
    def peers(self) -> list[Row]:
        """The other libraries' rows that have a time."""
        return [row for row in self.rows if row["variant"] in PEERS and timed(row)]

    @cached_property
    def ratio(self) -> float | None:
        """torch.nn's time by ours; None where one of them has none, and with an option, which torch.nn does without."""
        both = timed(self.ours) and timed(self.theirs)
        return float(self.ours["ratio"]) if both and not self["option"] else None

    @property
    def lost(self) -> bool:
        """Whether torch.nn is faster by more than noise."""
        return self.ratio is not None and self.ratio < NOISE

    def shape(self, *without: str) -> tuple[str, ...]:
        """What else is measured at the same sizes, whatever the columns of `without` hold, has the same shape."""
        return tuple(
            self[name] for name in (*SHAPE, "stepwise", "dtype", "direction", "threads") if name not in without
        )


def timed(row: Row | None) -> bool:
    """Whether a row holds a time: not what is missing, wrong, failed, out of memory or emulated."""
    return row is not None and row["status"] == "ok"


def per_step(row: Row, column: str = "median_us") -> float:
    """Microseconds a time step, all layers together."""
    return float(row[column]) / int(row["T"])


def against_default(cases: Iterable[Case]) -> list[tuple[Case, float]]:
    """Each case with an option, and its time by that of the same layer without, where both have one."""
    cases = list(cases)
    plain = {(case["set"], case.shape()): case for case in cases if not case["option"] and timed(case.ours)}
    found = []
    for case in cases:
        default = plain.get((case["set"], case.shape()))
        if case["option"] and default and timed(case.ours):
            found.append((case, per_step(case.ours) / per_step(default.ours)))
    return found


def read(files: Iterable[Path]) -> list[Case]:
    """The cases in results files of one device, each from the newest run that has it, in the order first seen.

    Raises:
        ValueError: results of several devices; no rows; a file that lacks columns, or that was cut off within a row.
        OSError: a file that cannot be read.
    """
    files = sorted(files)
    rows = [row for path in files for row in _rows(path)]
    devices = {row["device"] for row in rows}
    if len(devices) != 1:
        found = ", ".join(sorted(devices)) or "none"
        raise ValueError(
            f"results of exactly one device are wanted; in {', '.join(map(str, files))} there are: {found}"
        )
    by_case: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        by_case.setdefault(tuple(row[name] for name in KEY), []).append(row)
    newest = {key: max(row["date"] for row in found) for key, found in by_case.items()}
    cases = [Case(tuple(r for r in found if r["date"] == newest[key])) for key, found in by_case.items()]
    sets, problems = (list(dict.fromkeys(row[name] for row in rows)) for name in ("set", "problem"))
    return sorted(cases, key=lambda case: (sets.index(case["set"]), problems.index(case["problem"])))


def _rows(path: Path) -> list[Row]:
    try:
        reader = csv.DictReader(path.read_text().splitlines())
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no file of run.py: it is no text") from error
    missing = [name for name in NEEDED if name not in (reader.fieldnames or ())]
    if missing:
        raise ValueError(f"{path} is no file of run.py: it lacks the columns {', '.join(missing)}")
    rows = []
    for row in reader:
        if None in row or None in row.values():  # too many values, or too few: the run was killed while it wrote
            raise ValueError(f"{path}, line {reader.line_num}: a row that was cut off; delete the rows of its case")
        for name in ("median_us", "ratio"):
            if row["status"] == "ok" and (row[name] or name == "median_us") and not _is_time(row[name]):
                raise ValueError(
                    f"{path}, line {reader.line_num}: status is ok, and {name} is {row[name]!r}: run.py wrote no "
                    "such row"
                )
        rows.append(defaultdict(str, row))
    return rows


def _is_time(text: str) -> bool:
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False
