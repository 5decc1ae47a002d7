# SPDX-License-Identifier: Apache-2.0
"""The resident kernel against the float64 reference: values, final states and all gradients, interpreted and on a
GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gpu_rnn import cells, devices
from gpu_rnn.backends import persistent, resident
from gpu_rnn.backends.problem import Problem
from gpu_rnn.backends.reference import project
from gpu_rnn.recurrence import Recurrence
from tests.support import loops as support
from tests.support.cells import of_three_products, two_products
from tests.support.layer_options import with_options
from tests.support.pairwise import pairwise, spread
from tests.support.profiling import operations
from tests.support.resident import CELLS, DTYPES, SHAPES, compare, errors, settings  # noqa: F401

ACTIVATIONS = ["tanh", "relu", "hard_sigmoid", "gelu", "softplus", "silu"]  # of every shape: all are in test_codegen.py
LAYOUTS = ["0", "1", "01", "0 lengths", "1 lengths", "01 lengths"]  # directions; rows with lengths of their own
SMOOTH = {"relu": "silu", "hard_sigmoid": "gelu"}  # instead in 16 bits: an argument may round across a kink, either way
Case = tuple[str, str, torch.dtype, tuple[int, int, int], str, bool]


def smooth(case: Case) -> Case:
    cell, activation, dtype, *rest = case
    return (cell, activation if dtype == torch.float32 else SMOOTH.get(activation, activation), dtype, *rest)


CASES = [smooth(case) for case in pairwise(CELLS, ACTIVATIONS, DTYPES, SHAPES, LAYOUTS, [True, False])]


def recurrence_of(cell: str, activation: str) -> Recurrence:
    make = support.WITH_ACTIVATIONS.get(cell)
    return make(activation, "sigmoid") if make else support.RECURRENCES[cell]


def inputs_of(recurrence: Recurrence, shape: tuple[int, int, int], layout: str, bias: bool) -> support.Inputs:
    steps, batch, hidden = shape
    reverse, *with_lengths = layout.split()
    lengths = tuple((3 * row + 1) % (steps + 1) for row in range(batch)) if with_lengths else None
    return support.make(recurrence, T=steps, B=batch, H=hidden, reverse=reverse, bias=bias, lengths=lengths, scale=0.3)


def check(case: Case, device: str) -> None:
    cell, activation, dtype, shape, layout, bias = case
    recurrence = recurrence_of(cell, activation)
    compare(recurrence, inputs_of(recurrence, shape, layout, bias).to(dtype), device)


@pytest.mark.interpreter
@pytest.mark.parametrize("case", spread(CASES, 2), ids=lambda case: "-".join(map(str, case)))
def test_interpreted(case: Case) -> None:
    check(case, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_on_a_gpu(case: Case) -> None:
    check(case, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", CELLS)
def test_many_steps_at_the_limit_on_a_gpu(cell: str, dtype: torch.dtype) -> None:
    problem = replace(described(cell, dtype=dtype), device=devices.of(torch.device("cuda")), direction="backward")
    widths = [w for w in (64, 128, 256) if not resident.unsupported(replace(problem, H=w))]
    check((cell, "tanh", dtype, (60, 70, widths[-1]), "01 lengths", True), "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_tf32_on_a_gpu(cell: str) -> None:
    torch.backends.cudnn.rnn.fp32_precision = "tf32"
    recurrence = support.RECURRENCES[cell]
    inputs = inputs_of(recurrence, (20, 33, 64), "01", True)
    truth = support.values_and_gradients(recurrence, inputs, "reference")
    found = support.values_and_gradients(recurrence, inputs.to(torch.float32).on("cuda"), "resident")
    assert max(errors(found, truth).values()) < 20 * 2.0**-11  # TF32 has 10 bits after the point


def described(cell: str = "lstm", **changes: Any) -> Problem:
    """A problem that an H100 can run."""
    sizes = {"T": 100, "B": 64, "N": 2, "I": 8, "H": 64, "reverse": "01"}
    device = {"device_type": "cuda", "device": devices.describe("H100")}
    return replace(Problem(recurrence=support.RECURRENCES[cell], **sizes, **device), **changes)


def launched(save: bool, padding: float) -> tuple[Tensor, dict[str, Tensor]]:
    """The gates as the kernel leaves them, and all results; `padding` fills what lies beyond the rows' lengths."""
    recurrence = support.RECURRENCES["gru"]
    inputs = inputs_of(recurrence, (5, 3, 20), "01 lengths", True).to(torch.float32)
    assert inputs.lengths is not None
    beyond = (torch.arange(5)[:, None] >= inputs.lengths)[:, :, None, None]  # (T, B, 1, 1)
    gates = project(inputs.x.detach(), inputs.detached().weights, recurrence.program)
    gates = gates.masked_fill(beyond[..., None], padding)
    sizes = {"T": 5, "B": 3, "N": 2, "I": 2, "H": 20}
    direction = "training" if save else "inference"
    given = Problem(recurrence=recurrence, **sizes, direction=direction, reverse="01")
    result = resident.forward(inputs.detached().call(recurrence, given), gates, save, False)
    if not save:
        return gates, {"y": result.y, "gates": result.gates, "recurrent": result.recurrent, "inner": result.inner}
    d_y = torch.ones_like(result.y).masked_fill(beyond, padding)
    call = inputs.detached().call(recurrence, replace(given, direction="backward"))
    found = resident.backward(call, result, d_y, call.states, None)
    return gates, {
        "y": result.y,
        "h": result.final[0],
        "d_gates": found.d_gates,
        "d_r": found.d_recurrent,
        "d_h": found.d_states[0],
    }


@pytest.mark.interpreter
def test_nan_in_the_padding_does_not_leak() -> None:
    _, found = launched(save=True, padding=float("nan"))
    _, truth = launched(save=True, padding=0.0)
    torch.testing.assert_close(found, truth, rtol=0, atol=0)


@pytest.mark.interpreter
def test_nan_in_padded_units_does_not_spread() -> None:
    def step(x, r, s):  # type: ignore[no-untyped-def]
        q = x.g + r.g
        return torch.tanh(q) * q / q.abs(), s.c + q / q.abs()  # 0 / 0 where a unit has neither input nor weights

    recurrence = Recurrence(step, gates=("g",), states=("h", "c"))
    compare(recurrence, inputs_of(recurrence, (3, 2, 5), "0", True).to(torch.float32), "cpu")


@pytest.mark.interpreter
@pytest.mark.parametrize("options", [(), ("mask", "reset_values", "drop_per_gate", "zone", "all_states")])
@pytest.mark.parametrize("bias", [True, False])
def test_two_products(bias: bool, options: tuple[str, ...]) -> None:
    recurrence = two_products()
    inputs = with_options(inputs_of(recurrence, (4, 3, 20), "01", bias), recurrence, options)
    compare(recurrence, inputs.to(torch.float32), "cpu")


@pytest.mark.interpreter
def test_inference_saves_nothing() -> None:
    gates, found = launched(save=False, padding=0.0)
    untouched, _ = launched(save=False, padding=0.0)
    assert [found[name].numel() for name in ("gates", "recurrent", "inner")] == [0, 0, 0]
    torch.testing.assert_close(gates, untouched, rtol=0, atol=0)
    assert found["y"].isfinite().all()


@pytest.mark.interpreter
def test_an_empty_batch_launches_nothing() -> None:
    recurrence = support.RECURRENCES["lstm"]
    inputs = inputs_of(recurrence, (5, 0, 4), "0", True).to(torch.float32)
    found = support.values_and_gradients(recurrence, inputs, "resident")
    assert found["y"].shape == (5, 0, 1, 4)
    assert not found["d w_hh"].any()


@pytest.mark.interpreter
def test_a_users_recurrence_shows_in_the_profiler() -> None:
    recurrence = support.minimal_gated_unit(slope=2.0)
    inputs = inputs_of(recurrence, (3, 2, 4), "0", True).to(torch.float32)
    ran = operations(lambda: support.values_and_gradients(recurrence, inputs, "resident"))
    assert {"gpu_rnn::resident_forward", "gpu_rnn::resident_backward"} <= {*ran}


REFUSED = {
    "needs an NVIDIA GPU": {"device": devices.CPU, "device_type": "mps"},
    "needs compute capability 8.0": {"device": replace(devices.describe("A100"), name="V100", capability=(7, 0))},
    "takes two products a step at most, three has 3": {"recurrence": of_three_products()},
    "projects h (proj_size) where it enters the product alone, and gru": {"recurrence": cells.gru(), "proj_size": 8},
    "takes 128 units at most with a projection of h": {"H": 129, "proj_size": 8, "dtype": torch.half},
    "not float64": {"dtype": torch.float64},
    "65535 recurrences": {"N": 65536, "reverse": "0" * 65536},
    "64 units at most in full float32": {"recurrence": cells.rnn(), "H": 65},
    "with 129 units of lstm a block needs 544 KiB of shared memory and has 227": {"H": 129, "dtype": torch.bfloat16},
}


@pytest.mark.parametrize(("reason", "changes"), REFUSED.items())
def test_refusals_say_why(reason: str, changes: dict[str, Any]) -> None:
    pytest.importorskip("triton")
    assert resident.unsupported(described()) == []
    reasons = resident.unsupported(described(**changes))
    assert len(reasons) == 1
    assert reason in reasons[0]


def test_directions_travel_as_a_pattern() -> None:
    assert persistent.bits("01" * 500) == (0b10, 2)
    assert persistent.bits("0" * 7) == (0, 1)
    assert persistent.bits("0110") == (0b0110, 4)
    reason = "takes 65535 recurrences side by side, directions repeating within 62"
    assert resident.unsupported(described(N=100, reverse="1" + "0" * 99)) == [reason]


def test_cost_grows_with_the_work() -> None:
    base = resident.cost(described())
    assert resident.cost(described(T=200)) > 1.5 * base
    assert resident.cost(described(B=6400)) > 1.5 * base
    assert resident.cost(described(direction="backward")) > base
    assert resident.cost(described(device=devices.describe("A100"))) > base
