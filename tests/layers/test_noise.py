# SPDX-License-Identifier: Apache-2.0
"""What layers add at random in training: where it is drawn, what it changes, and what is expected at evaluation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gpu_rnn
from tests.support import layers as support
from tests.support.controlled import BATCH, EXACT, HIDDEN, INPUT, STEPS, layer


def test_zoneout_of_a_state_that_begins_at_infinity() -> None:
    cell = gpu_rnn.cells.slstm()
    with pytest.raises(ValueError, match="state m has no expectation: it begins at -inf"):
        gpu_rnn.Recurrent(cell, INPUT, HIDDEN, zoneout=0.1)
    found = gpu_rnn.Recurrent(cell, INPUT, HIDDEN, zoneout=tuple(0.0 if s == "m" else 0.1 for s in cell.states)).eval()
    assert all(state.isfinite().all() for state in found(torch.randn(STEPS, BATCH, INPUT))[1])


NOISE = [
    {"recurrent_dropout": 0.4},
    {"recurrent_dropout": 0.4, "recurrent_dropout_per_gate": True},
    {"zoneout": 0.3},
    {"zoneout": (0.0, 0.3)},
    {"weight_drop": 0.4},
]


@pytest.mark.parametrize("options", NOISE, ids=str)
def test_noise_is_drawn_from_torchs_generator_in_training_only(options: dict[str, Any]) -> None:
    found, plain = layer(**options), layer()
    x = support.draw(STEPS, BATCH, INPUT)

    def drawn(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return found(x)[0]

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))
    found.eval()
    assert torch.equal(drawn(1), drawn(2))
    assert torch.equal(found(x)[0], plain(x)[0]) is ("zoneout" not in options)


@pytest.mark.parametrize("per_gate", [False, True])
def test_recurrent_dropout_with_everything_dropped_leaves_the_input(per_gate: bool) -> None:
    found = layer(recurrent_dropout=1.0, recurrent_dropout_per_gate=per_gate)
    x = support.draw(STEPS, BATCH, INPUT)
    expected = layer()
    nn.init.zeros_(expected.weight_hh_l0)
    torch.testing.assert_close(found(x), expected(x), **EXACT)


def test_recurrent_dropout_is_one_mask_for_all_steps() -> None:
    """Units of h that are dropped at one step are so at all: a weight that only they meet has no gradient."""
    found = layer("RNN", recurrent_dropout=0.5)
    x = support.draw(STEPS, 1, INPUT)
    found(x)[0].sum().backward()
    dropped = found.weight_hh_l0.grad.eq(0).all(0)
    assert dropped.any()
    assert not dropped.all()


def test_zoneout_keeps_states_in_training_and_expects_them_at_evaluation() -> None:
    found = layer(zoneout=(1.0, 0.0))
    x, h, c = support.draw(STEPS, BATCH, INPUT), *support.states(found)
    output, (h_last, c_last) = found(x, (h, c))
    assert torch.equal(h_last, h)
    assert not torch.equal(c_last, c)
    torch.testing.assert_close(output, h.expand(STEPS, -1, -1), **EXACT)
    found, plain = layer(zoneout=(0.25, 0.5)).eval(), layer()
    _, (h_one, c_one) = found(x[:1], (h, c))
    _, (h_new, c_new) = plain(x[:1], (h, c))
    torch.testing.assert_close(h_one, 0.25 * h + 0.75 * h_new, **EXACT)
    torch.testing.assert_close(c_one, 0.5 * c + 0.5 * c_new, **EXACT)


@pytest.mark.parametrize("name", support.LAYERS)
@pytest.mark.parametrize("options", [{}, {"reset_after": False}])
def test_zoneout_of_everything_at_evaluation_has_gradients_of_zero(name: str, options: dict[str, Any]) -> None:
    """No output depends on any gate then."""
    found = layer(name, zoneout=1.0, backend="step", **(options if name == "GRU" else {})).eval()
    x, h = support.draw(STEPS, BATCH, INPUT), support.states(found)
    output, _ = found(x, h)
    first = support.leaves(h)[0]
    torch.testing.assert_close(output, first.expand(STEPS, -1, -1), **EXACT)
    grads = torch.autograd.grad(
        output.sum(), [first, x, *found.parameters()], materialize_grads=True, allow_unused=True
    )
    assert grads[0].eq(STEPS).all()
    assert all(grad.eq(0).all() for grad in grads[1:])
