# SPDX-License-Identifier: Apache-2.0
"""What the choice of backends takes for a number of steps that no call had before."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import torch

from benchmarks.measuring.counting import fastest, functions
from gpu_rnn import cells, devices
from gpu_rnn.backends import LOOPS
from gpu_rnn.backends.problem import Problem
from gpu_rnn.dispatch import choice

_steps = count(100)  # none is asked for twice


def problems() -> dict[str, Problem]:
    """An LSTM's calls on an H100, each with "auto"."""
    one = Problem(
        recurrence=cells.lstm(),
        T=1, B=64, N=1, I=64, H=64, dtype=torch.float16, device_type="cuda", device=devices.describe("H100"),
    )  # fmt: skip
    training = one.but(direction="training")
    return {
        "inference": one,
        "training": training,
        "4 layers, inference": one.but(layers=4),
        "4 layers, training": training.but(layers=4),
    }


def choosing(problem: Problem) -> Callable[[], None]:
    """Asks what a call of a problem asks, each time with another T."""

    def call() -> None:
        new = problem.but(T=next(_steps))
        choice.select(new)
        if new.layers > 1:
            choice.staggers(new)
        for direction in ("training", "backward") if new.training else ("inference",):
            one = new.but(direction=direction)
            if new.layers > 1:
                choice.wavefront(one)
            else:
                choice.select(one, "auto", LOOPS)

    return call


def asked(problem: Problem) -> int:
    """Function calls, after a few by which all that does not depend on T is known."""
    call = choosing(problem)
    for _ in range(3):
        call()
    return functions(call)


def took(problem: Problem) -> float:
    """Microseconds, likewise."""
    return fastest(choosing(problem))
