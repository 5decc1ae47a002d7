# SPDX-License-Identifier: Apache-2.0
"""The pictures of a GPU's page: each function takes the cases, and returns None where they have nothing to show."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.reporting.results import OPTION_LIMIT, Case

from . import against, options, ratio, scaling, style

# By title: what to say, and the function that draws each file.
PICTURES: dict[str, tuple[str, dict[str, Callable[[Sequence[Case]], Figure | None]]]] = {
    "Ratio to torch.nn": (
        "torch.nn's time by ours over hidden units H and batch B, of one layer in one direction. Where several shapes\n"
        "share H and B, the lowest of their ratios. Blue: ours is the faster; red, with losses in bold: the slower; "
        "grey:\n"
        "not measured.",
        {
            f"ratio-{cell.lower()}{'-few-steps' * few}": partial(ratio.draw, cell=cell, few=few)
            for cell in style.OF_CELL
            for few in (False, True)
        },
    ),
    "Time of a step and its floor": (
        "The floor is the least that a GPU's units, memories and synchronisation allow, whoever writes the "
        "kernel. The\n"
        "lines are fractions of the floor's speed.",
        {"floor": against.floor},
    ),
    "Scaling with T and layers": ("Time of a step, all layers together.", {"scaling": scaling.draw}),
    "Memory": (
        "The most that a call takes on top of its input and weights. The lines are multiples of what torch.nn's takes.",
        {"memory": against.memory},
    ),
    "Options": (
        f"Time with an option by that of the same layer without. Shaded: at most {100 * (OPTION_LIMIT - 1):.0f} "
        "% more.",
        {"options": options.draw},
    ),
    "Other libraries": (
        "Ours against what others run, as the legend names it, in the same turns. The lines are multiples of the\n"
        "other's time: below 1× ours is the faster.",
        {"peers": against.peers},
    ),
}


def draw(cases: Sequence[Case], folder: Path) -> dict[str, tuple[str, list[str]]]:
    """Writes the pictures there is data for; by title, what to say and the paths relative to the folder's parent."""
    shown: dict[str, tuple[str, list[str]]] = {}
    for title, (caption, files) in PICTURES.items():
        paths = []
        for name, function in files.items():
            with style.styled():
                figure = function(cases)
                if figure is not None:
                    style.save(figure, folder / f"{name}.svg")
                    paths.append(f"{folder.name}/{name}.svg")
        shown[title] = (caption, paths)
    return shown
