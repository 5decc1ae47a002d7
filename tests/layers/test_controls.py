# SPDX-License-Identifier: Apache-2.0
"""Masks, lengths and resets through the layers; what they compute is in call/test_options.py."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import gpu_rnn
from tests.support import layers as support
from tests.support.controlled import BATCH, EXACT, HIDDEN, INPUT, STEPS, layer, mask


@pytest.mark.parametrize("name", support.LAYERS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_lengths_are_what_packing_gives(name: str, batch_first: bool) -> None:
    """In any order and on any device; 0, which packing refuses, gives zeros and the initial states."""
    lengths = torch.tensor([4, 1, 6, 3])
    found = layer(name, num_layers=2, bidirectional=True, batch_first=batch_first)
    x = support.draw(BATCH, STEPS, INPUT) if batch_first else support.draw(STEPS, BATCH, INPUT)
    hx = support.states(found, BATCH)
    packed, states = found(pack_padded_sequence(x, lengths, batch_first, enforce_sorted=False), hx)
    output, _ = pad_packed_sequence(packed, batch_first)
    torch.testing.assert_close(found(x, hx, lengths=lengths), (output, states), **EXACT)
    rows = (slice(None), 1) if not batch_first else (1,)
    with_empty, states = found(x, hx, lengths=torch.tensor([4, 0, 6, 3]))
    assert with_empty[rows].eq(0).all()
    final, initial = support.leaves(states), support.leaves(hx)
    torch.testing.assert_close([s[:, 1] for s in final], [s[:, 1] for s in initial], **EXACT)


@pytest.mark.parametrize("name", support.LAYERS)
@pytest.mark.parametrize("option", ["mask", "lengths"])
def test_nan_in_the_padding_reaches_nothing(name: str, option: str) -> None:
    found = layer(name, bidirectional=True)
    x = support.draw(STEPS, BATCH, INPUT).detach()
    valid = mask() if option == "mask" else torch.arange(STEPS)[:, None] < torch.tensor([4, 0, 6, 3])
    given = valid if option == "mask" else torch.tensor([4, 0, 6, 3])
    results = []
    for padding in (0.0, float("nan")):
        padded = x.masked_fill(~valid[..., None], padding).requires_grad_()
        wanted = {"x": padded, **dict(found.named_parameters())}
        results.append(support.gradients(lambda padded=padded: found(padded, **{option: given}), wanted))
    torch.testing.assert_close(*results, **EXACT)
    assert results[1][1]["x"][~valid].eq(0).all()


@pytest.mark.parametrize("name", support.LAYERS)
def test_resets_are_separate_episodes(name: str) -> None:
    """An LSTM run over two episodes joined, with a reset between, gives what it gives over each."""
    found = layer(name, num_layers=2, bidirectional=True)
    first, second = support.draw(2, BATCH, INPUT, seed=1), support.draw(4, BATCH, INPUT, seed=2)
    resets = torch.zeros(STEPS, BATCH, dtype=torch.bool)
    resets[2] = True
    output, _ = found(torch.cat((first, second)), resets=resets)
    torch.testing.assert_close(output, torch.cat((found(first)[0], found(second)[0])), **EXACT)
    without, _ = found(torch.cat((first, second)))
    assert not torch.allclose(without, output)


def test_reset_state_is_learned() -> None:
    found = layer("GRU")
    state = support.draw(1, BATCH, HIDDEN, seed=4)
    resets = torch.zeros(STEPS, BATCH, dtype=torch.bool)
    resets[3] = True
    x = support.draw(STEPS, BATCH, INPUT)
    output, _ = found(x, resets=resets, reset_state=state)
    torch.testing.assert_close(output[3:], found(x[3:], state)[0], **EXACT)
    (grad,) = torch.autograd.grad(output[3:].sum(), state)
    (expected,) = torch.autograd.grad(found(x[3:], state)[0].sum(), state)
    torch.testing.assert_close(grad, expected, **EXACT)


def test_unbatched() -> None:
    found = layer(num_layers=2, bidirectional=True)
    x, keep, resets = support.draw(STEPS, INPUT), mask()[:, 1], mask()[:, 2]
    output, (h, c), every = found(x, mask=keep, resets=resets, return_all_states=True)
    batched = found(x[:, None], mask=keep[:, None], resets=resets[:, None], return_all_states=True)
    torch.testing.assert_close(output, batched[0][:, 0], **EXACT)
    torch.testing.assert_close([h, c], [s[:, 0] for s in batched[1]], **EXACT)
    torch.testing.assert_close(list(every), [s[:, :, 0] for s in batched[2]], **EXACT)
    assert layer(return_sequences=False)(x, lengths=torch.tensor(3))[0].shape == (HIDDEN,)


@pytest.mark.parametrize("batch_first", [False, True])
def test_return_sequences(batch_first: bool) -> None:
    """The last step of each direction that counts; 0 where none does."""
    found, short = (
        layer(num_layers=2, bidirectional=True, batch_first=batch_first, return_sequences=r) for r in (True, False)
    )
    x = support.draw(STEPS, BATCH, INPUT)
    given = x.transpose(0, 1) if batch_first else x
    keep = mask()
    output, _ = found(given, mask=keep.T if batch_first else keep)
    output = output.transpose(0, 1) if batch_first else output
    last, _ = short(given, mask=keep.T if batch_first else keep)
    assert last[0].eq(0).all()
    for row in range(1, BATCH):
        used = keep[:, row].nonzero()
        torch.testing.assert_close(last[row, :HIDDEN], output[used[-1, 0], row, :HIDDEN], **EXACT)
        torch.testing.assert_close(last[row, HIDDEN:], output[used[0, 0], row, HIDDEN:], **EXACT)


def test_the_last_output_is_not_what_a_later_reset_leaves() -> None:
    found, short = (layer("GRU", bidirectional=True, return_sequences=r) for r in (True, False))
    keep, resets = (torch.tensor(rows).bool()[:, None] for rows in ([0, 1, 1, 0], [0, 1, 0, 1]))
    x = support.draw(4, 1, INPUT)
    state = torch.full((2, 1, HIDDEN), 7.0, dtype=torch.float64)
    output, _ = found(x, mask=keep, resets=resets, reset_state=state)
    last, _ = short(x, mask=keep, resets=resets, reset_state=state)
    torch.testing.assert_close(last, torch.cat((output[2, :, :HIDDEN], output[1, :, HIDDEN:]), 1), **EXACT)


@pytest.mark.parametrize("backend", ["reference", "step"])
@pytest.mark.parametrize("per_step", [0, 1])
def test_reset_state_of_one_state_for_each_step(backend: str, per_step: int) -> None:
    found = layer(bidirectional=True, backend=backend)
    values = [support.draw(2, BATCH, HIDDEN, seed=5), support.draw(2, BATCH, HIDDEN, seed=6)]
    mixed = [v.expand(STEPS, *v.shape) if k == per_step else v for k, v in enumerate(values)]
    x, resets = support.draw(STEPS, BATCH, INPUT), mask()
    results = [found(x, resets=resets, reset_state=tuple(given)) for given in (values, mixed)]
    torch.testing.assert_close(*results, **EXACT)


@pytest.mark.parametrize(
    "lengths", [[4, 0, 6, 3], (4, 0, 6, 3), np.array([4, 0, 6, 3]), torch.tensor([4, 0, 6, 3]).int()]
)
def test_lengths_of_any_kind(lengths: Any) -> None:
    found = layer(return_sequences=False)
    x = support.draw(STEPS, BATCH, INPUT)
    torch.testing.assert_close(found(x, lengths=lengths), found(x, lengths=torch.tensor([4, 0, 6, 3])), **EXACT)


def test_options_can_be_changed_on_a_layer() -> None:
    found = layer(zoneout=0.1)
    found.zoneout, found.recurrent_dropout = 0.25, 0.5
    assert found.zoneout == (0.25, 0.25)
    assert repr(found) == f"LSTM({INPUT}, {HIDDEN}, recurrent_dropout=0.5, zoneout=(0.25, 0.25))"
    with pytest.raises(ValueError, match="range"):
        found.zoneout = 2.0
    for name in ("layer_norm", "rms_norm"):
        with pytest.raises(AttributeError):
            setattr(found, name, True)
    torch.testing.assert_close(
        found.eval()(x := support.draw(1, BATCH, INPUT))[0], 0.75 * layer().eval()(x)[0], **EXACT
    )


def test_all_states_of_packed_input_stand_in_the_given_order() -> None:
    found = layer(bidirectional=True)
    x, lengths = support.draw(STEPS, BATCH, INPUT), torch.tensor([4, 1, 6, 3])
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    _, _, from_packed = found(packed, return_all_states=True)
    _, _, from_lengths = found(x, lengths=lengths, return_all_states=True)
    torch.testing.assert_close(from_packed, from_lengths, **EXACT)


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_normalisation_makes_the_scale_of_weights_irrelevant(norm: str) -> None:
    found = layer("GRU", **{norm: True})
    x = support.draw(STEPS, BATCH, INPUT)
    before, _ = found(x)
    with torch.no_grad():
        found.weight_ih_l0.mul_(100)
        found.weight_hh_l0.mul_(100)
    torch.testing.assert_close(found(x)[0], before, rtol=0, atol=1e-3)  # but for the epsilon of 1e-5
    assert {"norm_ih_l0", "norm_hh_l0"} <= dict(found.named_parameters()).keys()


def test_rms_norm_is_torch_s_of_each_gate() -> None:
    """Of the input products here, as h is 0; and the scales are the layer's."""
    found = gpu_rnn.RNN(INPUT, HIDDEN, rms_norm=True, activation="linear", dtype=torch.float64)
    nn.init.normal_(found.norm_ih_l0)
    x = support.draw(1, BATCH, INPUT)
    products = nn.functional.rms_norm(x @ found.weight_ih_l0.T, (HIDDEN,), found.norm_ih_l0, 1e-5)
    torch.testing.assert_close(found(x)[0], products + found.bias_ih_l0 + found.bias_hh_l0, **EXACT)
    again = pickle.loads(pickle.dumps(found))
    assert "rms_norm=True" in repr(again) and torch.equal(again(x)[0], found(x)[0])


def test_initializers_and_the_forget_bias() -> None:
    found = layer(
        recurrent_initializer="orthogonal",
        kernel_initializer=nn.init.ones_,
        bias_initializer="zeros",
        unit_forget_bias=True,
    )
    assert found.weight_ih_l0.eq(1).all()
    torch.testing.assert_close(found.weight_hh_l0.T @ found.weight_hh_l0, torch.eye(HIDDEN, dtype=torch.float64))
    bias = (found.bias_ih_l0 + found.bias_hh_l0).chunk(4)
    assert bias[1].eq(1).all()
    assert all(bias[gate].eq(0).all() for gate in (0, 2, 3))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        ({"mask": torch.ones(STEPS, BATCH)}, TypeError, "mask is a bool tensor, True where a step counts"),
        ({"mask": torch.ones(BATCH, STEPS, dtype=torch.bool)}, ValueError, r"features, \(6, 4\), got \(4, 6\)"),
        ({"resets": [True]}, TypeError, "resets is a bool tensor"),
        ({"lengths": torch.ones(BATCH)}, TypeError, "integers, .*, got torch.float32"),
        ({"lengths": 5}, TypeError, r"a list or tensor of \(B\) integers, the number of steps of each row, got 5"),
        ({"lengths": torch.tensor([1, 2])}, ValueError, "one number for each of the 4 rows"),
        ({"lengths": [1, 2, 3, 7]}, ValueError, "between 0 and 6"),
        ({"lengths": [1, 2, 3, -1]}, ValueError, "between 0 and 6"),
        ({"reset_state": (torch.ones(1, BATCH, HIDDEN),) * 2}, ValueError, "give resets too"),
        (
            {"resets": torch.ones(STEPS, BATCH, dtype=torch.bool), "reset_state": (torch.ones(BATCH, HIDDEN),) * 2},
            ValueError,
            "reset_state",
        ),
        (
            {"resets": torch.ones(STEPS, BATCH, dtype=torch.bool), "reset_state": torch.ones(1, BATCH, HIDDEN)},
            TypeError,
            "tuple of 2",
        ),
        ({"masks": None}, TypeError, "masks"),
        (
            {"resets": mask(), "reset_state": (torch.ones(1, BATCH, HIDDEN),) * 2},
            RuntimeError,
            "reset_state is torch.float32",
        ),
        ({"resets": mask(), "reset_state": torch.ones(1, BATCH, HIDDEN)}, TypeError, "reset_state should be a tuple"),
    ],
    ids=lambda value: str(list(value)) if isinstance(value, dict) else "",
)
def test_bad_calls_say_what_to_do(call: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        layer()(torch.zeros(STEPS, BATCH, INPUT, dtype=torch.float64), **call)


def test_a_packed_sequence_takes_no_mask() -> None:
    packed = pack_padded_sequence(torch.zeros(STEPS, BATCH, INPUT, dtype=torch.float64), torch.tensor([6, 4, 4, 1]))
    with pytest.raises(ValueError, match="mask cannot come with a PackedSequence"):
        layer()(packed, mask=mask())


@pytest.mark.parametrize("shape", [(1, BATCH, 3, HIDDEN), (1, BATCH - 1, 1, HIDDEN), (1, BATCH, 1, 1)])
def test_masks_given_to_functional_are_checked(shape: tuple[int, ...]) -> None:
    found = layer()
    weights, x = list(found.parameters()), torch.zeros(STEPS, BATCH, INPUT, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"recurrent_mask is \(1, 4, 1 or 4, 5\)"):
        gpu_rnn.functional.rnn(x, None, weights, found.recurrence, recurrent_mask=torch.ones(shape).double())
    for zone in (torch.ones(2, STEPS, 1, BATCH, HIDDEN), torch.ones(1, STEPS, 1, BATCH, HIDDEN, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"zone is bool, \(2, 6, 1, 4, 5\)"):
            gpu_rnn.functional.rnn(x, None, weights, found.recurrence, zone=zone)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"recurrent_dropout": 1.5}, ValueError, "recurrent_dropout should be a number in range"),
        ({"recurrent_dropout": "0.5"}, TypeError, "recurrent_dropout should be a number"),
        ({"zoneout": (0.1, 0.2, 0.3)}, ValueError, r"one for each state \(h, c\)"),
        ({"zoneout": 0.1, "proj_size": 2}, ValueError, "zoneout of h is not defined with proj_size"),
        ({"layer_norm": 1}, TypeError, "layer_norm should be True or False"),
        ({"bidirectional": -1}, TypeError, "bidirectional should be True or False"),
        ({"layer_norm": True, "rms_norm": True}, ValueError, "two ways to normalise .*: give one"),
        ({"kernel_initializer": "glorot"}, ValueError, "glorot_uniform"),
    ],
    ids=lambda value: str(list(value)) if isinstance(value, dict) else "",
)
def test_bad_options_say_what_to_do(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        layer(**options)
