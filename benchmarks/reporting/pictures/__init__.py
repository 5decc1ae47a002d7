# SPDX-License-Identifier: Apache-2.0
"""The pictures of a device's page: each function takes what a table here is of, and returns None where that has nothing
to show: the cases, those of streams, measured cases beside simulated ones, or the name of a simulated device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.reporting import simulated
from benchmarks.reporting.results import OPTION_LIMIT

from . import against, options, ratio, scaling, steps, streams, style, taken, validation, work

# By title: what to say, and the function that draws each file; or their paths.
Pictures = Mapping[str, tuple[str, Mapping[str, Callable[[Any], Figure | None]]]]
Shown = dict[str, tuple[str, list[str]]]

LIMIT = f"{100 * (OPTION_LIMIT - 1):.0f} %"

PICTURES: Pictures = {
    "Ratio to torch.nn": (
        """torch.nn's time by ours over hidden units H and batch B, of one layer in one direction. Where several shapes
        share H and B, the lowest of their ratios. Blue: ours is the faster; red, with losses in bold: the slower; grey:
        not measured.""",
        {
            f"ratio-{cell.lower()}{'-few-steps' * few}": partial(ratio.draw, cell=cell, few=few)
            for cell in style.OF_CELL
            for few in (False, True)
        },
    ),
    "Time of a step and its floor": (
        """The floor is the least that a GPU's units, memories and synchronisation allow, whoever writes the kernel. The
        lines are fractions of the floor's speed.""",
        {"floor": against.floor},
    ),
    "Time of a step and its multiplications": (
        """Multiplications of both products of a step, and the time that it takes; on one thread, layers without
        options. The line is the most multiplications a second that any of these reached, which is no bound of the
        processor's.""",
        {"work": work.draw},
    ),
    "Scaling with T and layers": ("Time of a step, all layers together.", {"scaling": scaling.draw}),
    "Memory": (
        """The most that a call takes on top of its input and weights. The lines are multiples of what torch.nn's
        takes.""",
        {"memory": against.memory},
    ),
    "Options": (
        f"Time with an option by that of the same layer without. Shaded: at most {LIMIT} more.",
        {"options": options.draw},
    ),
    "Other libraries": (
        """Ours against what others run, as the legend names it, in the same turns. The lines are multiples of the
        other's time: below 1× ours is the faster.""",
        {"peers": against.peers},
    ),
}
OF_STREAMS: Pictures = {
    "Streams": (
        """Time of one step of so many streams, each of which has a sample: ours takes all of them in one call,
        torch.nn's layer is called for each of them.""",
        {"streams": streams.draw},
    ),
}
OF_BOTH: Pictures = {
    "Measured beside simulated": (
        """The measured time of a step, all passes and all that surrounds the time loop, against the simulated time of
        the loop alone. The lines are multiples of what was simulated.""",
        {"simulated": against.simulated},
    ),
}
# Of a device that steps are simulated for. Each caption says so.
SIMULATED: Pictures = {
    "How near it comes": (
        """Microseconds a step of an LSTM. Grey: what others measured of their kernels and published. Orange: the same
        kernel, simulated as ours are. Blue: ours at the same size, simulated; nobody ran it beside theirs.""",
        {"validation": lambda device: validation.draw(simulated.compared(device))},
    ),
    "Time of a step": (
        """Simulated microseconds of a step of the time loop, a colour for each number of rows B. Dashed, on an H100,
        whose rates are published: the bound, which is what multiplying and moving takes at least with W_hh on chip,
        latencies left out. Black: what others measured and published, of 16 rows. Products over all steps and launches
        come on top.""",
        {f"steps-{cell}": partial(steps.draw, cell=cell) for cell in ("lstm", "gru")},
    ),
    "Cost of options": (
        f"""Simulated time of a step with an option by the simulated time without, in 16 bits, a dot for each size.
        Options that are not here are not simulated. Shaded: at most {LIMIT} more.""",
        {"costs": lambda device: options.simulated(simulated.costs(device))},
    ),
    "Which backend a layer takes": (
        """The backend that is predicted cheapest for a plain layer of 1,000 steps with as many inputs as units: loops
        by simulation, `aten` by cuDNN's published steps and a model, what surrounds a loop by a model. A call takes
        another where a compiler refuses the kernel; `gpu_rnn.tune` measures on a device of your own.""",
        {"taken": taken.draw},
    ),
}


def draw(pictures: Pictures, given: Any, folder: Path) -> Shown:
    """Writes the pictures there is data for; by title, what to say and the paths relative to the folder's parent."""
    shown: Shown = {}
    for title, (caption, files) in pictures.items():
        paths = []
        for name, function in files.items():
            with style.styled():
                figure = function(given)
                if figure is not None:
                    style.save(figure, folder / f"{name}.svg")
                    paths.append(f"{folder.name}/{name}.svg")
        shown[title] = (caption, paths)
    return shown
