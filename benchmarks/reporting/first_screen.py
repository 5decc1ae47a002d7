# SPDX-License-Identifier: Apache-2.0
"""The five lines on README's first screen: what is measured and beside what, what is simulated, what is not known."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.cases.names import BY_HAND, COMPILED, FLASHRNN, ONNXRUNTIME, PEERS, TORCHRL
from benchmarks.reporting.simulated_page import slug
from benchmarks.reporting.summary import Measured, figure
from benchmarks.simulating import validation

IN_WORDS = {
    FLASHRNN: "FlashRNN",
    TORCHRL: "TorchRL",
    BY_HAND: "loops by hand",
    COMPILED: "the same compiled",
    ONNXRUNTIME: "ONNX Runtime",
}
MEASURED = "- **Measured** beside {beside}: geometric mean of all cases (lowest to highest), times as fast as torch.nn:"
NOTHING = "On a GPU nothing yet: `python benchmarks/run.py` does."
SIMULATED = "- **Simulated** from machine code, on no GPU: a step on {pages}."
CHECKED = (
    "  {count} kernels that others timed on an H100 come out at {low:.2f} to {high:.2f} of their published times so."
)
BESIDE = "what was measured too, beside it"
UNKNOWN = "- **Not known**: {what}. [Performance]({docs}/performance.md): pictures, and how to measure."
NOT_ON_A_GPU = "how fast anything is on a GPU, beside torch.nn or others"


def lines(measured: Sequence[Measured], docs: str, simulated: Sequence[str]) -> list[str]:
    """Five lines of Markdown, a list.

    Args:
        measured: devices with results.
        docs: the folder's name.
        simulated: the devices that are simulated and not measured.
    """
    on_gpu = sorted((each for each in measured if each.is_gpu), key=lambda each: -len(each.ratios))
    every = [*on_gpu, *(each for each in measured if not each.is_gpu)]
    beside = ", ".join(["torch.nn", *_peers(every)])
    figures = [
        f"[{each.device}]({docs}/performance/{each.name}.md), {each.date}: {figure(each.ratios)}" for each in every
    ]
    low, high = validation.shares()
    pages = ", ".join(f"[{name}]({docs}/performance/{slug(name)}.md)" for name in simulated) or BESIDE
    what = f"how fast anything is on {', '.join(simulated) or 'other devices'}" if on_gpu else NOT_ON_A_GPU
    return [
        MEASURED.format(beside=beside),
        "  " + " ".join([*[f"{'; '.join(figures)}."] * bool(figures), *[NOTHING] * (not on_gpu)]),
        SIMULATED.format(pages=pages),
        CHECKED.format(count=len(validation.checked()), low=low, high=high),
        UNKNOWN.format(what=what, docs=docs),
    ]


def _peers(measured: Iterable[Measured]) -> list[str]:
    there = {row["variant"] for each in measured for case in each.cases for row in case.peers}
    return [IN_WORDS[name] for name in PEERS if name in there]
