# SPDX-License-Identifier: Apache-2.0
"""The resident kernel's options against the float64 reference: each alone with each cell, and pairs of them."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, stack_module_state, vmap

import gpu_rnn
from gpu_rnn.backends import resident
from gpu_rnn.backends.problem import Problem
from gpu_rnn.backends.reference import project
from gpu_rnn.backends.tensors import RESET, SKIP, Call, Result
from gpu_rnn.recurrence import Recurrence
from tests.support import loops as support
from tests.support.layer_options import OPTIONS, STEERING, Case, inputs_of
from tests.support.pairwise import pairwise, spread
from tests.support.resident import CELLS, DTYPES, SHAPES, TIGHT, compare, errors, settings  # noqa: F401

DROPS = ["", "drop", "drop_per_gate"]
ALONE = list(product(CELLS, OPTIONS))
PAIRS = pairwise(
    CELLS, STEERING, DROPS, ["", "zone"], ["", "all_states"], DTYPES, SHAPES, ["0", "1", "01"], [True, False]
)


PROJECTED = ("lstm", "peephole_lstm", "coupled_lstm", "slstm")
PROJECTIONS = pairwise(
    PROJECTED,
    [f"proj {steering}" for steering in STEERING],
    DROPS,
    ["", "zone"],
    ["", "all_states"],
    DTYPES,
    [(1, 1, 2), *SHAPES[1:]],
    ["0", "1", "01"],
    [True, False],
)


def small(cell: str, *names: str, reverse: str = "01") -> tuple[Recurrence, support.Inputs]:
    return inputs_of((cell, " ".join(names), "", "", "", torch.float32, (4, 3, 5), reverse, True))


@pytest.mark.interpreter
@pytest.mark.parametrize(("cell", "option"), ALONE)
def test_each_option(cell: str, option: str) -> None:
    compare(*small(cell, option), "cpu")


@pytest.mark.interpreter
@pytest.mark.parametrize("case", spread(PAIRS, 2), ids=lambda case: "-".join(map(str, case)))
def test_options_together(case: Case) -> None:
    compare(*inputs_of(case), "cpu")


@pytest.mark.interpreter
@pytest.mark.parametrize("case", spread(PROJECTIONS, 2), ids=lambda case: "-".join(map(str, case)))
def test_a_projection_with_options(case: Case) -> None:
    compare(*inputs_of(case), "cpu")


@pytest.mark.interpreter
@pytest.mark.parametrize("proj", [1, 17, 36])
def test_widths_of_a_projection(proj: int) -> None:
    """Of one unit, of more than a block's least, and of nearly all."""
    recurrence = support.RECURRENCES["lstm"]
    inputs = support.make(recurrence, T=4, B=3, H=37, proj=proj, reverse="01", scale=0.3)
    compare(recurrence, inputs.to(torch.float32), "cpu")


@pytest.mark.interpreter
def test_members_and_second_derivatives_of_a_projection() -> None:
    """vmap over the weights of three layers, and the gradient of a gradient, beside the reference."""
    members = [gpu_rnn.LSTM(2, 5, proj_size=3) for _ in range(3)]
    params, _ = stack_module_state(members)
    x = torch.randn(4, 2, 2)

    def results(backend: str) -> list[Tensor]:
        layer = gpu_rnn.LSTM(2, 5, proj_size=3, backend=backend)
        leaves = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
        y = vmap(lambda p: functional_call(layer, p, (x,))[0])(leaves)
        first = torch.autograd.grad(y.sin().sum(), list(leaves.values()), create_graph=True)
        second = torch.autograd.grad(sum((g**2).sum() for g in first), list(leaves.values()))
        return [y, *first, *second]

    for found, truth in zip(results("resident"), results("reference"), strict=True):
        torch.testing.assert_close(found, truth, rtol=0, atol=TIGHT * max(1.0, truth.abs().max().item()))


@pytest.mark.gpu
@pytest.mark.parametrize("case", PROJECTIONS, ids=lambda case: "-".join(map(str, case)))
def test_a_projection_with_options_on_a_gpu(case: Case) -> None:
    compare(*inputs_of(case), "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize(("cell", "option"), ALONE)
def test_each_option_on_a_gpu(cell: str, option: str) -> None:
    compare(*small(cell, option), "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("case", PAIRS, ids=lambda case: "-".join(map(str, case)))
def test_options_together_on_a_gpu(case: Case) -> None:
    compare(*inputs_of(case), "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("cell", CELLS)
def test_many_steps_on_a_gpu(cell: str) -> None:
    sizes = (60, 70, 64)
    compare(
        *inputs_of(
            (cell, "mask reset_values", "drop_per_gate", "zone", "all_states", torch.float32, sizes, "01", True)
        ),
        "cuda",
    )


@pytest.mark.parametrize("option", [option for option in OPTIONS if option != "all_states"])
def test_a_kernel_that_ignores_an_option_is_found_out(option: str) -> None:
    """What the cases above compare differs from what the call without the option gives."""
    for cell in CELLS:
        recurrence, inputs = small(cell, option)
        _, plain = small(cell)
        found, truth = (support.values_and_gradients(recurrence, each, "reference") for each in (plain, inputs))
        assert max(errors(found, {name: truth[name] for name in found}).values()) > 100 * TIGHT, cell


def loops(cell: str, option: str, direction: str) -> tuple[Call, Tensor]:
    """A call without its input products, and its gates."""
    recurrence, inputs = small(cell, option)
    inputs = inputs.detached()
    proj = inputs.weights.w_hh.shape[-1] if inputs.weights.w_hr is not None else 0
    sizes = {"T": 4, "B": 3, "N": 2, "I": 2, "H": 5, "proj_size": proj}
    given = Problem(recurrence=recurrence, **sizes, direction=direction, reverse="01")
    return inputs.call(recurrence, given), project(inputs.x, inputs.weights, recurrence.program).contiguous()


def both_passes(option: str, which: int, padding: float) -> dict[str, Tensor]:
    """All results, with `padding` where no value may matter: the gates of skipped steps, or states that a reset
    drops."""
    call, gates = loops("peephole_lstm", option, "training")
    assert call.controls.flags is not None
    flagged = (call.controls.flags & which).bool()
    if which == SKIP:
        gates = gates.masked_fill(flagged[..., None, None], padding)
    else:
        first = torch.stack([flagged[0, :, 0], flagged[-1, :, 1]], 1)[..., None]  # (B, N, 1): of forward, of reversed
        assert first.any()
        states = [state.masked_fill(first, padding) for state in call.states]
        values = [value.masked_fill(~flagged[..., None], padding) for value in call.reset_values]
        call = replace(call, states=states, reset_values=values)
    result = resident.forward(call, gates, True, False)
    d_final = [torch.ones_like(state) for state in call.states]
    call = replace(call, problem=replace(call.problem, direction="backward"))
    found = resident.backward(call, result, torch.ones_like(result.y), d_final, None)
    outputs = {"y": result.y, "d_gates": found.d_gates, "d_params": found.d_params, "d_r": found.d_recurrent}
    outputs |= {"d_w_hr": found.d_w_hr}
    listed = [*result.final, *found.d_states, *found.d_resets]
    return {name: value for name, value in outputs.items() if value is not None} | dict(
        zip(map(str, range(9)), listed, strict=False)
    )


@pytest.mark.interpreter
@pytest.mark.parametrize("projection", ["", "proj"])
@pytest.mark.parametrize(("option", "which"), [("mask", SKIP), ("resets", RESET), ("reset_values_per_step", RESET)])
def test_nan_that_no_step_uses_does_not_leak(option: str, which: int, projection: str) -> None:
    found, truth = (both_passes(f"{option} {projection}", which, padding) for padding in (float("nan"), 0.0))
    torch.testing.assert_close(found, truth, rtol=0, atol=0)


@pytest.mark.interpreter
def test_all_states_in_inference() -> None:
    """They are written, and nothing else is: the projection stays what it was."""

    def run(all_states: bool) -> tuple[Result, Tensor, Tensor]:
        call, gates = loops("lstm", "mask", "inference")
        before = gates.clone()
        return resident.forward(call, gates, False, all_states), gates, before

    found, gates, before = run(True)
    torch.testing.assert_close(gates, before, rtol=0, atol=0)
    assert found.inner.shape == (1, 4, 3, 2, 5)
    torch.testing.assert_close(found.inner[0, -1, :, 0], found.final[1][:, 0])
    assert not found.gates.numel()
    assert not run(False)[0].inner.numel()


@pytest.mark.parametrize("direction", ["inference", "training", "backward"])
def test_loads_of_options_count_as_shared_memory(direction: str) -> None:
    """A step's zones, reset values and gradients of all states are under way with its other loads."""
    pytest.importorskip("triton")
    sizes = {"T": 4, "B": 16, "N": 1, "I": 8, "H": 128}
    plain = Problem(recurrence=support.RECURRENCES["lstm"], **sizes, dtype=torch.bfloat16, direction=direction)
    full = replace(plain, flags=True, reset_values=True, zone=True, all_states=True)
    more = resident.shared_memory(full, 2) - resident.shared_memory(plain, 2)
    unit = 2 * 2 + 2 * 1 + (4 if direction == "backward" else 0)  # two states: values of 2 bytes, zones of 1; d_inner
    assert more == 16 * 128 * unit
    assert resident.shared_memory(full, 1) == resident.shared_memory(plain, 1)


def test_the_bits_of_flags_are_the_layouts() -> None:
    blocks = pytest.importorskip("gpu_rnn.kernels.triton.blocks", reason="needs Triton")
    assert (blocks.SKIP_BIT.value, blocks.RESET_BIT.value) == (SKIP, RESET)
