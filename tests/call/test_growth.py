# SPDX-License-Identifier: Apache-2.0
"""What grows with the number of steps grows with it in proportion: the memory and the work of second derivatives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gpu_rnn

OPTIONS = {
    "reset before": {"reset_after": False},
    "norm": {"layer_norm": True},
    "rms": {"rms_norm": True, "heads": 2},
    "both directions, two layers": {"bidirectional": True, "num_layers": 2, "activation": "softsign"},
    "zoneout": {"zoneout": 0.5},
    "recurrent dropout": {"recurrent_dropout": 0.5},
    "mask": {},
    "lengths": {"bidirectional": True},
    "all states": {},
    "reset states": {},
}


class Written(TorchDispatchMode):
    """Counts operations and the bytes of all that they make: at least as much as is ever in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.operations = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        self.operations += 1
        if not function.is_view and not function._schema.is_mutable:
            self.bytes += sum(value.nbytes for value in tree_leaves(made) if isinstance(value, torch.Tensor))
        return made


def call(name: str, steps: int) -> dict[str, Any]:
    """The arguments of a layer's call."""
    flags = torch.rand(steps, 2) < 0.5
    return {
        "mask": {"mask": flags},
        "lengths": {"lengths": torch.tensor([steps, steps // 2])},
        "all states": {"return_all_states": True},
        "reset states": {"resets": flags, "reset_state": torch.randn(steps, 1, 2, 8, requires_grad=True)},
    }.get(name, {})


def second_derivatives(layer: torch.nn.Module, name: str, steps: int) -> Written:
    x = torch.randn(steps, 2, 4, requires_grad=True)
    options = call(name, steps)
    with Written() as written:
        y, *_ = layer(x, **options)
        first = torch.autograd.grad(y.square().sum(), [x, *layer.parameters()], create_graph=True)
        sum(d.square().sum() for d in first).backward()
    return written


ALIKE = ("zoneout", "recurrent dropout", "mask")  # as others


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in ALIKE)) for n in OPTIONS])
def test_second_derivatives_take_memory_and_time_in_proportion_to_the_steps(name: str) -> None:
    """From 24 to 48 steps comes at most a little more than twice what comes from 12 to 24: a derivative that is as
    large as all steps, for each step, adds four times as much."""
    layer = gpu_rnn.GRU(4, 8, **OPTIONS[name])
    first, second, third = (second_derivatives(layer, name, steps) for steps in (12, 24, 48))
    for what, most in (("bytes", 2.3), ("operations", 2.1)):
        few, some, many = (getattr(each, what) for each in (first, second, third))
        assert many - some < most * (some - few), what
