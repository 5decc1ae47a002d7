# SPDX-License-Identifier: Apache-2.0
"""The demo's picture: accuracy over epochs, and time beside torch.nn."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from gpu_rnn.demo.timing import SAME_KERNELS, CaseTiming
from gpu_rnn.demo.train import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw"]

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
OURS_LINE: dict[str, Any] = {
    "lw": 1.6,
    "marker": "o",
    "ms": 3,
    "zorder": 3,
}  # drawn over torch.nn's, which on a CPU it coincides with
THEIRS_LINE: dict[str, Any] = {"lw": 6, "alpha": 0.3, "solid_capstyle": "round", "zorder": 2}


def draw(runs: Sequence[Run], timings: Sequence[CaseTiming], *, data: str, timed: str, device: str, path: Path) -> None:
    """Writes a PNG, whole or not at all.

    Args:
        data: what the runs learnt, one line.
        timed: what the timings ran on, one line.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, and no global state of pyplot
    from matplotlib.figure import Figure

    figure = Figure(figsize=(17, 2.5 + 0.65 * len(timings)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"gpu-rnn on {device}", fontsize=15, weight="bold")
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(1.2, 1.6), wspace=0.03)[0]
    bands = "\nlines: mean of the seeds; bands: from the lowest to the highest" if len(runs[0].seeds) > 1 else ""
    left.suptitle(f"Accuracy on {data}{bands}", fontsize=11)
    same = f"{SAME_KERNELS}: both run torch.nn's kernels"
    right.suptitle(f"Time of {timed}\ntheirs by gpu_rnn's: above 1× gpu_rnn is the faster; {same}", fontsize=11)
    _draw_accuracy(left.subplots(), runs)
    forward, training = right.subplots(1, 2, sharey=True)
    for number, (axes, title) in enumerate(((forward, "forward"), (training, "forward and backward"))):
        _draw_times(axes, [timing.each[number] for timing in timings], title)
    labels = [f"{t.case.label.replace(', ', chr(10), 1)}\nbeside {t.case.theirs_label}" for t in timings]
    forward.set_yticks(range(len(timings)), labels, fontsize=10)
    left.legend(loc="outside lower center", fontsize=8.5, frameon=False, ncols=2)
    _save(figure, path)


def _draw_accuracy(axes: Axes, runs: Sequence[Run]) -> None:
    from matplotlib.ticker import MaxNLocator

    variants = list(dict.fromkeys(run.variant.label for run in runs))
    for run in runs:
        colour = COLOURS[variants.index(run.variant.label) % len(COLOURS)]
        by_epoch = [[100 * epoch.accuracy for epoch in seeds] for seeds in zip(*run.seeds, strict=True)]
        epochs = range(1, len(by_epoch) + 1)
        style = OURS_LINE if run.library == "gpu_rnn" else THEIRS_LINE
        axes.plot(epochs, [mean(seeds) for seeds in by_epoch], color=colour, label=run.title, **style)
        if run.library == "gpu_rnn":
            lows, highs = ([pick(seeds) for seeds in by_epoch] for pick in (min, max))
            axes.fill_between(epochs, lows, highs, color=colour, alpha=0.1)
    lowest = 100 * min(epoch.accuracy for run in runs for seed in run.seeds for epoch in seed)
    final = 100 * min(min(run.final) for run in runs)
    axes.set_ylim(max(lowest, final - 15) - 1, 100)  # the first epochs would squeeze the rest
    axes.set(xlabel="epoch", ylabel="test accuracy, %")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(alpha=0.25)


def _draw_times(axes: Axes, cells: Sequence[tuple[float, float, str]], title: str) -> None:
    """A bar a case, as long as ours is faster; from 1 on, where both take the same time."""
    from matplotlib.ticker import LogLocator

    for row, (ours, theirs, words) in enumerate(cells):
        times = 1.0 if words == SAME_KERNELS else theirs / ours
        colour = "0.6" if words == SAME_KERNELS else COLOURS[0] if times >= 1 else COLOURS[1]
        axes.barh(row, times - 1, left=1, height=0.5, color=colour)
        end = max(times, 1.0)
        axes.annotate(words, (end, row), (5, 1), textcoords="offset points", weight="bold", va="bottom")
        beside = f"{_milliseconds(1e3 * ours)} ms, theirs {_milliseconds(1e3 * theirs)}"
        axes.annotate(beside, (end, row), (5, -1), textcoords="offset points", va="top", fontsize=8.5, color="0.35")
    ratios = [theirs / ours for ours, theirs, words in cells if words != SAME_KERNELS]
    axes.axvline(1, color="0.3", lw=1)
    axes.set(title=title, xlabel="times as fast, logarithmic", xscale="log", ylim=(len(cells) - 0.5, -0.5))
    axes.set_xlim(min([0.9, *(0.9 * ratio for ratio in ratios)]), 4 * max([1.0, *ratios]))  # room for the words
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}×")
    axes.xaxis.set_minor_formatter("")
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _milliseconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        part = Path(folder) / path.name
        figure.savefig(part, format="png")
        part.replace(path)  # atomic: Ctrl-C leaves the old picture or the new one
