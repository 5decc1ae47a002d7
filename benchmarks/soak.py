# SPDX-License-Identifier: Apache-2.0
"""Random calls of every backend for a given time, outputs and gradients compared with the float64 reference.

python benchmarks/soak.py --seconds 600            as long as you like, on a GPU if there is one
python benchmarks/soak.py --seed 7 --case 123      one case again, as the report of a failure says
TRITON_INTERPRET=1 python benchmarks/soak.py --device cpu --seconds 60       without a GPU, emulated

On a GPU the backends run at once, each on a stream of its own, every second case as replays of CUDA graphs.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

if not __package__:  # as a script, which knows its own folder only
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor

import gpu_rnn
from benchmarks.certifying import soak_cases
from benchmarks.certifying.given import Given
from benchmarks.certifying.precisions import FLOORS, PRECISIONS, TIGHT
from benchmarks.certifying.record import RECORD, Writer
from benchmarks.certifying.soak_cases import Case, Run
from benchmarks.emulating import h100
from benchmarks.measuring import checking, machine
from benchmarks.measuring.checking import ELEMENT, OUTPUT, Errors
from gpu_rnn import devices
from gpu_rnn.cli import positive
from gpu_rnn.diagnostics import doctor
from gpu_rnn.dispatch import choice

BACKENDS = tuple(name for name in choice.BACKENDS if name != "reference")  # which is the truth
FULL = 10 * TIGHT  # the floor in full float32: longer sums than those of the tests that TIGHT is from
ROUNDINGS = 8
MOST = 25  # floors: where plain PyTorch is off by more, nothing can be said
REPEATS = 2  # calls of each backend on its stream, so that streams are busy at once
# Of a call that fails; AssertionError is what the CPU's CUDA runtime raises.
ERRORS: tuple[type[Exception], ...] = (RuntimeError, ValueError, AssertionError)
if importlib.util.find_spec("triton"):  # it exists for Linux only
    ERRORS += (importlib.import_module("triton.errors").TritonError,)

Results = dict[str, Tensor]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the soak. Returns 1 if a result was wrong or a call failed, else 0."""
    options = _parser().parse_args(arguments)
    machine.keep_caches()
    try:
        device = devices.pick(options.device)
    except ValueError as error:
        print(f"soak.py: {error}", file=sys.stderr)
        return 2
    seed = torch.seed() % 2**31 if options.seed is None else options.seed
    print(f"soak: seed {seed} on {doctor.device_name(device)}", flush=True)
    writer = Writer(os.environ.get(RECORD))
    writer.note(seed=seed)
    numbers = _numbers(options)
    soak = Soak(device, seed, writer)
    try:
        with _settings():
            soak.run(numbers, options.seconds)
        if options.case is None:
            soak.miss()
    except KeyboardInterrupt:
        print("soak: stopped", file=sys.stderr)
        return 128 + signal.SIGINT  # what a shell reports for Ctrl-C
    finally:
        writer.note(compared=dict(soak.compared))
    print(soak.summary())
    return 1 if soak.outcomes["failed"] else 0


class Soak:
    """Runs cases and counts."""

    def __init__(self, device: torch.device, seed: int, writer: Writer) -> None:
        self.device, self.seed, self.writer = device, seed, writer
        self.outcomes: Counter[str] = Counter()
        self.compared: Counter[str] = Counter()
        """Results that were right, by backend and the way it ran."""

    def run(self, numbers: Iterator[int], seconds: float) -> None:
        start = time.monotonic()
        with _bar(seconds) as (show, say):
            for number in numbers:
                self.case(number, say)
                show(
                    time.monotonic() - start,
                    f"{sum(self.outcomes.values())} cases, {self.outcomes['failed']} failed",
                )

    def case(self, number: int, say: Callable[[str], None]) -> None:
        """Runs one case and writes down how it ended."""
        case = soak_cases.draw(self.seed, number, self.device.type)
        name, repeat = f"case {number}: {case}", self.repeat(number)
        self.writer.begin(name)
        bad, said = check(case, self.device, self.compared)
        outcome = "failed" if bad else "skipped" if said else "passed"
        self.outcomes[outcome] += 1
        self.writer.end(name, outcome, "; ".join(bad) or said, repeat)
        if bad:
            say("\n".join([f"{name} FAILED", *(f"    {line}" for line in bad), f"    again: {repeat}"]))
        if bad and self.device.type == "cuda":
            torch.cuda.synchronize()  # raises where the device is lost: all that followed would fail of that

    def miss(self) -> None:
        """Fails for each backend that had no result, where nothing else says why."""
        if self.outcomes["failed"] or not self.outcomes["passed"]:
            return
        for backend in BACKENDS:
            if not any(way.startswith(f"{backend} ") for way in self.compared):
                said = "took no case, not even of a plain LSTM: python -m gpu_rnn doctor says what is missing"
                self.writer.end(backend, "failed", said, self.repeat(0))
                self.outcomes["failed"] += 1
                print(f"{backend} {said}")

    def repeat(self, number: int) -> str:
        emulated = self.device.type == "cpu"
        command = f"python benchmarks/soak.py --seed {self.seed} --case {number}"
        return f"TRITON_INTERPRET=1 {command} --device cpu" if emulated else command

    def summary(self) -> str:
        counts = ", ".join(f"{self.outcomes[name]} {name}" for name in ("passed", "failed", "skipped"))
        results = ", ".join(f"{name} {count}" for name, count in sorted(self.compared.items())) or "none"
        return f"soak: {counts}; results that were right: {results}"


def check(case: Case, device: torch.device, compared: Counter[str]) -> tuple[list[str], str]:
    """What is wrong with a case's results, by backend; and, where nothing could be compared, why."""
    dtype, torch.backends.cudnn.rnn.fp32_precision = PRECISIONS[case.precision]
    exact = Comparison(case, device)
    if not exact.useful:
        return [], "plain PyTorch in this dtype is too far off, or overflows"
    low = soak_cases.in_dtype(exact.members, dtype)
    runs: dict[str, Run] = {}
    bad = []
    for backend in BACKENDS:
        run = _pretending(soak_cases.run(case, low, backend), backend, device)
        try:
            found = run()  # compiles
        except ERRORS as error:
            if not _refused(error, backend):
                bad.append(f"{backend}: {_first_line(error)}")
            continue
        runs[backend] = run
        bad += exact.wrong(backend, "alone", found, compared)
    if device.type == "cuda" and runs and not bad:
        bad += _at_once(case, low, runs, exact, compared)
    return bad, "" if runs else "no backend takes it"


class Comparison:
    """A case's true results, and how far off plain PyTorch is in the case's dtype.

    That is one choice of roundings, and may be right by luck. Before a result is called wrong, plain PyTorch's answers
    to inputs that are rounded once more, at random, are asked as well.
    """

    def __init__(self, case: Case, device: torch.device) -> None:
        # Plain PyTorch's tf32 is not to be had on every device; float16 keeps as many bits.
        self.dtype = torch.float16 if case.precision == "tf32" else PRECISIONS[case.precision][0]
        self.floor = FLOORS.get(case.precision, FULL)
        self.case, self.members = case, case.members(device)
        self.exact = soak_cases.run(case, self.members, "reference")()
        self.plain = dict.fromkeys(errors(self.exact, self.exact), 0.0)
        self.asked = False
        self._ask(self.members)
        # Settled before anything is asked again: what is then found to be sensitive is compared all the same.
        self.known = {name for name, off in self.plain.items() if off <= MOST * self._floor(name)}

    def _ask(self, members: list[Given]) -> None:
        """Takes what plain PyTorch makes of these for what an honest result may be."""
        found = soak_cases.run(self.case, soak_cases.in_dtype(members, self.dtype), "reference")()
        self.plain = {name: max(self.plain[name], off) for name, off in errors(found, self.exact).items()}

    @property
    def useful(self) -> bool:
        """Whether plain PyTorch gets the outputs at all; a gradient may vanish in what cancels."""
        return "y" in self.known

    def wrong(self, backend: str, way: str, found: Results, compared: Counter[str]) -> list[str]:
        """The worst of the results that are wrong, in words; counts what is right."""
        off = errors(found, self.exact)
        if self._beyond(off) and not self.asked:
            self.asked = True
            for others in soak_cases.rounded_again(self.case, self.members, self.dtype, ROUNDINGS):
                self._ask(others)
        beyond = self._beyond(off)
        if not beyond:
            compared[f"{backend} {way}"] += 1
            return []
        name = max(beyond, key=beyond.__getitem__)
        others = f", and {len(beyond) - 1} more" if len(beyond) > 1 else ""
        allowed = f"{self._allowed(name):.1e} is allowed"
        return [f"{backend} {way}: {name} is off by {off[name]:.1e}, {allowed}{others}"]

    def _allowed(self, name: str) -> float:
        return 2 * self.plain[name] + self._floor(name)

    def _floor(self, name: str) -> float:
        return OUTPUT * self.floor if name.startswith(ELEMENT) else self.floor

    def _beyond(self, errors: Errors) -> Errors:
        """How many times too far off each wrong result is."""
        found = {name: off / self._allowed(name) for name, off in errors.items() if name in self.known}
        return {name: times for name, times in found.items() if times > 1}


def errors(found: Results, exact: Results) -> Errors:
    """As the benchmarks count them, of an element of the outputs only: where an activation has a kink, roundings change
    what passes through a unit at one step, and that is all of some gradient's element."""
    counted = checking.distances(found, exact)
    return {name: off for name, off in counted.items() if not name.startswith(f"{ELEMENT}d ")}


def _at_once(
    case: Case, low: list[Given], runs: dict[str, Run], exact: Comparison, compared: Counter[str]
) -> list[str]:
    """All backends at the same time, each on its stream, or as replays of graphs; what is wrong."""
    way = "replayed" if case.captured else "on a stream"
    try:
        found = _replayed(low, runs) if case.captured else _on_streams(runs)
        gpu_rnn.check()
    except ERRORS as failure:
        return [f"{', '.join(runs)} {way}: {_first_line(failure)}"]
    return [line for backend, results in found for line in exact.wrong(backend, way, results, compared)]


def _on_streams(runs: dict[str, Run]) -> list[tuple[str, Results]]:
    torch.cuda.synchronize()
    streams = {backend: torch.cuda.Stream() for backend in runs}
    found = []
    for _ in range(REPEATS):
        for backend, run in runs.items():
            with torch.cuda.stream(streams[backend]):
                found.append((backend, run()))
    torch.cuda.synchronize()
    return found


def _replayed(low: list[Given], runs: dict[str, Run]) -> list[tuple[str, Results]]:
    """Captured on other values than those replayed, so that nothing of the capture can pass for a result."""
    leaves = [leaf for made in low for leaf in soak_cases.random_calls.leaves(made).values()]
    values = [leaf.detach().clone() for leaf in leaves]
    _set(leaves, [value / 2 for value in values])
    streams = {backend: torch.cuda.Stream() for backend in runs}
    graphs = {backend: _capture(run, streams[backend]) for backend, run in runs.items()}
    _set(leaves, values)
    torch.cuda.synchronize()
    for _ in range(REPEATS):
        for backend, (graph, _) in graphs.items():
            with torch.cuda.stream(streams[backend]):
                graph.replay()
    torch.cuda.synchronize()
    return [(backend, results) for backend, (_, results) in graphs.items()]


def _capture(run: Run, stream: torch.cuda.Stream) -> tuple[torch.cuda.CUDAGraph, Results]:
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        run()  # what is prepared at the first call on a stream is not to be captured
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        results = run()
    return graph, results


@torch.no_grad()
def _set(leaves: list[Tensor], values: list[Tensor]) -> None:
    for leaf, value in zip(leaves, values, strict=True):
        leaf.copy_(value)


def _pretending(run: Run, backend: str, device: torch.device) -> Run:
    """On a CPU `group` finds an H100, on which its text runs under benchmarks/emulating."""
    if backend != "group" or device.type == "cuda":
        return run

    def pretending() -> Results:
        with h100.emulated():
            return run()

    return pretending


def _refused(error: Exception, backend: str) -> bool:
    return isinstance(error, ValueError) and str(error).startswith(f"backend={backend!r} cannot run")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


def _numbers(options: argparse.Namespace) -> Iterator[int]:
    if options.case is not None:
        return iter([options.case])
    return iter(range(options.cases)) if options.cases else _until(time.monotonic() + options.seconds)


def _until(end: float) -> Iterator[int]:
    """The numbers of cases until then, of one at least: a busy machine may take all the time to come here."""
    yield 0
    number = 1
    while time.monotonic() < end:
        yield number
        number += 1


@contextmanager
def _settings() -> Iterator[None]:
    before = torch.backends.cudnn.rnn.fp32_precision
    with checking.poisoned():
        yield
    torch.backends.cudnn.rnn.fp32_precision = before


@contextmanager
def _bar(seconds: float) -> Iterator[tuple[Callable[[float, str], None], Callable[[str], None]]]:
    """A function to show how far it is, on a terminal with tqdm, and one to print with."""
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        yield lambda spent, text: None, print
        return
    form = "{percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s{postfix}"
    with tqdm(total=seconds, bar_format=form, disable=None) as shown:  # None: only on a terminal

        def show(spent: float, text: str) -> None:
            shown.n = min(spent, seconds)
            shown.set_postfix_str(text)

        yield show, tqdm.write


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="soak.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=positive(float), default=60, metavar="S", help="how long (default: 60)")
    parser.add_argument("--seed", type=int, help="of all cases (default: a new one, which is printed)")
    parser.add_argument("--cases", type=positive(int), metavar="N", help="that many cases, however long they take")
    parser.add_argument("--case", type=int, metavar="K", help="only this case of the seed")
    which = "default: the GPU if there is one, of several the first of CUDA_VISIBLE_DEVICES"
    parser.add_argument("--device", choices=("cpu", "cuda"), help=which)
    return parser


if __name__ == "__main__":
    sys.exit(main())
