# SPDX-License-Identifier: Apache-2.0
"""What a layer adds at random in training, drawn from torch's generator, and what evaluation puts in its place.

The masks are tensors that the time loops read: forward, backward, recomputation and every backend see the same ones.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_rnn.compiler.builder import Builder
from gpu_rnn.compiler.program import Program
from gpu_rnn.memo import memoize
from gpu_rnn.recurrence import Recurrence


def recurrent_mask(like: Tensor, probability: float, shape: tuple[int, ...]) -> Tensor:
    """Factors 0 or 1 / (1 - p), the same for all steps (Gal & Ghahramani, arXiv:1512.05287)."""
    return F.dropout(like.new_ones(shape), probability)


def zone(like: Tensor, probabilities: tuple[float, ...], shape: tuple[int, ...]) -> Tensor:
    """(states, *shape) bool: the units of each step that keep their state (Krueger et al., arXiv:1606.01305)."""
    draws = [torch.rand(shape, dtype=torch.float32, device=like.device) for _ in probabilities]
    return torch.stack([draw < probability for draw, probability in zip(draws, probabilities, strict=True)])


def expected(recurrence: Recurrence, probabilities: tuple[float, ...]) -> Recurrence:
    """Zoneout at evaluation: each state s' becomes its expectation p s + (1 - p) s'."""
    return _expected(recurrence.program.text, probabilities) if any(probabilities) else recurrence


@memoize(64)
def _expected(text: str, probabilities: tuple[float, ...]) -> Recurrence:
    program = Program.parse(text)
    last = program.stages[-1]
    builder = Builder(start=1 + max((int(op.result[1:]) for stage in program.stages for op in stage.ops), default=-1))
    outputs = [
        (builder.value(f"s_{state}") * p + builder.value(output) * (1 - p)).name
        for state, output, p in zip(program.state_names, last.outputs, probabilities, strict=True)
    ]
    stage = replace(last, ops=(*last.ops, *builder.ops), outputs=tuple(outputs))
    return Recurrence.from_program(replace(program, stages=(*program.stages[:-1], stage)).text)
