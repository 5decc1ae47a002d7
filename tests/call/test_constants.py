# SPDX-License-Identifier: Apache-2.0
"""Constants are of a call's own dtype, and draws repeat, whatever torch's default dtype is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import gpu_rnn
from gpu_rnn import activations
from gpu_rnn.compiler import codegen
from gpu_rnn.compiler.evaluation import runner
from gpu_rnn.compiler.jacobian import jacobian
from gpu_rnn.compiler.program import Program
from gpu_rnn.layers import regularization

DEFAULTS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
every_loop = pytest.mark.parametrize("backend", ["reference", "step"])


@pytest.fixture(params=DEFAULTS, ids=str)
def default(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """Another default dtype, for one test."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


def spiking(x: Any, r: Any, s: Any) -> Any:
    """h is made of a truth value alone, and so are constants that float32 does not hold."""
    v = 0.9 * s.v + x.i + r.i
    fires = v > 0.1
    return torch.where(fires, 0.1, 0.7) * 0.3, torch.where(fires, v - 0.1, v) + (v > 0.5) * 0.1


CELL = gpu_rnn.Recurrence(spiking, gates=("i",), states={"h": 0.0, "v": 0.5})


def by_hand(x: Tensor, w_ih: Tensor, w_hh: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The same in float64, with every constant a tensor of it."""
    tenth, other = torch.tensor(0.1, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64)
    h = torch.zeros(x.shape[1], w_hh.shape[1], dtype=torch.float64)
    v, outputs = torch.full_like(h, 0.5), []
    for step in x:
        v = 0.9 * v + step @ w_ih.T + h @ w_hh.T + bias
        fires = v > 0.1
        h = torch.where(fires, tenth, other) * 0.3
        v = torch.where(fires, v - 0.1, v) + torch.where(v > 0.5, tenth, torch.zeros_like(tenth))
        outputs.append(h)
    return torch.stack(outputs), v


@every_loop
def test_constants_are_of_the_layers_dtype(default: torch.dtype, backend: str) -> None:
    layer = gpu_rnn.Recurrent(CELL, 3, 4, dtype=torch.float64, backend=backend)
    x = torch.randn(6, 2, 3, dtype=torch.float64)
    y, (_, v) = layer(x)
    expected_y, expected_v = by_hand(x, layer.weight_ih_l0, layer.weight_hh_l0, layer.bias_ih_l0 + layer.bias_hh_l0)
    assert y.dtype == v.dtype == torch.float64
    torch.testing.assert_close(y, expected_y, rtol=1e-15, atol=0)
    torch.testing.assert_close(v[0], expected_v, rtol=1e-14, atol=1e-14)
    (grad,) = torch.autograd.grad(v.sum(), layer.weight_ih_l0, retain_graph=True)
    (truth,) = torch.autograd.grad(expected_v.sum(), layer.weight_ih_l0)
    torch.testing.assert_close(grad, truth, rtol=1e-13, atol=1e-14)


@every_loop
def test_every_dtype_under_every_default(default: torch.dtype, backend: str) -> None:
    """A truth value lets no gradient through: it is 0 on every backend, and the output has one."""
    for dtype in (torch.float32, torch.bfloat16):
        layer = gpu_rnn.Recurrent(CELL, 3, 4, dtype=dtype, backend=backend)
        y, states = layer(torch.randn(6, 2, 3, dtype=dtype))
        assert {y.dtype, *(state.dtype for state in states)} == {dtype}
        values = set(y.double().flatten().tolist())
        assert values <= {torch.tensor(number, dtype=dtype).double().item() for number in (0.03, 0.21)} | {
            (torch.tensor(number, dtype=dtype) * 0.3).double().item() for number in (0.1, 0.7)
        }
        y.sum().backward()
        assert not layer.weight_ih_l0.grad.any()


def test_partial_derivatives_are_of_the_values_dtype(default: torch.dtype) -> None:
    partials = jacobian(CELL.program, 0)
    values = {name: torch.randn(3, dtype=torch.float64) for name in CELL.program.inputs(CELL.program.stages[0])}
    runner((*CELL.program.stages[0].ops, *partials.ops))(values)
    assert {v.dtype for v in values.values()} == {torch.float64, torch.bool}


def test_a_choice_of_numbers_in_a_later_stage() -> None:
    """There nothing but a truth value of the stage before may be read."""
    text = (
        "program 1 two\nstate h 0.0\n"
        "stage a:sum\nt0 = gt a_a 0.0\nproduct a_a\n"
        "stage b:sum\nt1 = where t0 0.1 -inf\nreturn t1\n"
    )
    program = Program.parse(text)
    values = {"a_a": torch.tensor([1.0, -1.0], dtype=torch.float64)}
    for stage in program.stages:
        stage.run(values)
    assert values["t1"].tolist() == [0.1, -float("inf")]


def test_zoneout_draws_the_same_under_every_default(default: torch.dtype) -> None:
    like = torch.empty(0, dtype=torch.float64)
    torch.manual_seed(0)
    found = regularization.zone(like, (0.001, 0.5), (1000, 500))
    torch.manual_seed(0)
    truth = [torch.rand((1000, 500), dtype=torch.float32) < p for p in (0.001, 0.5)]
    torch.testing.assert_close(found, torch.stack(truth))
    assert 0.0007 < found[0].double().mean() < 0.0013  # at 3e-5 of standard deviation; in bfloat16 it was 0.003


@pytest.mark.parametrize(
    ("number", "triton", "cuda"),
    [
        (0.1, "0.1", "0.1f"),
        (-0.0, "-0.0", "-0.0f"),
        (3e38, "3e+38", "3e+38f"),
        (1e39, 'float("inf")', "INFINITY"),
        (-1e300, 'float("-inf")', "-INFINITY"),
        (1e-300, "0.0", "0.0f"),
        (-1e-39, "-0.0", "-0.0f"),
        (float("nan"), 'float("nan")', "NAN"),
    ],
)
def test_printed_constants_are_float32s(number: float, triton: str, cuda: str) -> None:
    """Triton takes a number that float32 has no normal value for as a float64, and computes in float64 from there
    on."""
    text = f"program 1 one\nstate h 0.0\nstage a:sum\nt0 = mul a_a {number!r}\nreturn t0\n"
    program = Program.parse(text)
    assert f"t0 = a_a * {triton}\n" in codegen.source(program, "triton")
    assert f"t0 = a_a * {cuda};" in codegen.source(program, "cuda")


SIXTEEN = [torch.float16, torch.bfloat16]
OVERFLOWING = ["softplus", "gelu_tanh", "mish", "silu", "elu", "sigmoid"]


@every_loop
@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
@pytest.mark.parametrize("name", OVERFLOWING)
def test_16_bits_overflow_nowhere_in_a_step(name: str, dtype: torch.dtype, backend: str) -> None:
    """In float16 the exp of 11.1 is infinite, and so is 41 cubed."""
    activation = torch.nn.functional.mish if name == "mish" else activations.ACTIVATIONS[name]
    layer = gpu_rnn.RNN(1, 1, bias=False, activation=activation, dtype=dtype, backend=backend)
    with torch.no_grad():
        layer.weight_ih_l0.fill_(1)
        layer.weight_hh_l0.fill_(0)
    x = torch.tensor([*torch.arange(-60, 61, 0.5), 11.1, -11.1], dtype=dtype).view(1, -1, 1).requires_grad_()
    y = layer(x)[0]
    (grad,) = torch.autograd.grad(y.sum(), x)
    exact_x = x.detach().double().requires_grad_()
    exact = activation(exact_x)
    (exact_grad,) = torch.autograd.grad(exact.sum(), exact_x)
    # One rounding of the result, one of the derivative in each direction; 1 + tanh cancels in float32, times x.
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), exact.detach(), rtol=unit, atol=1e-6)
    torch.testing.assert_close(grad.double(), exact_grad, rtol=2 * unit, atol=1e-6)
