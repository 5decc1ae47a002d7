# SPDX-License-Identifier: Apache-2.0
"""torch.nn's layer beside ours: same weights, same input, everything that comes out compared."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import gpu_rnn

LAYERS = ("RNN", "LSTM", "GRU")
CELLS = ("RNNCell", "LSTMCell", "GRUCell")
INPUT, HIDDEN, STEPS, BATCH = 3, 5, 6, 4
LENGTHS = {"packed": [6, 4, 4, 1], "packed_unsorted": [4, 1, 6, 4]}
TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}


def pair(name: str, *args: Any, ours: dict[str, Any] | None = None, **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    """torch.nn's module and ours in float64 with the same weights; `ours` holds options torch.nn does not have."""
    kwargs.setdefault("dtype", torch.float64)
    theirs = getattr(nn, name)(*args, **kwargs)
    mine = getattr(gpu_rnn, name)(*args, **kwargs, **(ours or {}))
    mine.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, mine


def leaves(value: Any) -> list[Tensor]:
    """All tensors of a module's output that have values, in order."""
    if value is None:
        return []
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, PackedSequence):
        return [value.data]
    return [tensor for part in value for tensor in leaves(part)]


def draw(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    """Reproducible normal numbers that want a gradient."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()


def states(layer: nn.RNNBase, batch: int | None = BATCH) -> Any:
    """Initial states for a layer of torch.nn's kinds, in the user's form."""
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    between = () if batch is None else (batch,)
    h = draw(rows, *between, layer.proj_size or layer.hidden_size, seed=2, dtype=layer.weight_hh_l0.dtype)
    c = draw(rows, *between, layer.hidden_size, seed=3, dtype=layer.weight_hh_l0.dtype)
    return (h, c) if layer.mode == "LSTM" else h


def make_input(layer: nn.RNNBase, kind: str) -> tuple[Tensor, Any]:
    """The tensor that gets the gradient, and the layer's input made of it."""
    if kind == "unbatched":
        x = draw(STEPS, layer.input_size)
        return x, x
    x = draw(BATCH, STEPS, layer.input_size) if layer.batch_first else draw(STEPS, BATCH, layer.input_size)
    if kind == "batched":
        return x, x
    return x, pack_padded_sequence(x, LENGTHS[kind], layer.batch_first, enforce_sorted=kind == "packed")


def gradients(
    call: Callable[[], Any], wanted: dict[str, Tensor], *, retain_graph: bool = False
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The outputs of a call and the gradients of a fixed random sum of all of them; 0 for what is not used."""
    outputs = leaves(call())
    total = sum((out * draw(*out.shape, seed=i + 7).to(out.dtype)).sum() for i, out in enumerate(outputs))
    options = {"allow_unused": True, "materialize_grads": True, "retain_graph": retain_graph}
    grads = torch.autograd.grad(total, list(wanted.values()), **options)
    return outputs, dict(zip(wanted, grads, strict=True))


def assert_same(theirs: nn.Module, mine: nn.Module, *inputs: Any, sources: dict[str, Tensor]) -> None:
    """Outputs, final states, and the gradients of all parameters and of `sources` agree."""
    found = []
    for module in (mine, theirs):
        wanted = {**sources, **dict(module.named_parameters())}
        # The graph is kept: packed inputs are made once, for both.
        found.append(gradients(partial(module, *inputs), wanted, retain_graph=True))
    torch.testing.assert_close(*found, **TOLERANCE)


def quantized(values: torch.Tensor) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls them outdated
        return torch.quantize_per_tensor(values, 0.1, 0, torch.qint8)
