# SPDX-License-Identifier: Apache-2.0
"""Fits the constants of the cost models to results of one GPU or CPU, and says what the choices that follow from them
lose.

python benchmarks/fit.py benchmarks/results/<device>/*.csv         prints errors, constants and regret, before and after
python benchmarks/fit.py benchmarks/results/<device>/*.csv --write    and writes gpu_rnn/backends/rates.json

Regret is the time of the backend that dispatch would choose by that of the fastest measured of ours, less 1.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import groupby
from pathlib import Path
from statistics import median, quantiles
from typing import Any

if not __package__:  # as a script, which knows its own folder only
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from scipy.optimize import least_squares

from benchmarks.cases import comparison, variants
from benchmarks.cases.problems import Problem as Layer
from benchmarks.measuring.machine import ROOT
from benchmarks.reporting import results
from gpu_rnn import devices
from gpu_rnn.backends import aten, rates
from gpu_rnn.backends.native import launch as native
from gpu_rnn.backends.problem import Problem
from gpu_rnn.backends.rates import Rates
from gpu_rnn.devices import Device
from gpu_rnn.dispatch import choice

RESULTS = ROOT / "benchmarks" / "results"
SCATTER = 0.05  # an error of a row that counts as one unit, beyond which it counts less and less
DOUBT = math.log(1.25)  # a change of a constant that counts as much: one row alone moves none by more than 3 times
FARTHEST = 4.0  # times more or less than predicted; a fit that ends there says that the model is wrong
DIGITS = 4  # of a constant that is written
REGRET = 0.05  # that a choice may have
WORST = 8  # rows that are listed
# On a CPU a call lasts microseconds, and what it starts from is rough.
CPU_REGRET, CPU_DOUBT, CPU_FARTHEST = 0.10, math.log(3), 50.0
CPU_MODELS: dict[str, Callable[[Problem], str]] = {
    "aten": aten.cpu_model,
    "native": native.cpu_model,
    "step": lambda problem: "cpu_step",
}


@dataclass(frozen=True)
class Timed:
    """A measured row of one of our backends."""

    case: results.Case
    backend: str
    problem: Problem
    seconds: float

    @property
    def model(self) -> str:
        """The field of `Rates` with the constants that price it."""
        if self.problem.device.is_gpu or self.backend not in CPU_MODELS:
            return self.backend
        return CPU_MODELS[self.backend](self.problem)

    def predicted(self, given: Rates) -> float:
        """Seconds by the model; a row asks for its backend by name, so that both passes run on it."""
        return choice.total_cost(self.problem, self.backend, (self.backend,), given)

    def error(self, given: Rates) -> float:
        """The logarithm of predicted by measured."""
        return math.log(self.predicted(given) / self.seconds)


@dataclass(frozen=True)
class Decision:
    """The backend that dispatch would choose for a case, of those measured."""

    case: results.Case
    chosen: str
    fastest: str
    regret: float

    @property
    def ratio(self) -> float | None:
        """torch.nn's time by that of the chosen; None where torch.nn has none, and on a CPU, where its kernels are a
        choice."""
        theirs = self.case.theirs
        compared = results.timed(theirs) and not self.case["threads"]
        return _seconds(theirs) / _seconds(self._row) if compared else None

    @property
    def _row(self) -> results.Row:
        return next(row for row in self.case.rows if row["variant"] == self.chosen)

    @property
    def complaint(self) -> str:
        """What is wrong with the choice; empty where it is right."""
        if self.regret > (CPU_REGRET if self.case["threads"] else REGRET):
            return f"{self.case}: {self.chosen} is chosen, {100 * self.regret:.0f} % above {self.fastest}"
        if self.ratio is not None and self.ratio < results.NOISE:
            return f"{self.case}: {self.chosen} is chosen, at {self.ratio:.2f} times torch.nn's speed"
        return ""


def read(files: Iterable[Path]) -> list[Timed]:
    """The measured rows of our backends in results files of one GPU.

    Raises:
        ValueError: results of several devices, or of one that `gpu_rnn.devices` does not describe; columns are missing;
            no row has a time; rows of the group kernel, where there is no CuPy to say what it can run.
    """
    files = list(files)
    cases = results.read(files)
    found = [
        Timed(case, row["variant"], problem, _seconds(row))
        for case in cases
        if case["stepwise"] not in results.STEP_BY_STEP  # those ask no model of a sequence
        for problem in [problem_of(case, describe(case["device"], case["threads"]))]
        for row in case.rows
        if row["variant"] in choice.BACKENDS and results.timed(row)
    ]
    if not found:
        raise ValueError(f"{', '.join(map(str, files))}: no row of our backends has a time (status ok)")
    return found


def _seconds(row: results.Row) -> float:
    return float(row["median_us"]) / 1e6


def describe(name: str, threads: str = "") -> Device:
    """The described device that a driver's name means, such as "NVIDIA H100 80GB HBM3", or a CPU with so many threads.

    Raises:
        ValueError: there is none.
    """
    if threads:
        return replace(devices.CPU, name=name, sms=int(threads))
    key = devices.known_as(name)
    if key is None:
        listed = ", ".join(devices.DEVICES)
        raise ValueError(f"no rates of {name!r} to count with: describe it in gpu_rnn/devices.py, where {listed} are")
    return devices.DEVICES[key]


def problem_of(case: results.Case, device: Device) -> Problem:
    """The case as dispatch sees it on a device."""
    sizes = {name: int(case[name]) for name in ("T", "B", "I", "H", "layers", "heads")}
    both = case["bidirectional"] == "True"
    layer = Layer(case["problem"], case["cell"], **sizes, bidirectional=both, option=case["option"])
    asked = variants.Case(case["set"], layer, case["dtype"], case["direction"])
    meta = torch.device("meta")
    heads = (layer.heads,) if layer.heads > 1 else ()
    x = torch.empty(layer.T, layer.B, *heads, layer.I, dtype=variants.DTYPES[asked.dtype], device=meta)
    problem = comparison.explain(asked, x, asked.option.arguments(layer.T, layer.B, meta)).problem
    if not device.is_gpu:
        return replace(problem, device=device, device_type="cpu")
    precision = "ieee" if asked.dtype == "ieee" else "tf32"
    return replace(problem, device=device, device_type="cuda", precision=precision)


def fit(rows: Sequence[Timed]) -> dict[str, dict[str, float]]:
    """The constants of each backend that has rows: least squares of the logarithm of time, robust against single rows,
    held within `FARTHEST` and drawn towards what was predicted, so that few rows change little."""
    found = {}
    for model in rates.MODELS:
        own = [row for row in rows if row.model == model]
        if own:
            found[model] = _fit(model, own)
    return found


def _fit(model: str, rows: Sequence[Timed]) -> dict[str, float]:
    start, on_a_cpu = getattr(rates.PREDICTED, model), not rows[0].problem.device.is_gpu
    doubt = CPU_DOUBT if on_a_cpu else DOUBT
    names = [each.name for each in fields(start)]
    predicted = np.array([getattr(start, name) for name in names])

    def constants(logs: np.ndarray) -> dict[str, float]:
        return dict(zip(names, (predicted * np.exp(logs)).tolist(), strict=True))

    def residuals(logs: np.ndarray) -> np.ndarray:
        given = rates.PREDICTED.having({model: constants(logs)}, "on trial")
        errors = np.array([row.error(given) for row in rows]) / SCATTER
        robust = np.sign(errors) * np.sqrt(2 * (np.hypot(1, errors) - 1))  # squared, the soft form of an absolute value
        return np.concatenate([robust, logs / doubt])

    bound = math.log(CPU_FARTHEST if on_a_cpu else FARTHEST)
    best = least_squares(residuals, np.zeros(len(names)), bounds=(-bound, bound), x_scale=doubt)
    return {name: float(f"{value:.{DIGITS}g}") for name, value in constants(best.x).items()}


def decisions(rows: Sequence[Timed], given: Rates) -> list[Decision]:
    """What dispatch would choose for each case, had it the backends that were measured."""
    by_case = [list(own) for _, own in groupby(rows, key=lambda row: id(row.case))]  # as `read` has them
    return [_decision(own, given) for own in by_case]


def _decision(rows: Sequence[Timed], given: Rates) -> Decision:
    loops = [row.backend for row in rows if row.backend in choice.LOOPS]
    chosen = min(rows, key=lambda row: choice.total_cost(row.problem, row.backend, loops, given))
    fastest = min(rows, key=lambda row: row.seconds)
    seconds = chosen.seconds - _saved_backward(chosen, loops, given)
    return Decision(chosen.case, chosen.backend, fastest.backend, max(seconds / fastest.seconds - 1, 0.0))


def _saved_backward(row: Timed, loops: Sequence[str], given: Rates) -> float:
    """Seconds that dispatch saves where another loop runs the backward pass, as predicted: a row is timed with one
    backend for both passes."""
    if row.backend not in loops:
        return 0.0
    alone, mixed = (choice.total_cost(row.problem, row.backend, each, given) for each in ((row.backend,), loops))
    return alone - mixed


def report(rows: Sequence[Timed], before: Rates, after: Rates) -> str:
    """Errors, constants and choices, before and after."""
    lines = [f"{rows[0].case['device']}: {len(rows)} rows. Before: {before.source}. Errors: median, 90th percentile."]
    choices = [decisions(rows, given) for given in (before, after)]
    for model in rates.MODELS:
        own = [row for row in rows if row.model == model]
        if own:
            spreads = " → ".join(_spread([row.error(given) for row in own]) for given in (before, after))
            lines += [f"{model:10} {len(own):4} rows, error {spreads}", *_changes(model, before, after)]
    for backend in dict.fromkeys(row.backend for row in rows):
        lines += [f"{backend} is chosen in " + " → ".join(_regrets(found, backend) for found in choices)]
    worst = sorted(rows, key=lambda row: -abs(row.error(after)))[:WORST]
    lines += ["", "The worst rows after the fit:"]
    lines += [f"  {100 * (math.exp(row.error(after)) - 1):+4.0f} % {row.backend}, {row.case}" for row in worst]
    for title, found in zip(("before", "after"), choices, strict=True):
        wrong = [each.complaint for each in found if each.complaint]
        lines += ["", f"Choices {title}: {len(found)} cases, {len(wrong)} wrong.", *(f"  {each}" for each in wrong)]
    cases = {id(row.case): row.case for row in rows}.values()
    untimed = [f"  {case}: {row['variant']} is {row['status']}" for case in cases for row in case.rows if _refused(row)]
    lines += ["", "No choice could fall on what has no time, though dispatch may take it:", *untimed] if untimed else []
    return "\n".join(lines)


def _refused(row: results.Row) -> bool:
    return row["variant"] in choice.BACKENDS and not results.timed(row)


def _spread(errors: Sequence[float]) -> str:
    sizes = sorted(math.exp(abs(error)) - 1 for error in errors)
    most = quantiles(sizes, n=10, method="inclusive")[-1] if len(sizes) > 1 else sizes[0]
    return f"{100 * median(sizes):.0f} %, {100 * most:.0f} %"


def _changes(model: str, before: Rates, after: Rates) -> list[str]:
    old, new = getattr(before, model), getattr(after, model)
    pairs = {each.name: (getattr(old, each.name), getattr(new, each.name)) for each in fields(old)}
    return [f"  {name}: {was:g} → {now:g}" for name, (was, now) in pairs.items() if was != now]


def _regrets(found: Sequence[Decision], backend: str) -> str:
    own = [each.regret for each in found if each.chosen == backend]
    if not own:
        return "0 cases"
    return f"{len(own)} cases, regret {100 * sum(own) / len(own):.1f} % on average, {100 * max(own):.0f} % at most"


def entry(rows: Sequence[Timed], files: Sequence[Path], constants: dict[str, dict[str, float]]) -> dict[str, Any]:
    """What rates.json says of a GPU.

    Raises:
        ValueError: files that are not in benchmarks/results, or rows that were not measured of a commit.
    """
    apart = [str(path) for path in files if RESULTS not in path.resolve().parents]
    if apart:
        raise ValueError(f"constants are written from what lies in benchmarks/results: {', '.join(apart)} does not")
    measured = [row for timed in rows for row in timed.case.rows if row["variant"] == timed.backend]
    if any(row["dirty"] != "no" or not row["commit"] for row in measured):
        raise ValueError(
            "rows were measured with changes that no commit has: measure from a clean checkout, then --write"
        )
    return {
        "device": rows[0].case["device"],
        "results": [path.resolve().relative_to(ROOT).as_posix() for path in files],
        "commits": sorted({row["commit"] for row in measured}),
        "constants": constants,
    }


def write(found: dict[str, Any]) -> None:
    """Puts an entry into rates.json, in the place of an older one of the same GPU."""
    path = rates.FILE
    known = json.loads(path.read_text()) | {devices.known_as(found["device"]) or found["device"]: found}
    path.write_text(json.dumps(dict(sorted(known.items())), indent=2) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Fits, prints, and writes if that is asked for. Returns 1 where the files cannot be fitted, else 0."""
    parser = argparse.ArgumentParser(
        prog="fit.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="what run.py wrote, of one GPU")
    parser.add_argument("--write", action="store_true", help="write the constants into gpu_rnn/backends/rates.json")
    options = parser.parse_args(arguments)
    try:
        rows = read(options.files)
        constants = fit(rows)
        found = entry(rows, options.files, constants) if options.write else None
    except (OSError, ValueError) as error:
        print(f"fit.py: {error}", file=sys.stderr)
        return 1
    print(report(rows, rates.of(rows[0].problem.device), rates.PREDICTED.having(constants, "fitted")))
    if found:
        write(found)
        print(f"\nwrote {rates.FILE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
