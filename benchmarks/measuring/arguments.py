# SPDX-License-Identifier: Apache-2.0
"""The command line of run.py, and the cases that it asks for."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import torch

from benchmarks.cases import problems, variants
from benchmarks.cases.names import COMPILED, PEERS
from benchmarks.cases.variants import Case
from gpu_rnn.cli import Parser, positive
from gpu_rnn.dispatch import choice

NAMES = (*choice.BACKENDS, *PEERS)


def names(options: argparse.Namespace, on_a_cpu: bool) -> list[str]:
    """What is measured beside torch.nn. By default Inductor, which takes seconds to compile for each case, is left out,
    and for a CPU the reference, which is slow and never chosen there."""
    left_out = {COMPILED, *["reference"] * on_a_cpu}
    return options.backend or [name for name in NAMES if name not in left_out]


QUICK_TRIALS, TRIALS = 7, 15
QUICK_SECONDS = 180  # less than `make gpu-check` gives: importing and the case in hand come on top


def cases(options: argparse.Namespace, device: torch.device) -> list[Case]:
    """What to measure, in the order in which to measure it.

    Ordered by dtype first, so that a run that is cut short has seen every problem; with --all as `problems.ORDER` says.

    Raises:
        ValueError: a name that does not exist, arguments that exclude each other, or nothing left to measure.
    """
    if options.emulate and options.device not in (None, "cpu"):
        raise ValueError(f"--emulate runs on the CPU: leave --device {options.device} out, or --emulate")
    if options.all and options.set:
        raise ValueError("--all measures every set: leave --set out, or --all")
    if options.quick and options.set is None and not options.all and device.type == "cpu":
        print("no GPU: --quick runs the set tiny, and its times say nothing of a GPU")
    sets = options.set or ["quick" if device.type == "cuda" else "tiny"]
    _check_names(options, sets)
    if options.all:
        found = _of(options, ["quick"], ["bf16"])
        for name in problems.ORDER:
            found += _of(options, [name], problems.ALL)
    else:
        found = _of(options, sets, options.dtype or problems.ALL)
    if options.only:
        found = [case for case in found if fnmatch(str(case), f"*{options.only}*")]
    if not found:
        raise ValueError("nothing to measure: no problem of these sets, dtypes, directions and names")
    if device.type != "cpu":
        return list(dict.fromkeys(replace(case, threads=None) for case in found))
    return [replace(case, threads=case.threads or torch.get_num_threads()) for case in found]


def _of(options: argparse.Namespace, sets: Iterable[str], dtypes: Iterable[str]) -> list[Case]:
    return [
        Case(name, problem, dtype, direction, threads)
        for dtype in dtypes
        for name in sets
        for problem in problems.SETS[name]
        for direction in options.direction or problems.BOTH
        for threads in options.threads or problem.threads or (None,)
        if direction in problem.directions and dtype in (options.dtype or problem.dtypes)
    ]


def _check_names(options: argparse.Namespace, sets: list[str]) -> None:
    """Raises ValueError for the first name that does not exist."""
    asked = {"set": sets, "dtype": options.dtype, "direction": options.direction, "backend": options.backend}
    known: dict[str, Iterable[str]] = {
        "set": problems.SETS,
        "dtype": variants.DTYPES,
        "direction": problems.BOTH,
        "backend": NAMES,
    }
    for what, names in known.items():
        for name in asked[what] or ():
            if name not in names:
                raise ValueError(f"no {what} {name!r}; there are {', '.join(names)}")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _counts(text: str) -> list[int]:
    return [positive(int)(name) for name in _names(text)]


def parser(description: str) -> argparse.ArgumentParser:
    """The options of run.py."""
    found = Parser(prog="run.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    _add_what(found)
    _add_how(found)
    return found


def _add_what(parser: argparse.ArgumentParser) -> None:
    """Which cases."""
    sets = ", ".join(problems.SETS)
    parser.add_argument("--set", type=_names, metavar="NAME,...", help=f"of {sets} (default: quick; on a CPU tiny)")
    parser.add_argument(
        "--all", action="store_true", help="every set, most valuable cases first; see --seconds and --resume"
    )
    parser.add_argument(
        "--dtype", type=_names, metavar="NAME,...", help="of bf16, fp16, fp32, ieee (default: each problem's)"
    )
    parser.add_argument("--direction", type=_names, metavar="NAME,...", help="of forward, training (default: both)")
    parser.add_argument(
        "--backend",
        type=_names,
        metavar="NAME,...",
        help=f"besides torch.nn, of {', '.join(NAMES)} (default: all that can run, but for {COMPILED})",
    )
    parser.add_argument("--only", metavar="PATTERN", help="cases in whose names this stands, such as 'GRU*B1-T100*fo'")
    parser.add_argument(
        "--threads",
        type=_counts,
        metavar="N,...",
        help="of a CPU, each a case of its own (default: each problem's, or torch's)",
    )


def _add_how(parser: argparse.ArgumentParser) -> None:
    """How long, how, and where the results go."""
    parser.add_argument(
        "--trials",
        type=positive(int),
        metavar="N",
        help=f"rounds of samples (default: {TRIALS}; quick {QUICK_TRIALS})",
    )
    parser.add_argument(
        "--seconds",
        type=positive(float),
        metavar="S",
        help="for the whole run, about; says what was left out",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"few trials, and --seconds {QUICK_SECONDS}: does all work, roughly how fast?",
    )
    parser.add_argument(
        "--emulate",
        action="store_true",
        help="on the CPU, the GPU's kernels in Triton's interpreter and as C++: checks results, times nothing",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="default: benchmarks/results/<device>/; for what a CPU only tries, build/benchmarks/",
    )
    parser.add_argument(
        "--resume",
        type=Path,
        metavar="FILE",
        help="append to FILE, without the cases that it has of this commit and device",
    )
    parser.add_argument("--limit", type=positive(int), metavar="N", help="cases at most")
    parser.add_argument("--device", help="cpu, cuda or cuda:1 (default: the GPU if there is one)")
    parser.add_argument("--seed", type=int, help="of weights and inputs (default: a new one, written into the rows)")
    parser.add_argument("--commit", help="to write into the rows where the code is no git checkout")
