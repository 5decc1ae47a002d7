# SPDX-License-Identifier: Apache-2.0
"""What cannot take the place of a weight or an option of a layer that exists is refused where it is set."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import gpu_rnn
from tests.support.layers import quantized

I, H = 3, 5  # noqa: E741
WEIGHTS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "sparse": (
        lambda w: w.to_sparse(),
        r"weight_hh\w* should be a strided tensor, got a torch.sparse_coo one: use",
    ),
    "of oneDNN": (
        lambda w: w.to_mkldnn(),
        r"weight_hh\w* should be a strided tensor, got a torch._mkldnn one: use",
    ),
    "quantized": (quantized, r"weight_hh\w* should hold floating-point numbers, got a quantized tensor: use .dequ"),
}


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("kind", ["LSTM", "GRUCell"])
def test_a_weight_that_no_kernel_reads_is_refused_where_it_is_set(kind: str, name: str) -> None:
    module, (other, words) = getattr(gpu_rnn, kind)(I, H), WEIGHTS[name]
    weight = "weight_hh" if kind.endswith("Cell") else "weight_hh_l0"
    with pytest.raises(TypeError, match=f"^{kind}: {words}"):
        setattr(module, weight, nn.Parameter(other(getattr(module, weight).detach()), requires_grad=False))
    assert getattr(module, weight).layout == torch.strided


@pytest.mark.parametrize("option", ["layer_norm", "rms_norm", "heads"])
def test_what_the_parameters_were_made_for_is_not_set_later(option: str) -> None:
    with pytest.raises(AttributeError, match=f"the parameters were made for {option}: make another layer with it"):
        setattr(gpu_rnn.LSTM(I, H), option, True)
