# SPDX-License-Identifier: Apache-2.0
"""The demo's picture: accuracy over epochs, and time beside torch.nn."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gpu_rnn.demo.timing import Timing
from gpu_rnn.demo.train import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw"]

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
OURS, THEIRS = "#0072B2", "#999999"


def draw(
    runs: Sequence[Run], timings: Sequence[Timing], *, data: str, timed: str, device: str, path: Path
) -> None:
    """Writes a PNG, whole or not at all.

    Args:
        data: what the runs learnt, one line.
        timed: what the timings ran on, one line.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, and no global state of pyplot
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"gpu-rnn on {device}", fontsize=15, weight="bold")
    accuracy, forward, training = figure.subplots(1, 3, width_ratios=(1.25, 1, 1))
    _draw_accuracy(accuracy, runs, data)
    _draw_times(forward, [t.forward for t in timings], "Forward")
    _draw_times(training, [t.training for t in timings], "Forward and backward")
    labels = [f"{t.case.label.replace(', ', chr(10))}\nbeside {t.case.theirs_label}" for t in timings]
    forward.set_yticks(range(len(timings)), labels, fontsize=9)
    training.set_yticks(range(len(timings)), [""] * len(timings))
    forward.annotate(
        timed, (0, 0), (0, -48), "axes fraction", textcoords="offset points", fontsize=9, color="0.3"
    )
    _save(figure, path)


def _draw_accuracy(axes: Axes, runs: Sequence[Run], data: str) -> None:
    variants = list(dict.fromkeys(run.variant.label for run in runs))
    for run in runs:
        ours = run.library == "gpu_rnn"
        colour = COLOURS[variants.index(run.variant.label) % len(COLOURS)]
        curves = [[100 * epoch.accuracy for epoch in seed] for seed in run.seeds]
        epochs = range(1, len(curves[0]) + 1)
        mean = [sum(values) / len(values) for values in zip(*curves, strict=True)]
        style = (
            {"lw": 1.6} if ours else {"lw": 6, "alpha": 0.3, "solid_capstyle": "round"}
        )  # ours on top of theirs
        axes.plot(epochs, mean, color=colour, label=f"{run.variant.label} ({run.library})", **style)
        if ours:
            axes.fill_between(epochs, *map(_extreme(curves), (min, max)), color=colour, alpha=0.12, lw=0)
    axes.set(title=data, xlabel="epoch", ylabel="test accuracy, %")
    axes.title.set_fontsize(10)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.25)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), fontsize=9, frameon=False, ncols=1)


def _extreme(curves):
    return lambda pick: [pick(values) for values in zip(*curves, strict=True)]


def _draw_times(axes: Axes, pairs: Sequence[tuple[float, float]], title: str) -> None:
    """One row a case: two dots on a logarithmic axis, the ratio between them."""
    for row, (ours, theirs) in enumerate(pairs):
        axes.plot([1e3 * ours, 1e3 * theirs], [row, row], color="0.75", lw=3, zorder=1)
        axes.annotate(
            f"{theirs / ours:.2f}x",
            (1e3 * (ours * theirs) ** 0.5, row),
            (0, 9),
            textcoords="offset points",
            ha="center",
        )
    axes.scatter(
        [1e3 * ours for ours, _ in pairs], range(len(pairs)), color=OURS, s=70, label="gpu_rnn", zorder=3
    )
    axes.scatter(
        [1e3 * theirs for _, theirs in pairs],
        range(len(pairs)),
        color=THEIRS,
        s=110,
        label="what it is beside",
        zorder=2,
    )
    axes.set(title=title, xlabel="ms a call (logarithmic)", xscale="log", ylim=(len(pairs) - 0.4, -0.6))
    axes.margins(x=0.25)
    axes.grid(axis="x", which="both", alpha=0.25)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), fontsize=9, frameon=False, ncols=2)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            figure.savefig(file, format="png")
        Path(name).replace(path)  # atomic: Ctrl-C leaves the old picture or the new one
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
