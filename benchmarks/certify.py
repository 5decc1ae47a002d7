# SPDX-License-Identifier: Apache-2.0
"""Checks the library on this machine's GPU and writes what was found: certificate.json and certificate.md.

python benchmarks/certify.py                    all steps, in under 8 minutes, into benchmarks/results/<gpu>/
python benchmarks/certify.py --only soak --soak 600
python benchmarks/certify.py --device cpu       the same steps with an emulated GPU, into build/benchmarks/

Only a run of all steps into its own folder is a certificate: with --only it goes to build/benchmarks/ too.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType

if not __package__:  # as a script, which knows its own folder only
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmarks import sanitize
from benchmarks.certifying import certificate, record
from benchmarks.certifying.certificate import FAILED, INTERRUPTED, NOT_RUN, PASSED, Outcome
from benchmarks.certifying.record import Record
from benchmarks.emulating import h100
from benchmarks.measuring import machine
from gpu_rnn import devices
from gpu_rnn.cli import positive

ROOT = Path(__file__).resolve().parent.parent
# Processes that share the gpu matrix: it mostly compiles, on one core each, and each has a CUDA context and its
# tensors.
MOST_WORKERS, WORKER_BYTES = 16, 3 << 30
# Of one core, measured: one in six gpu tests on Triton's launcher with a stub driver, kernels built for sm_90a, times
# six; and the start of pytest and torch. The limit is twice what follows from them: the device's part only a device can
# show.
MATRIX_SECONDS, START_SECONDS = 900, 12
LEAST_MATRIX = 200  # seconds of that limit, however many cores there are
SOAK_SECONDS = 60
LAST_CASE = 30  # seconds beyond the soak's own: importing, and the case that is running
POLL = 0.2  # seconds between two looks at what a step has written
GRACE = 5  # seconds that a process has to end after Ctrl-C
NO_TESTS = 5  # pytest's exit status where nothing was selected: of a small suite's shard


@dataclass(frozen=True)
class Command:
    arguments: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        shown = [f"{name}={value}" for name, value in self.environment.items() if name != record.SHARD]
        return " ".join([*shown, "python", *map(shlex.quote, self.arguments)])


@dataclass(frozen=True)
class Step:
    """Commands that run side by side, and together may take `limit` seconds."""

    name: str
    what: str
    commands: tuple[Command, ...]
    limit: float
    decisive: bool = False  # nothing after it would mean anything
    impossible: str = ""  # why it cannot be run here
    own_bar: bool = False  # shows its progress itself

    @property
    def outcome(self) -> Outcome:
        commands = [*dict.fromkeys(map(str, self.commands))]  # shards are one
        return Outcome(self.name, self.what, commands, reason=self.impossible or "not reached")


def pytest(*arguments: str, **environment: str) -> Command:
    return Command(("-m", "pytest", "-q", "--tb=short", *arguments), environment)


def workers() -> int:
    room = (
        torch.cuda.get_device_properties().total_memory // WORKER_BYTES if torch.cuda.is_available() else MOST_WORKERS
    )
    return max(1, min(MOST_WORKERS, os.cpu_count() or 1, room))


def matrix_on_gpu() -> tuple[Command, ...]:
    """Every gpu test that is not slow, shared by processes of which each builds the kernels that it launches."""
    return tuple(pytest("-m", "gpu and not slow", **{record.SHARD: f"{k}/{workers()}"}) for k in range(workers()))


def matrix_limit() -> float:
    return max(LEAST_MATRIX, 2 * math.ceil(MATRIX_SECONDS / workers() + START_SECONDS))


def steps_on_gpu(soak: float) -> tuple[Step, ...]:
    missing = "" if sanitize.compute_sanitizer() else sanitize.MISSING
    return (
        Step("primitives", "each CUDA primitive beside its CPU body",
             (pytest("-m", "gpu", "tests/kernels/test_cuda_primitives.py"),), 50, decisive=True),
        Step("matrix", "every test that is marked gpu, and not slow", matrix_on_gpu(), matrix_limit()),
        Step("sanitizer", "memcheck and racecheck of every kernel, small shapes",
             (Command(("benchmarks/sanitize.py",)),), 90, impossible=missing),
        Step("deadline", "waiting for a block that never comes ends in NaN and an error",
             (pytest("-m", "gpu", "tests/backends/group/test_deadline.py"),), 35),
        soak_step(soak, Command(("benchmarks/soak.py", "--seconds", f"{soak:g}"))),
    )  # fmt: skip


def steps_on_cpu(soak: float) -> tuple[Step, ...]:
    """The same on an emulated GPU; of the matrix a part, as `make test` has all of it. The processes of the GPU's
    matrix collect their tests too, and say of each that there is no GPU."""
    interpreted = {"TRITON_INTERPRET": "1"}
    watched = "stay_in_their_buffers or (free_of_races and lstm-fp32)"
    arguments = ("benchmarks/soak.py", "--device", "cpu", "--seconds", f"{soak:g}")
    return (
        Step("primitives", "each CUDA primitive's CPU body beside a formula",
             (pytest("-m", "cuda_cpu", "tests/kernels/test_cuda_primitives.py"),), 120, decisive=True),
        Step("matrix", "a part of the matrix, in Triton's interpreter and with the CUDA sources built for the CPU; "
            "gpu tests collected",
             (pytest("-m", "interpreter and not slow", "tests/backends/test_user_recurrence.py", **interpreted),
              pytest("-m", "cuda_cpu", "tests/backends/group/test_layers.py"), *matrix_on_gpu()), 300),
        Step("sanitizer", "ThreadSanitizer and AddressSanitizer of the group kernel on the CPU",
             (pytest("-m", "cuda_cpu", "tests/backends/group/test_kernels.py", "-k", watched),), 180),
        Step("deadline", "waiting for a block that never comes ends in NaN and an error",
             (pytest("-m", "cuda_cpu", "tests/backends/group/test_deadline.py"),), 120),
        soak_step(soak, Command(arguments, interpreted), h100.unavailable().removeprefix("--emulate ")),
    )  # fmt: skip


def soak_step(seconds: float, command: Command, impossible: str = "") -> Step:
    what = "random calls of every backend beside the float64 reference"
    return Step("soak", what, (command,), seconds + LAST_CASE, impossible=impossible, own_bar=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the steps. Returns 1 if one that ran did not pass, 130 after Ctrl-C, else 0."""
    options = _parser().parse_args(arguments)
    try:
        device = devices.pick(options.device)
        steps = _chosen(
            steps_on_gpu(options.soak) if device.type == "cuda" else steps_on_cpu(options.soak), options.only
        )
        machine.keep_caches()
        facts = machine.columns(device, options.commit)
    except ValueError as error:
        print(f"certify.py: {error}", file=sys.stderr)
        return 2
    emulated = device.type != "cuda"
    kept = torch.device("cpu") if options.only else device
    folder = options.out or machine.folder(kept)
    outcomes = [step.outcome for step in steps]
    most = sum(step.limit for step in steps if not step.impossible) / 60
    doing = "emulating a GPU on" if emulated else "certifying"
    print(f"{doing} {facts['device']}, at most {most:.0f} minutes; the certificate goes to {folder}")
    stopped = False
    try:
        with _terminated_is_interrupted():
            _run_all(steps, outcomes, lambda: certificate.write(folder, facts, outcomes, emulated))
    except KeyboardInterrupt:
        stopped = True
    said = certificate.write(folder, facts, outcomes, emulated)
    print(f"{said}\nsee {folder / 'certificate.md'}")
    if stopped:
        return 128 + signal.SIGINT  # what a shell reports for Ctrl-C
    return int(any(outcome.status == FAILED for outcome in outcomes))


def _run_all(steps: Sequence[Step], outcomes: Sequence[Outcome], keep: Callable[[], object]) -> None:
    """Runs one step after another, the certificate written anew around each."""
    for number, (step, outcome) in enumerate(zip(steps, outcomes, strict=True), 1):
        print(f"\n[{number}/{len(steps)}] {step.name}: {step.what}, at most {step.limit:g} s", flush=True)
        if not step.impossible:
            outcome.status, outcome.reason = FAILED, "it was running when the certificate was cut short"
            keep()
            _run(step, outcome)
        keep()
        print("\n".join(_said(outcome)), flush=True)
        if step.decisive and outcome.status == FAILED:
            print(f"{step.name} failed: nothing that runs on this device can be trusted, so nothing else is checked")
            for left in outcomes[number:]:
                left.reason = f"{step.name} failed"
            return


def _run(step: Step, outcome: Outcome) -> None:
    """Runs a step and fills in its outcome, also where it is interrupted."""
    with tempfile.TemporaryDirectory() as scratch:
        running = Running(step, Path(scratch))
        ended = INTERRUPTED
        start = time.monotonic()
        try:
            ended = running.wait(start + step.limit)
        finally:
            outcome.seconds = time.monotonic() - start
            running.end()
            judge(outcome, running.record(), running.statuses, ended)
            if outcome.status == FAILED and not step.own_bar:
                running.show_output()


def judge(outcome: Outcome, found: Record, statuses: Sequence[int | None], ended: str) -> None:
    """What a step's record and its processes' exit statuses say; `ended` is why it did not end by itself, or empty."""
    outcome.passed, outcome.failed, outcome.skipped = map(found.count, (PASSED, FAILED, "skipped"))
    outcome.failures, outcome.skips, outcome.notes = found.of(FAILED), found.reasons, found.notes
    begun = [end["name"] for end in found.of("begun")]
    during = f" in {begun[-1]}" if begun else ""
    crashed = [status for status in statuses if status is not None and status < 0]
    bad = [status for status in statuses if status not in (0, NO_TESTS)]
    outcome.status = INTERRUPTED if ended == INTERRUPTED and not outcome.failed else FAILED
    outcome.reason = ""
    if ended:
        outcome.reason = f"{ended}{during}"
    elif crashed:
        outcome.reason = f"crashed, {signal.Signals(-crashed[0]).name}{during}"
    elif bad and not outcome.failed:
        outcome.reason = f"exit status {bad[0]}{during}, and nothing that failed was named"
    elif not bad and not outcome.failed and not outcome.passed:
        outcome.status, outcome.reason = NOT_RUN, "all were skipped" if outcome.skips else "nothing ran"
    elif not bad and not outcome.failed and not begun:
        outcome.status = PASSED


class Running:
    """The processes of a step, each with a record of its own and, unless they show it themselves, their output kept."""

    def __init__(self, step: Step, folder: Path) -> None:
        self.step = step
        self.records = [folder / f"{k}.jsonl" for k in range(len(step.commands))]
        self.outputs = [folder / f"{k}.log" for k in range(len(step.commands))]
        self.processes = [self._start(*each) for each in zip(step.commands, self.records, self.outputs, strict=True)]

    def _start(self, command: Command, written: Path, output: Path) -> subprocess.Popen[bytes]:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
        environment = {
            **os.environ,
            "PYTHONPATH": path,
            "PYTEST_PLUGINS": "benchmarks.certifying.pytest_record",
            record.RECORD: str(written),
        }
        with output.open("wb") as file:
            to = {} if self.step.own_bar else {"stdout": file, "stderr": subprocess.STDOUT}
            # A session of its own, so that its children can be ended with it.
            return subprocess.Popen(
                [sys.executable, *command.arguments],
                cwd=ROOT,
                env=environment | command.environment,
                start_new_session=True,
                **to,
            )

    @property
    def statuses(self) -> list[int | None]:
        return [process.poll() for process in self.processes]

    def record(self) -> Record:
        return record.read(*self.records)

    def wait(self, deadline: float) -> str:
        """Until all have ended, or the time is over, in which case it says so."""
        with _bar(not self.step.own_bar) as show:
            while None in self.statuses:
                if time.monotonic() > deadline:
                    return f"not done after {self.step.limit:g} s"
                show(self.record())
                time.sleep(POLL)
        return ""

    def end(self) -> None:
        """Ends what still runs: as Ctrl-C would, and then for sure."""
        for signal_, patience in ((signal.SIGINT, GRACE), (signal.SIGKILL, None)):
            left = [process for process in self.processes if process.poll() is None]
            for process in left:
                os.killpg(process.pid, signal_)
            end = time.monotonic() + GRACE
            while patience and any(process.poll() is None for process in left) and time.monotonic() < end:
                time.sleep(POLL)
        for process in self.processes:
            process.wait()

    def show_output(self) -> None:
        for output, status in zip(self.outputs, self.statuses, strict=True):
            if status not in (0, NO_TESTS):
                print(output.read_text(errors="replace"), flush=True)


def _said(outcome: Outcome) -> list[str]:
    """A step's outcome for the terminal."""
    if outcome.status == NOT_RUN:
        return [
            f"    not run: {outcome.reason}",
            *(f"    {count}: {why}" for why, count in outcome.skips.items()),
        ]
    lines = [f"    {outcome.status}: {outcome.counts}, {outcome.seconds:.0f} s"]
    lines += [f"    {outcome.reason}"] if outcome.reason else []
    for failure in outcome.failures[: certificate.FAILURES]:
        lines += [f"    FAILED {failure['name']}: {failure['detail']}", f"        again: {failure['repeat']}"]
    return lines


def _chosen(steps: tuple[Step, ...], names: list[str] | None) -> tuple[Step, ...]:
    """All steps, those that were not asked for as not to be run."""
    known = [step.name for step in steps]
    for name in names or ():
        if name not in known:
            raise ValueError(f"no step {name!r}; there are {', '.join(known)}")
    return tuple(
        step if not names or step.name in names else replace(step, impossible="left out by --only") for step in steps
    )


@contextmanager
def _terminated_is_interrupted() -> Iterator[None]:
    """`timeout` and schedulers end a process with SIGTERM: the certificate then says so, as after Ctrl-C."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _bar(shown: bool) -> Iterator[Callable[[Record], None]]:
    """A function to show how far a step is, on a terminal with tqdm."""
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        shown = False
    if not shown:
        yield lambda found: None
        return
    with tqdm(unit="test", disable=None, leave=False) as bar:  # None: only on a terminal

        def show(found: Record) -> None:
            bar.total = found.total or None
            bar.n = len(found.ends) - found.count("begun")
            bar.set_postfix_str(f"{found.count(FAILED)} failed")

        yield show


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="certify.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = "default: the GPU if there is one, of several the first of CUDA_VISIBLE_DEVICES"
    parser.add_argument("--device", choices=("cpu", "cuda"), help=which)
    parser.add_argument(
        "--only",
        type=lambda text: [name.strip() for name in text.split(",") if name.strip()],
        metavar="STEP,...",
        help="of primitives, matrix, sanitizer, deadline, soak",
    )
    parser.add_argument(
        "--soak", type=positive(float), default=SOAK_SECONDS, metavar="S", help=f"default: {SOAK_SECONDS}"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where the certificate goes")
    parser.add_argument("--commit", help="to write down where the code is no git checkout")
    return parser


if __name__ == "__main__":
    sys.exit(main())
