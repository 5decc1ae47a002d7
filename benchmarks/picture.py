# SPDX-License-Identifier: Apache-2.0
"""A set's picture: the ratio to torch.nn as a heat map, and the time of a step beside torch.nn's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from results import NOISE, Case, per_step

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DTYPES = ("bf16", "fp16", "fp32", "ieee")
DIRECTIONS = ("forward", "training")
FAR = 4.0  # the colours end at this ratio and its inverse
OURS, THEIRS = "#0072B2", "0.55"  # Okabe and Ito's blue, which colour-blind readers can tell apart, and grey


def draw(cases: Sequence[Case], path: Path) -> None:
    """Writes a PNG of the cases of one set.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import (
            FigureCanvasAgg,  # no display, and no global state of pyplot
        )
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("a report needs matplotlib: pip install matplotlib") from error
    found = {(case.problem, case.dtype, case.direction): case for case in cases}
    problems = list(dict.fromkeys(case.problem for case in cases))
    columns = [(d, w) for d in DTYPES for w in DIRECTIONS if any((p, d, w) in found for p in problems)]
    directions = [d for d in DIRECTIONS if any(column[1] == d for column in columns)]
    dtype = max(DTYPES, key=lambda name: sum(case.dtype == name for case in cases))  # what most cases have
    widths = (0.9 * len(columns), *[3.6] * len(directions))
    figure = Figure(figsize=(3 + sum(widths), 2.2 + 0.34 * len(problems)), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{cases[0].set} on {cases[0].theirs['device']}", fontsize=13, weight="bold")
    left, *right = figure.subplots(1, 1 + len(directions), squeeze=False, width_ratios=widths)[0]
    _heat_map(left, [[found.get((p, *column)) for column in columns] for p in problems])
    left.set_xticks(range(len(columns)), [f"{d}\n{w}" for d, w in columns], fontsize=9)
    left.set_yticks(range(len(problems)), problems, fontsize=9)
    for axes, direction in zip(right, directions, strict=True):
        _times(
            axes, [found.get((problem, dtype, direction)) for problem in problems], f"{direction}, {dtype}"
        )
    right[0].legend(
        loc="upper left", bbox_to_anchor=(0, -0.6 / figure.get_size_inches()[1]), frameon=False, fontsize=9
    )
    figure.savefig(path, metadata={"Software": None})  # the same results make the same file


def _heat_map(axes: Axes, cells: list[list[Case | None]]) -> None:
    """torch.nn's time by ours: blue where ours is the faster, red where it is the slower."""
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm

    ratios = [[case.ratio if case and case.ratio else float("nan") for case in row] for row in cells]
    colours = colormaps["RdBu"].with_extremes(bad="0.92")
    axes.imshow(ratios, cmap=colours, norm=LogNorm(1 / FAR, FAR), aspect="auto")
    for y, row in enumerate(cells):
        for x, case in enumerate(row):
            text, bold = _cell(case)
            dark = case is not None and case.ratio is not None and not 0.5 < case.ratio < 2
            weight = "bold" if bold else "normal"
            axes.text(
                x, y, text, ha="center", va="center", fontsize=9, color="w" if dark else "k", weight=weight
            )
    axes.set_title("torch.nn's time / ours", fontsize=10)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _cell(case: Case | None) -> tuple[str, bool]:
    """What a cell says, and whether it is bold: a loss, or a result that was refused."""
    if case is None:
        return "", False
    if case.ratio is None:
        return (
            (case.ours["status"], True) if case.ours and case.ours["status"] != "ok" else ("no time", False)
        )
    return f"{case.ratio:.2f}×", case.ratio < NOISE


def _times(axes: Axes, cases: list[Case | None], title: str) -> None:
    """Two dots a problem on a logarithmic axis, with the 20th to 80th percentile as a line where it can be seen."""
    from matplotlib.ticker import LogLocator

    there = [(y, case) for y, case in enumerate(cases) if case is not None]
    for y, case in there:
        if case.ours and case.ratio:
            axes.plot(
                [per_step(case.theirs)[1], per_step(case.ours)[1]], [y, y], color="0.85", lw=3, zorder=1
            )
    for name, colour, size in (("torch.nn", THEIRS, 8), ("ours", OURS, 5)):
        rows = [(y, case.theirs if name == "torch.nn" else case.ours) for y, case in there]
        timed = [(y, *per_step(row)) for y, row in rows if row and row["status"] == "ok"]
        if timed:
            y, low, middle, high = zip(*timed, strict=True)
            below, above = (
                [abs(m - end) for m, end in zip(middle, ends, strict=True)] for ends in (low, high)
            )
            axes.errorbar(middle, y, xerr=(below, above), fmt="o", color=colour, ms=size, lw=1.2, label=name)
    axes.set(title=f"µs a step: {title}", xscale="log", ylim=(len(cases) - 0.5, -0.5))
    axes.title.set_fontsize(10)
    axes.set_yticks(range(len(cases)), [])
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.tick_params(labelsize=8)
    axes.margins(x=0.12)
    axes.grid(alpha=0.25)
