# SPDX-License-Identifier: Apache-2.0
"""The time of a step over T, and over the number of layers, with all else equal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.reporting.results import DIRECTIONS, Case, per_step

from . import style

SETS = ("scaling", "cpu-scaling")  # those that are made for it; others have such shapes by chance
AXES = {"T": "T, steps", "layers": "layers"}
FEWEST = 3  # points that make a line
ACROSS = 3  # panels
LOOKS = {"forward": "--", "training": "-"}

Line = list[tuple[int, float, float]]  # T or layers, torch.nn's µs a step, ours


def draw(cases: Sequence[Case]) -> Figure | None:
    """A panel for each layer that was measured at several T or depths: torch.nn in grey, ours in blue."""
    panels: dict[tuple[str, str], dict[str, Line]] = {}
    for axis in AXES:
        for title, direction, line in _lines(cases, axis):
            panels.setdefault((axis, title), {})[direction] = line
    if not panels:
        return None
    down = -(-len(panels) // ACROSS)
    across = -(-len(panels) // down)  # rows of about the same length
    figure = style.new(3 * across, 2.4 * down + 0.4)
    places = list(figure.subplots(down, across, squeeze=False).flat)
    for axes, ((axis, title), lines) in zip(places, panels.items(), strict=False):
        _panel(axes, lines)
        axes.set_title(title)
        axes.set(xlabel=AXES[axis], ylabel="µs a step")
    for axes in places[len(panels) :]:
        axes.set_axis_off()
    used = [name for name in DIRECTIONS if any(name in lines for lines in panels.values())]
    keys = {
        f"{who}, {name}": Line2D([], [], color=colour, ls=LOOKS[name], marker="o", ms=3)
        for name in used
        for who, colour in (("torch.nn", style.GREY), ("ours", style.BLUE))
    }
    style.legend(figure, keys)
    return figure


def _lines(cases: Iterable[Case], axis: str) -> list[tuple[str, str, Line]]:
    """Title of the panel, direction and points of every line over T or layers."""
    found: dict[tuple[str, ...], dict[int, Case]] = {}
    for case in cases:
        if case.ratio is not None and case["set"] in SETS:
            found.setdefault(case.shape(axis), {})[int(case[axis])] = case
    lines = []
    for points in found.values():
        if len(points) < FEWEST:
            continue
        first = next(iter(points.values()))
        line = [(at, per_step(case.theirs), per_step(case.ours)) for at, case in sorted(points.items())]
        lines.append((_title(first, axis), first["direction"], line))
    return lines


def _title(case: Case, axis: str) -> str:
    sizes = [f"{name} {case[name]}" for name in ("H", "B") if name != axis]
    sizes += [f"I {case['I']}"] * (case["I"] != case["H"]) + [f"T {case['T']}"] * (axis != "T")
    sizes += [f"{case['heads']} heads"] * (case["heads"] != "1")
    sizes += [f"{case['layers']} layers"] * (axis != "layers" and case["layers"] != "1")
    sizes += ["both directions"] * (case["bidirectional"] == "True")
    return f"{case['cell']} {case['dtype']}, {', '.join(sizes)}"


def _panel(axes: Axes, lines: dict[str, Line]) -> None:
    for direction, line in lines.items():
        at, theirs, ours = zip(*line, strict=True)
        for times, colour in ((theirs, style.GREY), (ours, style.BLUE)):
            axes.plot(at, times, color=colour, ls=LOOKS[direction], marker="o", ms=3, lw=1.3)
    axes.set(xscale="log", yscale="log")
    axes.set_xticks(ticks := _apart(at), [str(x) for x in ticks])
    axes.set_xticks([], minor=True)
    style.decimal_ticks(axes.yaxis)
    axes.grid(axis="y", color="0.92")


def _apart(values: Sequence[int]) -> list[int]:
    """Those that leave room for their labels on a logarithmic axis, which has room for about eight."""
    least = (values[-1] / values[0]) ** (1 / 8)
    kept = [values[0]]
    for value in values[1:]:
        if value >= least * kept[-1]:
            kept.append(value)
    return kept
