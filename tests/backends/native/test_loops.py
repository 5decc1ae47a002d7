# SPDX-License-Identifier: Apache-2.0
"""The time loop in C against the float64 reference: values, final states and all gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import gpu_rnn
from gpu_rnn.backends import tensors
from gpu_rnn.backends.native import building, launch
from gpu_rnn.backends.problem import Problem
from gpu_rnn.backends.reference import project
from gpu_rnn.call import passes
from gpu_rnn.recurrence import Recurrence
from tests.support import loops as support
from tests.support import native, resident
from tests.support.cells import of_three_products, two_products
from tests.support.layer_options import FURTHER, OPTIONS, STEERING, Case, inputs_of, with_options
from tests.support.pairwise import pairwise, spread
from tests.support.resident import CELLS, errors, settings  # noqa: F401

PROJECTED = ("lstm", "peephole_lstm", "coupled_lstm", "slstm")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 1), (5, 3, 20), (4, 17, 16), (3, 5, 33), (6, 2, 9), (2, 7, 130), (3, 4, 64)]  # T, B, H
PAIRS = pairwise(
    CELLS,
    STEERING,
    ["", "drop", "drop_per_gate"],
    ["", "zone"],
    ["", "all_states"],
    ["", "norm", "rms"],
    ["", "proj"],
    DTYPES,
    SHAPES,
    ["0", "1", "01"],
    [True, False],
)


@pytest.fixture(autouse=True)
def a_compiler() -> None:
    native.any_compiler()


def compare(recurrence: Recurrence, inputs: support.Inputs) -> None:
    if inputs.x.dtype != torch.float64:
        resident.compare(recurrence, inputs, "cpu", "native")
        return
    truth = support.values_and_gradients(recurrence, inputs, "reference")
    wrong = errors(support.values_and_gradients(recurrence, inputs, "native"), truth)
    assert max(wrong.values()) < 1e-12, wrong


def that_there_is(case: Case) -> Case:
    """Of some cells alone h can be projected."""
    cell, *words, dtype, shape, reverse, bias = case
    words = ["" if word == "proj" and cell not in PROJECTED else word for word in words]
    return (cell, *words, dtype, shape, reverse, bias)


@pytest.mark.parametrize("case", spread([*map(that_there_is, PAIRS)]), ids=lambda case: "-".join(map(str, case)))
def test_options_together(case: Case) -> None:
    compare(*inputs_of(case))


@pytest.mark.parametrize("option", ["", "lengths", *OPTIONS, *FURTHER])
@pytest.mark.parametrize("cell", CELLS)
def test_each_option(cell: str, option: str) -> None:
    compare(*inputs_of((cell, option, torch.float32, (4, 3, 5), "01", True)))


@pytest.mark.parametrize("option", ["", "lengths", *OPTIONS, *FURTHER])
@pytest.mark.parametrize("cell", PROJECTED)
def test_each_option_with_a_projection(cell: str, option: str) -> None:
    compare(*inputs_of((cell, option, "proj", torch.float32, (4, 3, 21), "01", True)))


@pytest.mark.parametrize("options", [(), ("mask", "reset_values", "drop_per_gate", "zone", "all_states", "norm")])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("make", [two_products, of_three_products])
def test_products_after_one_another(make: Callable[[], Recurrence], bias: bool, options: tuple[str, ...]) -> None:
    recurrence = make()
    inputs = support.make(recurrence, T=4, B=3, H=21, reverse="01", bias=bias, scale=0.2)
    compare(recurrence, with_options(inputs, recurrence, options).to(torch.float32))


@pytest.mark.parametrize("compiler", ["cc", pytest.param("gcc", marks=pytest.mark.slow), "clang"])
@pytest.mark.parametrize("target", building.instruction_sets(), ids=lambda target: target.name)
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.slow)])
def test_every_compiler_and_instruction_set(
    target: building.InstructionSet, dtype: torch.dtype, compiler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    native.needs(compiler, "plain")
    monkeypatch.setenv("CC", compiler)
    building.library.cache_clear()
    monkeypatch.setattr(building, "instruction_sets", lambda: (target,))
    compare(*inputs_of(("minimal", "mask resets", "drop", "zone", "all_states", dtype, (5, 7, 33), "01", True)))
    compare(*inputs_of(("lstm", "lengths", "drop_per_gate", "norm proj", dtype, (5, 7, 33), "01", True)))


def test_more_gates_than_vectors_side_by_side() -> None:
    def step(x, r, s, p):  # type: ignore[no-untyped-def]
        gates = [torch.tanh(getattr(x, name) + getattr(r, name)) for name in names]
        return sum(gates) / 11 + p.leak * s.h

    names = tuple("abcdefghijk")
    cell = gpu_rnn.Recurrence(step, gates=names, states=("h",), params=("leak",), name="wide")
    compare(cell, support.make(cell, T=4, B=5, H=18, scale=0.3).to(torch.float32))


def both_passes(cell: str, inputs: support.Inputs, rows: slice = slice(None)) -> dict[str, Tensor]:
    """All that the loops give for some rows, without the products around them."""
    recurrence, inputs = support.RECURRENCES[cell], inputs.detached()
    gates = project(inputs.x, inputs.weights, recurrence.program)[:, rows].clone(memory_format=torch.contiguous_format)
    inputs = inputs._replace(states=[state[rows] for state in inputs.states])
    steps, batch, n, _, hidden = gates.shape
    given = Problem(recurrence=recurrence, T=steps, B=batch, N=n, I=2, H=hidden, direction="training")
    call = inputs.call(recurrence, given)
    saved = launch.forward(call, gates, True, True)
    d = launch.backward(call, saved, saved.y.sin(), [state.cos() for state in saved.final], saved.inner.cos())
    named = {"y": saved.y, "gates": saved.gates, "inner": saved.inner, "d_gates": d.d_gates, "d_params": d.d_params}
    named |= {f"final {k}": value for k, value in enumerate(saved.final)}
    return named | {f"d_state {k}": value for k, value in enumerate(d.d_states)}


def threads(count: int) -> Callable[[], int]:
    return lambda: count


@pytest.mark.parametrize("lengths", [None, (6, 0, 1, 3, 6, 2, 5, 4, 6, 6, 1)])
def test_results_do_not_depend_on_threads(lengths: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    recurrence = support.RECURRENCES["peephole_lstm"]
    inputs = support.make(recurrence, T=6, B=11, H=37, reverse="01", lengths=lengths).to(torch.float32)
    monkeypatch.setattr(launch, "OF_A_THREAD", 1.0)
    monkeypatch.setattr(torch, "get_num_threads", threads(1))
    alone = both_passes("peephole_lstm", inputs)
    for count in (2, 3, 7, 64):
        monkeypatch.setattr(torch, "get_num_threads", threads(count))
        for name, value in both_passes("peephole_lstm", inputs).items():
            assert torch.equal(value, alone[name]), (name, count)


@pytest.mark.parametrize("cell", ["peephole_lstm", "gru"])
def test_a_row_does_not_depend_on_those_beside_it(cell: str) -> None:
    inputs = support.make(support.RECURRENCES[cell], T=4, B=18, H=37).to(torch.float32)
    whole = both_passes(cell, inputs)
    for count in range(1, 18):  # a product of each number of rows that registers hold
        rows = slice(count, count + count)
        some = both_passes(cell, inputs, rows)
        for name in ("y", "d_gates"):
            assert torch.equal(whole[name][:, rows], some[name]), (name, count)


@pytest.mark.parametrize(("which", "padding"), [("lengths", float("nan")), ("mask", float("inf"))])
def test_what_is_not_computed_may_hold_anything(which: str, padding: float) -> None:
    recurrence, inputs = inputs_of(("gru", which, torch.float32, (4, 3, 5), "01", True))
    plain = support.values_and_gradients(recurrence, inputs, "native")
    if which == "lengths":
        skipped = torch.arange(4)[:, None] >= inputs.lengths
    else:
        assert inputs.controls.flags is not None
        skipped = (inputs.controls.flags & tensors.SKIP).bool().all(2)
    assert skipped.any()
    x = inputs.x.detach().masked_fill(skipped[..., None], padding)
    inner = support.run(recurrence, inputs.detached()._replace(x=x), "native")
    assert torch.equal(inner[0], plain["y"]) and torch.equal(inner[1], plain["final h"])


@pytest.mark.parametrize(("steps", "batch"), [(0, 3), (4, 0)])
def test_nothing_to_do(steps: int, batch: int) -> None:
    layer = gpu_rnn.GRU(3, 4, backend="native")
    x = torch.randn(steps, batch, 3, requires_grad=True)
    if steps == 0:
        with pytest.raises(RuntimeError):
            layer(x)
        return
    y, h = layer(x)
    y.sum().backward()
    assert y.shape == (steps, batch, 4) and h.shape == (1, batch, 4) and x.grad is not None


@pytest.mark.parametrize("word", ["mask", "lengths"])
def test_another_loop_goes_back(word: str) -> None:
    """Dispatch chooses anew for the backward pass: what one loop kept is whole for another."""
    recurrence, inputs = inputs_of(("gru", word, "norm", torch.float32, (4, 3, 21), "01", True))
    text, options, given = recurrence.text(), inputs.options("native", save=True), inputs.detached().layer
    weights = given.weights._replace(norm_ih=torch.ones_like(given.weights.norm))  # type: ignore[arg-type]
    given = given._replace(weights=weights)
    saved = passes.run(text, options, given, keep=True)
    d_outputs = [saved.y.sin(), *(state.cos() for state in saved.final)]
    found, expected = (
        passes.run_backward(text, options._replace(backend=name), d_outputs, given, saved)
        for name in ("step", "reference")
    )
    assert saved.kept is not None
    for value, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-4, atol=1e-4)


def test_it_takes_no_less_than_it_says() -> None:
    lstm = Problem(recurrence=support.RECURRENCES["lstm"], T=3, B=2, N=1, I=3, H=4)
    assert launch.unsupported(lstm) == []
    refused = {
        "takes real floating-point numbers, not complex64": {"dtype": torch.complex64},
        "runs on a CPU, not on mps": {"device_type": "mps"},
    }
    for reason, change in refused.items():
        assert launch.unsupported(replace(lstm, **change)) == [reason]
