# SPDX-License-Identifier: Apache-2.0
"""What torch.compile makes of a layer on a CPU, beside the eager layer and torch.nn's: a table of milliseconds.

torch.nn's layer as one operation of Python's, compiled likewise, says what torch itself takes around such a one.

python benchmarks/compiled.py --threads 1
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from math import inf
from pathlib import Path
from statistics import median

if not __package__:  # as a script, which knows its own folder only
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor, nn

import gpu_rnn
from benchmarks.measuring import timing
from benchmarks.measuring.one_operation import InOneOperation

SIZES = ((20, 8, 64, 128), (100, 32, 64, 128))  # T, B, I, H
HEAD = """\
| layer | T, B, I, H | | torch.nn | as an operation, compiled | eager | compiled | compiled / eager |
|---|---|---|--:|--:|--:|--:|--:|"""


def inference(layer: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        layer(x)


def training(layer: nn.Module, x: Tensor) -> None:
    torch.autograd.grad(layer(x)[0].sum(), [*layer.parameters()])


def layers(name: str, features: int, hidden: int) -> dict[str, nn.Module]:
    """The same weights four times."""
    theirs, ours = (getattr(library, name)(features, hidden) for library in (nn, gpu_rnn))
    ours.load_state_dict(theirs.state_dict())
    torch._dynamo.reset()
    operation = InOneOperation(theirs)
    every = {"torch.nn": theirs, "operation": operation, "eager": ours, "compiled": ours}
    compiles = ("operation", "compiled")
    return {key: torch.compile(layer, fullgraph=True) if key in compiles else layer for key, layer in every.items()}


def rows(seconds: float) -> Iterator[str]:
    passes: tuple[Callable[[nn.Module, Tensor], None], ...] = (inference, training)
    for name, (steps, batch, features, hidden) in ((name, sizes) for name in ("LSTM", "GRU", "RNN") for sizes in SIZES):
        x, every = torch.randn(steps, batch, features), layers(name, features, hidden)
        for run in passes:
            calls = {key: partial(run, layer, x) for key, layer in every.items()}
            found = timing.interleave(calls, x.device, trials=15, seconds=seconds / 15, deadline=inf)
            times = [1e3 * median(found[key].samples) for key in calls]
            numbers = " | ".join(f"{each:.3f}" for each in times)
            sizes = f"{steps}, {batch}, {features}, {hidden}"
            yield f"| {name} | {sizes} | {run.__name__} | {numbers} | {times[3] / times[2]:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.4, help="of each of four layers, in each row")
    given = parser.parse_args()
    with timing.threads(given.threads):
        print(HEAD)
        for row in rows(given.seconds):
            print(row, flush=True)


if __name__ == "__main__":
    main()
