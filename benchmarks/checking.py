# SPDX-License-Identifier: Apache-2.0
"""Whether a result is right: its distance from the truth in float64, and how much of it a dtype allows."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import options
import torch
from results import TORCH
from torch import Tensor
from variants import Case, Inputs, Outputs, Variant

PLAIN = (TORCH, "reference")
# Largest ‖result − reference‖ / ‖reference‖ of any output or gradient: some times the unit roundoff of the products'
# operands (bf16 4e-3, fp16 and tf32 5e-4, fp32 6e-8), since errors add up over time. Where torch.nn in the same dtype is
# further off (with an option: our reference), twice its error is allowed.
TOLERANCE = {"bf16": 2e-2, "fp16": 4e-3, "tf32": 4e-3, "ieee": 1e-4}
# Nothing is allowed more than this many times that. Plain PyTorch, the yardstick, is held to this alone: the reference's
# autograd sums the gradients of the weights step by step in the dtype itself.
MOST = 5
# Calls before the one that is checked: the first compiles, the second captures graphs (launch/graphs.py), which are kept
# for what is timed and must not hold the poison's fills.
UNPOISONED = 2


class Limits:
    """What is allowed of the variants of a side in turn, the yardstick first."""

    def __init__(self, precision: str) -> None:
        self.precision = precision
        self._tolerance, self._most = TOLERANCE[precision], MOST * TOLERANCE[precision]

    def allowed(self, variant: str) -> float:
        """The largest error."""
        return self._most if variant in PLAIN else self._tolerance

    def widen(self, error: float) -> None:
        """Allows twice the yardstick's error."""
        self._tolerance = min(self._most, max(self._tolerance, 2 * error))


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


def errors(variant: Variant, inputs: Inputs, truth: Outputs, seed: int) -> dict[str, float]:
    """‖result − truth‖ / ‖truth‖ of every output and gradient; NaN wherever an element was not written."""
    if inputs.x.is_cuda:
        for _ in range(UNPOISONED):
            variant.call(inputs)()
    with _poisoned(), options.same_masks(seed):
        found = variant.results(inputs)
    assert found.keys() == truth.keys()
    return {name: _error(found[name], right) for name, right in truth.items()}


def worst(found: dict[str, float]) -> str:
    """The output or gradient that is furthest off; NaN is further than anything."""
    return max(found, key=lambda name: math.inf if math.isnan(found[name]) else found[name])


@torch.no_grad()
def _error(found: Tensor, right: Tensor) -> float:
    if found.numel() != right.numel():
        return math.nan
    difference = (found.double().flatten() - right.flatten()).norm()
    return float(difference / right.norm().clamp_min(1e-30))  # a gradient may be exactly 0: of W_hh after one step


@contextmanager
def _poisoned() -> Iterator[None]:
    """New memory is filled with NaN, so that an element nothing wrote shows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says which operations have no deterministic form; none is needed
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)
