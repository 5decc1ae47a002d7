# SPDX-License-Identifier: Apache-2.0
"""Times a layer beside what people use today: interleaved, medians, and only after both gave the same result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from gpu_rnn.diagnostics.timing import TRIALS, interleave

__all__ = ["Case", "CaseTiming", "measure", "table"]

SAME_KERNELS = "same"  # what stands for a ratio where both sides are one kernel
# Of the largest output. The CPU computes in full fp32. A GPU in tf32 or bf16: over PLAID's steps plain bf16 is off by
# 1.4 % from fp32 (this demo's layers, on a CPU), and both sides may be.
AGREEMENT = {"cpu": 1e-4, "cuda": 5e-2}


@dataclass(frozen=True)
class Case:
    """Two modules with the same weights that do the same on the same packed input."""

    label: str
    ours: nn.Module
    theirs: nn.Module
    theirs_label: str
    inputs: PackedSequence
    backends: tuple[str, str]  # those that run ours forward, and forward with backward


@dataclass(frozen=True)
class CaseTiming:
    """Median seconds a call."""

    case: Case
    forward: tuple[float, float]  # (ours, theirs), inference
    training: tuple[float, float]  # (ours, theirs), forward and backward

    @property
    def each(self) -> list[tuple[float, float, str]]:
        """Of both: ours, theirs, and the ratio in words. Where ours are the kernels of torch.nn, the two differ by
        noise."""
        pairs = zip((self.forward, self.training), self.case.backends, strict=True)
        return [(*pair, SAME_KERNELS if backend == "aten" else f"{pair[1] / pair[0]:.2f}×") for pair, backend in pairs]


def measure(case: Case, *, seconds: float) -> CaseTiming:
    """Times both modules of a case, forward and forward with backward, each within about `seconds`.

    Raises:
        RuntimeError: the two do not agree; a wrong result is not timed.
    """
    _check(case)

    def forward(module: nn.Module) -> Callable[[], object]:
        def call() -> None:
            with torch.inference_mode():
                module(case.inputs)

        return call

    def training(module: nn.Module) -> Callable[[], object]:
        weights = list(module.parameters())
        return lambda: torch.autograd.grad(module(case.inputs)[0].data.sum(), weights)

    def both(kind: Callable[[nn.Module], Callable[[], object]]) -> tuple[float, float]:
        for module in (case.ours, case.theirs):  # oneDNN keeps more in training mode, also without gradients
            module.train(kind is training)
        calls = {"ours": kind(case.ours), "theirs": kind(case.theirs)}
        timings = interleave(calls, case.inputs.data.device, trials=TRIALS, seconds=seconds)
        return timings["ours"].median, timings["theirs"].median

    return CaseTiming(case, both(forward), both(training))


def table(timings: Sequence[CaseTiming]) -> str:
    """The ratio table: above 1.00x ours is the faster."""
    title = "layer, compared with"
    wide = max(len(title), *(len(timing.case.label) for timing in timings))
    head = f"{'':{wide}}{'forward, ms':>22}{'':8}{'forward + backward, ms':>24}"
    names = f"{title:{wide}}{'ours':>10}{'theirs':>10}{'ratio':>10}{'ours':>10}{'theirs':>10}{'ratio':>10}"
    lines = [head, names, "-" * len(names)]
    for timing in timings:
        cells = "".join(f"{1e3 * ours:10.2f}{1e3 * theirs:10.2f}{ratio:>10}" for ours, theirs, ratio in timing.each)
        ran = " and ".join(dict.fromkeys(timing.case.backends))
        lines += [f"{timing.case.label:{wide}}{cells}", f"  beside {timing.case.theirs_label}; backend {ran}"]
    lines.append("ratio: theirs divided by ours, so above 1.00× gpu_rnn is the faster")
    used = {backend for timing in timings for backend in timing.case.backends}
    if "aten" in used:
        lines.append(f"{SAME_KERNELS}: ours are the kernels of torch.nn there, so what differs is noise")
    if "step" in used and any(not timing.case.inputs.data.is_cuda for timing in timings):
        lines.append("step is a loop of torch operations: with a C compiler (gcc or clang) `native` runs these, in C")
    return "\n".join(lines)


def _check(case: Case) -> None:
    with torch.no_grad():
        ours, theirs = (module(case.inputs)[0].data for module in (case.ours, case.theirs))
    error = float((ours - theirs).abs().max() / theirs.abs().max())
    if not error <= AGREEMENT[ours.device.type]:
        raise RuntimeError(
            f"{case.label} differs from {case.theirs_label} by {error:.1e} of the largest output: not timed"
        )
