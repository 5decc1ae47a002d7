# SPDX-License-Identifier: Apache-2.0
"""What each option costs: its time by that of the same layer without it, measured or simulated."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from benchmarks.reporting.results import DIRECTIONS, OPTION_LIMIT, Case, against_default
from benchmarks.reporting.simulated import PASSES, Cost

from . import style

NEAR = (0.8, 0.9, 1, 1.1, 1.25, 1.5, 2)
FAR = (0.5, 1, 2, 3, 5, 10, 20, 50)
OF_UNITS = {"up to 128 units": style.BLUE, "up to 512 units": style.ORANGE, "more units": style.GREEN}


class Dot(NamedTuple):
    row: str
    panel: str
    times: float
    look: str  # a key of the colours


def draw(cases: Iterable[Case]) -> Figure | None:
    """A row for each option, a dot for each case; right of the shaded part is more than the limit."""
    found = [Dot(c["option"], c["direction"], times, _look(c)) for c, times in against_default(cases)]
    colours = dict(style.OF_DTYPE) | OF_CASE
    return _draw(found, DIRECTIONS, colours, "time with the option by time without")


OF_CASE = {"1 step": style.PURPLE, "more steps, B 1": style.BLUE, "more steps, B > 1": style.GREEN}


def _look(case: Case) -> str:
    """By dtype, or on a CPU, which has one, by what the time of a call is made of."""
    if not case["threads"]:
        return case["dtype"]
    return "1 step" if case["T"] == "1" else "more steps, B 1" if case["B"] == "1" else "more steps, B > 1"


def simulated(costs: Sequence[Cost]) -> Figure | None:
    """A row for each option of each cell, a dot for each size."""
    found = [
        Dot(f"{each.cell}, {each.option}", PASSES[each.direction], each.times, _units(each.hidden)) for each in costs
    ]
    return _draw(found, tuple(PASSES.values()), OF_UNITS, "simulated time with, by simulated time without")


def _units(hidden: int) -> str:
    few, some, many = OF_UNITS
    return few if hidden <= 128 else some if hidden <= 512 else many


def _draw(found: Sequence[Dot], order: Sequence[str], colours: Mapping[str, str], label: str) -> Figure | None:
    if not found:
        return None
    options = list(dict.fromkeys(dot.row for dot in found))
    titles = [name for name in order if any(dot.panel == name for dot in found)]
    figure = style.new(1.6 + (7.0 if len(titles) > 2 else 3.4 * len(titles)), 1.1 + 0.22 * len(options))
    panels = figure.subplots(1, len(titles), squeeze=False, sharex=True, sharey=True)[0]
    times = [dot.times for dot in found]
    for axes, title in zip(panels, titles, strict=True):
        _panel(axes, [dot for dot in found if dot.panel == title], options, colours)
        axes.set(title=title, xlabel=label if len(titles) < 3 or title == titles[1] else "")
    low, high = min(*times, 0.9) / 1.03, max(*times, 1.2) * 1.03
    ticks = [tick for tick in (NEAR if high < 3 * low else FAR) if low <= tick <= high]
    panels[0].set(xlim=(low, high), ylim=(len(options) - 0.5, -0.5))
    panels[0].set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    panels[0].set_yticks(range(len(options)), options)
    shown = {name: handle for axes in panels for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    style.legend(figure, {name: shown[name] for name in colours if name in shown})
    return figure


def _panel(axes: Axes, found: Sequence[Dot], options: list[str], colours: Mapping[str, str]) -> None:
    axes.axvspan(0.01, OPTION_LIMIT, color="0.93", lw=0, zorder=0)
    axes.axvline(1, color="0.6", lw=0.8, zorder=1)
    for name, colour in colours.items():
        own = [dot for dot in found if dot.look == name]
        if own:
            look = {"color": colour, "alpha": 0.7, "linewidths": 0, "s": 22}
            axes.scatter([dot.times for dot in own], [options.index(dot.row) for dot in own], label=name, **look)
    axes.set(xscale="log")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(which="minor", length=0)
    axes.tick_params(axis="y", length=0)
