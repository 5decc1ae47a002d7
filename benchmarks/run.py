# SPDX-License-Identifier: Apache-2.0
"""Times every backend beside torch.nn, in turns, each only after its result was found right, and writes CSV rows.

python benchmarks/run.py --quick                        a GPU: one problem of each kind, in under 4 minutes
python benchmarks/run.py --set flashrnn,rl --dtype bf16
python benchmarks/run.py --set tiny --out /tmp/tiny.csv
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import machine
import problems
import timing
import torch
import variants
from variants import TORCH, Case, Comparison, Variant

from gpu_rnn import dispatch, doctor

# Less than `make gpu-check` gives: importing and the case in hand come on top.
QUICK_SECONDS = 180
QUICK_TRIALS, TRIALS = 7, 15
CASE_SECONDS = {"quick": 1.0, "full": 4.0}  # of samples, for all variants of a case

INTERRUPTED = 130  # 128 + SIGINT, what a shell reports for Ctrl-C

Row = dict[str, object]
SIZES = ("cell", "T", "B", "I", "H", "layers", "bidirectional", "heads")
COLUMNS = (
    *("set", "problem", *SIZES, "dtype", "precision", "direction", "variant", "chosen", "status"),
    *("median_us", "p20_us", "p80_us", "us_per_step", "ratio", "trials", "calls", "timing", "peak_mib"),
    *("error", "worst", "tolerance", "checked_against", "detail", "seed"),
    *("device", "driver", "cuda", "cudnn", "torch", "triton", "cupy", "gpu_rnn", "commit", "dirty", "date"),
)


@dataclass(frozen=True)
class Settings:
    """How a run measures."""

    device: torch.device
    backends: list[str]
    trials: int
    case_seconds: float
    seed: int
    deadline: float  # of time.monotonic(), for the whole run


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmarks. Returns 1 if a result was wrong or a variant failed, else 0."""
    options = _parser().parse_args(arguments)
    try:
        device = doctor.pick_device(options.device)
        cases = _cases(options, device)
    except ValueError as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 2
    seconds = options.seconds or (QUICK_SECONDS if options.quick else None)
    settings = Settings(
        device,
        options.backend,
        options.trials or (QUICK_TRIALS if options.quick else TRIALS),
        CASE_SECONDS["quick" if options.quick else "full"],
        torch.seed() % 2**31 if options.seed is None else options.seed,
        time.monotonic() + (seconds or float("inf")),
    )
    facts = machine.columns(device, options.commit)
    path = options.out or machine.folder(device) / _file_name(cases, facts)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("w", newline="") as file:
            bad, left_out = _run(cases, settings, facts, file)
    except KeyboardInterrupt:
        print(f"stopped; what was measured until now is in {path}", file=sys.stderr)
        return INTERRUPTED
    print(f"wrote {path}")
    _say_left_out(left_out, len(cases), seconds)
    if bad:
        print(f"{bad} result{'s' * (bad > 1)} wrong or failed: see the column status", file=sys.stderr)
    return 1 if bad else 0


def _run(
    cases: list[Case], settings: Settings, facts: dict[str, str], file: TextIO
) -> tuple[int, list[Case]]:
    """Measures case after case, writing as it goes; the number of bad rows and the cases there was no time for."""
    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
    writer.writeheader()
    bad, longest, left_out = 0, 0.0, []
    for title, case, say in _progress(cases):
        start = time.monotonic()
        if start + longest > settings.deadline:
            left_out.append(case)
            continue
        rows = measure(case, settings)
        longest = max(longest, time.monotonic() - start)
        writer.writerows({"seed": settings.seed, **facts, **row} for row in rows)
        file.flush()  # a run that is cut short keeps what it has
        bad += sum(row["status"] in ("wrong", "failed") for row in rows)
        say(f"{title}: " + ", ".join(_short(row) for row in rows))
    return bad, left_out


def measure(case: Case, settings: Settings) -> list[Row]:
    """Checks and times all variants of a case; a row for each, torch.nn's first."""
    rows: dict[str, Row] = {}
    try:
        _measure(case, settings, rows)
    except torch.OutOfMemoryError:  # of the truth, or of all calls together; of one variant _check sees it
        torch.cuda.empty_cache()
        rows = rows or {TORCH: _row(case, TORCH, "", "")}
        for row in rows.values():
            row["status"] = row["status"] or "no memory"
    return list(rows.values())


def _measure(case: Case, settings: Settings, rows: dict[str, Row]) -> None:
    """Fills `rows`, one for each variant."""
    device, problem = settings.device, case.problem
    torch.manual_seed(settings.seed)
    with variants.products_as(case):
        compared = variants.build(case, device, settings.backends)
        inputs, truth = compared.inputs, compared.truth.name
        rows |= {v.name: _row(case, v.name, compared.chosen, f"{truth} float64") for v in compared.variants}
        calls = {v.name: v.call(inputs) for v in _check(case, compared, rows, device)}
        for name, call in calls.items():
            rows[name]["peak_mib"] = _text(timing.peak_memory(call, device), ".1f")
        if calls:
            timings = timing.interleave(
                calls,
                device,
                trials=settings.trials,
                seconds=settings.case_seconds,
                deadline=settings.deadline,
                graph=problem.T <= 2 and not inputs.d_outputs,
            )
            _enter(rows, timings, problem.T)


def _check(case: Case, compared: Comparison, rows: dict[str, Row], device: torch.device) -> list[Variant]:
    """Those whose every output and gradient is right; the rows of the others say what is wrong."""
    exact = compared.truth.results(compared.inputs.to(torch.float64))
    precision = variants.precision(case, device)
    tolerance, most = variants.TOLERANCE[precision], variants.MOST * variants.TOLERANCE[precision]
    right = []
    for variant in compared.variants:
        row = rows[variant.name]
        try:
            errors = variants.errors(variant, compared.inputs, exact)
        except torch.OutOfMemoryError:
            row["status"] = "no memory"
            torch.cuda.empty_cache()
            continue
        except (RuntimeError, ValueError, *_triton_errors()) as error:
            row.update(status="failed", detail=str(error).strip().split("\n")[0])
            continue
        worst = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
        allowed = most if variant.name in variants.PLAIN else tolerance
        row.update(precision=precision, worst=worst, error=f"{errors[worst]:.1e}", tolerance=f"{allowed:.1e}")
        if not errors[worst] <= allowed:
            row.update(status="wrong", detail=f"{worst} is off by {errors[worst]:.1e}: not timed")
            continue
        right.append(variant)
        if variant.name == TORCH:
            tolerance = min(most, max(tolerance, 2 * errors[worst]))
    return right


def _enter(rows: dict[str, Row], timings: dict[str, timing.Timing], steps: int) -> None:
    """The times, and the ratio to torch.nn's: above 1 the variant is the faster."""
    theirs = timings.get(TORCH)
    for name, found in timings.items():
        low, high = found.spread
        rows[name].update(
            status="ok",
            median_us=f"{1e6 * found.median:.2f}",
            p20_us=f"{1e6 * low:.2f}",
            p80_us=f"{1e6 * high:.2f}",
            us_per_step=f"{1e6 * found.median / steps:.3f}",
            trials=len(found.samples),
            calls=found.calls,
            timing=found.how,
            ratio=f"{theirs.median / found.median:.4g}" if theirs else "",
        )


def _row(case: Case, variant: str, chosen: str, against: str) -> Row:
    sizes = {name: getattr(case.problem, name) for name in SIZES}
    named = {"set": case.set, "problem": case.problem.name, "dtype": case.dtype, "direction": case.direction}
    verdict = {"variant": variant, "chosen": "yes" if variant == chosen else "", "checked_against": against}
    return {**dict.fromkeys(COLUMNS[: COLUMNS.index("seed")], ""), **sizes, **named, **verdict}


def _text(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _short(row: Row) -> str:
    name = f"{row['variant']}{'*' * bool(row['chosen'])}"
    if row["status"] != "ok":
        return f"{name} {str(row['status']).upper()} {row['detail']}".rstrip()
    ratio = f" ({float(str(row['ratio'])):.2f}x)" if row["ratio"] and row["variant"] != TORCH else ""
    return f"{name} {float(str(row['median_us'])):.0f} µs{ratio}"


def _triton_errors() -> tuple[type[Exception], ...]:
    """What a kernel that does not compile, or does not fit, raises; Triton exists for Linux only."""
    try:
        from triton.errors import TritonError
    except ModuleNotFoundError:
        return ()
    return (TritonError,)


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


def _say_left_out(left_out: list[Case], total: int, seconds: float | None) -> None:
    if left_out:
        print(f"left out after {seconds:g} s: {len(left_out)} of {total} cases")
        print("\n".join(f"  {case}" for case in left_out))


def _cases(options: argparse.Namespace, device: torch.device) -> list[Case]:
    """Ordered by dtype first, so that a run that is cut short has seen every problem.

    Raises:
        ValueError: a name that does not exist, or nothing left to measure.
    """
    if options.quick and options.set is None and device.type == "cpu":
        print("no GPU: --quick runs the set tiny, and its times say nothing of a GPU")
    sets = options.set or ["quick" if device.type == "cuda" else "tiny"]
    known: dict[str, Iterable[str]] = {
        "set": problems.SETS,
        "dtype": variants.DTYPES,
        "direction": problems.BOTH,
        "backend": dispatch.BACKENDS,
    }
    for what, names in known.items():
        for name in sets if what == "set" else getattr(options, what) or ():
            if name not in names:
                raise ValueError(f"no {what} {name!r}; there are {', '.join(names)}")
    options.backend = options.backend or list(dispatch.BACKENDS)
    cases = [
        Case(name, problem, dtype, direction)
        for dtype in options.dtype or problems.ALL
        for name in sets
        for problem in problems.SETS[name]
        for direction in options.direction or problems.BOTH
        if direction in problem.directions and (options.dtype or dtype in problem.dtypes)
    ]
    if not cases:
        raise ValueError("nothing to measure: the sets' problems are not meant for these directions")
    return cases


def _file_name(cases: list[Case], facts: dict[str, str]) -> str:
    sets = "-".join(dict.fromkeys(case.set for case in cases))
    return f"{facts['date'][:19].replace(':', '')}-{sets}.csv"


def _positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    def number(text: str) -> float:
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"must be more than 0, not {text}")
        return value

    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="run.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def names(text: str) -> list[str]:
        return [name.strip() for name in text.split(",") if name.strip()]

    sets = ", ".join(problems.SETS)
    parser.add_argument(
        "--set", type=names, metavar="NAME,...", help=f"of {sets} (default: quick; on a CPU tiny)"
    )
    parser.add_argument(
        "--dtype", type=names, metavar="NAME,...", help="of bf16, fp32, fp16, ieee (default: each problem's)"
    )
    parser.add_argument(
        "--direction", type=names, metavar="NAME,...", help="of forward, training (default: both)"
    )
    parser.add_argument(
        "--backend", type=names, metavar="NAME,...", help="besides torch.nn (default: all that can run)"
    )
    parser.add_argument(
        "--trials",
        type=_positive(int),
        metavar="N",
        help=f"rounds of samples (default: {TRIALS}; quick {QUICK_TRIALS})",
    )
    parser.add_argument(
        "--seconds",
        type=_positive(float),
        metavar="S",
        help="for the whole run, about; says what was left out",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"few trials, and --seconds {QUICK_SECONDS}: does all work, roughly how fast?",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="default: benchmarks/results/<GPU>/, for a CPU build/benchmarks/",
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:1 (default: the GPU if there is one)")
    parser.add_argument(
        "--seed", type=int, help="of weights and inputs (default: a new one, written into the rows)"
    )
    parser.add_argument("--commit", help="to write into the rows where the code is no git checkout")
    return parser


if __name__ == "__main__":
    sys.exit(main())
