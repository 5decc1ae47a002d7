# SPDX-License-Identifier: Apache-2.0
"""All that a case compares: torch.nn's layer, each backend of ours and the peers, with the same weights and input."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

import gpu_rnn
from benchmarks.cases import peers
from benchmarks.cases.names import TORCH
from benchmarks.cases.options import OPTIONS
from benchmarks.cases.problems import Problem
from benchmarks.cases.stepwise import Stepwise
from benchmarks.cases.streaming import OneByOne, Served
from benchmarks.cases.variants import DTYPES, Case, Inputs, Variant
from gpu_rnn.diagnostics.explanation import Explanation
from gpu_rnn.dispatch import choice

REFERENCE_BYTES = 4 * 2**30
"""What the reference's graph may take; above, torch.nn in float64 stands in for it."""
TENSORS_A_STEP = (
    9  # of (B, H) that the reference's graph keeps: saved_tensors_hooks count 8.3 for an LSTM, 7.2 for a GRU
)

Call = Mapping[str, Any]  # keyword arguments of a layer's call


@dataclass(frozen=True)
class Side:
    """Variants that compute the same function of the same inputs, and what is true of it, in float64."""

    inputs: Inputs
    variants: list[Variant]
    truth: Variant

    @property
    def yardstick(self) -> str:
        """Plain PyTorch in the case's dtype, by whose error the others are measured: torch.nn or, where it has not the
        option, our reference."""
        return TORCH if any(variant.name == TORCH for variant in self.variants) else "reference"


@dataclass(frozen=True)
class Comparison:
    """The sides of a case: one or, where ours have an option, torch.nn without it and then ours.

    `left_out` are the peers that cannot take the case, and why.
    """

    sides: list[Side]
    explanation: Explanation
    left_out: dict[str, str]


def build(case: Case, device: torch.device, names: list[str]) -> Comparison:
    """torch.nn, and those of the named backends and peers that can run the case."""
    problem, training = case.problem, case.direction == "training"
    theirs = [_layer(nn, problem, device, DTYPES[case.dtype]) for _ in range(problem.heads)]
    for layer in theirs:  # in training mode cuDNN and oneDNN keep what a backward pass needs, follow one or not
        layer.train(training)
    heads = (problem.heads,) if problem.heads > 1 else ()
    x = torch.randn(problem.T, problem.B, *heads, problem.I, device=device).to(DTYPES[case.dtype])
    x.requires_grad_(training)
    call = case.option.arguments(problem.T, problem.B, device)
    explanation = explain(case, x, call)
    backends = [row.backend for row in explanation.rows if row.runs and row.backend in names]
    layers = [_with_option(case, theirs[0])] if problem.option else theirs
    found, left_out = peers.find(case, layers, call, names)
    ours = [_ours(case, layers, backend, call) for backend in backends]
    side = Side(_inputs(case, x), [*ours, *found], _truth(case, layers, call))
    if not problem.option:
        sides = [replace(side, variants=[_torch(theirs), *side.variants])]
    else:
        plain = replace(case, problem=replace(problem, option=""))
        sides = [Side(_inputs(plain, x), [_torch(theirs)], _truth(plain, theirs, {})), side]
    return Comparison(sides, explanation, left_out)


def explain(case: Case, x: Tensor, call: Call) -> Explanation:
    """Every backend's verdict on the case, and which is chosen; of a cell, that of a layer's one step."""
    one = replace(case.problem, heads=1, stepwise=False, streams=False)
    x = x[:1] if case.problem.stepwise or case.problem.streams else x
    layer = _layer(gpu_rnn, one, torch.device("meta"), x.dtype, **case.option.layer)
    layer.train(case.direction == "training")
    with torch.set_grad_enabled(case.direction == "training"):
        asked = gpu_rnn.explain(layer, x if case.problem.heads == 1 else x[:, :, 0], **call)
    if case.problem.stepwise and layer.recurrence.aten is not None:  # cells as torch.nn has them stay with its kernels
        rows = tuple(replace(row, chosen=row.backend == "aten") for row in asked.rows)
        return replace(asked, rows=rows)
    if case.problem.heads == 1:
        return asked
    # Heads run as vmap over the weights: one launch with a recurrence for each.
    problem = replace(asked.problem, N=asked.problem.N * case.problem.heads, transforms=True)
    return Explanation(problem, tuple(choice.verdicts(problem)))


def _layer(library: Any, problem: Problem, device: torch.device, dtype: torch.dtype, **options: Any) -> nn.Module:
    recurrence = OPTIONS[problem.option].recurrence if problem.option and library is gpu_rnn else None
    if problem.stepwise:
        cell = getattr(library, f"{problem.cell}Cell")
        return Stepwise(cell(problem.I, problem.H, device=device, dtype=dtype, **options))
    make = partial(gpu_rnn.Recurrent, recurrence) if recurrence else getattr(library, problem.cell)
    sizes = (problem.I, problem.H, problem.layers)
    layer = make(*sizes, bidirectional=problem.bidirectional, device=device, dtype=dtype, **options)
    if problem.streams:
        return Served(layer, problem.B) if library is gpu_rnn else OneByOne(layer)
    return layer


def _with_option(case: Case, like: nn.Module) -> nn.Module:
    """Our layer with the case's option and the weights of torch.nn's; what it has besides is random."""
    weight = next(like.parameters())
    layer = _layer(gpu_rnn, case.problem, weight.device, weight.dtype, **case.option.layer)
    own = layer.load_state_dict(like.state_dict(), strict=False).missing_keys
    # Scales and peepholes. Drawn around 1 they make an LSTM chaotic: after 128 steps at H 64 plain PyTorch's gradients
    # in bf16 are off by 90 %, and nothing can be compared. These leave 2 %, and an option that is missing changes y by
    # 6 %.
    for name in own:
        nn.init.uniform_(layer.get_parameter(name), 0.1, 0.3)
    return layer.train(like.training)


def _inputs(case: Case, x: Tensor) -> Inputs:
    p = case.problem
    if case.direction == "forward":
        return Inputs(x)
    heads = (p.heads,) if p.heads > 1 else ()
    directions, states = 2 if p.bidirectional else 1, 2 if p.cell == "LSTM" else 1
    y, final = (p.T, p.B, *heads, p.H * directions), (*heads, p.layers * directions, p.B, p.H)
    every = [(p.T, *final)] * states if case.option.call.get("return_all_states") else []
    shapes = [y, *[final] * states, *every]
    return Inputs(x, tuple(torch.randn(shape, device=x.device).to(x.dtype) for shape in shapes))


def _truth(case: Case, layers: list[nn.Module], call: Call) -> Variant:
    """What is true, in float64: the reference or, where it would not fit and there is no option, torch.nn."""
    p = case.problem
    exact = [copy.deepcopy(layer).double() for layer in layers]
    numbers = p.T * p.B * p.H * p.heads * p.layers * (2 if p.bidirectional else 1)
    if p.option or numbers * 8 * TENSORS_A_STEP <= REFERENCE_BYTES:
        return _ours(case, exact, "reference", call)
    return _torch(exact)


def _flat(result: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """y, the final states and, where they are returned, those of all steps."""
    y, *states = result
    return (y, *(s for given in states for s in ((given,) if isinstance(given, Tensor) else given)))


def _torch(layers: list[nn.Module]) -> Variant:
    """torch.nn, which has no heads: as many layers, one after another."""
    weights = {name: tuple(layer.get_parameter(name) for layer in layers) for name, _ in layers[0].named_parameters()}
    if len(layers) == 1:
        return Variant(TORCH, lambda x: _flat(layers[0](x)), weights)

    def heads(x: Tensor) -> tuple[Tensor, ...]:
        y, *states = zip(*[_flat(layer(x[:, :, k])) for k, layer in enumerate(layers)], strict=True)
        return torch.stack(y, 2), *(torch.stack(state) for state in states)

    return Variant(TORCH, heads, weights)


def _ours(case: Case, layers: list[nn.Module], backend: str, call: Call) -> Variant:
    """One of our backends on the same weights; heads are vmap over them."""
    like = next(layers[0].parameters())
    layer = _layer(gpu_rnn, case.problem, like.device, like.dtype, backend=backend, **case.option.layer)
    layer.load_state_dict(layers[0].state_dict())
    layer.train(layers[0].training)
    if len(layers) == 1:
        weights = {name: (parameter,) for name, parameter in layer.named_parameters()}
        return Variant(backend, lambda x: _flat(layer(x, **call)), weights)
    stacked = {
        name: torch.stack([other.get_parameter(name).detach() for other in layers]).requires_grad_()
        for name, _ in layer.named_parameters()
    }
    one = partial(functional_call, layer)
    heads = vmap(lambda weights, x: one(weights, (x,)), in_dims=(0, 2), out_dims=(2, 0))
    return Variant(backend, lambda x: _flat(heads(stacked, x)), {name: (t,) for name, t in stacked.items()})
