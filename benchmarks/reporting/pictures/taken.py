# SPDX-License-Identifier: Apache-2.0
"""Which backend dispatch takes over H and B, by simulated, published and modelled times."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from benchmarks.reporting.simulated import NAMES, TAKEN_BATCH, TAKEN_HIDDEN, taken

from . import style

COLOURS = {
    "resident": style.GREEN,
    "group": style.BLUE,
    "aten": "0.75",
    "step": style.ORANGE,
    "reference": style.PURPLE,
}
CALLS = {"inference": "inference", "training": "forward and backward"}
CELLS, DTYPES = ("lstm", "gru"), ("bf16", "fp32")


def draw(device: str) -> Figure:
    """A row of panels for each cell, and in it one for each dtype and kind of call."""
    kinds = [(dtype, call) for dtype in DTYPES for call in CALLS]
    figure = style.new(2.4 * len(kinds), 2.7 * len(CELLS) + 0.2)
    figure.suptitle(f"What a layer is predicted to take on {device}: simulated and modelled", weight="bold")
    panels = figure.subplots(len(CELLS), len(kinds))
    for row, cell in zip(panels, CELLS, strict=True):
        for axes, (dtype, call) in zip(row, kinds, strict=True):
            _panel(axes, taken(device, cell, call, dtype))
            axes.set_title(f"{NAMES[cell]} {dtype}, {CALLS[call]}", fontsize=8)
        row[0].set_ylabel("H")
    for axes in panels[-1]:
        axes.set_xlabel("B")
    return figure


def _panel(axes: Axes, found: Mapping[tuple[int, int], str]) -> None:
    names = list(COLOURS)
    places = [[names.index(found[hidden, batch]) for batch in TAKEN_BATCH] for hidden in TAKEN_HIDDEN]
    axes.imshow(
        places, cmap=ListedColormap(list(COLOURS.values())), vmin=0, vmax=len(names) - 1, aspect="auto", alpha=0.75
    )
    for y, row in enumerate(places):
        for x, place in enumerate(row):
            axes.text(x, y, names[place], ha="center", va="center", fontsize=6)
    axes.set_xticks(range(len(TAKEN_BATCH)), [str(batch) for batch in TAKEN_BATCH])
    axes.set_yticks(range(len(TAKEN_HIDDEN)), [str(hidden) for hidden in TAKEN_HIDDEN])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
