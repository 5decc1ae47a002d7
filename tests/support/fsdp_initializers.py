# SPDX-License-Identifier: Apache-2.0
"""One of two processes that make layers on "meta", shard, materialise and initialise them; run by
test_initializers.py."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard

import gpu_rnn
from gpu_rnn.initializers import FOR_BIASES, INITIALIZERS

RANK, STORE = int(sys.argv[1]), sys.argv[2]
OPTIONS: dict[str, dict] = {
    "default": {},
    "layer_norm": {"layer_norm": True},
    "peephole": {"peephole": True},
    "unit_forget_bias": {"unit_forget_bias": True},
    "a function": {"recurrent_initializer": lambda w: [torch.nn.init.orthogonal_(gate) for gate in w.chunk(4)]},
    "torch's function": {"kernel_initializer": torch.nn.init.xavier_normal_},
    **{name: {"kernel_initializer": name, "recurrent_initializer": name} for name in INITIALIZERS},
    **{f"{name} bias": {"bias_initializer": name, "unit_forget_bias": True} for name in FOR_BIASES},
}


def sharded(options: dict) -> gpu_rnn.LSTM:
    with torch.device("meta"):
        layer = gpu_rnn.LSTM(6, 8, **options)
    fully_shard(layer)
    layer.to_empty(device="cpu")
    for parameter in layer.parameters():
        parameter.to_local().detach().fill_(torch.nan)
    layer.reset_parameters()
    return layer


def wholes(layer: gpu_rnn.LSTM) -> dict[str, Tensor]:
    return {name: parameter.full_tensor().detach() for name, parameter in layer.named_parameters()}


def check(options: dict) -> None:
    layer = sharded(options)
    found = wholes(layer)
    assert all(tensor.isfinite().all() for tensor in found.values()), "values are missing"
    for initializer, name in (("kernel", "weight_ih_l0"), ("recurrent", "weight_hh_l0"), ("bias", "bias_ih_l0")):
        chosen = options.get(f"{initializer}_initializer")
        if chosen in ("zeros", "ones"):
            rest = found[name].view(4, 8, -1)[[0, 2, 3]]  # the forget gate's bias is another's
            assert (rest == (chosen == "ones")).all(), f"{name} is not {chosen}"
        elif isinstance(chosen, str):
            first, second = found[name].chunk(2)
            assert not torch.equal(first, second), f"each process drew the same for its part of {name}"
    if options.get("recurrent_initializer") == "orthogonal":
        torch.testing.assert_close(found["weight_hh_l0"].T @ found["weight_hh_l0"], torch.eye(8))
    if callable(options.get("recurrent_initializer")):
        for gate in found["weight_hh_l0"].chunk(4):
            torch.testing.assert_close(gate @ gate.T, torch.eye(8))
    if options.get("unit_forget_bias"):
        assert ((found["bias_ih_l0"] + found["bias_hh_l0"]).view(4, 8)[1] == 1).all(), "the forget gate's bias is not 1"
    layer(torch.randn(5, 3, 6))[0].sum().backward()


torch.manual_seed(0)  # the same in both, as recipes have it
dist.init_process_group("gloo", init_method=f"file://{STORE}", rank=RANK, world_size=2)
try:
    for name, options in OPTIONS.items():
        try:
            check(options)
        except Exception as error:
            raise RuntimeError(f"{name}: {error}") from error
finally:
    dist.destroy_process_group()
print("done", len(OPTIONS))
