# SPDX-License-Identifier: Apache-2.0
"""The time of a step on a CPU over the multiplications that it takes, and the fastest that any of them went."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.reporting.results import DIRECTIONS, STEP_BY_STEP, Case, per_step, timed

from . import style

COLOURS = {"LSTM": style.BLUE, "GRU": style.ORANGE, "RNN": style.GREEN}
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
PASSES = {"forward": 1, "training": 3}  # backward multiplies twice as often
MARGIN = 1.5


class Work(NamedTuple):
    case: Case
    products: float  # multiplications a step
    ours: float  # µs a step
    theirs: float


def multiplications(case: Case) -> float:
    """Of a step, both products of all layers; of a layer after the first, whose input is H wide, as of the first."""
    units, wide = int(case["H"]), int(case["I"])
    rows = int(case["B"]) * int(case["layers"]) * (1 + (case["bidirectional"] == "True")) * int(case["heads"])
    return PASSES[case["direction"]] * GATES[case["cell"]] * units * (units + wide) * rows


def draw(cases: Sequence[Case]) -> Figure | None:
    """A panel for each direction, of one thread; the line is the most multiplications a second that anything
    reached."""
    found = [
        Work(case, multiplications(case), per_step(case.ours), per_step(case.theirs))
        for case in cases
        if case["threads"] == "1" and case["stepwise"] not in STEP_BY_STEP and case.ratio is not None
        and timed(case.ours) and timed(case.theirs)
    ]  # fmt: skip
    directions = [name for name in DIRECTIONS if any(work.case["direction"] == name for work in found)]
    if not directions:
        return None
    figure = style.new(3.7 * len(directions) + 0.4, 3.7)
    for axes, direction in zip(figure.subplots(1, len(directions), squeeze=False)[0], directions, strict=True):
        _panel(axes, [work for work in found if work.case["direction"] == direction])
        axes.set(title=f"{direction}, one thread", xlabel="multiplications a step", ylabel="µs a step")
        shown = dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    style.legend(figure, shown)
    return figure


def _panel(axes: Axes, found: Sequence[Work]) -> None:
    fastest = max(work.products / min(work.ours, work.theirs) for work in found)
    ends = min(work.products for work in found) / MARGIN, max(work.products for work in found) * MARGIN
    axes.plot(ends, [end / fastest for end in ends], color="0.5", lw=0.8, zorder=0)
    place = (ends[0] * 2, ends[0] * 2 / fastest)
    axes.annotate(f"{fastest / 1e3:.0f} billion a second,\nthe most that any reached", place, (8, -2), color="0.4",
                  fontsize=7, textcoords="offset points", va="top")  # fmt: skip
    axes.scatter(
        [work.products for work in found], [work.theirs for work in found], color="0.65", s=16, label="torch.nn"
    )
    for cell, colour in COLOURS.items():
        own = [work for work in found if work.case["cell"] == cell]
        look = {"color": colour, "marker": style.OF_CELL[cell], "alpha": 0.8, "linewidths": 0, "s": 20}
        axes.scatter([work.products for work in own], [work.ours for work in own], label=f"ours, {cell}", **look)
    axes.set(xscale="log", yscale="log", xlim=ends)
    axes.set_ylim(bottom=min(axes.get_ylim()[0], ends[0] / fastest / 2))
    style.decimal_ticks(axes.yaxis)
