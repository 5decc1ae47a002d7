# SPDX-License-Identifier: Apache-2.0
"""The options of one layer, drawn at random, for `loops.Inputs`."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from gpu_rnn.backends.tensors import RESET, SKIP
from gpu_rnn.recurrence import Recurrence
from tests.support import loops as support

OPTIONS = ("mask", "resets", "reset_values", "reset_values_per_step", "drop", "drop_per_gate", "zone", "all_states")
FURTHER = ("norm", "rms")  # those that not every backend takes
STEERING = ["", "lengths", "mask", "resets", "mask resets", "reset_values", "mask reset_values_per_step"]
# A cell, some words of options, a dtype, T, B and H, directions, whether there are biases.
Case = tuple[Any, ...]
RATE = 0.3  # of the steps that are masked or reset, of the units that are dropped or kept


def with_options(
    inputs: support.Inputs, recurrence: Recurrence, names: Collection[str], seed: int = 0
) -> support.Inputs:
    """The same inputs with the options `names`, of `OPTIONS` and `FURTHER`. Reset values bring resets with them.

    Every mask has both values where it has two elements or more, so that a kernel that ignores one is found out; with
    three rows the last is masked throughout.
    """
    unknown = set(names) - {*OPTIONS, *FURTHER}
    assert not unknown, unknown
    controls, states = inputs.controls, inputs.states
    steps, batch, n = inputs.x.shape[0], *states[0].shape[:2]
    values = [name for name in names if name.startswith("reset_values")]
    if values or {"mask", "resets"} & set(names):
        assert controls.lengths is None, "lengths and flags never come together"
        resets = bool(values) or "resets" in names
        controls = controls._replace(flags=_flags(steps, batch, n, "mask" in names, resets, seed))
    reset_values: list[Tensor] = []
    if values:
        reset_values = _values(recurrence, states, steps if "reset_values_per_step" in values else 1, seed)
    if "drop" in names or "drop_per_gate" in names:
        masks = len(recurrence.gates) if "drop_per_gate" in names else 1
        kept = ~_drawn(batch, n, masks, states[0].shape[-1], seed=seed + 3)
        controls = controls._replace(drop=kept.to(states[0].dtype) / (1 - RATE))
    if "zone" in names:
        hidden = inputs.weights.w_hh.shape[2]
        controls = controls._replace(zone=_drawn(len(states), steps, batch, n, hidden, seed=seed + 4))
    if {"norm", "rms"} & set(names):
        scales = (1 + support.draw(*inputs.weights.w_hh.shape[:3], seed=77, scale=0.3)).requires_grad_()
        inputs = inputs._replace(weights=inputs.weights._replace(norm=scales))
    flags = {"all_states": "all_states" in names, "rms": "rms" in names}
    return inputs._replace(controls=controls, reset_values=reset_values, **flags)


def inputs_of(case: Case) -> tuple[Recurrence, support.Inputs]:
    """Of the words of a case, `lengths` and `proj`, a projection of h to half of the units, are none of `OPTIONS`."""
    cell, *parts, dtype, (steps, batch, hidden), reverse, bias = case
    recurrence = support.RECURRENCES[cell]
    names = " ".join(parts).split()
    lengths = tuple((3 * row + 1) % (steps + 1) for row in range(batch)) if "lengths" in names else None
    sizes = {"T": steps, "B": batch, "H": hidden, "proj": hidden // 2 * ("proj" in names)}
    inputs = support.make(recurrence, **sizes, reverse=reverse, bias=bias, lengths=lengths, scale=0.3)
    return recurrence, with_options(inputs, recurrence, set(names) - {"lengths", "proj"}).to(dtype)


def _flags(steps: int, batch: int, n: int, mask: bool, resets: bool, seed: int) -> Tensor:
    """(T, B, N) uint8."""
    flags = torch.zeros(steps, batch, n, dtype=torch.uint8)
    if mask:
        skip = _drawn(steps, batch, n, seed=seed + 1)
        skip[:, 2:][:, -1:] = True
        flags += SKIP * skip.to(torch.uint8)
    if resets:
        flags += RESET * _drawn(steps, batch, n, seed=seed + 2).to(torch.uint8)
    return flags


def _values(recurrence: Recurrence, states: list[Tensor], count: int, seed: int) -> list[Tensor]:
    """What states are reset to, each (count, B, N, ·), leaves."""
    found = [support.draw(count, *s.shape, seed=seed + 20 + k, scale=0.5).to(s.dtype) for k, s in enumerate(states)]
    if "n" in recurrence.states:  # a normaliser is a sum of positive terms
        found[recurrence.states.index("n")].abs_().add_(0.5)
    return [value.requires_grad_() for value in found]


def _drawn(*shape: int, seed: int) -> Tensor:
    """A mask, true at `RATE`, with both values where it has two elements or more."""
    generator = torch.Generator().manual_seed(100 + seed)
    found = torch.rand(shape, generator=generator) < RATE
    flat = found.view(-1)
    flat[-1:] = False
    flat[:1] = True
    return found
