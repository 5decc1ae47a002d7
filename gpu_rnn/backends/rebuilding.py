# SPDX-License-Identifier: Apache-2.0
"""What a forward pass did not keep: pre-activations from the states, of all steps at once.

A step makes its gates of its input product and of the product of the h that entered it. The backward pass knows every
h, so no loop is needed: one more product for each of both, into the tensor that the backward pass reads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gpu_rnn.backends import linear
from gpu_rnn.backends.normalisation import room_for
from gpu_rnn.backends.problem import Problem
from gpu_rnn.backends.step.product import Product, masks
from gpu_rnn.backends.tensors import Call, Result, chunks, state_dtype
from gpu_rnn.backends.throughput import product_rate


def rebuilt(call: Call, x: Tensor, saved: Result) -> Result:
    """`saved`, which holds y and `inner` alone, with `gates` and `recurrent` as the forward pass would have kept them
    but for rounding. `x` is (T, B, I) or (T, B, N, I)."""
    gates = linear.project(x, call.weights, call.program, normaliser=call.normaliser).contiguous()
    recurrent = gates.new_zeros(*gates.shape[:3], len(call.program.split), gates.shape[-1])
    saved = saved._replace(gates=gates, recurrent=recurrent)
    for entering, rows in linear.entered_products(call, saved):  # of a second stage from the gates of the first
        for which, target in linear.runs(call.program, rows, gates, recurrent):
            if call.weights.b_hh is not None and call.program.gates[which.start] not in call.program.summed:
                target += call.weights.b_hh[:, which]
            _add_products(call, entering, which, target)
    return saved


def _add_products(call: Call, entering: Tensor, gates: slice, target: Tensor) -> None:
    """Those of some gates, of all steps."""
    w_hh, drop, norm = call.weights.w_hh[:, gates], masks(call.controls.drop, gates), call.weights.norm
    if norm is None:
        Product.of(w_hh, drop).add_over_time(target, entering)
        return
    product = Product.of(w_hh.to(state_dtype(target.dtype)), drop)
    for part in chunks(target):
        normal = call.normaliser.normalise(product.over_time(entering[part]))
        target[part] += normal.values * norm[:, gates]


class SavedBytes(NamedTuple):
    """What a forward pass on a loop keeps for the backward pass, of all layers."""

    states: int  # y, and the other states as the loop computes them
    gates: int  # pre-activations and split gates' products; what is normalised, where it is kept

    @staticmethod
    def of(problem: Problem) -> SavedBytes:
        """With gates, whether it rebuilds them or not."""
        program, hidden = problem.program, problem.H
        width, wide = problem.proj_size or hidden, state_dtype(problem.dtype).itemsize
        numbers = (problem.G + len(program.split)) * hidden
        like = torch.empty(0, 0, dtype=problem.dtype, device="meta" if problem.device.is_gpu else "cpu")
        if problem.norm and room_for(like, ()) is not None:
            numbers += 2 * problem.G * (hidden + 1)
        states = width * problem.dtype.itemsize + (len(program.states) - 1) * hidden * wide
        units = problem.layers * problem.T * problem.B * problem.N
        return SavedBytes(units * states, units * numbers * problem.dtype.itemsize)


def seconds(problem: Problem) -> float:
    """What it takes a GPU at least to rebuild all layers' gates: their products, which are those of a forward pass, and
    to write, read and write them. Modelled."""
    operations = problem.but(direction="training").flops / product_rate(problem)
    return operations + 3 * SavedBytes.of(problem).gates / (problem.device.memory_rate * 1e9)
