# SPDX-License-Identifier: Apache-2.0
"""What surrounds a backward launch with layer normalisation: the products of all steps, normalised once more, and the
gradient of their scales."""

from __future__ import annotations

import torch
from torch import Tensor

from gpu_rnn.backends import linear
from gpu_rnn.backends.step.product import normalised_products
from gpu_rnn.backends.tensors import Call, LoopGradients, Result


def arguments(call: Call, saved: Result) -> dict[str, Tensor | int]:
    """What the kernel takes, by name: the normalised products of all steps (T, B, N, G, H), 1 over their deviations
    (T, B, N, G) in fp32, and where the gradients of the products go; 0 for each without normalisation."""
    if call.weights.norm is None:
        return dict.fromkeys(("p_normal", "p_rstd", "p_d_products"), 0)
    normal = normalised_products(call, saved)
    values = normal.values.to(saved.gates.dtype).contiguous()
    return {"p_normal": values, "p_rstd": normal.rstd.contiguous(), "p_d_products": torch.empty_like(values)}


def of_scales(call: Call, gradients: LoopGradients, values: Tensor) -> Tensor:
    """(N, G, H): the gradient of the scales, from those of what they made and the normalised products."""
    parts = []
    for rows in call.program.rows:
        for gates, d in linear.runs(call.program, rows, gradients.d_gates, gradients.d_recurrent):
            parts.append((d.float() * values[:, :, :, gates].float()).sum((0, 1)))
    return torch.cat(parts, 1)
