# SPDX-License-Identifier: Apache-2.0
"""What is compared: torch.nn's layer and each backend of ours with the same weights, and whether a result is right."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from problems import Problem
from torch import Tensor, nn
from torch.func import functional_call, vmap

import gpu_rnn
from gpu_rnn import dispatch

TORCH = "torch.nn"
PLAIN = (TORCH, "reference")
# "fp32" multiplies as torch's recurrent layers do by default (tf32 on a GPU), "ieee" in full precision.
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16, "ieee": torch.float32}

# Largest ‖result − reference‖ / ‖reference‖ of any output or gradient: some times the unit roundoff of the products'
# operands (bf16 4e-3, fp16 and tf32 5e-4, fp32 6e-8), since errors add up over time. Where torch.nn in the same dtype is
# further off, twice its error is allowed.
TOLERANCE = {"bf16": 2e-2, "fp16": 4e-3, "tf32": 4e-3, "ieee": 1e-4}
# Nothing is allowed more than this many times that. Plain PyTorch, the yardstick, is held to this alone: the reference's
# autograd sums the gradients of the weights step by step in the dtype itself.
MOST = 5
REFERENCE_BYTES = 4 * 2**30
"""What the reference's graph may take; above, torch.nn in float64 stands in for it."""
TENSORS_A_STEP = (
    9  # of (B, H) that the reference's graph keeps: saved_tensors_hooks count 8.3 for an LSTM, 7.2 for a GRU
)

Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A problem in one dtype and direction: what its variants are compared on."""

    set: str
    problem: Problem
    dtype: str
    direction: str

    def __str__(self) -> str:
        return f"{self.set}/{self.problem.name} {self.dtype} {self.direction}"


@dataclass(frozen=True)
class Inputs:
    """(T, B, I), or (T, B, heads, I), and in training the gradients of y and of the final states."""

    x: Tensor
    d_outputs: tuple[Tensor, ...] = ()

    def to(self, dtype: torch.dtype) -> Inputs:
        x = self.x.detach().to(dtype).requires_grad_(self.x.requires_grad)
        return Inputs(x, tuple(d.to(dtype) for d in self.d_outputs))


@dataclass(frozen=True)
class Variant:
    """A name, a function from x to (y, final states), and the weights it uses: one tensor of each name, or one a head."""

    name: str
    forward: Callable[[Tensor], tuple[Tensor, ...]]
    weights: Mapping[str, tuple[Tensor, ...]]

    def call(self, inputs: Inputs) -> Callable[[], tuple[Tensor, ...]]:
        """What is checked and then timed: inference, or forward and backward to x and the weights."""

        def inference() -> tuple[Tensor, ...]:
            with torch.inference_mode():
                return self.forward(inputs.x)

        wanted = [inputs.x, *(tensor for tensors in self.weights.values() for tensor in tensors)]

        def training() -> tuple[Tensor, ...]:
            outputs = self.forward(inputs.x)
            return (*outputs, *torch.autograd.grad(outputs, wanted, inputs.d_outputs))

        return training if inputs.d_outputs else inference

    def results(self, inputs: Inputs) -> Outputs:
        """One call's outputs and gradients by name, the heads' gradients one after another."""
        found = iter(self.call(inputs)())
        states = len(inputs.d_outputs) - 1
        named = {"y": next(found)}
        if not inputs.d_outputs:
            return named | {f"final state {k}": state for k, state in enumerate(found)}
        named |= {f"final state {k}": next(found) for k in range(states)} | {"d_x": next(found)}
        for name, tensors in self.weights.items():
            named[f"d_{name}"] = torch.cat([next(found).flatten() for _ in tensors])
        return named


class Comparison(NamedTuple):
    """All that a case needs: what is compared, torch.nn first, and what is true."""

    inputs: Inputs
    variants: list[Variant]
    truth: Variant  # in float64
    chosen: str  # the backend that backend="auto" takes


def build(case: Case, device: torch.device, backends: list[str]) -> Comparison:
    """torch.nn and those of the backends that can run the case, with the same random weights and input."""
    problem, dtype = case.problem, DTYPES[case.dtype]
    layers = [_layer(torch.nn, problem, device, dtype) for _ in range(problem.heads)]
    for layer in (
        layers
    ):  # in training mode cuDNN and oneDNN keep what a backward pass needs, whether one follows or not
        layer.train(case.direction == "training")
    inputs = _inputs(case, device, layers[0])
    variants = [_torch(layers)]
    verdicts = explain(case, inputs.x)
    variants += [
        _ours(problem, layers, row.backend) for row in verdicts if row.runs and row.backend in backends
    ]
    exact = [copy.deepcopy(layer).double() for layer in layers]
    size = (
        problem.T
        * problem.B
        * problem.H
        * problem.heads
        * problem.layers
        * (2 if problem.bidirectional else 1)
    )
    fits = size * 8 * TENSORS_A_STEP <= REFERENCE_BYTES
    truth = replace(_ours(problem, exact, "reference"), name="reference") if fits else _torch(exact)
    return Comparison(inputs, variants, truth, next((row.backend for row in verdicts if row.chosen), ""))


def explain(case: Case, x: Tensor) -> list[dispatch.Row]:
    """Every backend's verdict on the case, and which is chosen."""
    problem = replace(case.problem, heads=1)
    layer = _layer(gpu_rnn, problem, torch.device("meta"), x.dtype)
    with torch.set_grad_enabled(case.direction == "training"):
        asked = gpu_rnn.explain(layer, x if case.problem.heads == 1 else x[:, :, 0])
    if case.problem.heads == 1:
        return list(asked.rows)
    # Heads run as vmap over the weights: one launch with a recurrence for each.
    return dispatch.explain(replace(asked.problem, N=asked.problem.N * case.problem.heads, transforms=True))


def precision(case: Case, device: torch.device) -> str:
    """What the products round their operands to."""
    return (
        "tf32"
        if case.dtype == "fp32" and device.type == "cuda"
        else "ieee"
        if case.dtype == "fp32"
        else case.dtype
    )


@contextmanager
def products_as(case: Case) -> Iterator[None]:
    """torch's setting for the products of recurrent layers, as the case names it."""
    before = torch.backends.cudnn.rnn.fp32_precision
    torch.backends.cudnn.rnn.fp32_precision = "ieee" if case.dtype == "ieee" else "tf32"
    try:
        yield
    finally:
        torch.backends.cudnn.rnn.fp32_precision = before


def errors(variant: Variant, inputs: Inputs, truth: Outputs) -> dict[str, float]:
    """‖result − truth‖ / ‖truth‖ of every output and gradient; NaN wherever an element was not written."""
    if inputs.x.is_cuda:
        variant.call(inputs)()  # compiles, and captures graphs, which must not keep the poison's fills
    with _poisoned():
        found = variant.results(inputs)
    assert found.keys() == truth.keys()
    return {name: _error(found[name], right) for name, right in truth.items()}


@torch.no_grad()
def _error(found: Tensor, right: Tensor) -> float:
    if found.numel() != right.numel():
        return math.nan
    difference = (found.double().flatten() - right.flatten()).norm()
    return float(
        difference / right.norm().clamp_min(1e-30)
    )  # a gradient may be exactly 0: of W_hh after one step


@contextmanager
def _poisoned() -> Iterator[None]:
    """New memory is filled with NaN, so that an element nothing wrote shows."""
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # torch says which operations have no deterministic form; none is needed
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


def _layer(
    library: Any, problem: Problem, device: torch.device, dtype: torch.dtype, **options: Any
) -> nn.Module:
    make = getattr(library, problem.cell)
    sizes = (problem.I, problem.H, problem.layers)
    return make(*sizes, bidirectional=problem.bidirectional, device=device, dtype=dtype, **options)


def _inputs(case: Case, device: torch.device, layer: nn.Module) -> Inputs:
    p, training = case.problem, case.direction == "training"
    heads = (p.heads,) if p.heads > 1 else ()
    directions = 2 if p.bidirectional else 1

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(DTYPES[case.dtype])

    x = random(p.T, p.B, *heads, p.I).requires_grad_(training)
    if not training:
        return Inputs(x)
    states = 2 if p.cell == "LSTM" else 1
    final = [random(*heads, p.layers * directions, p.B, p.H) for _ in range(states)]
    return Inputs(x, (random(p.T, p.B, *heads, p.H * directions), *final))


def _flat(result: tuple[Tensor, Any]) -> tuple[Tensor, ...]:
    y, states = result
    return (y, states) if isinstance(states, Tensor) else (y, *states)


def _torch(layers: list[nn.Module]) -> Variant:
    """torch.nn, which has no heads: as many layers, one after another."""
    weights = {
        name: tuple(layer.get_parameter(name) for layer in layers) for name, _ in layers[0].named_parameters()
    }
    if len(layers) == 1:
        return Variant(TORCH, lambda x: _flat(layers[0](x)), weights)

    def heads(x: Tensor) -> tuple[Tensor, ...]:
        y, *states = zip(*[_flat(layer(x[:, :, k])) for k, layer in enumerate(layers)], strict=True)
        return torch.stack(y, 2), *(torch.stack(state) for state in states)

    return Variant(TORCH, heads, weights)


def _ours(problem: Problem, layers: list[nn.Module], backend: str) -> Variant:
    """One of our backends on the same weights; heads are vmap over them."""
    like = next(layers[0].parameters())
    layer = _layer(gpu_rnn, problem, like.device, like.dtype, backend=backend)
    layer.load_state_dict(layers[0].state_dict())
    layer.train(layers[0].training)
    if len(layers) == 1:
        weights = {name: (parameter,) for name, parameter in layer.named_parameters()}
        return Variant(backend, lambda x: _flat(layer(x)), weights)
    stacked = {
        name: torch.stack([other.get_parameter(name).detach() for other in layers]).requires_grad_()
        for name, _ in layer.named_parameters()
    }
    one = partial(functional_call, layer)
    heads = vmap(lambda weights, x: one(weights, (x,)), in_dims=(0, 2), out_dims=(2, 0))
    return Variant(backend, lambda x: _flat(heads(stacked, x)), {name: (t,) for name, t in stacked.items()})
