# SPDX-License-Identifier: Apache-2.0
"""The simulated part of a device's page, and the page of a device on which nothing was measured yet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from benchmarks.reporting.results import per_step
from benchmarks.reporting.simulated import NAMES, OPTIONS, PASSES, Beside, by_build, compared, device_of
from benchmarks.reporting.tables import number, paragraph, table
from benchmarks.simulating import machines, validation

HOW = "`make gpu-check`, `python benchmarks/run.py --all --quick --seconds 570`, `make report`"
LABEL = "Simulated from machine code"
ABOUT = """No GPU ran what follows: each kernel that ships is compiled for the device, and its time loop is run on a
model of a multiprocessor, whose latencies are published figures and none of which is fitted. It is the loop's time
alone."""
PREDICTED_HOP = """Of this device nobody has published how long a word takes from block to block, and no kernel that
others timed on it was simulated: the simulation was {} only."""
SHARED = {"H100": "An H200 has the same chip: these are its figures too."}
CHECKED_BY = """Published in {source}, 16 rows, 1,024 steps; a backward pass is both passes less the forward one.
Simulated, the {count} that are compiled without a GPU take {low:.2f} to {high:.2f} of what was published: the model
leaves out instruction fetch, bank conflicts, and that multiprocessors share L2. Of the others no machine code is to be
had without a GPU. cuDNN's was timed as torch.nn.LSTM, the input's product included; the others, and ours here, are time
loops alone."""
EVERY = """Of the report on [{device}](../{page}.md). Simulated from machine code by
`python -m benchmarks.simulating.chains`; no GPU ran any of it. Cycles and microseconds of a step of the time loop.
`16-bit` is one build for fp16 and bf16; `tf32` and `fp32` are layers in fp32 whose products are taken in tf32 and in
full. {bound}"""
BOUNDED = """The bound is what multiplying and moving takes at least with W_hh on chip; "bound by it" is the bound by
the simulated time. Its rates are not the simulation's, so that a step may come out a percent below it."""
UNMEASURED = """Nothing yet. On a machine with such a GPU: {how}. What was measured then stands here, beside what is
simulated. [What is measured](../performance.md#what-is-measured), and how."""
COMPARED = "library, kernel|dtype|pass|units:|published, µs:|the same, simulated, µs:|ours, simulated, µs:"
STEPS = "backend|cell|option|dtype|pass|H:|B:|cycles, simulated:|µs, simulated:|bound, µs:|bound by it:"
BESIDE = (
    "case|backend|measured, µs:|loop, simulated, µs:|predicted with launches, µs:|bound, µs:|torch.nn, measured, µs:"
)
Pictures = Mapping[str, tuple[str, list[str]]]  # by title: the caption and the paths
CHECKED = "H100"  # the device that others published kernels of which are simulated too


def slug(device: str) -> str:
    return device.lower().replace(" ", "-")


def unmeasured(device: str, pictures: Pictures, checked_on: str) -> str:
    """The page of a device that only simulations know."""
    lines = [f"# {device}", "", "## Measured", "", *paragraph(UNMEASURED.format(how=HOW))]
    return "\n".join([*lines, *part(device, pictures, slug(device), checked_on)]) + "\n"


def part(device: str, pictures: Pictures, folder: str, checked_on: str) -> list[str]:
    """What is simulated of a device; `folder` is that of the pictures, `checked_on` the page of the H100."""
    machine, words = machines.of(device), "checked on an H100"
    where = f"[{words}]({checked_on}#how-near-it-comes)" if checked_on else words
    about = [ABOUT, *[PREDICTED_HOP.format(where)] * bool(machine.predicted), SHARED.get(device, "")]
    about.append(f"The clock is {machine.clock} GHz. [Every step]({folder}/steps.md) has a row.")
    lines = ["", f"## {LABEL}", "", *paragraph(" ".join(about))]
    for title, (caption, paths) in pictures.items():
        lines += ["", f"### {title}", "", *paragraph(caption)] if paths else []
        for path in paths:
            lines += ["", f"![{title}, {device}, simulated: {path.rpartition('/')[2]}]({path})"]
        lines += _compared(device) if paths and title == "How near it comes" else []
    return lines


def _compared(device: str) -> list[str]:
    rows = []
    for published, ours in compared(device):
        times = (f"{us:.2f}" if us is not None else "" for us in (published.us, published.simulated, ours))
        units = f"{published.heads} × {published.hidden}" if published.heads > 1 else published.hidden
        rows.append([published.library, published.dtype, PASSES[published.direction], units, *times])
    (low, high), count = validation.shares(), len(validation.checked())
    source = validation.SOURCE.partition(", on")[0]
    text = CHECKED_BY.format(source=source, count=count, low=low, high=high)
    return ["", *table(COMPARED.split("|"), rows), "", *paragraph(text)]


def every_step(device: str, page: str) -> str:
    """The page with a row for each simulated step."""
    rows = []
    for build, steps in by_build(device):
        what = build.backend, NAMES[build.cell], OPTIONS.get(build.option, ""), build.kind, PASSES[build.direction]
        for step in sorted(steps, key=lambda step: step.size):
            bound = ["", ""] if step.bound is None else [number(step.bound), f"{100 * step.bound / step.us:.0f} %"]
            rows.append([*what, *step.size, step.cycles, number(step.us), *bound])
    text = paragraph(EVERY.format(device=device, page=page, bound="" if machines.of(device).predicted else BOUNDED))
    return "\n".join([f"# Simulated steps of {device}", "", *text, "", *table(STEPS.split("|"), rows)]) + "\n"


def beside(found: Sequence[Beside], device: str) -> list[str]:
    """Measured and simulated, side by side."""
    if not found:
        return ["", f"None of the measured cases is a plain layer whose time loop is simulated of an {device}."]
    rows = []
    for each in found:
        ours, theirs = each.case.ours, each.case.theirs
        assert ours is not None
        predicted, bound = (number(float(ours[name])) if ours[name] else "" for name in ("predicted_us", "floor_us"))
        yardstick = number(per_step(theirs)) if theirs is not None and theirs["status"] == "ok" else ""
        rows.append(
            [each.case, ours["variant"], number(each.measured), number(each.simulated), predicted, bound, yardstick]
        )
    return ["", *table(BESIDE.split("|"), rows)]


def without(measured: Iterable[str], devices: Sequence[str]) -> list[str]:
    """Of the simulated devices those on which nothing was measured."""
    found = {device_of(name) for name in measured}
    return [name for name in devices if name not in found]


def checked_on(measured: Mapping[str, str], alone: Sequence[str]) -> str:
    """The page of the device on which others timed what is simulated too; empty where this report has none.
    `measured`: devices by the name of their page."""
    pages = [name for name, device in measured.items() if device_of(device) == CHECKED]
    pages += [slug(CHECKED)] if CHECKED in alone else []
    return f"{pages[0]}.md" if pages else ""
