# SPDX-License-Identifier: Apache-2.0
"""Ours against something else that was measured, a dot a case: the floor, torch.nn's memory, other libraries."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.cases.names import ON_A_CPU, ON_A_GPU
from benchmarks.reporting.results import DIRECTIONS, Case, per_step, timed
from benchmarks.reporting.simulated import Beside

from . import style

LOOKS = ((style.BLUE, "o"), (style.ORANGE, "^"), (style.GREEN, "s"))
OF_PEER = dict(zip(ON_A_GPU, LOOKS[:2], strict=True)) | dict(zip(ON_A_CPU, LOOKS, strict=True))
MARGIN = 1.5  # between the outermost dot and the edge, on logarithmic axes


class Dot(NamedTuple):
    direction: str
    x: float
    y: float
    name: str  # in the legend
    look: tuple[str, str]  # colour and marker


def floor(cases: Iterable[Case]) -> Figure | None:
    """The time of a step against its floor; the lines are fractions of the floor's speed."""
    dots = []
    for case in cases:
        for row in (case.theirs, case.ours):
            if row and timed(row) and row["floor_us"]:
                name, look = (_name(case), _look(case)) if row is case.ours else ("torch.nn", ("0.7", "o"))
                dots.append(Dot(case["direction"], float(row["floor_us"]), per_step(row), name, look))
    lines = {1.0: "100 %", 2.0: "50 %", 4.0: "25 %", 10.0: "10 %"}
    return _draw(dots, "floor, µs a step", "measured, µs a step", lines)


def memory(cases: Iterable[Case]) -> Figure | None:
    """The memory of a call against torch.nn's."""
    dots = []
    for case in cases:
        if case.ratio is not None:
            x, y = (float(row["peak_mib"] or 0) for row in (case.theirs, case.ours) if row)
            dots.append(Dot(case["direction"], x, y, _name(case), _look(case)))
    dots = [dot for dot in dots if dot.x > 0 and dot.y > 0]
    return _draw(dots, "torch.nn, peak MiB", "ours, peak MiB", {0.5: "½×", 1.0: "1×", 2.0: "2×"})


def peers(cases: Iterable[Case]) -> Figure | None:
    """The time of a step against other libraries'; below the line 1× ours is the faster."""
    dots = [
        Dot(case["direction"], per_step(row), per_step(case.ours), row["variant"], OF_PEER[row["variant"]])
        for case in cases
        for row in case.peers
        if case.ours and timed(case.ours)
    ]
    lines = {0.25: "¼×", 0.5: "½×", 1.0: "1×", 2.0: "2×"}
    return _draw(dots, "the other library, µs a step", "ours, µs a step", lines)


def simulated(found: Iterable[Beside]) -> Figure | None:
    """The measured time of a step against the simulated one of its loop; the lines are multiples of the latter."""
    dots = [
        Dot(each.case["direction"], each.simulated, each.measured, _name(each.case), _look(each.case)) for each in found
    ]
    lines = {1.0: "1×", 1.5: "1½×", 2.0: "2×", 4.0: "4×"}
    return _draw(dots, "simulated time loop, µs a step", "measured, µs a step", lines)


def _name(case: Case) -> str:
    return f"{case['cell']} {case['dtype']}"


def _look(case: Case) -> tuple[str, str]:
    return style.OF_DTYPE[case["dtype"]], style.OF_CELL[case["cell"]]


def _draw(dots: list[Dot], x: str, y: str, lines: Mapping[float, str]) -> Figure | None:
    if not dots:
        return None
    directions = [name for name in DIRECTIONS if any(dot.direction == name for dot in dots)]
    figure = style.new(3.5 * len(directions) + 0.4, 4.2)
    shown = {}
    for axes, direction in zip(figure.subplots(1, len(directions), squeeze=False)[0], directions, strict=True):
        _panel(axes, [dot for dot in dots if dot.direction == direction], lines)
        axes.set_title(direction, pad=20)  # above the names of the lines
        axes.set(xlabel=x, ylabel=y)
        shown |= dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    style.legend(figure, shown)
    return figure


def _panel(axes: Axes, dots: list[Dot], lines: Mapping[float, str]) -> None:
    """Both axes logarithmic; a line for each multiple of x, named where it leaves the panel."""
    xs, ys = [dot.x for dot in dots], [dot.y for dot in dots]
    left, right, low, high = min(xs) / MARGIN, max(xs) * MARGIN, min(ys) / MARGIN, max(ys) * MARGIN
    for factor, name in lines.items():
        axes.plot([left, right], [left * factor, right * factor], color="0.8", lw=0.8, zorder=0)
        look = {"textcoords": "offset points", "color": "0.4", "fontsize": 7}
        if factor * left < high <= factor * right:
            axes.annotate(name, (high / factor, high), (1, 2), rotation=50, **look)
        elif low < factor * right < high:
            axes.annotate(name, (right, right * factor), (3, 0), va="center", **look)
    for name in sorted({dot.name for dot in dots}, key=lambda name: (name != "torch.nn", name)):
        own = [dot for dot in dots if dot.name == name]
        colour, marker = own[0].look
        look = {"color": colour, "marker": marker, "alpha": 0.6, "linewidths": 0, "s": 14}
        axes.scatter([dot.x for dot in own], [dot.y for dot in own], label=name, **look)
    axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(low, high))
    for axis in (axes.xaxis, axes.yaxis):
        style.decimal_ticks(axis)
