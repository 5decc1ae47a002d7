# SPDX-License-Identifier: Apache-2.0
"""How every picture looks, and how it is written: SVG, the same bytes for the same results.

Text stays text, so that a diff shows which figure changed. The background is white, also on a dark page: what follows
the page's colours would depend on the reader's browser.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from matplotlib.artist import Artist
from matplotlib.axis import Axis
from matplotlib.backends.backend_svg import FigureCanvasSVG  # no display, and no global state of pyplot
from matplotlib.figure import Figure
from matplotlib.style import context
from matplotlib.ticker import LogLocator, NullFormatter

STYLE = {
    "svg.hashsalt": "gpu-rnn",  # else the ids within the file are random
    "svg.fonttype": "none",
    "font.family": ["DejaVu Sans", "sans-serif"],  # matplotlib brings it; a reader's own sans-serif is no wider
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "0.6",
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}
# Of Okabe and Ito, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "0.6"
OF_DTYPE = {"bf16": BLUE, "fp16": ORANGE, "fp32": GREEN, "ieee": PURPLE}
OF_CELL = {"LSTM": "o", "GRU": "^", "RNN": "s"}


@contextmanager
def styled() -> Iterator[None]:
    """matplotlib's own defaults and the above, whatever the user's configuration says."""
    with context(["default", STYLE]):
        yield


def new(width: float, height: float) -> Figure:
    """An empty figure; inches, of which a page shows about nine."""
    figure = Figure(figsize=(width, height))
    FigureCanvasSVG(figure)
    return figure


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def legend(figure: Figure, names: Mapping[str, Artist]) -> None:
    """Below all panels, where it covers nothing, in rows of equal length."""
    rows = -(-len(names) // 6)
    figure.legend(names.values(), names.keys(), loc="outside lower center", ncols=-(-len(names) // rows))


def decimal_ticks(axis: Axis) -> None:
    """1, 10, 100 on a logarithmic axis instead of powers, and more between them where there is room."""
    low, high = axis.get_view_interval()
    span = high / low
    subs = (1, 1.5, 2, 3, 4, 5, 6, 8) if span < 8 else (1, 2, 5) if span < 200 else (1,)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())
