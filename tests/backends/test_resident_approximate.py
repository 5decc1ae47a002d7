# SPDX-License-Identifier: Apache-2.0
"""The hardware's tanh in the resident kernel: where it is taken, and how far off a result may then be.

No interpreter has that instruction, so tanh is off there by all that PTX allows, always up or always down.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

import gpu_rnn
from gpu_rnn import cells, devices
from gpu_rnn.backends import resident_launch
from gpu_rnn.backends.problem import Problem
from gpu_rnn.recurrence import Recurrence
from tests.support import loops as support
from tests.support.resident import compare, settings  # noqa: F401

HALVES = (torch.bfloat16, torch.float16)
FAST = ("rnn", "lstm", "gru", "peephole_lstm")
WORST = [("lstm", torch.bfloat16, 1), ("lstm", torch.float16, -1), ("gru", torch.bfloat16, -1)]
MORE = [case for case in product(FAST, HALVES, (1, -1)) if case not in WORST]


def gate_of_a_logarithm(x: Any, r: Any, s: Any) -> Any:
    """Of what sigmoid rounds to 0 the logarithm is infinite."""
    return torch.log(torch.sigmoid(x.a + r.a)) + s.h


def problem(recurrence: Recurrence | None = None, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Problem:
    sizes = {"T": 8, "B": 16, "N": 1, "I": 8, "H": 32}
    device: dict[str, Any] = {"device": devices.describe("H100"), "device_type": "cuda"}
    return Problem(recurrence=recurrence or cells.lstm(), dtype=dtype, **sizes | device | changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("said", [None, "", "none", "bf16", "16-bit"])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_which_dtypes_take_it(said: str | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GPU_RNN_APPROXIMATE", raising=False)
    if said is not None:
        monkeypatch.setenv("GPU_RNN_APPROXIMATE", said)
    expected = {"none": (), "16-bit": HALVES}.get(said or "", HALVES[:1])
    assert (resident_launch.functions(problem(dtype=dtype)) == resident_launch.FAST_FUNCTIONS) == (dtype in expected)


@pytest.mark.parametrize("name", support.RECURRENCES)
def test_which_cells_take_it(name: str) -> None:
    """Those in which it makes no small error large."""
    recurrence = support.RECURRENCES[name]
    risky = {op.name for stage in recurrence.program.stages for op in stage.ops} - resident_launch.STEADY
    assert (resident_launch.functions(problem(recurrence)) == resident_launch.FAST_FUNCTIONS) == (not risky)
    assert name not in FAST or not risky


def test_a_logarithm_of_a_gate_keeps_the_exact_one() -> None:
    recurrence = gpu_rnn.Recurrence(gate_of_a_logarithm, gates=("a",), states=("h",))
    assert resident_launch.functions(problem(recurrence)) == resident_launch.EXACT_FUNCTIONS


@pytest.mark.interpreter
def test_the_interpreter_keeps_the_exact_one() -> None:
    assert resident_launch.functions(problem()) == resident_launch.EXACT_FUNCTIONS


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("name", "dtype", "sign"), [*WORST, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)]
)
def test_results_at_the_largest_error(
    name: str, dtype: torch.dtype, sign: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most twice the error of plain PyTorch in that dtype."""
    tl = pytest.importorskip("triton.language")
    from tests.support import worst_math

    monkeypatch.setattr(worst_math, "ERROR", tl.constexpr(sign * worst_math.LARGEST))
    monkeypatch.setattr(resident_launch, "functions", lambda problem: worst_math.__name__)
    recurrence = support.RECURRENCES[name]
    inputs = support.make(recurrence, T=9, B=2, H=16, reverse="0", bias=True, lengths=None, scale=0.3)
    compare(recurrence, inputs.to(dtype), "cpu")


@pytest.mark.compile
@pytest.mark.parametrize("direction", ["training", "backward"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_built(dtype: torch.dtype, direction: str) -> None:
    """Of an LSTM: a tanh for each of four activations and that of c, and nothing to take a power."""
    from tests.backends.test_resident_builds import compiled

    assembly = compiled(problem(dtype=dtype, direction=direction)).asm["ptx"]
    fast = dtype == torch.bfloat16
    assert ("tanh.approx.f32" in assembly) == fast
    assert ("ex2.approx" in assembly) != fast


@pytest.mark.gpu
def test_the_error_of_the_instruction_on_a_gpu() -> None:
    from gpu_rnn.compiler import triton_module
    from tests.kernels.test_triton_math import as_program
    from tests.support.generated_kernel import apply
    from tests.support.worst_math import LARGEST

    size = 4096
    given = torch.linspace(-12.0, 12.0, size, device="cuda")
    for name, largest in (("tanh", LARGEST), ("sigmoid", LARGEST / 2)):
        step = triton_module.triton_module(as_program(name), resident_launch.FAST_FUNCTIONS).step_0
        found, exact = torch.empty_like(given), getattr(torch, name)(given.double())
        apply[(1,)](torch.stack([given, given]), found, step, 1, 0, 1, 0, 0, 0, size)
        scale = exact.abs() if name == "tanh" else torch.ones_like(exact)
        assert bool(((found - exact).abs() <= largest * scale + 2.0**-24).all())


@pytest.mark.gpu
@pytest.mark.parametrize("said", ["none", "16-bit"])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", FAST)
def test_results_on_a_gpu(name: str, dtype: torch.dtype, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPU_RNN_APPROXIMATE", said)
    recurrence = support.RECURRENCES[name]
    inputs = support.make(recurrence, T=60, B=33, H=64, reverse="01", bias=True, lengths=None, scale=0.3)
    compare(recurrence, inputs.to(dtype), "cuda")
