# SPDX-License-Identifier: Apache-2.0
"""Cycles and microseconds of a step, simulated from the machine code that a problem gets: no GPU, nothing is measured.

python benchmarks/simulate.py --cell lstm --hidden 64 --batch 16 --dtype bf16 --device H100 --pass inference
python benchmarks/simulate.py --validate   # how near it comes: another library's kernels beside their published times
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # as a script, which knows its own folder only
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.cases.variants import DTYPES
from benchmarks.simulating import builds, machines, published, report
from benchmarks.simulating.paths import Lost
from gpu_rnn import cells, devices
from gpu_rnn.backends.group.nvrtc import CompileError
from gpu_rnn.backends.problem import DIRECTIONS, Problem
from gpu_rnn.cli import positive
from gpu_rnn.dispatch import choice

STEPS = 1024  # of the sequence: dispatch spreads a launch over them


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--cell", choices=list(cells.CELLS), default="lstm")
    found.add_argument("--hidden", type=positive(int), metavar="H", help="units")
    found.add_argument("--batch", type=positive(int), metavar="B", help="rows")
    found.add_argument("--heads", type=positive(int), default=1, metavar="N", help="recurrences side by side")
    norms = found.add_mutually_exclusive_group()
    norms.add_argument("--layer-norm", action="store_true", help="the products are normalised, those of each head")
    norms.add_argument("--rms-norm", action="store_true", help="likewise, by their root mean square")
    found.add_argument("--dtype", choices=list(DTYPES), default="bf16", help="fp32 multiplies in tf32, ieee in full")
    found.add_argument("--device", default="H100", metavar="NAME", help=f"of {', '.join(machines.MACHINES)}")
    found.add_argument("--pass", dest="direction", choices=DIRECTIONS, default="inference")
    found.add_argument("--backend", choices=list(choice.BACKENDS), help="default: the one that dispatch takes")
    found.add_argument("--csv", action="store_true", help="one line, whose last field is µs a step")
    found.add_argument("--validate", action="store_true", help="simulated beside published; pip fetches a package")
    return found


def problem_of(options: argparse.Namespace) -> Problem:
    """The problem that the options describe.

    Raises:
        ValueError: there is no such device.
    """
    return Problem(
        recurrence=cells.CELLS[options.cell](),
        T=STEPS,
        B=options.batch,
        N=options.heads,
        I=options.hidden,
        H=options.hidden,
        dtype=DTYPES[options.dtype],
        device_type="cuda",
        device=devices.describe(options.device),
        direction=options.direction,
        norm=options.layer_norm or options.rms_norm,
        rms=options.rms_norm,
        precision="tf32" if options.dtype == "fp32" else "ieee",
    )


def simulations(options: argparse.Namespace) -> tuple[str, list[report.Simulation]]:
    """The backend, and each of its kernels.

    Raises:
        Lost: the simulator does not follow it.
        ValueError: no such device, none of which figures are published, or a backend that cannot run the problem.
    """
    problem = problem_of(options)
    name = next((key for key, device in devices.DEVICES.items() if device == problem.device), options.device)
    machine = machines.of(name)
    backend = choice.select(problem, options.backend or "auto")
    try:
        return backend, [report.simulate(kernel, machine) for kernel in builds.kernels(problem, backend)]
    except Lost as lost:
        raise Lost(f"{backend} is not followed: {lost}") from lost


def main() -> None:
    options = parser().parse_args()
    if options.validate:
        published.main()
        return
    if not options.hidden or not options.batch:
        parser().error("give --hidden and --batch")
    try:
        backend, found = simulations(options)
    except (ValueError, CompileError, FileNotFoundError) as error:
        sys.exit(str(error))
    sizes = f"{options.cell},{options.dtype},{options.hidden},{options.batch},{options.heads},{options.direction}"
    if options.csv:
        known = found and all(each.kernel.loops and not each.spills for each in found)
        print(
            f"{sizes},{options.device},{backend},{sum(each.us for each in found):.2f}"
            if known
            else f"{sizes},{options.device},{backend},"
        )
        return
    print(f"{backend}: {sizes.replace(',', ' ')} on {options.device}; {report.LABEL}, not measured\n")
    for each in found:
        print("\n".join(report.lines(each)))
    if not all(each.kernel.loops for each in found):
        print("\nA step is these passes, their launches and a product by a library, whose machine code is not here.")


if __name__ == "__main__":
    main()
