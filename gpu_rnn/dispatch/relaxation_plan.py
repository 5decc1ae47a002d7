# SPDX-License-Identifier: Apache-2.0
"""Whether the steps of a layer run parallel in time (`gpu_rnn.call.relaxation`), and in how many chunks."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch

from gpu_rnn import memo
from gpu_rnn.backends import BACKENDS, KERNELS, LOOPS
from gpu_rnn.backends.problem import Problem
from gpu_rnn.dispatch import choice
from gpu_rnn.dispatch.lines import like, way
from gpu_rnn.memo import memoize

log = logging.getLogger("gpu_rnn")

# Steps after which an LSTM whose forget bias begins at 1 has forgotten a guessed state to 1e-6: chunks of so many
# settle in two passes (docs/time_parallel.md, by benchmarks/time_parallel.py).
MEMORY = 128
SHORTEST = 32  # steps of a chunk: shorter ones would take more than five passes
MOST_PASSES = 16
PASS_HOST = 3e-4  # predicted seconds of a pass beside its launch: some 30 small operations, and the wait for its answer
CPU_BYTES = 5e9  # a second that a core copies, rough
MOST_OUTCOMES = 256


@dataclass(frozen=True)
class TimePlan:
    """How one pass of a layer runs."""

    chunks: int = 0
    steps: int = 0
    """Of a chunk."""
    passes: int = 0
    """After which borders that still move send the call back to one step after the other."""
    seconds: float = math.inf
    """Predicted, in the passes that are expected."""
    alone: float = math.inf
    """Predicted, one step after the other."""
    against: str = ""
    """Why one step runs after the other; empty where chunks run side by side."""


@dataclass(frozen=True)
class Outcome:
    """What became of a pass that ran in chunks."""

    passes: int
    settled: bool


_outcomes: dict[tuple[Problem, float], Outcome] = memo.hold(f"{__name__}: outcomes", {}, MOST_OUTCOMES)


def note(problem: Problem, plan: TimePlan, tolerance: float, outcome: Outcome) -> None:
    """Keeps for `explain` what became of a pass, and says so where its borders did not settle."""
    memo.put(_outcomes, (problem, tolerance), outcome, MOST_OUTCOMES)
    if not outcome.settled:
        log.info(
            "%s of %s: after %d passes borders between %d chunks of %d steps still move by more than %g: not parallel "
            "in time, one step after the other",
            *(problem.direction, problem.recurrence.name, outcome.passes, plan.chunks, plan.steps, tolerance),
        )


def outcome(problem: Problem, tolerance: float) -> Outcome | None:
    """What became of the last such pass to that tolerance in this process."""
    return _outcomes.get((problem, tolerance))


def launched(problem: Problem, steps: int, rows: int) -> Problem:
    """What so many rows of a chunk's steps are to a backend: steps that fill the last chunk, and those after a row's
    end, are masked."""
    masked = problem.flags or problem.lengths or bool(problem.T % steps)
    return problem.but(T=steps, B=rows, flags=masked, lengths=False, packed=False)


@memoize(1024)
def plan(problem: Problem, backend: str, tolerance: float) -> TimePlan:
    """Of one pass of a layer; says at INFO why steps run one after the other."""
    found = _planned(problem, backend, tolerance)
    if found.against:
        _said(problem, found.against)
    return found


def _planned(problem: Problem, backend: str, tolerance: float) -> TimePlan:
    name = choice.select(problem, backend, LOOPS)
    alone = way(like(problem), name).seconds(problem.T)
    refusal = _refusal(problem, name, tolerance)
    if refusal:
        return TimePlan(alone=alone, against=refusal)
    plans = [_in_chunks(problem, backend, chunk, alone) for chunk in _lengths(problem.T)]
    best = min(plans, key=lambda each: each.seconds)
    if best.seconds < alone:
        return best
    ms = [f"{1e3 * seconds:.3g} ms" for seconds in (best.seconds, alone)]
    words = f"{best.chunks} chunks of {best.steps} steps are predicted to take {ms[0]}, and one after the other {ms[1]}"
    return TimePlan(alone=alone, against=words)


def _refusal(problem: Problem, name: str, tolerance: float) -> str:
    """Why a layer cannot run so, whatever it would take."""
    if name not in KERNELS:
        return "the reference runs one step after the other"
    if problem.layers > 1:
        return "a stack runs so layer by layer"
    if problem.dtype.itemsize == 2 and tolerance < torch.finfo(problem.dtype).eps:
        kind, eps = str(problem.dtype).removeprefix("torch."), torch.finfo(problem.dtype).eps
        return f"borders hand on states of {kind}, which are rounded: the tolerance is at least {eps:g} there"
    if not problem.B:
        return "there are no rows"
    if problem.T < 2 * SHORTEST:
        return f"there are {problem.T} steps, and a chunk has at least {SHORTEST}"
    return ""


def _lengths(steps: int) -> list[int]:
    """Steps of a chunk to choose from: of those that divide time alike, every power of two."""
    powers = range(SHORTEST.bit_length() - 1, (steps - 1).bit_length())
    counts = dict.fromkeys(-(-steps // (1 << power)) for power in powers)
    return [-(-steps // count) for count in counts if count > 1]


def _in_chunks(problem: Problem, backend: str, steps: int, alone: float) -> TimePlan:
    chunks = -(-problem.T // steps)
    one = launched(problem, steps, chunks * problem.B)
    names = [name for name in KERNELS if backend in ("auto", name) and not BACKENDS[name].unsupported(one)]
    if not names:
        return TimePlan(chunks, steps)
    name = min(names, key=lambda name: way(like(one), name).seconds(steps))
    whole, loop = way(like(one), name).seconds(steps), way(like(one.but(I=0)), name).seconds(steps)
    again = loop + _copies(one)
    expected = 1 + -(-MEMORY // steps)
    # To give up costs half of what steps in a row take, if more passes than expected fit into that.
    most = min(MOST_PASSES, chunks, max(expected + 1, int(alone / 2 / again)))
    return TimePlan(chunks, steps, most, (whole - loop) + expected * again, alone)


def _copies(one: Problem) -> float:
    """Seconds of a pass beside the loop: what goes in is copied, what comes out is put back."""
    moved = (
        one.T * one.B * one.N * one.H * one.dtype.itemsize * (one.G + len(one.program.states) + one.G * one.training)
    )
    return PASS_HOST + 2 * moved / (one.device.memory_rate * 1e9 if one.device.is_gpu else CPU_BYTES)


@memoize(1024)
def against(problem: Problem, backend: str, tolerance: float) -> str:
    """Why a call of a stack does not run so, of all that it might run on; in training with its backward pass. Empty
    where it does."""
    if backend not in ("auto", *LOOPS):
        return _said(problem, f"{backend} takes all steps by itself")
    each = of_passes(problem, backend, tolerance)
    if all(of_pass.against for of_pass in each):
        return each[0].against
    chunks = problem.layers * sum(min(of_pass.seconds, of_pass.alone) for of_pass in each)
    name = choice.select(problem, backend)
    alone = choice.total_cost(problem, name)
    if chunks < alone:
        return ""
    words = f"chunks of steps are predicted to take {1e3 * chunks:.3g} ms, and {name} {1e3 * alone:.3g} ms"
    return _said(problem, words)


def _said(problem: Problem, words: str) -> str:
    """Words against chunks, which those that listen at INFO hear."""
    log.info("%s of %s: not parallel in time: %s", problem.direction, problem.recurrence.name, words)
    return words


def of_passes(problem: Problem, backend: str, tolerance: float) -> list[TimePlan]:
    """Of each pass of a call, for one of its layers."""
    directions = ("training", "backward") if problem.direction == "training" else (problem.direction,)
    return [plan(of_one_layer(problem, direction), backend, tolerance) for direction in directions]


def of_one_layer(problem: Problem, direction: str) -> Problem:
    """The problem that a layer of a call poses to the loops in a pass."""
    lengths = problem.lengths or problem.packed
    return problem.but(layers=1, direction=direction, packed=False, lengths=lengths, transforms=False)
