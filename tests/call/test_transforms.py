# SPDX-License-Identifier: Apache-2.0
"""torch.func's transforms and their nestings under every kernel that a CPU can stand in for, beside plain autograd in
loops."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import gpu_rnn
from gpu_rnn.backends import persistent
from tests.support import native
from tests.support.cuda.machines import NEEDS_COMPILER
from tests.support.group import pretend
from tests.support.loops import RECURRENCES, make
from tests.support.transforms import CASES, assert_right, turns

ONE_PRODUCT = tuple(case for case in CASES if case != "gru before")  # a step, as `group` takes them
TIGHT = 2e-5  # float32 against float64, relative to the largest value (tests/support/resident.py)
# What torch itself does at the first use of forward mode.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is:DeprecationWarning")


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    before = torch.backends.cudnn.rnn.fp32_precision
    torch.backends.cudnn.rnn.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.rnn.fp32_precision = before


@pytest.mark.interpreter
@pytest.mark.parametrize(("way", "case"), turns())
def test_resident(way: str, case: str) -> None:
    assert_right(CASES[case], way, "resident", torch.float32, TIGHT)


@pytest.mark.interpreter
@pytest.mark.parametrize(("way", "case"), turns())
def test_step(way: str, case: str) -> None:
    assert_right(CASES[case], way, "step", torch.float32, TIGHT)


@pytest.mark.cuda_cpu
@NEEDS_COMPILER
@pytest.mark.parametrize(("way", "case"), turns(ONE_PRODUCT))
def test_group(way: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    assert_right(CASES[case], way, "group", torch.float32, TIGHT)


@pytest.mark.parametrize(("way", "case"), turns())
@pytest.mark.parametrize("backend", [native.BACKEND, "step", "reference"])
def test_in_torch(backend: str, way: str, case: str) -> None:
    assert_right(CASES[case], way, backend, torch.float64, 1e-9)


GATES = torch.randn(3, 2, 4, 2, 5)  # (T, B, N, G, H)
LAYOUTS = {
    "whole": GATES,
    "gaps": torch.randn(3, 4, 4, 2, 5)[:, ::2],
    "turned": GATES.transpose(0, 1).contiguous().transpose(0, 1),
    "members alike": GATES[:, :, :1].expand_as(GATES),
    "all alike": GATES[:1, :1, :1, :1].expand_as(GATES),
    "units alike": GATES[..., :1].expand_as(GATES),
    "a window": torch.randn(100).as_strided(GATES.shape, (8, 8, 5, 5, 1)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_of_gates_share_no_memory(name: str) -> None:
    """They have the strides of the gates as the kernel reads them, which are copied only where that is needed."""
    saved, recurrence = LAYOUTS[name], RECURRENCES["rnn"]
    gates, d_gates = persistent.beside(make(recurrence).call(recurrence), saved)
    assert torch.equal(gates, saved) and gates.stride() == d_gates.stride() and gates.stride(-1) == 1
    d_gates.copy_(torch.arange(d_gates.numel()).view(d_gates.shape))
    assert len(d_gates.unique()) == d_gates.numel()
    assert (gates.data_ptr() == saved.data_ptr()) == (name in ("whole", "gaps", "turned"))


@pytest.mark.gpu
@pytest.mark.parametrize(("way", "case"), turns())
@pytest.mark.parametrize("backend", ["resident", "step"])
def test_on_a_gpu(backend: str, way: str, case: str) -> None:
    assert_right(CASES[case], way, backend, torch.float32, TIGHT, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize(("way", "case"), turns(ONE_PRODUCT))
def test_group_on_a_gpu(way: str, case: str) -> None:
    assert_right(CASES[case], way, "group", torch.float32, TIGHT, "cuda")


@pytest.mark.interpreter
@pytest.mark.parametrize("backend", ["resident", "step"])
def test_a_tensor_that_outlived_its_transform_is_one_as_any(backend: str) -> None:
    """torch.func wraps what runs inside of it, and a user may keep that: it has no memory of its own."""
    layer, x, h, kept = gpu_rnn.GRU(3, 4, backend=backend), torch.randn(5, 2, 3), torch.randn(1, 2, 4), []

    def inside(value: torch.Tensor) -> torch.Tensor:
        kept.append(value * 1)
        return value.sum()

    torch.func.grad(inside)(h)
    weights = list(layer.parameters())
    found, right = (torch.autograd.grad(layer(x, state)[0].sum(), weights) for state in (kept[0], h))
    assert all(map(torch.equal, found, right))
    with torch.no_grad():
        right = layer(x, h)
        for _ in range(3):  # of which the last would be by a plan
            assert all(map(torch.equal, layer(x, kept[0]), right))


Dead = Callable[[torch.Tensor], torch.Tensor]


def of_grad(value: torch.Tensor) -> torch.Tensor:
    kept: list[torch.Tensor] = []
    torch.func.grad(lambda inside: (kept.append(inside * 1), inside.sum())[1])(value)  # type: ignore[func-returns-value]
    return kept[0]


def of_vmap(value: torch.Tensor) -> torch.Tensor:
    kept: list[torch.Tensor] = []
    torch.func.vmap(lambda inside: (kept.append(inside * 1), inside)[1])(value[None])  # type: ignore[func-returns-value]
    return kept[0]


def layers_calls(backend: str) -> dict[str, Callable[[Dead], Any]]:
    """Calls with a tensor in each place, of layers and cells whose ways are different ones."""
    x, h, weight = torch.randn(5, 2, 3), torch.randn(1, 2, 4), torch.randn(12, 3)
    layer, cell = gpu_rnn.GRU(3, 4, activation="gelu", backend=backend), gpu_rnn.GRUCell(3, 4, clip=3.0)
    cell.backend = backend
    return {
        "x": lambda of: layer(of(x)),
        "one step": lambda of: layer(of(x[:1])),
        "a state": lambda of: layer(x, of(h)),
        "a weight": lambda of: torch.func.functional_call(layer, {"weight_ih_l0": of(weight)}, (x,)),
        "a mask": lambda of: layer(x, mask=of(x)[..., 0] > 0),
        "lengths": lambda of: layer(x, lengths=(of(x)[..., 0] > 0).sum(0)),
        "what resets set": lambda of: layer(x, resets=x[..., 0] > 0, reset_state=of(h)),
        "a cell's x": lambda of: cell(of(x[0])),
        "a cell's state": lambda of: cell(x[0], of(h[0])),
    }


@pytest.mark.usefixtures("native_by_itself")
@pytest.mark.parametrize("recording", [False, True])
@pytest.mark.parametrize("backend", ["auto", "native", "step", "reference"])
def test_what_outlived_its_transform_on_a_cpu(backend: str, recording: bool) -> None:
    """Of grad it is a tensor as any, as for torch.nn's layers; of vmap, which held many, an error that says so."""
    with torch.set_grad_enabled(recording):
        for name, call in layers_calls(backend).items():
            found, right = call(of_grad), call(lambda value: value)
            torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-6, msg=name)
            with pytest.raises(RuntimeError, match="may have escaped from inside a function being vmapped"):
                call(of_vmap)
