# SPDX-License-Identifier: Apache-2.0
"""The rows of a results file: their columns, how they are filled, and how one looks on a terminal."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

from benchmarks.cases.comparison import Comparison
from benchmarks.cases.names import LIBRARIES, PEERS, TORCH
from benchmarks.cases.variants import Case
from benchmarks.measuring import timing
from gpu_rnn.diagnostics.explanation import Explanation

Row = dict[str, object]
SIZES = ("cell", "T", "B", "I", "H", "layers", "bidirectional", "heads", "stepwise", "option")
COLUMNS = (
    *("set", "problem", *SIZES, "dtype", "precision", "direction", "threads", "variant", "chosen", "status"),
    *("median_us", "p20_us", "p80_us", "us_per_step", "floor_us", "of_floor", "predicted_us", "ratio"),
    *("trials", "calls", "timing", "peak_mib"),
    *("error", "worst", "tolerance", "checked_against", "detail", "seed"),
    *(
        "device",
        "driver",
        "cuda",
        "cudnn",
        "torch",
        "triton",
        "cupy",
        *LIBRARIES,
        "compiler",
        "gpu_rnn",
        "commit",
        "dirty",
        "date",
    ),
)
CASE = ("set", "problem", "dtype", "direction", "threads")  # what names a case, see `Case.key`


def empty(case: Case, variant: str = TORCH) -> Row:
    """A row of a case, with nothing known of it yet."""
    sizes = {name: getattr(case.problem, name) for name in SIZES}
    if case.problem.streams:
        sizes["stepwise"] = "streams"
    named = dict(zip(CASE, case.key, strict=True))
    return {**dict.fromkeys(COLUMNS[: COLUMNS.index("seed")], ""), **sizes, **named, "variant": variant}


def begin(case: Case, compared: Comparison, predictions: bool) -> dict[str, Row]:
    """A row for each variant; with what was predicted of the device, unless that is only played."""
    explanation, rows = compared.explanation, {}
    floor = text(_floor_us(explanation) if predictions else None, ".3f")
    predicted = {row.backend: row.predicted_us for row in explanation.rows if predictions}
    for side in compared.sides:
        for variant in side.variants:
            rows[variant.name] = empty(case, variant.name) | {
                "chosen": "yes" if variant.name == explanation.chosen else "",
                "checked_against": f"{side.truth.name} float64",
                "detail": variant.note,
                "floor_us": floor,
                "predicted_us": text(predicted.get(variant.name), ".3f"),
            }
    return rows


def _floor_us(explanation: Explanation) -> float | None:
    """The least microseconds a step for all layers: one after another or, unless a layer waits for the whole of the one
    below because it runs backwards in time, side by side, each a step behind."""
    problem, one = explanation.problem, explanation.floor_us
    if one is None or problem.layers == 1 or "1" in problem.reverse:
        return one and one * problem.layers
    together = replace(explanation, problem=replace(problem, N=problem.N * problem.layers)).floor_us
    assert together is not None  # what fits alone fits in turns
    return min(problem.layers * one, (1 + (problem.layers - 1) / problem.T) * together)


def enter(rows: dict[str, Row], timings: dict[str, timing.Timing], steps: int) -> None:
    """The times, their ratio to torch.nn's (above 1 the variant is the faster), and the share of the floor's speed."""
    theirs = timings.get(TORCH)
    for name, found in timings.items():
        low, high = found.spread
        a_step, floor = 1e6 * found.median / steps, str(rows[name]["floor_us"])
        rows[name].update(
            status="ok",
            median_us=f"{1e6 * found.median:.2f}",
            p20_us=f"{1e6 * low:.2f}",
            p80_us=f"{1e6 * high:.2f}",
            us_per_step=f"{a_step:.3f}",
            of_floor=f"{float(floor) / a_step:.3g}" if floor else "",
            trials=len(found.samples),
            calls=found.calls,
            timing=found.how,
            ratio=f"{theirs.median / found.median:.4g}" if theirs else "",
        )


def failed(row: Row) -> bool:
    """Whether the row says that something is wrong here. What a peer gets wrong is no fault of ours."""
    return row["status"] in ("wrong", "failed") and row["variant"] not in PEERS


def short(row: Row) -> str:
    """A few words for the terminal."""
    name = f"{row['variant']}{'*' * bool(row['chosen'])}"
    if row["status"] == "emulated":
        return f"{name} right"
    if row["status"] != "ok":
        return f"{name} {str(row['status']).upper()} {row['detail']}".rstrip()
    ratio = f" ({float(str(row['ratio'])):.2f}x)" if row["ratio"] and row["variant"] != TORCH else ""
    return f"{name} {float(str(row['median_us'])):.0f} µs{ratio}"


def text(value: float | None, form: str) -> str:
    """The number, or nothing where there is none."""
    return "" if value is None else format(value, form)


def finished(path: Path, facts: dict[str, str]) -> set[tuple[str, ...]]:
    """The keys of the cases that a results file has of the same commit, device and versions.

    Raises:
        ValueError: the file is none of this version's, or ends within a row; the code has no commit, or is not known
            to.
    """
    if not facts["commit"]:
        raise ValueError(
            "--resume leaves out what was measured of the same commit, which is not known here: give --commit"
        )
    if facts["dirty"] == "yes":  # two changed checkouts of one commit need not be the same
        raise ValueError(
            "--resume leaves out what was measured of the same code, which no commit names here: commit the changes"
        )
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path} has other columns than are written now: start a new file with --out")
        if not path.read_text().endswith("\n"):
            raise ValueError(f"{path} ends within a row, of a run that was killed: delete the rows of its last case")
        same = [row for row in reader if all(row[name] == fact for name, fact in facts.items() if name != "date")]
    return {tuple(row[name] for name in CASE) for row in same}
