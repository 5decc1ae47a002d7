# SPDX-License-Identifier: Apache-2.0
"""The time of one step of many streams: all in one call, beside a call for each."""

from __future__ import annotations

from collections.abc import Iterable

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.cases.names import BY_HAND, ONNXRUNTIME
from benchmarks.reporting.results import Case, per_step, timed

from . import style

LINES = {  # by what is timed: its name, colour and marker
    "torch.nn": ("torch.nn, a call for each stream", style.GREY, "s"),
    "": ("ours, one call", style.BLUE, "o"),
    BY_HAND: ("by hand, one call", style.ORANGE, "^"),
    ONNXRUNTIME: ("ONNX Runtime, one call", style.GREEN, "v"),
}
ACROSS = 4


def draw(cases: Iterable[Case]) -> Figure | None:
    """A panel for each layer."""
    layers: dict[str, list[Case]] = {}
    for case in cases:
        if timed(case.ours):
            layers.setdefault(f"{case['cell']} {case['dtype']}, H {case['H']}", []).append(case)
    if not layers:
        return None
    across = min(ACROSS, len(layers))
    down = -(-len(layers) // across)
    figure = style.new(2.4 * across, 2.4 * down + 0.4)
    places = list(figure.subplots(down, across, squeeze=False, sharey=True).flat)
    shown = {}
    for axes, (title, own) in zip(places, layers.items(), strict=False):
        _panel(axes, sorted(own, key=lambda case: int(case["B"])))
        axes.set(title=title, xlabel="streams")
        shown |= dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    places[0].set_ylabel("µs a step of all streams")
    for axes in places[len(layers) :]:
        axes.set_axis_off()
    style.legend(figure, shown)
    return figure


def _panel(axes: Axes, cases: list[Case]) -> None:
    for variant, (name, colour, marker) in LINES.items():
        line = [
            (int(case["B"]), per_step(row))
            for case in cases
            for row in case.rows
            if timed(row) and (row["chosen"] if not variant else row["variant"] == variant)
        ]
        if line:
            axes.plot(*zip(*line, strict=True), color=colour, marker=marker, ms=3.5, lw=1.2, label=name)
    axes.set(xscale="log", yscale="log")
    ticks = sorted({int(case["B"]) for case in cases})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.grid(axis="y", color="0.92")
    style.decimal_ticks(axes.yaxis)
