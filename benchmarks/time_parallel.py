# SPDX-License-Identifier: Apache-2.0
"""Layers parallel in time: when they settle, what the cost models predict on a GPU, and what a CPU takes.

python benchmarks/time_parallel.py --settling                    draws docs/time_parallel/settling.svg
python benchmarks/time_parallel.py --modelled H100               a table; nothing is measured
python benchmarks/time_parallel.py --measured --threads 1        a table, on this CPU
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from math import inf
from pathlib import Path
from statistics import median
from unittest import mock

if not __package__:  # as a script, which knows its own folder only
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor

import gpu_rnn
from benchmarks.measuring import timing
from gpu_rnn import devices
from gpu_rnn.backends.problem import Problem
from gpu_rnn.dispatch import relaxation_plan
from gpu_rnn.dispatch.relaxation_plan import TimePlan
from gpu_rnn.layers.base import LayerBase

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "time_parallel" / "settling.svg"
STEPS, FEATURES, HIDDEN, TOLERANCE = 4096, 64, 128, 1e-6  # of the picture
BIASES, LENGTHS, MOST = (0.0, 1.0, 2.0, 3.0, 4.0), (32, 64, 128, 256, 512), 16
# Backend, units, T
MEASURED = (("native", 128, 4096), ("native", 512, 2048), ("native", 1024, 1024), ("step", 128, 2048))

Pass = tuple[float, float]  # what the borders moved by after it, and how far off the outputs are


def initial(name: str, bias: float, hidden: int = HIDDEN) -> LayerBase:
    """With torch.nn's initial weights, and this much more in an LSTM's forget gate."""
    torch.manual_seed(0)
    layer: LayerBase = getattr(gpu_rnn, name)(FEATURES, hidden).requires_grad_(False)
    if name == "LSTM":
        layer.bias_hh_l0[hidden : 2 * hidden] += bias
    return layer


def history(layer: LayerBase, x: Tensor, length: int) -> Iterator[Pass]:
    """What becomes of chunks of so many steps, pass after pass, written out: all of them run, and hand on their end."""
    count = len(x) // length
    rows = x.view(count, length, -1).transpose(0, 1).contiguous()
    truth, start = layer(x)[0], None
    for _ in range(min(MOST, count)):
        y, end = layer(rows, start)
        ends = end if isinstance(end, tuple) else (end,)
        wanted = tuple(torch.cat([torch.zeros_like(each[:, :1]), each[:, :-1]], 1) for each in ends)
        before = [torch.zeros_like(each) for each in ends] if start is None else start
        before = before if isinstance(before, (tuple, list)) else (before,)
        moved = max((new - old).abs().max().item() for new, old in zip(wanted, before, strict=True))
        yield moved, (y.transpose(0, 1).reshape(truth.shape) - truth).abs().max().item()
        start = wanted if isinstance(end, tuple) else wanted[0]


def settled(passes: Sequence[Pass]) -> int | None:
    """The passes after which no border moves by more than the tolerance; None where that takes more than were run."""
    return next((number for number, (moved, _) in enumerate(passes, 1) if moved <= TOLERANCE), None)


def settling() -> None:
    """Prints passes and errors, and draws them."""
    from benchmarks.reporting.pictures import style  # needs matplotlib

    x = torch.randn(STEPS, 1, FEATURES, generator=torch.Generator().manual_seed(1))
    layers = {f"LSTM, forget bias {bias:g}": initial("LSTM", bias) for bias in BIASES} | {"GRU": initial("GRU", 0.0)}
    with style.styled():
        figure = style.new(8, 3.2)
        left, right = figure.subplots(1, 2)
        colours = [style.BLUE, style.GREEN, style.PURPLE, style.ORANGE, "0.2", style.GREY]
        for (name, layer), colour in zip(layers.items(), colours, strict=False):
            runs = [[*history(layer, x, length)] for length in LENGTHS]
            needed, off = [settled(run) for run in runs], [max(run[1][1], 1e-8) for run in runs]
            print(name, *(f"{n or '-'} ({error:.0e})" for n, error in zip(needed, off, strict=True)), sep=" | ")
            points = [(length, n) for length, n in zip(LENGTHS, needed, strict=True) if n is not None]
            (line,) = left.plot(
                *zip(*points, strict=True) if points else ((), ()), "o-", ms=3, color=colour, label=name
            )
            right.plot(LENGTHS, off, "o-", ms=3, color=line.get_color())
        left.set(title=f"Passes until no border moves by more than {TOLERANCE:g}", ylabel=f"passes, of at most {MOST}")
        right.set(title="After two passes", ylabel="largest error of an output", yscale="log")
        for axes in (left, right):
            axes.set_xscale("log", base=2)
            axes.set(xlabel="steps of a chunk", xticks=LENGTHS, xticklabels=map(str, LENGTHS))
        figure.legend(loc="outside lower center", ncols=3)
        PICTURE.parent.mkdir(exist_ok=True)
        style.save(figure, PICTURE)


def modelled(device: str) -> None:
    """Milliseconds by the cost models for a described device."""
    print("| layer | T | B | forward | in chunks | backward | in chunks |\n|---|--:|--:|--:|--:|--:|--:|")
    for name, hidden, dtype, tolerance in (("LSTM", 128, torch.float32, 1e-5), ("GRU", 512, torch.bfloat16, 1e-2)):
        layer = getattr(gpu_rnn, name)(FEATURES, hidden, dtype=dtype, device="meta")
        words = f"{name}, {hidden} units, {str(dtype).removeprefix('torch.')}"
        for steps, batch in ((steps, batch) for steps in (2048, 8192, 65536) for batch in (1, 4, 16)):
            x = torch.empty(steps, batch, FEATURES, dtype=dtype, device="meta")
            plans = gpu_rnn.explain(layer, x, device=device, time_parallel=tolerance).time_plans
            print(
                f"| {words} | {steps:,} | {batch} | {' | '.join(map(_ways, plans)) or 'not predicted to pay | | |'} |"
            )


def _ways(plan: TimePlan) -> str:
    """One after the other, and in chunks."""
    alone = f"{1e3 * plan.alone:.2f} ms"
    if plan.against:
        return f"{alone} | do not pay"
    times = f"{plan.alone / plan.seconds:.1f}×"
    return f"{alone} | {1e3 * plan.seconds:.2f} ms, {times} ({plan.chunks} of {plan.steps} steps)"


@contextmanager
def in_chunks(length: int) -> Iterator[None]:
    """Whatever is predicted."""

    def plan(problem: Problem, backend: str, tolerance: float) -> TimePlan:
        return TimePlan(-(-problem.T // length), length, MOST, 0.0, 1.0)

    with mock.patch.object(relaxation_plan, "plan", plan), mock.patch.object(relaxation_plan, "against", lambda *_: ""):
        yield


def chunked(layer: LayerBase, x: Tensor, length: int) -> Tensor:
    with in_chunks(length):
        y: Tensor = layer(x, time_parallel=TOLERANCE)[0]
    return y


def measured(seconds: float) -> None:
    """Milliseconds of both ways on this CPU, each chunk length whether it is predicted to pay or not."""
    print(f"{devices.cpu_model()}, {torch.get_num_threads()} thread, torch {torch.__version__}, fp32, B 1, forward\n")
    print(
        "| backend | units | T | one after the other | chunks of | in chunks | times |\n|---|--:|--:|--:|--:|--:|--:|"
    )
    for backend, hidden, steps in MEASURED:
        layer, x = initial("LSTM", 0.0, hidden), torch.randn(steps, 1, FEATURES)
        layer.backend = backend
        ways = {length: partial(chunked, layer, x, length) for length in (64, 128, 256) if length < steps}
        calls = {0: partial(layer, x), **ways}
        named = {str(length): call for length, call in calls.items()}
        found = timing.interleave(named, x.device, trials=5, seconds=seconds / 16, deadline=inf)
        ms = {length: 1e3 * median(found[str(length)].samples) for length in calls}
        for length in ways:
            times = f"{ms[0]:.1f} ms | {length} | {ms[length]:.1f} ms | {ms[0] / ms[length]:.2f}"
            print(f"| `{backend}` | {hidden} | {steps:,} | {times} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--settling", action="store_true")
    parser.add_argument("--modelled", metavar="DEVICE")
    parser.add_argument("--measured", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=30.0, help="for all that is measured, about")
    given = parser.parse_args()
    with timing.threads(given.threads):
        if given.settling:
            settling()
        if given.modelled:
            modelled(given.modelled)
        if given.measured:
            measured(given.seconds)


if __name__ == "__main__":
    main()
