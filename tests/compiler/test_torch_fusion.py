# SPDX-License-Identifier: Apache-2.0
"""A program's operations as torch runs them on a CPU: functions that NumPy computes, and several operations as one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gpu_rnn import cells
from gpu_rnn.backends.step.torch_operations import compiled, tanh
from gpu_rnn.compiler.derivative import stage_outputs
from gpu_rnn.compiler.evaluation import runner
from gpu_rnn.compiler.jacobian import jacobian
from gpu_rnn.compiler.operations import live
from gpu_rnn.compiler.program import Program
from gpu_rnn.compiler.torch_fusion import fused
from tests.support import loops as support

ULPS = 4  # NumPy promises no more; found: 1.8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tanh_is_exact_for_small_arguments_too(dtype: torch.dtype) -> None:
    sizes = torch.logspace(-30, 1.2, 20_000, dtype=torch.float64).to(dtype)
    x = torch.cat([sizes, -sizes])
    exact = torch.tanh(x.double())
    error = (tanh(x).double() - exact).abs() / exact.abs()
    assert error.max() <= ULPS * torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_tanh_of_any_tensor(dtype: torch.dtype) -> None:
    x = torch.linspace(-3, 3, 24).to(dtype).view(2, 3, 4).requires_grad_()
    inf, nan = float("inf"), float("nan")
    special = torch.tensor([0.0, -0.0, inf, -inf, nan], dtype=dtype)
    for each in (x, x[:, 1], x.transpose(0, 2), x[0, 0, 0], x[:0], special):
        with torch.no_grad():
            torch.testing.assert_close(tanh(each), torch.tanh(each), equal_nan=True)
    assert tanh(special)[1].signbit()


def inputs(program: Program) -> dict[str, Tensor]:
    names = sorted({name for stage in program.stages for name in program.inputs(stage)})
    return {name: support.draw(50, seed=k).abs() + 0.1 for k, name in enumerate(names)}


@pytest.mark.parametrize("name", support.RECURRENCES)
def test_every_cell_and_its_derivative_come_to_the_same(name: str) -> None:
    """Stage after stage, so that what later ones read of earlier ones is there."""
    program = support.RECURRENCES[name].program
    plain, found = inputs(program), inputs(program)
    for number, stage in enumerate(program.stages):
        partials = jacobian(program, number)
        ops = (*stage.ops, *partials.ops)
        wanted = (*stage_outputs(program, number), *partials.results)
        runner(ops)(plain)
        compiled(ops, wanted)(found)
        for value in wanted:
            if isinstance(value, str):
                torch.testing.assert_close(found[value], plain[value], rtol=1e-12, atol=1e-14, msg=value)


def test_an_lstm_takes_half_the_operations_and_keeps_nothing_else() -> None:
    program = cells.lstm().program
    partials = jacobian(program, 0)
    ops = live((*program.stages[0].ops, *partials.ops), partials.results)
    fewer = fused(ops, partials.results)
    assert (len(ops), len(fewer)) == (23, 12)
    names = [op.name for op in fewer]
    assert {name: names.count(name) for name in ("sigmoid_backward", "tanh_backward", "addcmul")} == {
        "sigmoid_backward": 3,
        "tanh_backward": 2,
        "addcmul": 1,
    }
    values = inputs(program)
    before = set(values)
    compiled((*program.stages[0].ops, *partials.ops), partials.results)(values)
    assert set(values) - before == {name for name in partials.results if isinstance(name, str)}


@pytest.mark.parametrize(
    "lines, names",
    [
        (["t0 = sub 1.0 a_y", "t1 = mul a_y t0", "t2 = mul a_x t1"], ["sigmoid_backward"]),
        (["t0 = sub 1.0 a_y", "t1 = mul t0 a_y", "t2 = mul t1 a_x"], ["sigmoid_backward"]),
        (["t0 = mul a_y a_y", "t1 = sub 1.0 t0", "t2 = mul t1 a_x"], ["tanh_backward"]),
        (["t0 = mul a_x a_y", "t1 = add t0 a_x"], ["addcmul"]),
        (["t0 = mul a_x a_y", "t1 = mul a_y a_y", "t2 = add t0 t1"], ["mul", "addcmul"]),
        # What looks alike and is not.
        (["t0 = sub 2.0 a_y", "t1 = mul a_y t0", "t2 = mul a_x t1"], ["sub", "mul", "mul"]),
        (["t0 = sub 1.0 a_x", "t1 = mul a_y t0", "t2 = mul a_x t1"], ["sub", "mul", "mul"]),
        (["t0 = mul a_y a_x", "t1 = sub 1.0 t0", "t2 = mul t1 a_x"], ["mul", "sub", "mul"]),
        (["t0 = mul a_y a_y", "t1 = sub 2.0 t0", "t2 = mul t1 a_x"], ["mul", "sub", "mul"]),
        (["t0 = mul a_x 3.0", "t1 = add t0 a_y"], ["mul", "add"]),
        (["t0 = mul a_x a_y", "t1 = add t0 1.0"], ["mul", "add"]),
    ],
)
def test_what_is_fused(lines: list[str], names: list[str]) -> None:
    result = lines[-1].split()[0]
    text = ["program 1 sample", "state h 0.0", "stage x:sum y:sum", *lines, f"return {result}"]
    stage = Program.parse("\n".join([*text, ""])).stages[0]
    assert [op.name for op in fused(stage.ops, (result,))] == names
    values = {"a_x": support.draw(20, seed=1), "a_y": support.draw(20, seed=2)}
    plain = dict(values)
    runner(stage.ops)(plain)
    compiled(stage.ops, (result,))(values)
    torch.testing.assert_close(values[result], plain[result], rtol=1e-13, atol=1e-14)
