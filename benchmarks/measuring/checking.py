# SPDX-License-Identifier: Apache-2.0
"""Whether a result is right: its distance from the truth in float64, and how much of it a dtype allows."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from benchmarks.cases import options
from benchmarks.cases.names import TORCH
from benchmarks.cases.variants import Case, Inputs, Outputs, Variant

PLAIN = (TORCH, "reference")
# Largest ‖result − reference‖ / ‖reference‖ of any output or gradient: some times the unit roundoff of the products'
# operands (bf16 4e-3, fp16 and tf32 5e-4, fp32 6e-8), since errors add up over time. Where torch.nn in the same dtype
# is further off (with an option: our reference), twice its error is allowed.
TOLERANCE = {"bf16": 2e-2, "fp16": 4e-3, "tf32": 4e-3, "ieee": 1e-4}
# Times that, the largest |result − reference| of one element by the reference's root mean square, because one wrong
# element is lost in the norm of a large tensor. The largest of 10⁸ normal errors is 6 times their root mean square, and
# errors differ in size from step to step and unit to unit besides: plain PyTorch's largest is 9 times in outputs and 17
# times in gradients (256 steps, H 64, fp32, fp16 and bf16), which is at most half of these limits.
OUTPUT, GRADIENT = 8, 32
ELEMENT = "an element of "  # of what these errors are named
# Nothing is allowed more than this many times its limit. Plain PyTorch, the yardstick, is held to this alone: the
# reference's autograd sums the gradients of the weights step by step in the dtype itself.
MOST = 5
# Calls before the one that is checked: the first compiles, the second captures graphs (backends/step/cuda_graphs.py),
# which are kept for what is timed and must not hold the poison's fills.
UNPOISONED = 2

Errors = dict[str, float]  # by output and gradient, and of an element of each


class Limits:
    """What is allowed of the variants of a side in turn, the yardstick first."""

    def __init__(self, precision: str) -> None:
        self.precision = precision
        self._twice: dict[int, float] = {}  # the yardstick's largest error of a kind

    def allowed(self, variant: str, name: str) -> float:
        """The largest error of an output or gradient, or of an element of it."""
        kind = _kind(name)
        tolerance = kind * TOLERANCE[self.precision]
        most = MOST * tolerance
        return most if variant in PLAIN else min(most, max(tolerance, self._twice.get(kind, 0)))

    def widen(self, found: Errors) -> None:
        """Allows twice the yardstick's errors: norms, elements of outputs and elements of gradients each by their
        largest."""
        for name, error in found.items():
            self._twice[_kind(name)] = max(self._twice.get(_kind(name), 0), 2 * error)

    def worst(self, variant: str, found: Errors) -> str:
        """The error that is furthest beyond its limit, or nearest to it."""
        return max(found, key=lambda name: found[name] / self.allowed(variant, name))


def _kind(name: str) -> int:
    """Times the dtype's limit that is allowed of this error."""
    if not name.startswith(ELEMENT):
        return 1
    return GRADIENT if name.removeprefix(ELEMENT).startswith("d_") else OUTPUT


def precision(case: Case, tensor_cores: bool) -> str:
    """What the products round their operands to."""
    if case.dtype != "fp32":
        return case.dtype
    return "tf32" if tensor_cores else "ieee"


@contextmanager
def products_as(case: Case) -> Iterator[None]:
    """torch's settings for fp32 products, as the case names them: of recurrent layers and, for the input projections of
    peers, of all others, which are in full precision by default."""
    settings = (torch.backends.cudnn.rnn, torch.backends.cuda.matmul)
    before = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = "ieee" if case.dtype == "ieee" else "tf32"
    try:
        yield
    finally:
        for setting, was in zip(settings, before, strict=True):
            setting.fp32_precision = was


def exact(truth: Variant, inputs: Inputs, seed: int) -> Outputs:
    """What is true of the inputs, with the random masks of the seed."""
    with options.same_masks(seed):
        return truth.results(inputs.to(torch.float64))


def errors(variant: Variant, inputs: Inputs, truth: Outputs, seed: int) -> Errors:
    """The errors of every output and gradient; infinite wherever an element was not written."""
    if inputs.x.is_cuda:
        for _ in range(UNPOISONED):
            variant.call(inputs)()
    with poisoned(), options.same_masks(seed):
        found = variant.results(inputs)
    assert found.keys() == truth.keys()
    return distances(found, truth)


def distances(found: Outputs, truth: Outputs) -> Errors:
    """‖result − truth‖ / ‖truth‖ of each, and max |result − truth| of an element of it by the truth's root mean
    square."""
    named = {name: distance(found[name], right) for name, right in truth.items()}
    norms = {name: norm for name, (norm, _) in named.items()}
    return norms | {f"{ELEMENT}{name}": element for name, (_, element) in named.items()}


@torch.no_grad()
def distance(found: Tensor, right: Tensor) -> tuple[float, float]:
    """Of all elements and of the worst; an infinity equals itself, and a NaN is infinitely far off."""
    if found.numel() != right.numel():
        return math.inf, math.inf
    if not right.numel():
        return 0.0, 0.0
    found, right = found.double().flatten(), right.flatten()
    difference = torch.where(found == right, 0, found - right)
    finite = right[right.isfinite()]
    size = finite.norm().clamp_min(1e-30)  # a gradient may be exactly 0: of W_hh after one step
    norm = float(difference.norm() / size)
    element = float(difference.abs().max() / size * math.sqrt(finite.numel()))
    return (math.inf, math.inf) if math.isnan(norm) else (norm, element)


@contextmanager
def poisoned() -> Iterator[None]:
    """New memory is filled with NaN, so that an element nothing wrote shows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says which operations have no deterministic form; none is needed
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)
