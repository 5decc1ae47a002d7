# SPDX-License-Identifier: Apache-2.0
"""Every scalar operation, as printed for Triton, against torch in float64: small and large arguments, infinities,
NaN."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from gpu_rnn.backends import triton_interpreter
from gpu_rnn.compiler import triton_module
from gpu_rnn.compiler.operations import OPERATIONS
from gpu_rnn.compiler.program import Program

SIZE = 256
MAGNITUDES = [
    0.0,
    1e-30,
    1e-12,
    1e-6,
    1e-4,
    0.01,
    0.1,
    0.3,
    0.49,
    0.51,
    0.54,
    0.56,
    0.9,
    1.0,
    1.7,
    3.0,
    6.0,
    9.5,
    20.0,
    80.0,
]
SPECIAL = [float("inf"), -float("inf"), float("nan")]
POINTS = [*MAGNITUDES, *(-m for m in MAGNITUDES), *SPECIAL]
POSITIVE = {"log", "sqrt"}  # torch gives NaN below 0, the hardware too, but its log of a negative is not tested
BOUNDS = [-0.5, 1.0]  # of clamp: numbers, no values
UNITS = {  # of the last place that an operation may be off by, where more than 2
    "tanh": 4,
    "sigmoid": 60,  # far down its left tail e^x is, where x log2(e) is rounded: 80 units of 1e-7
    "exp": 60,
    "expm1": 60,
    "erf": 4,
    # Of Kahan's formula: CUDA's logf, 1 unit (its table of maximum errors); div.full.f32, 2 (PTX ISA); the product and
    # 1 + x, a half each.
    "log1p": 4,
}


def as_program(name: str) -> Program:
    """``h' = name(arguments)`` with the gates as arguments; a truth is a gate above 0 going in, and 1 or 0 coming
    out."""
    operation = OPERATIONS[name]
    gates = "bcd"[: operation.arity]
    truths = {"where": 1, "and": 2, "or": 2, "not": 1}.get(name, 0)
    lines = [f"t{k} = gt a_{gate} 0.0" for k, gate in enumerate(gates[:truths])]
    words = [*(f"t{k}" for k in range(truths)), *(f"a_{gate}" for gate in gates[truths:])]
    if name == "clamp":
        words[1:] = map(str, BOUNDS)
    lines.append(f"t{truths} = {name} {' '.join(words)}")
    if operation.is_bool:
        lines.append(f"t{truths + 1} = where t{truths} 1.0 0.0")
    stage = " ".join(f"{gate}:sum" for gate in gates)
    result = lines[-1].split()[0]
    return Program.parse("\n".join(["program 1 one", "state h 0.0", f"stage {stage}", *lines, f"return {result}"]))


def arguments(name: str) -> Tensor:
    """(arity, SIZE): all points, or a walk through all combinations of a few."""
    if OPERATIONS[name].arity == 1:
        points = [(abs(p) if name in POSITIVE else max(p, -1.0) if name == "log1p" else p,) for p in POINTS]
    else:
        few = (
            [-2.0, -0.5, 0.0, 0.5, 2.0, float("nan")] if OPERATIONS[name].arity == 2 else [-1.5, 0.0, 2.0, float("nan")]
        )
        points = list(product(few, repeat=OPERATIONS[name].arity))
    padded = points + [points[0]] * (SIZE - len(points))
    return torch.tensor(padded, dtype=torch.float32).T.contiguous()


def expected(name: str, given: Tensor) -> Tensor:
    operation, exact = OPERATIONS[name], list(given.double())
    if name in ("and", "or", "not"):
        exact = [value > 0 for value in exact]
    if name == "where":
        exact[0] = exact[0] > 0
    if name == "clamp":
        exact[1:] = BOUNDS
    return operation.torch(*exact).double()


def check(name: str, device: str) -> None:
    pytest.importorskip("triton")
    from tests.support.generated_kernel import apply

    given = arguments(name)
    out = torch.full((1, SIZE), float("nan"), device=device)
    step = triton_module.triton_module(as_program(name)).step_0
    rest = torch.cat([given, torch.zeros(1, SIZE)]).to(device)  # the state, which no operation here reads
    with triton_interpreter.arithmetic():
        apply[(1,)](rest, out, step, len(given), 0, 1, 0, 0, 0, SIZE)
    found, truth = out[0].cpu(), expected(name, given).float()
    finite = truth.isfinite()
    torch.testing.assert_close(found[~finite], truth[~finite], rtol=0, atol=0, equal_nan=True)
    unit = 2.0**-23
    torch.testing.assert_close(found[finite], truth[finite], rtol=UNITS.get(name, 2) * unit, atol=2.0**-149)


@pytest.mark.interpreter
@pytest.mark.parametrize("name", OPERATIONS)
def test_interpreted(name: str) -> None:
    check(name, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPERATIONS)
def test_on_a_gpu(name: str) -> None:
    check(name, "cuda")
