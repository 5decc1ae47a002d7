# SPDX-License-Identifier: Apache-2.0
"""Many cases in a few figures: the tables of README.md and docs/performance.md."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean
from types import MappingProxyType

from benchmarks.reporting import cpu
from benchmarks.reporting.results import DIRECTIONS, DTYPES, NOISE, Case
from benchmarks.reporting.tables import paragraph, ratio, table

LARGE = 1024  # units; larger layers are summarised apart, because their weights do not fit on a GPU's chip
SIZES = (f"H ≤ {LARGE}", f"H > {LARGE}")
BEGIN, END = '<!-- performance: written by "make report" -->', "<!-- end of performance -->"
WORST = 3  # losses that README.md names
HOW = "`python benchmarks/run.py` on a machine with an NVIDIA GPU, then `make report`"


@dataclass(frozen=True)
class Measured:
    """The results of one GPU or CPU, and the name of its page.

    Streams stand by themselves: a batch of them beside torch.nn's layer for each says nothing of a layer's speed.
    """

    name: str
    cases: Sequence[Case]
    streams: Sequence[Case] = ()

    @classmethod
    def of(cls, name: str, cases: Iterable[Case]) -> Measured:
        cases = list(cases)
        streams = [case for case in cases if case["stepwise"] == "streams"]
        return cls(name, [case for case in cases if case not in streams], streams)

    @property
    def device(self) -> str:
        return [*self.cases, *self.streams][0]["device"]

    @property
    def is_gpu(self) -> bool:
        """Only the rows of a GPU name a driver."""
        return any(case["driver"] for case in (*self.cases, *self.streams))

    @property
    def date(self) -> str:
        return max(case["date"] for case in (*self.cases, *self.streams))[:10]

    @property
    def ratios(self) -> list[float]:
        return ratios(self.cases)

    @property
    def lost(self) -> list[Case]:
        """Where torch.nn is faster, the worst first."""
        return sorted((case for case in self.cases if case.lost), key=lambda case: case.ratio or 0)


def ratios(cases: Iterable[Case]) -> list[float]:
    return [case.ratio for case in cases if case.ratio is not None]


def size(case: Case) -> str:
    return SIZES[int(case["H"]) > LARGE]


def figure(found: Sequence[float]) -> str:
    """The geometric mean, the range, and how many are losses."""
    if not found:
        return "not measured"
    slower = sum(value < NOISE for value in found)
    return f"{geometric_mean(found):.2f}× ({min(found):.2f} to {max(found):.2f}), {slower} of {len(found)} slower"


def by_dtype(cases: Iterable[Case]) -> list[str]:
    """A row for each dtype, a column for each direction and size."""
    cases = list(cases)
    columns = [(direction, large) for direction in DIRECTIONS for large in SIZES]
    rows = []
    for dtype in DTYPES:
        own = [case for case in cases if case["dtype"] == dtype]
        cells = [figure(ratios(c for c in own if (c["direction"], size(c)) == column)) for column in columns]
        rows += [[dtype, *cells]] if ratios(own) else []
    return table(["", *(", ".join(column) for column in columns)], rows)


def block(gpus: Sequence[Measured], docs: str) -> list[str]:
    """README's tables: the GPU with the most cases in one, the others in a line each, then the CPU that was measured
    last. `docs` is the folder's name."""
    newest = max((each for each in gpus if not each.is_gpu), key=lambda each: each.date, default=None)
    on_a_cpu = _of_a_cpu(newest, docs) if newest else []
    return [*_of_gpus([each for each in gpus if each.is_gpu], docs), *on_a_cpu]


def _of_a_cpu(measured: Measured, docs: str) -> list[str]:
    return [
        "",
        *paragraph(
            f"**{measured.device}**, one thread, fp32, times as fast as torch.nn: geometric mean (lowest to "
            f"highest), each on the backend that it took in that run ([pictures, and every case]("
            f"{docs}/performance/{measured.name}.md))."
        ),
        "",
        *cpu.summary(measured.cases),
    ]


def _of_gpus(gpus: Sequence[Measured], docs: str) -> list[str]:
    if not gpus:
        return []
    most, *others = sorted(gpus, key=lambda gpu: -len(gpu.ratios))
    page = f"{docs}/performance/{most.name}.md"
    lines = ["", *by_dtype(most.cases), "", _slower(most, page)]
    for gpu in others:
        lines.append(f"On [{gpu.device}]({docs}/performance/{gpu.name}.md): {figure(gpu.ratios)}.")
    return lines


def _slower(gpu: Measured, page: str) -> str:
    """Where it is not faster, in a sentence."""
    if not gpu.lost:
        return f"Slower than torch.nn in none of {len(gpu.ratios)} cases, by more than noise (a ratio below {NOISE})."
    worst = ", ".join(f"{case} {ratio(case.ratio)}" for case in gpu.lost[:WORST])
    every = f"[all {len(gpu.lost)}]({page}#where-it-is-slower)"
    return f"**Slower** in {len(gpu.lost)} of {len(gpu.ratios)} cases, at worst {worst}: {every}."


def inserted(text: str, lines: Sequence[str], path: Path) -> str:
    """The text with the lines between the two markers.

    Raises:
        ValueError: the markers are not there, each once and in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(
            f"{path} needs these two lines, once, in this order, for the report between them:\n{BEGIN}\n{END}"
        )
    before, _, rest = text.partition(BEGIN)
    return before + "\n".join([BEGIN, *lines, END]) + rest.partition(END)[2]


def index(gpus: Sequence[Measured], simulated: Mapping[str, str] = MappingProxyType({})) -> str:
    """docs/performance.md. `simulated`: the pages of devices on which nothing was measured, by their names."""
    lines = ["# Performance", ""]
    if not any(gpu.is_gpu for gpu in gpus):
        lines += [f"**Nothing has been measured on a GPU yet.** That is still to be done, by {HOW}.", ""]
    if gpus:
        lines += ["How many times as fast as torch.nn: geometric mean (lowest to highest) of all cases.", ""]
    rows = [[f"[{gpu.device}](performance/{gpu.name}.md)", f"measured {gpu.date}", figure(gpu.ratios)] for gpu in gpus]
    rows += [[f"[{device}](performance/{name}.md)", *SIMULATED] for device, name in simulated.items()]
    if rows:
        lines += [
            *table(["GPU" if all(gpu.is_gpu for gpu in gpus) else "device", "figures", "times as fast"], rows),
            "",
        ]
    return "\n".join([*lines, ABOUT])


SIMULATED = ("simulated from machine code", "not measured")
ABOUT = f"""## What is measured

`benchmarks/run.py` times torch.nn and every backend on the same weights and input, in turns, in one run; other
libraries' kernels beside them where they are installed. Before a result is timed, all its outputs and gradients are
compared with float64; what is wrong has no time and is listed as such. The ratio is torch.nn's time by that of the
backend which a layer takes by itself: above 1 ours is the faster, below {NOISE}, which is more than noise, it is a
loss, and set in bold. All losses of a GPU are listed in one place on its page. `forward` is inference, `training`
forward and backward; `fp32` multiplies in tf32, which is torch's default for recurrent layers, `ieee` in full
precision. `benchmarks/README.md` in the source has the details.

`make report` rebuilds these pages, their pictures and README's figures from `benchmarks/results` and from what is
simulated, and nothing else goes into them.

## What is simulated

The time loop of a step, from the machine code that each kernel is compiled to, on a model of a multiprocessor. No GPU
runs it, and no ratio to another library is made of it: what others published stands beside it with its source. A page
of a device says how near the simulation comes to kernels that others timed. Once a device is measured, its page has
both, side by side.

## What is predicted

A layer takes the backend that is predicted cheapest: by simulated steps, published ones of cuDNN, and models of what
surrounds them. For a layer of yours, on a GPU that need not be there:

```python
import torch, gpu_rnn

x = torch.empty(100, 32, 64, dtype=torch.bfloat16)
print(gpu_rnn.explain(gpu_rnn.LSTM(64, 512).bfloat16(), x, device="H100"))
```
"""
