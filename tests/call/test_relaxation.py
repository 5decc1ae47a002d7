# SPDX-License-Identifier: Apache-2.0
"""Layers parallel in time: the numbers of steps in a row, a bound at every border, a way back where none settles."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import gpu_rnn
from benchmarks.certifying import random_calls
from benchmarks.certifying.random_calls import leaves, values_and_gradients
from gpu_rnn import functional
from gpu_rnn.call import relaxation
from gpu_rnn.dispatch.relaxation_plan import Outcome
from tests.call.test_options import FEW_BUILDS, SINGLE, calls, combinations, recurrence, tensors
from tests.support import native
from tests.support import options_by_hand as by_hand
from tests.support.time_chunks import EXACT, draw, forgetful, in_chunks, outcomes, outputs, same

TIGHT = 1e-9


def compare(
    call: dict[str, Any], chunks: int, backend: str, dtype: torch.dtype = torch.float64, atol: float = TIGHT
) -> None:
    """Beside loops by hand, until nothing moves."""
    made, options = tensors(call), call["options"]
    y, final, every = by_hand.run(made)
    of_leaves = [*leaves(made).values()]
    expected = values_and_gradients([y, *final, *(every if "all_states" in options else [])], of_leaves)
    with in_chunks(chunks) as launches, pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "rnn", partial(functional.rnn, time_parallel=EXACT))
        low = made if dtype == torch.float64 else made.to(dtype)
        called = random_calls.call(low, recurrence(call), options, backend)
        found = values_and_gradients(called, [*leaves(low).values()])
        assert {direction for direction, _ in launches} == {"training", "backward"}
        assert all(outcome.settled for outcome in outcomes())
    for value, truth in zip(found, expected, strict=True):
        scale = max(1.0, truth.abs().max().item()) if truth.numel() else 1.0
        torch.testing.assert_close(value, truth, rtol=0, atol=atol * scale, check_dtype=False)


def longer(without: frozenset[str] = frozenset(), **among: Any) -> Any:
    """Random calls of more steps, and a number of chunks."""
    steps = st.tuples(st.integers(4, 11), st.integers(2, 4))
    return st.tuples(calls(without=without, **among), steps).map(lambda both: (both[0] | {"T": both[1][0]}, both[1][1]))


@combinations(40)
@given(longer())
def test_every_option_and_cell(drawn: tuple[dict[str, Any], int]) -> None:
    compare(*drawn, "step")


@pytest.mark.slow
@combinations(400)
@given(longer())
def test_every_option_and_cell_in_full(drawn: tuple[dict[str, Any], int]) -> None:
    compare(*drawn, "step")


@native.NEEDS_C
@combinations(40)
@given(longer(frozenset({"clip"}), among=FEW_BUILDS))
def test_native(drawn: tuple[dict[str, Any], int]) -> None:
    compare(*drawn, "native")


@pytest.mark.interpreter
@pytest.mark.slow
@combinations(20)
@given(longer(frozenset({"layer_norm", "rms_norm"})))
def test_resident_in_the_interpreter(drawn: tuple[dict[str, Any], int]) -> None:
    compare(*drawn, "resident", torch.float32, SINGLE)


@pytest.mark.parametrize("option", ["recurrent_dropout", "zoneout", "weight_drop", "layer_norm", "dropout"])
def test_a_layer_in_training(option: str) -> None:
    """What is drawn at random is the same in both."""
    layer, x = forgetful(num_layers=2, **{option: True if option == "layer_norm" else 0.3}), draw(30, 2, 3)
    both = []
    for call in ({}, {"time_parallel": EXACT}):
        torch.manual_seed(2)
        with in_chunks(3):
            found = outputs(layer, x, **call)
        both.append([*found, *torch.autograd.grad(found[0].square().sum(), [x, *layer.parameters()])])
    same(both[1], both[0], TIGHT)


@pytest.mark.parametrize("backend", ["step", pytest.param("native", marks=native.NEEDS_C)])
def test_packed_and_jagged_rows(backend: str) -> None:
    layer, x, lengths = forgetful(bidirectional=True), draw(40, 3, 3), torch.tensor([40, 17, 9])
    layer.backend = backend
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, lengths)
    jagged = torch.nested.nested_tensor([x[:n, row].detach() for row, n in enumerate(lengths)], layout=torch.jagged)
    with in_chunks(4) as launches:
        found, expected = layer(packed, time_parallel=EXACT), layer(packed)
        assert launches
        launches.clear()
        of_jagged, expected_jagged = layer(jagged, time_parallel=EXACT), layer(jagged)
        assert launches
    same([found[0].data, *found[1]], [expected[0].data, *expected[1]], TIGHT)
    same([of_jagged[0].values(), *of_jagged[1]], [expected_jagged[0].values(), *expected_jagged[1]], TIGHT)


@pytest.mark.parametrize("tolerance", [1e-3, 1e-6, 1e-9])
@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
def test_the_tolerance_bounds_every_border(cell: str, tolerance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each chunk begins within the tolerance of where the one before it ends, in the last pass that it ran."""
    borders = {}

    class Recorded(relaxation._Forward):
        def run(self, values: list[Tensor], rows: Tensor | None) -> None:
            super().run(values, rows)
            borders["starts"], borders["ends"] = values, self.result.final

    monkeypatch.setattr(relaxation, "_Forward", Recorded)
    layer = forgetful(cell)
    for scale in (0.5, 1.0, 2.0):
        with torch.no_grad(), in_chunks(8):
            layer.weight_hh_l0 *= scale
            layer(draw(160, 2, 3), time_parallel=tolerance)
            assert outcomes()[0].settled
        for start, end in zip(borders["starts"], borders["ends"], strict=True):
            assert (start[2:] - end[:-2]).abs().max() <= tolerance  # rows of a batch of two


@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
def test_values_and_gradients_are_as_close_as_asked(cell: str) -> None:
    layer, x = forgetful(cell), draw(256, 2, 3)
    expected = values_and_gradients(outputs(layer, x), [x, *layer.parameters()])
    for tolerance in (1e-3, 1e-6, 1e-9):
        with in_chunks(8):
            found = values_and_gradients(outputs(layer, x, time_parallel=tolerance), [x, *layer.parameters()])
            assert all(outcome.settled and outcome.passes < 8 for outcome in outcomes())
        for value, truth in zip(found, expected, strict=True):
            # A recurrence that forgets makes of what is off at a border no more than that.
            torch.testing.assert_close(value, truth, rtol=0, atol=2 * tolerance * max(1.0, truth.abs().max().item()))


def test_a_long_memory_never_settles_and_is_computed_step_by_step(caplog: pytest.LogCaptureFixture) -> None:
    """Bit for bit as without the option."""
    layer, x = forgetful(), draw(96, 2, 3)
    with torch.no_grad():
        layer.bias_hh_l0[6:12] += 4.0  # the forget gate
    expected = values_and_gradients(outputs(layer, x), [x, *layer.parameters()])
    with in_chunks(12, most=3) as launches, caplog.at_level(logging.INFO, "gpu_rnn"):
        found = values_and_gradients(outputs(layer, x, time_parallel=1e-6), [x, *layer.parameters()])
        assert [outcome for outcome in outcomes() if not outcome.settled] == [Outcome(3, False)] * 2
    assert [direction for direction, _ in launches] == ["training"] * 3 + ["backward"] * 3
    for value, truth in zip(found, expected, strict=True):
        assert torch.equal(value, truth)
    said = [record.getMessage() for record in caplog.records]
    assert [words.split(":")[0] for words in said] == ["training of lstm", "backward of lstm"]
    assert "after 3 passes borders between 12 chunks of 8 steps still move by more than 1e-06" in said[0]


def test_no_number_never_settles() -> None:
    layer, x = forgetful(), draw(32, 1, 3).detach()
    x[5] = float("nan")
    with in_chunks(4, most=6):
        y, _ = layer(x, time_parallel=1e-6)
        assert not outcomes()[0].settled
    torch.testing.assert_close(y, layer(x)[0], rtol=0, atol=0, equal_nan=True)


def test_only_chunks_whose_border_moved_run_again() -> None:
    """Of a memory that is cut by a mask everywhere but in one place."""
    layer, x = forgetful(), draw(160, 1, 3)
    with torch.no_grad():
        layer.bias_hh_l0[6:12] += 12.0  # it forgets nothing
    resets = torch.zeros(160, 1, dtype=torch.bool)
    resets[::10] = True  # a chunk begins with every second
    resets[40:80] = False
    with torch.no_grad(), in_chunks(8) as launches:
        found = outputs(layer, x, resets=resets, time_parallel=1e-9)
    # Chunks 2 and 3 begin without one, and 3 is right once 2 has been.
    assert launches == [("inference", 8), ("inference", 2), ("inference", 1)]
    with torch.no_grad():
        same(found, outputs(layer, x, resets=resets), 1e-9)


def test_a_reset_at_a_border_leaves_it_free() -> None:
    layer, x = forgetful(bidirectional=True), draw(80, 2, 3)
    with torch.no_grad():
        layer.bias_hh_l0[6:12] += 12.0
    resets = torch.zeros(80, 2, dtype=torch.bool)
    resets[::20] = True  # which cuts both directions
    expected = values_and_gradients(outputs(layer, x, resets=resets), [x, *layer.parameters()])
    with in_chunks(4) as launches:
        found = values_and_gradients(outputs(layer, x, resets=resets, time_parallel=EXACT), [x, *layer.parameters()])
    assert launches == [("training", 8), ("backward", 8)]
    same(found, expected, TIGHT)


@pytest.mark.parametrize("steps", [40, 37])
def test_a_reversed_row_begins_with_its_state_within_a_chunk(steps: int) -> None:
    """After its own last step, or after those that fill the last chunk, which both count nowhere."""
    layer, x, hx = forgetful("GRU", bidirectional=True), draw(steps, 3, 3), draw(2, 3, 6)
    for call in ({"lengths": torch.tensor([steps, 17, 0])}, {}):
        wanted = [x, hx, *layer.parameters()]
        expected = values_and_gradients(outputs(layer, x, hx=hx, **call), wanted)
        with in_chunks(4):
            found = values_and_gradients(outputs(layer, x, hx=hx, **call, time_parallel=EXACT), wanted)
        same(found, expected, TIGHT)


def test_masked_chunks_hand_on_at_once() -> None:
    """What comes after any number of them has its state in the second pass."""
    layer, x = forgetful(), draw(200, 2, 3)
    with torch.no_grad():
        layer.bias_hh_l0[6:12] += 12.0
    mask = torch.zeros(200, 2, dtype=torch.bool)
    mask[:5] = mask[190:] = True
    call = {"mask": mask, "return_all_states": True}
    wanted = [x, *layer.parameters()]
    expected = values_and_gradients(outputs(layer, x, **call), wanted)
    with in_chunks(10):
        found = values_and_gradients(outputs(layer, x, **call, time_parallel=EXACT), wanted)
        assert [outcome.passes for outcome in outcomes()] == [2, 2]
    same(found, expected, TIGHT)


def test_rows_that_run_again_are_a_half_or_less_of_all() -> None:
    chunks = relaxation.TimeChunks.__new__(relaxation.TimeChunks)
    chunks.count, chunks.batch = 16, 2
    for count, rows in ((32, None), (17, None), (16, 16), (9, 16), (8, 8), (3, 4), (1, 1)):
        moved = torch.zeros(32, dtype=torch.bool)
        moved[5 : 5 + count] = True
        found = chunks.again(moved, int(moved.sum()))
        assert (None if found is None else len(found)) == (None if rows is None else rows)
        assert found is None or set(moved.nonzero().flatten().tolist()) <= set(found.tolist())


def test_infinities_stand_still() -> None:
    infinite = torch.full((2, 1, 1), float("inf"))
    assert not relaxation._moved([infinite], [infinite], 1e-6, None).any()
    assert relaxation._moved([infinite], [-infinite], 1e-6, None).all()


def test_an_infinite_gradient_leaves_other_rows_to_settle() -> None:
    """Of one unit, where infinity times a weight stays infinite."""
    torch.manual_seed(0)
    layer, x = gpu_rnn.RNN(3, 1, dtype=torch.float64, backend="step"), draw(40, 3, 3)
    with torch.no_grad():
        layer.weight_hh_l0.fill_(0.9)
    d_y = torch.ones(40, 3, 1, dtype=torch.float64)
    d_y[35, 0] = float("inf")
    (expected,) = torch.autograd.grad(layer(x)[0], x, d_y)
    with in_chunks(4):
        (found,) = torch.autograd.grad(layer(x, time_parallel=EXACT)[0], x, d_y)
    assert not expected[:, 0].isfinite().all()
    torch.testing.assert_close(found, expected, rtol=0, atol=TIGHT)
