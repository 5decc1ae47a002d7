# SPDX-License-Identifier: Apache-2.0
"""Writes tests/data/costs_synthetic.csv: made-up results of a GPU that is exactly as the cost models say, but for
noise.

No number in it is a measurement of anything: each is a model's time with the constants `TRUE`, times a random factor. A
fit has to find those constants again.

python -m tests.support.synthetic_costs
"""

from __future__ import annotations

import csv
import random
from collections.abc import Iterator
from dataclasses import replace

from benchmarks import fit
from benchmarks.cases import problems
from benchmarks.cases.names import TORCH
from benchmarks.reporting import results
from gpu_rnn.backends import rates
from gpu_rnn.backends.group import launch as group
from gpu_rnn.dispatch import choice
from tests.support.paths import ROOT

FILE = ROOT / "tests" / "data" / "costs_synthetic.csv"
DEVICE = "Synthetic H100 (made-up numbers; no measurement)"
NOISE = 0.01  # standard deviation of a time's logarithm
SEED = 0
TRUE = {
    "resident": {"step": 1.3},
    "group": {"step": 1.6},
    "aten": {"step": 4.5e-6, "persistent_step": 2.6e-6, "persistent_backward": 4e-6},
    "step": {"step": 4e-6},
    "reference": {"operation": 5e-6},
}
COLUMNS = (*results.NEEDED, "option", "commit", "dirty")
FACTS = {"device": DEVICE, "commit": "0" * 40, "dirty": "no", "date": "2000-01-01T00:00:00+00:00"}
SETS = ("quick", "rl")  # stacks in one direction are left out: a wavefront has constants that no fit changes


def rows() -> Iterator[dict[str, object]]:
    """A row for torch.nn and for each backend that can run a case."""
    rng, given = random.Random(SEED), rates.PREDICTED.having(TRUE, "made up")
    for name in SETS:
        for problem in problems.SETS[name]:
            for dtype in problem.dtypes:
                for direction in problem.directions:
                    yield from _of_case(
                        {"set": name, "problem": problem.name, "dtype": dtype, "direction": direction},
                        problem,
                        given,
                        rng,
                    )


def _of_case(
    named: dict[str, str], problem: problems.Problem, given: rates.Rates, rng: random.Random
) -> Iterator[dict[str, object]]:
    sizes = {column: getattr(problem, column) for column in results.SHAPE}
    case = results.Case(({**named, **{key: str(value) for key, value in sizes.items()}, "option": problem.option},))
    asked = fit.problem_of(case, fit.describe(DEVICE))
    one = replace(asked, N=asked.N // problem.heads, reverse=asked.reverse, transforms=False)
    # torch.nn is ATen with a little around it, for each head in turn.
    times = {TORCH: 1.1 * problem.heads * choice.total_cost(one, "aten", constants=given)}
    passes = [asked, replace(asked, direction="backward")] if asked.training else [asked]
    for backend, module in choice.BACKENDS.items():
        if not any(module.unsupported(each) for each in passes):
            times[backend] = choice.total_cost(asked, backend, (backend,), given)
    for variant, seconds in times.items():
        us = 1e6 * seconds * rng.lognormvariate(0, NOISE)
        row = {**named, **sizes, "option": problem.option, "variant": variant, "status": "ok", "median_us": f"{us:.2f}"}
        yield row | {"chosen": "", "ratio": ""} | FACTS


def main() -> None:
    group.prepare = lambda problem: None  # where CuPy is here, it would build each kernel
    with FILE.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows())


if __name__ == "__main__":
    main()
