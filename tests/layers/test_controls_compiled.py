# SPDX-License-Identifier: Apache-2.0
"""Masks, resets and noise under torch.compile, torch.export, vmap, autocast and derivatives of every kind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import gpu_rnn
from tests.support import layers as support
from tests.support.controlled import BATCH, EXACT, HIDDEN, INPUT, STEPS, layer, mask


@pytest.mark.parametrize(
    "call",
    [
        {"mask": mask()},
        {"lengths": torch.tensor([4, 0, 6, 3])},
        {
            "resets": mask(),
            "reset_state": (torch.ones(2, BATCH, HIDDEN).double(), torch.zeros(2, BATCH, HIDDEN).double()),
        },
        {"return_all_states": True},
    ],
    ids=lambda call: next(iter(call)),
)
def test_compiled(call: dict[str, Any]) -> None:
    found = layer(bidirectional=True)
    compiled = torch.compile(found, fullgraph=True, backend="aot_eager")
    x = support.draw(STEPS, BATCH, INPUT)
    wanted = {"x": x, **dict(found.named_parameters())}
    results = [support.gradients(lambda run=run: run(x, **call), wanted) for run in (compiled, found)]
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-10)


def test_compiled_after_other_batch_sizes() -> None:
    """The input's sizes are symbolic by then, those of the reset states are numbers still."""
    torch._dynamo.reset()
    found = layer()
    compiled = torch.compile(found, fullgraph=True, backend="aot_eager")
    for batch in (2, 3):
        compiled(torch.ones(STEPS, batch, INPUT, dtype=torch.float64))
    call = {"resets": mask(), "reset_state": (torch.ones(1, BATCH, HIDDEN, dtype=torch.float64),) * 2}
    x = support.draw(STEPS, BATCH, INPUT)
    torch.testing.assert_close(compiled(x, **call)[0], found(x, **call)[0])


def test_compiled_with_noise_repeats_under_the_seed() -> None:
    found = layer(recurrent_dropout=0.5, zoneout=0.2)
    compiled = torch.compile(found, fullgraph=True, backend="aot_eager")
    x = support.draw(STEPS, BATCH, INPUT)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(compiled(x)[0])
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_exported_with_a_mask_of_any_size() -> None:
    found = layer("GRU", bidirectional=True).eval()
    steps, batch = torch.export.Dim("steps"), torch.export.Dim("batch")
    sizes = {0: steps, 1: batch}
    x = torch.randn(STEPS, BATCH, INPUT, dtype=torch.float64)
    shapes = {"input": sizes, "mask": sizes, "resets": sizes}
    given = {"mask": mask(), "resets": ~mask()}
    exported = torch.export.export(found, (x,), given, dynamic_shapes=shapes).module()
    for length in (2, 9):
        longer, keep = torch.randn(length, 3, INPUT, dtype=torch.float64), torch.rand(length, 3) > 0.5
        expected = found(longer, mask=keep, resets=~keep)
        torch.testing.assert_close(exported(longer, mask=keep, resets=~keep), expected, **EXACT)


def test_vmap_over_masks_and_over_weights() -> None:
    found = layer("GRU")
    x, masks = support.draw(STEPS, BATCH, INPUT), torch.stack([mask(), ~mask()])
    mapped = torch.vmap(lambda keep: found(x, mask=keep)[0])(masks)
    torch.testing.assert_close(mapped, torch.stack([found(x, mask=keep)[0] for keep in masks]), **EXACT)
    weights = {name: torch.stack([w, 2 * w]) for name, w in found.named_parameters()}
    one_by_one = [
        torch.func.functional_call(found, {n: w[k] for n, w in weights.items()}, (x,), {"mask": masks[k]})[0]
        for k in range(2)
    ]
    together = torch.vmap(lambda w, keep: torch.func.functional_call(found, w, (x,), {"mask": keep})[0])(weights, masks)
    torch.testing.assert_close(together, torch.stack(one_by_one), **EXACT)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is:DeprecationWarning")  # torch's own, in forward mode
def test_derivatives_of_every_kind() -> None:
    found = layer("LSTM", layer_norm=True)
    keep, resets, state = mask(), mask(), tuple(support.draw(1, BATCH, HIDDEN, seed=s) for s in (5, 6))

    def function(x: Tensor, h: Tensor, c: Tensor) -> Any:
        output, _, every = found(x, mask=keep, resets=resets, reset_state=(h, c), return_all_states=True)
        return output, *every

    point = (support.draw(STEPS, BATCH, INPUT), *state)
    assert torch.autograd.gradcheck(function, point, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, point, fast_mode=True)


@pytest.mark.parametrize("options", [{}, {"layer_norm": True}, {"layer_norm": True, "proj_size": 2}])
def test_autocast_with_options(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    found = gpu_rnn.LSTM(INPUT, HIDDEN, **options)
    x = torch.randn(STEPS, BATCH, INPUT)
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = found(x, mask=mask())
        output.float().sum().backward()
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), found(x, mask=mask())[0], rtol=0, atol=0.05)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in found.parameters())
