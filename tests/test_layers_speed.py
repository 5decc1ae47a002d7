# SPDX-License-Identifier: Apache-2.0
"""On the CPU with standard options a call costs what torch.nn's costs: 5 % for a call of 1 ms or more, else 10 µs.

``python tests/test_layers_speed.py`` prints the table.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import NamedTuple

import layer_support as support
import pytest
import torch

ROUNDS = 41
BUDGET = 0.01  # seconds of work behind each timed sample: a short call is repeated until it fills this
SHARE, MICROSECONDS = 1.05, 10.0
CASES = [  # name, options, T, B, I = H
    *((name, {}, 1, 1, 8) for name in (*support.LAYERS, *support.CELLS)),
    *((name, {}, 20, 8, 64) for name in support.LAYERS),
    *((name, {}, 50, 16, 128) for name in support.LAYERS),
    ("LSTM", {"num_layers": 2, "bidirectional": True}, 1, 1, 8),
    ("GRU", {"num_layers": 2, "bidirectional": True}, 30, 8, 64),
]


class Timing(NamedTuple):
    """Medians over the rounds, in microseconds."""

    theirs: float
    ours: float
    extra: float  # of the differences within a round

    @property
    def allowed(self) -> bool:
        return self.extra <= (self.theirs * (SHARE - 1) if self.theirs >= 1000 else MICROSECONDS)


def sample(call: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats * 1e6


def measure(theirs: Callable[[], object], ours: Callable[[], object]) -> Timing:
    """Both calls in turn, who is first changing from round to round, so that a busy machine troubles both alike."""
    sample(theirs, 3), sample(ours, 3)
    repeats = max(1, int(BUDGET / (sample(theirs, 5) * 1e-6)))
    rounds = []
    for index in range(ROUNDS):
        if index % 2:
            rounds.append((sample(theirs, repeats), sample(ours, repeats)))
        else:
            rounds.append((sample(ours, repeats), sample(theirs, repeats))[::-1])
    return Timing(
        median(a for a, _ in rounds), median(b for _, b in rounds), median(b - a for a, b in rounds)
    )


def calls(
    name: str, options: dict, steps: int, batch: int, size: int
) -> Iterator[tuple[str, Callable, Callable]]:
    theirs, ours = support.pair(name, size, size, dtype=torch.float32, **options)
    x = torch.randn(batch, size) if name.endswith("Cell") else torch.randn(steps, batch, size)

    def inference(module: torch.nn.Module) -> Callable[[], object]:
        @torch.no_grad()
        def call() -> object:
            return module(x)

        return call

    def training(module: torch.nn.Module) -> Callable[[], object]:
        weights = list(module.parameters())

        def call() -> object:
            return torch.autograd.grad(support.leaves(module(x))[0].sum(), weights)

        return call

    yield "forward", inference(theirs), inference(ours)
    if not name.endswith("Cell"):  # from states of 0 a cell's recurrent weights get no part
        yield "forward+backward", training(theirs), training(ours)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options", "steps", "batch", "size"), CASES)
def test_no_slower_than_torch(name: str, options: dict, steps: int, batch: int, size: int) -> None:
    for what, theirs, ours in calls(name, options, steps, batch, size):
        timing = measure(theirs, ours)
        assert timing.allowed, f"{what}: {timing}"


def main() -> None:
    print(f"{'call':60} {'torch.nn µs':>12} {'gpu_rnn µs':>12} {'extra µs':>9} {'ratio':>6}")
    for case in CASES:
        for what, theirs, ours in calls(*case):
            timing = measure(theirs, ours)
            label = f"{case[0]} {case[1] or ''} T,B,H={case[2:]} {what}"
            row = f"{label:60} {timing.theirs:12.1f} {timing.ours:12.1f} {timing.extra:+9.1f} {timing.ours / timing.theirs:6.3f}"
            print(row, "" if timing.allowed else "TOO SLOW")


if __name__ == "__main__":
    main()
