# SPDX-License-Identifier: Apache-2.0
"""The choice among the backends: by what they answer (`gpu_rnn.backends.Backend`).

Each prices a problem that it can run by a model whose constants are in `backends/rates.py`. Where `gpu_rnn.tune` has
measured the answer to a question (`dispatch/measured.py`), the models are not asked.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from gpu_rnn import devices, environment, memo
from gpu_rnn.backends import BACKENDS, KERNELS, LOOPS, SOURCES, WAVEFRONTS, precision, rates
from gpu_rnn.backends.problem import Problem
from gpu_rnn.dispatch import measured as choices
from gpu_rnn.dispatch import wavefront_plan
from gpu_rnn.dispatch.lines import Way, can_stagger, like, way
from gpu_rnn.dispatch.measured import Question, Times
from gpu_rnn.memo import memoize

log = logging.getLogger("gpu_rnn")
device_of = devices.of


@dataclass(frozen=True)
class Row:
    """A backend's verdict on a problem."""

    backend: str
    runs: bool
    chosen: bool
    reasons: tuple[str, ...]
    predicted_us: float | None
    """Microseconds per time step by the cost model."""
    measured_us: float | None = None
    """Microseconds per time step as `gpu_rnn.tune` measured them on this device; None where it did not."""
    source: str = ""
    """Where the figure comes from: "measured", a model "fitted" to results; else of the time loop "simulated" from
    machine code, "published" by others, or "modelled". Empty where it cannot run."""


def check_name(backend: str) -> None:
    """Raises ValueError for a backend that does not exist."""
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend must be 'auto' or one of {', '.join(BACKENDS)}, got {backend!r}")


def check_recorded(backend: str) -> None:
    """Raises ValueError for a backend that no registered operation runs on, when there is no problem yet to be selected
    for."""
    if backend not in ("auto", *LOOPS):
        raise ValueError(
            f"backend={backend!r} cannot run this call where it is recorded (torch.compile, torch.export, make_fx): "
            "that runs "
            f"one of {', '.join(LOOPS)}\nUse backend='auto', or remove the cause."
        )


def select(problem: Problem, backend: str = "auto", among: tuple[str, ...] | None = None) -> str:
    """The name of the cheapest backend that can run a problem, or of the one asked for; `among` those named, or all.

    With "auto", the environment's GPU_RNN_BACKEND names a preference; then comes what `gpu_rnn.tune` measured to be the
    fastest, then what the cost models say.

    Raises:
        ValueError: the backend asked for does not exist, or cannot run the problem; every reason is given.
    """
    among = tuple(BACKENDS) if among is None else among
    if backend == "auto" and _trial.backend:
        answer = _select(problem, backend, among, _trial.backend)
        _trial.answers[problem, among] = answer
        return answer
    return _select(problem, backend, among, environment.backend(BACKENDS))


class _Trial(threading.local):
    """What "auto" stands for in this thread while it is measured, and what was asked and answered meanwhile."""

    backend = ""
    answers: dict[Question, str]


_trial = _Trial()


@contextmanager
def trial(backend: str) -> Iterator[dict[Question, str]]:
    """In this thread "auto" is this backend wherever it can run. Yields every question that is asked, with its
    answer."""
    before = dict(vars(_trial))
    _trial.backend, _trial.answers = backend, {}
    try:
        yield _trial.answers
    finally:
        vars(_trial).clear()
        vars(_trial).update(before)


def on_trial() -> bool:
    """Whether a backend is being measured in this thread."""
    return bool(_trial.backend)


def remember(device: devices.Device, found: Mapping[Question, Times]) -> Path:
    """Keeps what was measured on a device: `select` goes by it from now on. Returns the file.

    Raises:
        OSError: no folder takes it.
    """
    path = choices.keep(device, found)
    memo.clear(__name__)
    return path


def forget() -> None:
    """Removes everything that `gpu_rnn.tune` ever kept, for every device and version. Also `gpu_rnn.tuning.forget`."""
    choices.forget()
    memo.clear(__name__)


def only_predicted_on_cpu() -> bool:
    """Whether no measurement decides on a CPU: none is kept, and none is being made in this thread."""
    return not (_trial.backend or choices.any_on_cpu(torch.get_num_threads()))


@memoize(4096)
def _select(problem: Problem, backend: str, among: tuple[str, ...], preferred: str, both: bool = True) -> str:
    check_name(backend)
    if backend != "auto":
        reasons = (_against if both else _prepared)(problem, backend)
        if backend not in among:
            reasons = [f"this call runs one of {', '.join(among)}"]
        if reasons:
            listed = "\n".join(f"  - {reason}" for reason in reasons)
            raise ValueError(
                f"backend={backend!r} cannot run this call:\n{listed}\nUse backend='auto', or remove the cause."
            )
        return backend
    candidates = _candidates(like(problem), among)
    if preferred in candidates.able and candidates.runs(preferred):
        return preferred
    places = {name: place for place, name in enumerate(choices.find(problem, among))}
    seconds = candidates.seconds(problem.T)
    order = sorted(candidates.able, key=lambda name: (places.get(name, len(places)), seconds[name]))
    chosen = next(filter(candidates.runs, order))
    if chosen == "reference":
        against = [(name, reason) for name in among for reason in BACKENDS[name].unsupported(problem)]
        for name, reason in against:
            _say_once(problem.direction, problem.recurrence.name, name, reason)
    return chosen


class _Candidates:
    """Those that can run a problem of one step, or of any larger number, and their cost models."""

    def __init__(self, problem: Problem, among: tuple[str, ...]) -> None:
        self.problem = problem
        self.able = [name for name in among if not BACKENDS[name].unsupported(problem)]
        self.there = {name: way(problem, name).seconds for name in self.able}
        after, self.back = problem.but(direction="backward"), {}
        if problem.direction == "training":
            named = {*(name for name in self.able if name not in LOOPS), *LOOPS}
            self.back = {name: way(after, name).seconds for name in named if not BACKENDS[name].unsupported(after)}
        self.refused: dict[str, bool] = {}

    def seconds(self, steps: int) -> dict[str, float]:
        """Of each, as `total_cost`."""
        there = {name: of_steps(steps) for name, of_steps in self.there.items()}
        if not self.back:
            return there
        back = {name: of_steps(steps) for name, of_steps in self.back.items()}
        least = min([seconds for name, seconds in back.items() if name in LOOPS])
        return {name: seconds + (least if name in LOOPS else back[name]) for name, seconds in there.items()}

    def runs(self, name: str) -> bool:
        """Whether one that is about to be taken can run the problem after all."""
        if name not in self.refused:
            reasons = _prepared(self.problem, name)
            for reason in reasons:
                _say_once(self.problem.direction, self.problem.recurrence.name, name, reason)
            self.refused[name] = bool(reasons)
        return not self.refused[name]


_candidates = memoize(1024, name=f"{__name__}._candidates")(_Candidates)


def _prepared(problem: Problem, name: str) -> list[str]:
    """Why a backend that is about to be taken cannot run a problem after all."""
    backend = BACKENDS[name]
    reasons = backend.unsupported(problem)
    if not reasons:
        backend.prepare(problem)
        reasons = backend.unsupported(problem)
    return reasons


def _against(problem: Problem, name: str) -> list[str]:
    """As `_prepared`, for a backend that is asked for by name: it runs the backward pass too, which is too late to
    refuse."""
    reasons = _prepared(problem, name)
    if reasons or problem.direction != "training" or name not in LOOPS or wavefront_plan.possible(problem):
        return reasons
    return [f"in the backward pass: {reason}" for reason in _prepared(problem.but(direction="backward"), name)]


def total_cost(
    problem: Problem, name: str, loops: Sequence[str] | None = None, constants: rates.Rates | None = None
) -> float:
    """Seconds for a call and, in training, for its backward pass, which may run on another loop than the forward.

    Args:
        loops: those that may run the backward pass; None: all that can.
        constants: for the cost models; None: the device's own.
    """
    cost = _cost(problem, name, constants)
    if problem.direction != "training":
        return cost
    after = problem.but(direction="backward")
    if name not in LOOPS:
        return cost + _cost(after, name, constants)
    loops = [n for n in LOOPS if not BACKENDS[n].unsupported(after)] if loops is None else loops
    return cost + min(_cost(after, n, constants) for n in loops)


def _cost(problem: Problem, name: str, constants: rates.Rates | None) -> float:
    """Seconds for one pass; of a stack on a loop the less of layer after layer and of a wavefront."""
    one = like(problem)
    return (way(one, name) if constants is None else Way(one, name, constants)).seconds(problem.T)


def wavefront(problem: Problem, backend: str = "auto") -> tuple[str, int]:
    """The loop that a stack runs on in one pass as a wavefront, and how many steps its layers run together.

    Where a wavefront is not predicted to gain in this pass, these are all steps: layer after layer.
    """
    settled = _settled(problem, backend)
    plan = _plan(problem, settled or backend)
    name = _select(plan.launch, backend, tuple(KERNELS), settled, both=False)
    if backend != "auto" and problem.direction == "training":
        _backward_too(problem, backend)
    if backend == "auto" and _trial.backend:
        _trial.answers[problem, LOOPS] = name
    return name, plan.chunk


@memoize(1024)
def _backward_too(problem: Problem, backend: str) -> None:
    """Raises where the backend that is asked for by name cannot run the backward pass, which has a plan of its own."""
    wavefront(problem.but(direction="backward"), backend)


def staggers(problem: Problem, backend: str = "auto") -> bool:
    """Whether the loops run a stack as a wavefront: where that is predicted to be faster than layer after layer."""
    if not wavefront_plan.possible(problem):
        return False
    loop = _settled(problem, backend) or backend
    return loop != "reference" and _gain(problem, loop) > 0


def _settled(problem: Problem, backend: str) -> str:
    """The loop that "auto" is for a stack before a cost model is asked: the one on trial, the environment's, or the one
    measured to be the fastest; empty where there is none."""
    if backend != "auto":
        return ""
    if not _trial.backend:
        preferred = environment.backend(BACKENDS)
        return preferred if preferred in LOOPS else _fastest_loop(problem)
    if _trial.backend not in LOOPS:
        return ""
    _trial.answers[problem, LOOPS] = _trial.backend
    return _trial.backend


@memoize(1024)
def _fastest_loop(problem: Problem) -> str:
    return next(iter(choices.find(problem, LOOPS)), "")


@memoize(1024)
def _gain(problem: Problem, loop: str) -> float:
    """Seconds that a wavefront is predicted to save, of both passes in training."""
    directions = ("training", "backward") if problem.training else ("inference",)
    return sum(_plan(problem.but(direction=direction), loop).gain for direction in directions)


class _Plan(NamedTuple):
    """How a stack runs in one pass."""

    gain: float  # seconds that a wavefront is predicted to save
    chunk: int  # all steps where it saves none
    launch: Problem  # what a loop sees


@memoize(1024)
def _plan(problem: Problem, loop: str) -> _Plan:
    """For a loop, or the best of them."""
    single, ways = _ways(like(problem), loop)
    alone = problem.layers * min((each.alone.at(problem.T) for each in single), default=0.0)
    chunk, seconds = min((each.plan(problem.T) for each in ways), key=lambda plan: plan[1], default=(0, math.inf))
    if seconds < alone:
        return _Plan(alone - seconds, chunk, wavefront_plan.launched(problem, chunk, problem.layers))
    return _Plan(alone - seconds, problem.T, wavefront_plan.launched(problem, problem.T, 1))


@memoize(1024)
def _ways(problem: Problem, loop: str) -> tuple[list[Way], list[Way]]:
    """Of one layer, and of the stack, on a loop or all of them."""
    one, named = problem.but(layers=1), [name for name in KERNELS if loop in ("auto", name)]
    return [way(one, name) for name in named if not BACKENDS[name].unsupported(one)], [
        way(problem, name) for name in named if can_stagger(problem, name)
    ]


@memoize(1024, stays="what was said once is not said again")
def _say_once(direction: str, cell: str, backend: str, reason: str) -> None:
    """Why a cell does not run on a backend that would be taken, once, whatever the number of steps or samples."""
    log.info("%s of %s: %s not used: %s", direction, cell, backend, reason)


def verdicts(problem: Problem, backend: str = "auto") -> list[Row]:
    """Every backend's verdict on a problem, in the order of the table; of training calls, both passes' time."""
    chosen = select(problem, backend) if backend == "auto" or not _against(problem, backend) else None
    measured = choices.find(problem, tuple(BACKENDS))
    rows = []
    for name, each in BACKENDS.items():
        reasons = each.unsupported(problem)
        runs = not reasons
        predicted = total_cost(problem, name) * 1e6 / max(problem.T, 1) if runs else None
        if runs and problem.direction == "training" and name in LOOPS:
            against = each.unsupported(problem.but(direction="backward"))
            reasons = [f"backward on another loop: {reason}" for reason in against]
        us = measured.get(name) if runs else None
        source = "" if not runs else "measured" if us is not None else _source(problem, name)
        rows.append(Row(name, runs, name == chosen, tuple(reasons), predicted, us, source))
    return rows


def _is_fitted(problem: Problem, name: str) -> bool:
    """Whether a backend's model has constants of the device that are fitted to results."""
    known, cost = rates.of(problem.device), BACKENDS[name].cost
    return known.fitted and cost(problem, known) != cost(problem, rates.PREDICTED)


def _source(problem: Problem, name: str) -> str:
    """Where `total_cost` comes from: of two passes, or layers side by side, what is true of all."""
    if _is_fitted(problem, name):
        return "fitted"
    if name in WAVEFRONTS and problem.layers > 1 and wavefront_plan.possible(problem):
        return "modelled"
    if problem.direction != "training":
        return SOURCES[name](problem)
    after, back = problem.but(direction="backward"), name
    if name in LOOPS:
        back = min(
            (loop for loop in LOOPS if not BACKENDS[loop].unsupported(after)),
            key=lambda loop: _cost(after, loop, None),
        )
    both = {SOURCES[name](problem), SOURCES[back](after)}
    return both.pop() if len(both) == 1 else "modelled"


def described(problem: Problem, place: str | torch.device) -> Problem:
    """The same problem on a device described by name, such as "H100", or on one that is here."""
    device = devices.of(place) if isinstance(place, torch.device) else devices.describe(place)
    kind = "cuda" if device.is_gpu else "cpu"
    return problem.but(device=device, device_type=kind, precision=precision.of_rnn())
