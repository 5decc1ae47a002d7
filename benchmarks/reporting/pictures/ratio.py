# SPDX-License-Identifier: Apache-2.0
"""torch.nn's time by ours over H and B: a heat map for each dtype and direction of a cell."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from benchmarks.reporting.results import DIRECTIONS, DTYPES, NOISE, STEP_BY_STEP, Case

from . import style

FAR = 4.0  # the colours end at this ratio and its inverse
FEW = 2  # a T up to it is a question of latency: apart from the loops
CELL_WIDTH, CELL_HEIGHT = 0.36, 0.24  # inches
NARROWEST = 3  # cells, as wide as a panel's title

Grid = dict[tuple[int, int], float]  # ratio by H and B


def draw(cases: Sequence[Case], cell: str, few: bool) -> Figure | None:
    """One layer, one direction, no heads, T up to FEW or above. Where shapes share H and B, the lowest of their
    ratios. Numbers of threads have panels of their own, and cells that are called for each step none."""
    grids: dict[tuple[str, str], Grid] = {}
    for case in cases:
        single = (case["layers"], case["bidirectional"], case["heads"]) == ("1", "False", "1")
        single = single and case["stepwise"] not in STEP_BY_STEP
        if case.ratio is not None and case["cell"] == cell and single and (int(case["T"]) <= FEW) == few:
            grid, place = grids.setdefault((case["dtype"], _panel_of(case)), {}), (int(case["H"]), int(case["B"]))
            grid[place] = min(case.ratio, grid.get(place, case.ratio))
    if not grids:
        return None
    dtypes = [name for name in DTYPES if any(key[0] == name for key in grids)]
    kinds = sorted(
        {kind for _, kind in grids}, key=lambda kind: ([*map(kind.startswith, DIRECTIONS)].index(True), kind)
    )
    heights = {d: sorted({H for key, grid in grids.items() if key[0] == d for H, _ in grid}) for d in dtypes}
    widths = {k: sorted({B for key, grid in grids.items() if key[1] == k for _, B in grid}) for k in kinds}
    across, down = [max(len(widths[k]), NARROWEST) for k in kinds], [len(heights[d]) for d in dtypes]
    size = CELL_WIDTH * sum(across) + 0.8 * len(kinds), CELL_HEIGHT * sum(down) + 0.7 * len(dtypes) + 0.2
    figure = style.new(*size)
    figure.suptitle(f"{cell}, T ≤ {FEW}" if few else cell, weight="bold")
    panels = figure.subplots(len(dtypes), len(kinds), squeeze=False, width_ratios=across, height_ratios=down)
    for row, dtype in zip(panels, dtypes, strict=True):
        for axes, kind in zip(row, kinds, strict=True):
            if (dtype, kind) in grids:
                _panel(axes, grids[dtype, kind], heights[dtype], widths[kind])
                axes.set(xlabel="B, rows", ylabel="H, units")
                axes.set_title(f"{dtype}, {kind}", fontsize=8)
            else:
                axes.set_axis_off()
    return figure


def _panel_of(case: Case) -> str:
    threads = case["threads"]
    return case["direction"] + (f", {threads} thread{'s' * (threads != '1')}" if threads else "")


def _panel(axes: Axes, grid: Grid, heights: list[int], widths: list[int]) -> None:
    """Blue where ours is the faster, red and bold where it is the slower, grey where nothing was measured."""
    ratios = [[grid.get((H, B), float("nan")) for B in widths] for H in heights]
    colours = colormaps["RdBu"].with_extremes(bad="0.94")
    axes.imshow(ratios, cmap=colours, norm=LogNorm(1 / FAR, FAR), aspect="auto")
    for y, row in enumerate(ratios):
        for x, ratio in enumerate(row):
            if ratio == ratio:
                _write(axes, x, y, ratio)
    axes.set_xticks(range(len(widths)), [str(B) for B in widths])
    axes.set_yticks(range(len(heights)), [str(H) for H in heights])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _write(axes: Axes, x: int, y: int, ratio: float) -> None:
    colour, weight = "k" if 0.5 < ratio < 2 else "w", "bold" if ratio < NOISE else "normal"
    text = f"{ratio:.2f}" if ratio < 10 else f"{ratio:.1f}"
    axes.text(x, y, text, color=colour, weight=weight, ha="center", va="center", fontsize=7)
