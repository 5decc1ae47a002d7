# SPDX-License-Identifier: Apache-2.0
"""Published steps of other libraries' kernels: the same kernel simulated, and ours simulated at the same size."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from benchmarks.reporting.simulated import PASSES, Compared

from . import style

LOOKS = {  # what, and its colour, marker and whether it is filled
    "published by others": ("0.35", "D"),
    "the same kernel, simulated": (style.ORANGE, "o"),
    "ours, simulated": (style.BLUE, "^"),
}


def draw(found: Sequence[Compared]) -> Figure | None:
    """A row for each published figure."""
    if not found:
        return None
    figure = style.new(8, 1.3 + 0.3 * len(found))
    axes = figure.subplots()
    for place, row in enumerate(found):
        times = (row.published.us, row.published.simulated, row.ours)
        there = [us for us in times if us is not None]
        axes.plot([min(there), max(there)], [place, place], color="0.85", lw=1, zorder=0)
        for (name, (colour, marker)), us in zip(LOOKS.items(), times, strict=True):
            if us is not None:
                axes.scatter([us], [place], color=colour, marker=marker, s=30, label=name)
                above = name != next(iter(LOOKS))  # two that are near each other have room so
                axes.annotate(
                    f"{us:.2f}",
                    (us, place),
                    (0, 5 if above else -11),
                    textcoords="offset points",
                    ha="center",
                    fontsize=7,
                )
    axes.set_yticks(range(len(found)), [_name(row) for row in found])
    axes.set(
        xscale="log", ylim=(len(found) - 0.5, -0.7), xlabel="µs a step: simulated or published, as the legend says"
    )
    axes.set_xlim(axes.get_xlim()[0] / 1.1, axes.get_xlim()[1] * 1.1)
    style.decimal_ticks(axes.xaxis)
    axes.tick_params(axis="y", length=0)
    shown = dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    style.legend(figure, {name: shown[name] for name in LOOKS if name in shown})
    return figure


def _name(row: Compared) -> str:
    each = row.published
    sizes = f"{each.heads} × {each.hidden}" if each.heads > 1 else f"{each.hidden}"
    return f"{each.library}, {sizes} units, B {each.batch}, {each.dtype}, {PASSES[each.direction]}"
