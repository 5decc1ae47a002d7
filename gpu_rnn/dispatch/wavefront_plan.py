# SPDX-License-Identifier: Apache-2.0
"""Whether a stack runs as a wavefront (`gpu_rnn.call.wavefront`), and how many steps its layers run together."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

from gpu_rnn.backends.problem import Problem
from gpu_rnn.devices import Device

BETWEEN = 1.5e-5  # predicted seconds of a diagonal beside its launch: a product, and some copies of what it leaves
# Seconds that the host takes to put a diagonal in the queue: forward 9e-5, backward 1.4e-4 of CPU time on an AMD EPYC.
# A shorter chunk would leave the device waiting.
HOST = 1e-4


def possible(problem: Problem) -> bool:
    """Whether a stack can run so, and its device may gain by it."""
    others = problem.proj_size or problem.norm or problem.rebuilds
    plain = not (others or problem.transforms or problem.dtype.is_complex)
    return problem.layers > 1 and problem.N == 1 and plain and idles(problem.device)


def idles(device: Device) -> bool:
    """Whether one layer may leave a part of the device idle. On a CPU a product takes all of it."""
    return device.is_gpu


def launched(problem: Problem, steps: int, layers: int) -> Problem:
    """What a launch of so many steps and layers of a stack is to a backend."""
    flags = problem.flags or problem.lengths
    return problem.but(T=steps, N=layers, layers=1, reverse="0" * layers, flags=flags, lengths=False, packed=False)


class OfSteps(Protocol):
    """What some cost model says of a problem: so many seconds more for each step."""

    step: float

    def at(self, steps: int) -> float:
        """Seconds."""


class Staggered:
    """A stack as a wavefront on one backend, for any number of steps.

    A launch takes a + b·steps, so K chunks take (K + L - 1)(a + b·T/K), which is least at K = √(b·T·(L - 1)/a).
    """

    def __init__(self, problem: Problem, line: Callable[[Problem], OfSteps]) -> None:
        single = problem.but(T=2, layers=1)
        bare = problem.but(I=0)  # the products of the input are the same, however they are cut
        self.layers = problem.layers
        self.single, self.loop = line(single), line(single.but(I=0))
        self.together, self.alone = (line(launched(bare, 2, layers)) for layers in (problem.layers, 1))
        self.last: tuple[int, tuple[int, float]] = (0, (0, math.inf))  # a call asks for its steps more than once

    def plan(self, total: int) -> tuple[int, float]:
        """The chunk that takes least, and its seconds."""
        asked, answer = self.last
        if asked != total:
            answer = self._plan(total)
            self.last = total, answer
        return answer

    def _plan(self, total: int) -> tuple[int, float]:
        layers, step = self.layers, self.together.step
        products = layers * (self.single.at(total) - self.loop.at(total))
        start = BETWEEN + max(self.together.at(1) - step, 0.0)
        count = round(math.sqrt(step * total * (layers - 1) / start))
        if start + step < HOST:
            count = min(count, int(step * total / (HOST - start)))
        chunk = total // min(max(1, count), total)
        odd, count = total % chunk, total // chunk
        seconds = products + (count + layers - 1) * max(HOST, start + step * chunk)
        if odd:
            seconds += layers * max(HOST, BETWEEN + self.alone.at(odd))
        return chunk, seconds
