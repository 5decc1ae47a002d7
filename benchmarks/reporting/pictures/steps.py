# SPDX-License-Identifier: Apache-2.0
"""Simulated µs a step over H, a line for each B, beside the bound and what others published."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.reporting.results import DTYPES
from benchmarks.reporting.simulated import NAMES, PASSES, Step, of_dtype
from benchmarks.simulating.validation import Published, read

from . import style

OF_BATCH = {1: style.BLUE, 16: style.ORANGE, 64: style.GREEN, 128: style.PURPLE}
OF_BACKEND = {"group": ("o", "-"), "resident": ("^", ":")}
MARKS = ("x", "+", "1")  # of what is published
ALIKE = {"bf16": ("bf16", "fp16")}  # others' dtypes that stand in a panel: 16 bits are one build of group
TALL = {"bf16": "16 bits", "fp32": "fp32, products in tf32", "ieee": "fp32, products in full"}


def draw(device: str, cell: str) -> Figure | None:
    """A row of panels for each dtype, a column for each pass."""
    dtypes = [name for name in DTYPES if name in TALL and of_dtype(device, cell, name, "inference")]
    if not dtypes:
        return None
    figure = style.new(3 * len(PASSES), 2.3 * len(dtypes) + 0.8)
    figure.suptitle(f"{NAMES[cell]} on {device}: simulated, not measured", weight="bold")
    marks = _marks(device, cell)
    panels = figure.subplots(len(dtypes), len(PASSES), squeeze=False, sharex=True, sharey="row")
    used: set[int] = set()
    for row, dtype in zip(panels, dtypes, strict=True):
        for axes, (direction, words) in zip(row, PASSES.items(), strict=True):
            found = of_dtype(device, cell, dtype, direction)
            used |= {step.batch for step in found}
            _panel(axes, found)
            _published(
                axes, [each for each in marks if each.direction == direction and each.dtype in ALIKE.get(dtype, ())]
            )
            axes.set_title(f"{TALL[dtype]}, {words}")
            if axes is row[0]:
                axes.set_ylabel("simulated, µs a step")
    for axes in panels[-1]:
        axes.set_xlabel("H, units")
    _finish(panels)
    style.legend(
        figure, _keys(sorted(used), marks, any(step.bound for step in of_dtype(device, cell, dtypes[0], "inference")))
    )
    return figure


def _marks(device: str, cell: str) -> list[Published]:
    """What others published of a single layer of that cell on the device."""
    return [each for each in read() if each.device == device and each.heads == 1 and cell == "lstm"]


def _panel(axes: Axes, found: Sequence[Step]) -> None:
    for backend, (marker, line) in OF_BACKEND.items():
        for batch, colour in OF_BATCH.items():
            own = sorted(step for step in found if (step.build.backend, step.batch) == (backend, batch))
            own.sort(key=lambda step: step.hidden)
            axes.plot(
                [step.hidden for step in own],
                [step.us for step in own],
                color=colour,
                ls=line,
                marker=marker,
                ms=3.5,
                lw=1.2,
            )
            bound = [(step.hidden, step.bound) for step in own if step.bound and backend == "group"]
            axes.plot(*zip(*bound, strict=True) if bound else ((), ()), color=colour, ls="--", lw=0.7, alpha=0.7)


def _published(axes: Axes, marks: Sequence[Published]) -> None:
    for each, marker in zip(marks, MARKS, strict=False):
        axes.scatter([each.hidden], [each.us], color="k", marker=marker, s=36, zorder=3)


def _finish(panels: Sequence[Sequence[Axes]]) -> None:
    for row in panels:
        for axes in row:
            axes.set(xscale="log", yscale="log")
            axes.set_xticks(ticks := (16, 64, 256, 1024), [str(tick) for tick in ticks])
            axes.set_xticks([], minor=True)
            axes.grid(axis="y", color="0.92")
        style.decimal_ticks(row[0].yaxis)


def _keys(batches: Sequence[int], marks: Sequence[Published], bounded: bool) -> dict[str, Line2D]:
    keys = {f"group, B {batch}": Line2D([], [], color=OF_BATCH[batch], marker="o", ms=3.5) for batch in batches}
    if 16 in batches:
        keys["resident, up to 16 rows"] = Line2D([], [], color=OF_BATCH[16], marker="^", ms=3.5, ls=":")
    if bounded:
        keys["bound of each B"] = Line2D([], [], color="0.4", ls="--", lw=0.7)
    for library, marker in zip(dict.fromkeys(each.library for each in marks), MARKS, strict=False):
        keys[f"{library}, published"] = Line2D([], [], color="k", ls="", marker=marker)
    return keys
