# SPDX-License-Identifier: Apache-2.0
"""Whether a stack runs as a wavefront (`gpu_rnn.call.wavefront`), and how many steps its layers run together."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from gpu_rnn.backends.problem import Problem
from gpu_rnn.devices import Device

BETWEEN = 1.5e-5  # predicted seconds of a diagonal beside its launch: a product, and some copies of what it leaves
# Seconds that the host takes to put a diagonal in the queue: forward 9e-5, backward 1.4e-4 of CPU time on an AMD EPYC.
# A shorter chunk would leave the device waiting.
HOST = 1e-4


def possible(problem: Problem) -> bool:
    """Whether a stack can run so, and its device may gain by it."""
    plain = not (problem.proj_size or problem.norm or problem.transforms or problem.dtype.is_complex)
    return problem.layers > 1 and problem.N == 1 and plain and idles(problem.device)


def idles(device: Device) -> bool:
    """Whether one layer may leave a part of the device idle. On a CPU a product takes all of it."""
    return device.is_gpu


def launched(problem: Problem, steps: int, layers: int) -> Problem:
    """What a launch of so many steps and layers of a stack is to a backend."""
    flags = problem.flags or problem.lengths
    one = replace(problem, T=steps, N=layers, layers=1, reverse="0" * layers)
    return replace(one, flags=flags, lengths=False, packed=False)


def plan(problem: Problem, cost: Callable[[Problem], float]) -> tuple[int, float]:
    """The chunk that takes least by a cost model, and the seconds that it predicts.

    A launch takes a + b·steps, so K chunks take (K + L - 1)(a + b·T/K), which is least at K = √(b·T·(L - 1)/a).
    """
    layers, total = problem.layers, problem.T
    single = replace(problem, layers=1)
    bare = replace(problem, I=0)  # the products of the input are the same, however they are cut
    products = layers * (cost(single) - cost(replace(single, I=0)))
    one, whole = (cost(launched(bare, steps, layers)) for steps in (1, total + 1))
    step = (whole - one) / total
    start = BETWEEN + max(one - step, 0.0)
    count = round(math.sqrt(step * total * (layers - 1) / start))
    if start + step < HOST:
        count = min(count, int(step * total / (HOST - start)))
    chunk = total // min(max(1, count), total)
    odd, count = total % chunk, total // chunk
    seconds = products + (count + layers - 1) * max(HOST, start + step * chunk)
    if odd:
        seconds += layers * max(HOST, BETWEEN + cost(launched(bare, odd, 1)))
    return chunk, seconds
