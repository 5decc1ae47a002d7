# SPDX-License-Identifier: Apache-2.0
"""Times every backend beside torch.nn, in turns, each only after its result was found right, and writes CSV rows.

python benchmarks/run.py --quick                        a GPU: one problem of each kind, in under 4 minutes
python benchmarks/run.py --set flashrnn,rl --dtype bf16
python benchmarks/run.py --all --seconds 570 --resume all.csv      once and again, until nothing is left out
python benchmarks/run.py --device cpu --set cpu         a CPU: torch.nn, loops by hand and ONNX Runtime beside ours
python benchmarks/run.py --emulate                      no GPU: are the GPU's results right?
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

if not __package__:  # as a script, which knows its own folder only
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmarks.cases import comparison, peers, problems
from benchmarks.cases.comparison import Comparison, Side
from benchmarks.cases.names import PEERS, TORCH
from benchmarks.cases.variants import Case, Inputs, Variant
from benchmarks.emulating import h100
from benchmarks.measuring import arguments, checking, machine, timing
from benchmarks.measuring import rows as table
from benchmarks.measuring.rows import Row
from gpu_rnn import devices

CASE_SECONDS = {"quick": 1.0, "full": 4.0}  # of samples, for all variants of a case
SIGNS = "* is the backend that a layer takes by itself; (2.00x) is twice as fast as torch.nn"
INTERRUPTED = 130  # 128 + SIGINT, what a shell reports for Ctrl-C


@dataclass(frozen=True)
class Settings:
    """How a run measures."""

    device: torch.device
    names: list[str]  # of backends and peers
    trials: int
    case_seconds: float
    seed: int
    deadline: float  # of time.monotonic(), for the whole run
    emulated: bool = False
    said: set[str] = field(default_factory=set)  # what need not be said again


def main(given: Sequence[str] | None = None) -> int:
    """Runs the benchmarks. Returns 1 if a result was wrong or a variant failed, else 0."""
    options = arguments.parser(__doc__ or "").parse_args(given)
    if options.emulate and h100.unavailable():
        print(f"run.py: {h100.unavailable()}", file=sys.stderr)
        return 2
    if options.emulate and not h100.interpreting():
        return h100.again(__file__, sys.argv[1:] if given is None else given)
    machine.keep_caches()
    try:
        device = devices.pick("cpu" if options.emulate else options.device)
        machine.check_nothing_chooses(device)
        facts = machine.columns(device, options.commit, options.emulate)
        cases = arguments.cases(options, device)
        for_a_cpu = {case.set for case in cases} <= {*problems.FOR_A_CPU}
        folder = machine.folder(device, for_a_cpu)
        path = options.resume or options.out or folder / _file_name(options, cases, facts)
        done = table.finished(path, facts) if options.resume and path.exists() else set()
    except ValueError as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 2
    seconds = options.seconds or (arguments.QUICK_SECONDS if options.quick else None)
    settings = Settings(
        device,
        arguments.names(options, for_a_cpu),
        options.trials or (arguments.QUICK_TRIALS if options.quick else arguments.TRIALS),
        CASE_SECONDS["quick" if options.quick else "full"],
        torch.seed() % 2**31 if options.seed is None else options.seed,
        time.monotonic() + (seconds or float("inf")),
        options.emulate,
    )
    left = [case for case in cases if case.key not in done][: options.limit]
    if done:
        print(f"{sum(case.key in done for case in cases)} of {len(cases)} cases are in {path} already")
    return _write(left, settings, facts, path, "a" if options.resume else "w")


def _write(cases: list[Case], settings: Settings, facts: dict[str, str], path: Path, mode: str) -> int:
    """Measures the cases, says how it went, and returns the exit status."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with path.open(mode, newline="") as file, h100.emulated() if settings.emulated else nullcontext():
            bad, left_out = _run(cases, settings, facts, file)
    except KeyboardInterrupt:
        print(f"stopped; what was measured until now is in {path}: go on with --resume {path}", file=sys.stderr)
        return INTERRUPTED
    print(f"wrote {path}")
    _say_left_out(left_out, cases, path)
    if bad:
        print(f"{bad} result{'s' * (bad > 1)} wrong or failed: see the column status", file=sys.stderr)
    return 1 if bad else 0


def _run(cases: list[Case], settings: Settings, facts: dict[str, str], file: TextIO) -> tuple[int, list[Case]]:
    """Measures case after case, writing as it goes; the number of bad rows and the cases there was no time for."""
    writer = csv.DictWriter(file, table.COLUMNS, lineterminator="\n")
    if not file.tell():
        writer.writeheader()
    bad, longest, left_out = 0, 0.0, []
    if cases:
        print(SIGNS)
    for title, case, say in _progress(cases):
        start = time.monotonic()
        if longest and start + longest > settings.deadline:  # one at least, however busy the machine is
            left_out.append(case)
            continue
        rows = measure(case, settings, say)
        longest = max(longest, time.monotonic() - start)
        writer.writerows({"seed": settings.seed, **facts, **row} for row in rows)
        file.flush()  # a run that is cut short keeps what it has
        bad += sum(table.failed(row) for row in rows)
        say(f"{title}: " + ", ".join(table.short(row) for row in rows))
    return bad, left_out


def measure(case: Case, settings: Settings, say: Callable[[str], None] = print) -> list[Row]:
    """Checks and times all variants of a case; a row for each, torch.nn's first."""
    rows: dict[str, Row] = {}
    try:
        _measure(case, settings, rows, say)
    except torch.OutOfMemoryError:  # of the truth, or of all calls together; of one variant _check sees it
        torch.cuda.empty_cache()
        rows = rows or {TORCH: table.empty(case)}
        for row in rows.values():
            row["status"] = row["status"] or "no memory"
    return list(rows.values())


def _measure(case: Case, settings: Settings, rows: dict[str, Row], say: Callable[[str], None]) -> None:
    """Fills `rows`, one for each variant."""
    device, problem = settings.device, case.problem
    torch.manual_seed(settings.seed)
    with checking.products_as(case), timing.threads(case.threads):
        compared = comparison.build(case, device, settings.names)
        _say_without(compared, settings, say)
        rows |= table.begin(case, compared, predictions=not settings.emulated)
        right = _check(case, compared, rows, settings)
        if settings.emulated:
            for variant, _ in right:
                rows[variant.name]["status"] = "emulated"
            return
        calls = {variant.name: variant.call(inputs) for variant, inputs in right}
        for name, call in calls.items():
            rows[name]["peak_mib"] = table.text(timing.peak_memory(call, device), ".1f")
        if calls:
            timings = timing.interleave(
                calls,
                device,
                trials=settings.trials,
                seconds=settings.case_seconds,
                deadline=settings.deadline,
                graph=problem.T <= 2 and case.direction == "forward",
            )
            table.enter(rows, timings, problem.T)


def _check(case: Case, compared: Comparison, rows: dict[str, Row], settings: Settings) -> list[tuple[Variant, Inputs]]:
    """Those whose every output and gradient is right, with their inputs; the rows of the others say what is wrong."""
    precision = checking.precision(case, settings.device.type == "cuda" or settings.emulated)
    right = {
        variant.name: (variant, side.inputs)
        for side in compared.sides
        for variant in _right(side, checking.Limits(precision), rows, settings.seed)
    }
    return [right[name] for name in rows if name in right]


def _right(side: Side, limits: checking.Limits, rows: dict[str, Row], seed: int) -> Iterator[Variant]:
    """Of one side those that are right; the yardstick goes first."""
    exact = checking.exact(side.truth, side.inputs, seed)
    for variant in sorted(side.variants, key=lambda variant: variant.name != side.yardstick):
        row = rows[variant.name]
        try:
            errors = checking.errors(variant, side.inputs, exact, seed)
        except torch.OutOfMemoryError:
            row["status"] = "no memory"
            torch.cuda.empty_cache()
            continue
        except (RuntimeError, ValueError, *_errors_of(variant)) as error:
            row.update(status="failed", detail=str(error).strip().split("\n")[0])
            continue
        worst = limits.worst(variant.name, errors)
        allowed = limits.allowed(variant.name, worst)
        row.update(precision=limits.precision, worst=worst, error=f"{errors[worst]:.1e}", tolerance=f"{allowed:.1e}")
        if not errors[worst] <= allowed:
            row.update(status="wrong", detail=f"{worst} is off by {errors[worst]:.1e}: not timed")
            continue
        if variant.name == side.yardstick:
            limits.widen(errors)
        yield variant


def _errors_of(variant: Variant) -> tuple[type[Exception], ...]:
    """What a kernel that does not compile, or does not fit, raises besides; Triton exists for Linux only."""
    others = peers.ERRORS if variant.name in PEERS else ()
    try:
        from triton.errors import TritonError
    except ModuleNotFoundError:
        return others
    return (TritonError, *others)


def _say_without(compared: Comparison, settings: Settings, say: Callable[[str], None]) -> None:
    """Why a peer is left out, once for each reason."""
    for name, reason in compared.left_out.items():
        line = f"without {name}: {reason}"
        if line not in settings.said:
            settings.said.add(line)
            say(line)


def _progress(cases: list[Case]) -> Iterator[tuple[str, Case, Callable[[str], None]]]:
    """Each case with its number and a function to print with; on a terminal with tqdm there is a bar too."""
    bar, write = None, print
    try:
        from tqdm import tqdm

        bar, write = tqdm(total=len(cases), unit="case", disable=None), tqdm.write  # None: only on a terminal
    except ModuleNotFoundError:
        pass
    for number, case in enumerate(cases, 1):
        yield f"[{number}/{len(cases)}] {case}", case, write
        sys.stdout.flush()
        if bar is not None:
            bar.update()
    if bar is not None:
        bar.close()


def _say_left_out(left_out: list[Case], cases: list[Case], path: Path) -> None:
    """How much of each set there was no time for."""
    if not left_out:
        return
    print(f"left out for want of time: {len(left_out)} of {len(cases)} cases; go on with --resume {path}")
    for name in dict.fromkeys(case.set for case in left_out):
        counts = Counter(case.dtype for case in left_out if case.set == name)
        print(f"  {name}: {', '.join(f'{count} in {dtype}' for dtype, count in counts.items())}")


def _file_name(options: argparse.Namespace, cases: list[Case], facts: dict[str, str]) -> str:
    sets = ["all"] if options.all else dict.fromkeys(case.set for case in cases)
    parts = [facts["date"][:19].replace(":", ""), *sets, *["emulated"] * options.emulate]
    return f"{'-'.join(parts)}.csv"


if __name__ == "__main__":
    sys.exit(main())
