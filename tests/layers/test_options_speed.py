# SPDX-License-Identifier: Apache-2.0
"""On the CPU, options that torch.nn's kernels lack cost at most twice what torch.nn's layer costs without them.

``python -m tests.layers.test_options_speed`` prints the table.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gpu_rnn import cells, functional
from gpu_rnn.recurrence import Recurrence

T, B, I, H = 100, 32, 64, 128  # noqa: E741
ROUNDS, ATTEMPTS, LIMIT = 20, 3, 2.0
RATE = 0.2  # of masked steps, dropped and kept units


def draw(*shape: int) -> Tensor:
    return torch.rand(shape) < RATE


def options() -> dict[str, tuple[type[nn.RNNBase], Recurrence, dict[str, Any]]]:
    """Each option: the layer it is measured against, the cell, and what `functional.rnn` is given."""
    torch.manual_seed(0)
    lstm, gru = (nn.LSTM, cells.lstm()), (nn.GRU, cells.gru())
    kept = 1 - RATE
    controls: dict[str, dict[str, Any]] = {
        "mask": {"mask": ~draw(T, B)},
        "lengths": {"lengths": torch.randint(1, T + 1, (B,))},
        "resets": {"resets": draw(T, B)},
        "reset_state": {
            "resets": draw(T, B),
            "reset_state": tuple(torch.randn(1, B, H, requires_grad=True) for _ in range(2)),
        },
        "recurrent dropout": {"recurrent_mask": ~draw(1, B, 1, H) / kept},
        "recurrent dropout per gate": {"recurrent_mask": ~draw(1, B, 4, H) / kept},
        "zoneout": {"zone": draw(2, T, 1, B, H)},
        "all states": {"all_states": True},
        "layer norm": {"norm": True},
    }
    return {
        "LSTM softsign": (nn.LSTM, cells.lstm("softsign"), {}),
        "LSTM peephole": (nn.LSTM, cells.lstm(peephole=True), {}),
        "GRU reset before": (nn.GRU, cells.gru(reset_after=False), {}),
        **{f"LSTM {name}": (*lstm, given) for name, given in controls.items()},
        "GRU mask": (*gru, controls["mask"]),
        "GRU layer norm": (*gru, controls["layer norm"]),
    }


def calls(
    module: type[nn.RNNBase], recurrence: Recurrence, given: dict[str, Any]
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Forward and backward of torch.nn's layer, and of ours with the option."""
    layer = module(I, H)
    x = torch.randn(T, B, I, requires_grad=True)
    weights = list(layer.parameters())
    own = [*weights, *([torch.randn(len(recurrence.params), H, requires_grad=True)] if recurrence.params else [])]
    if given.get("norm"):
        own += [torch.ones(len(recurrence.gates) * H, requires_grad=True) for _ in range(2)]
    reached = [x, *own, *given.get("reset_state", ())]

    def theirs() -> Any:
        return torch.autograd.grad(layer(x)[0].sum(), [x, *weights])

    def ours() -> Any:
        y, *_, states = functional.rnn(x, None, own, recurrence, **given)
        total = y.sum() + (sum(state.sum() for state in states) if given.get("all_states") else 0)
        return torch.autograd.grad(total, reached)

    return theirs, ours


def measure(*functions: Callable[[], Any]) -> list[float]:
    """Milliseconds of this thread: the fastest of calls in turn and in random order, as others' load only ever adds.

    Like `timeit`, without the garbage collector: it goes through all that this process has, such as other tests'
    objects.
    """
    gc.collect()
    gc.disable()
    try:
        return _fastest(*functions)
    finally:
        gc.enable()


def _fastest(*functions: Callable[[], Any]) -> list[float]:
    order, shuffler = list(range(len(functions))), random.Random(0)
    best = [float("inf")] * len(functions)
    for _ in range(ROUNDS):
        shuffler.shuffle(order)
        for which in order:
            start = time.thread_time()
            functions[which]()
            best[which] = min(best[which], (time.thread_time() - start) * 1e3)
    return best


def settled(name: str) -> tuple[float, float]:
    """A measurement, repeated if it is not as it should be: other programs can spoil seconds on end."""
    both = calls(*options()[name])
    best = [float("inf"), float("inf")]
    for _ in range(ATTEMPTS):
        best = [min(pair) for pair in zip(best, measure(*both), strict=True)]
        if best[1] <= LIMIT * best[0]:
            break
    return best[0], best[1]


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.usefixtures("one_thread", "native_by_itself")
@pytest.mark.parametrize("name", options())
def test_at_most_twice_the_default(name: str) -> None:
    theirs, ours = settled(name)
    assert ours <= LIMIT * theirs, f"{ours:.1f} ms, torch.nn without the option {theirs:.1f} ms"


def main() -> None:
    torch.set_num_threads(1)
    print(f"T={T} B={B} I={I} H={H}, float32, forward and backward, CPU time of one thread")
    print(f"{'option':32} {'torch.nn ms':>12} {'gpu_rnn ms':>12} {'ratio':>6}")
    for name in options():
        theirs, ours = settled(name)
        verdict = "" if ours <= LIMIT * theirs else " TOO SLOW"
        print(f"{name:32} {theirs:12.1f} {ours:12.1f} {ours / theirs:6.2f}{verdict}")


if __name__ == "__main__":
    main()
