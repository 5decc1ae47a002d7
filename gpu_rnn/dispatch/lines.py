# SPDX-License-Identifier: Apache-2.0
"""What a pass takes for any number of steps: a model adds so much for each to what a call takes however long it is, so
it is asked at two points."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from gpu_rnn.backends import BACKENDS, WAVEFRONTS
from gpu_rnn.backends.problem import Problem
from gpu_rnn.backends.rates import Rates
from gpu_rnn.dispatch import wavefront_plan
from gpu_rnn.memo import memoize

FAR = 1024  # steps between the two points of a line: rounding is far below what models know


class Line:
    """Seconds by a cost model: of a problem of one step, which may be a matter of its own, or of any larger number."""

    def __init__(self, cost: Callable[[Problem], float], problem: Problem) -> None:
        self.start, self.first = problem.T, cost(problem)
        last = self.first if problem.T == 1 else cost(problem.but(T=problem.T + FAR))
        self.step = (last - self.first) / FAR if math.isfinite(self.first) else 0.0

    def at(self, steps: int) -> float:
        return self.first + (steps - self.start) * self.step


def like(problem: Problem) -> Problem:
    """The problem that a line starts from."""
    return problem.but(T=min(problem.T, 2))


def can_stagger(problem: Problem, name: str) -> bool:
    """Whether a backend can run a stack as a wavefront."""
    if name not in WAVEFRONTS or not wavefront_plan.possible(problem):
        return False
    return not BACKENDS[name].unsupported(wavefront_plan.launched(problem, 1, problem.layers))


class Way:
    """One pass on a backend: the layers of a stack one after the other, or as a wavefront where that takes less."""

    def __init__(self, problem: Problem, name: str, constants: Rates | None = None) -> None:
        backend = BACKENDS[name]
        line = partial(Line, lambda part: backend.cost(part, constants))
        self.alone, self.staggered = line(problem), None
        if can_stagger(problem, name):
            self.staggered = wavefront_plan.Staggered(problem, line)

    @property
    def seconds(self) -> Callable[[int], float]:
        """Of so many steps."""
        return self.alone.at if self.staggered is None else self._less

    def _less(self, steps: int) -> float:
        return min(self.alone.at(steps), self.plan(steps)[1])

    def plan(self, steps: int) -> tuple[int, float]:
        """The best chunk of a wavefront and its seconds, infinitely many where it cannot run so."""
        return (steps, math.inf) if self.staggered is None else self.staggered.plan(steps)


way = memoize(4096, name=f"{__name__}.way")(Way)
