# SPDX-License-Identifier: Apache-2.0
"""What each option costs: its time by that of the same layer without it."""

from __future__ import annotations

from collections.abc import Iterable

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from benchmarks.reporting.results import DIRECTIONS, DTYPES, OPTION_LIMIT, Case, against_default

from . import style

NEAR = (0.8, 0.9, 1, 1.1, 1.25, 1.5, 2)
FAR = (0.5, 1, 2, 3, 5, 10, 20, 50)


def draw(cases: Iterable[Case]) -> Figure | None:
    """A row for each option, a dot for each case; right of the shaded part is more than the limit."""
    found = against_default(cases)
    if not found:
        return None
    options = list(dict.fromkeys(case["option"] for case, _ in found))
    directions = [name for name in DIRECTIONS if any(case["direction"] == name for case, _ in found)]
    figure = style.new(1.6 + 3.4 * len(directions), 1.1 + 0.22 * len(options))
    panels = figure.subplots(1, len(directions), squeeze=False, sharex=True, sharey=True)[0]
    times = [time for _, time in found]
    for axes, direction in zip(panels, directions, strict=True):
        own = [(case, time) for case, time in found if case["direction"] == direction]
        _panel(axes, own, options)
        axes.set_title(direction)
    low, high = min(*times, 0.9) / 1.03, max(*times, 1.2) * 1.03
    ticks = [tick for tick in (NEAR if high < 3 * low else FAR) if low <= tick <= high]
    panels[0].set(xlim=(low, high), ylim=(len(options) - 0.5, -0.5))
    panels[0].set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    panels[0].set_yticks(range(len(options)), options)
    shown = dict(zip(*panels[0].get_legend_handles_labels()[::-1], strict=True))
    style.legend(figure, shown)
    return figure


def _panel(axes: Axes, found: list[tuple[Case, float]], options: list[str]) -> None:
    axes.axvspan(0.01, OPTION_LIMIT, color="0.93", lw=0, zorder=0)
    axes.axvline(1, color="0.6", lw=0.8, zorder=1)
    for dtype in DTYPES:
        own = [(case, time) for case, time in found if case["dtype"] == dtype]
        if own:
            rows = [options.index(case["option"]) for case, _ in own]
            look = {"color": style.OF_DTYPE[dtype], "alpha": 0.7, "linewidths": 0, "s": 22}
            axes.scatter([time for _, time in own], rows, label=dtype, **look)
    axes.set(xscale="log", xlabel="time with the option by time without")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(which="minor", length=0)
    axes.tick_params(axis="y", length=0)
