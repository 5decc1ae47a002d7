# SPDX-License-Identifier: Apache-2.0
"""A user's own cell through the resident kernel and the loop in C, from the layer down: seen by the
profiler, and under every transform."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import gpu_rnn
from tests.support import loops as support
from tests.support import native
from tests.support.profiling import operations

TIGHT = 1e-5  # float32 beside float64 over a few steps
PLACES = [
    pytest.param("resident", "cpu", marks=pytest.mark.interpreter),
    pytest.param("native", "cpu", marks=native.NEEDS_C),
    pytest.param("resident", "cuda", marks=pytest.mark.gpu),
]

everywhere = pytest.mark.parametrize(("backend", "device"), PLACES)
in_full_precision = pytest.mark.usefixtures("full_precision")


@pytest.fixture
def full_precision() -> Iterator[None]:
    before = torch.backends.cudnn.rnn.fp32_precision
    torch.backends.cudnn.rnn.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.rnn.fp32_precision = before


def layers(backend: str, device: str) -> tuple[gpu_rnn.Recurrent, gpu_rnn.Recurrent, Tensor]:
    """The same layer on a kernel and on the reference in float64, and an input."""
    cell = support.minimal_gated_unit(1.5)
    torch.manual_seed(0)
    exact = gpu_rnn.Recurrent(cell, 3, 5, bidirectional=True, dtype=torch.float64, backend="reference")
    fast = gpu_rnn.Recurrent(cell, 3, 5, bidirectional=True, backend=backend)
    fast.load_state_dict(exact.state_dict())
    x = torch.randn(6, 2, 3, device=device)
    return fast.to(device), exact.to(device), x


def gradients(layer: gpu_rnn.Recurrent, x: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y, h = layer(x)
    return list(torch.autograd.grad(y.sin().sum() + h.cos().sum(), [x, *layer.parameters()]))


def assert_near(found: list[Tensor], truth: list[Tensor], tolerance: float = TIGHT) -> None:
    for f, t in zip(found, truth, strict=True):
        torch.testing.assert_close(f.double(), t, rtol=tolerance, atol=tolerance)


@everywhere
@in_full_precision
def test_the_profiler_shows_both_passes(backend: str, device: str) -> None:
    fast, exact, x = layers(backend, device)
    names = {*operations(lambda: gradients(fast, x))}
    assert {f"gpu_rnn::{backend}_forward", f"gpu_rnn::{backend}_backward"} <= names
    assert not {name for name in names if name.startswith(("gpu_rnn::reference", "gpu_rnn::step"))}
    assert_near([fast(x)[0], *gradients(fast, x)], [exact(x.double())[0], *gradients(exact, x.double())])


@everywhere
@in_full_precision
@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # torch's own, when jvp is first used
def test_second_derivatives_jvp_and_vmap(backend: str, device: str) -> None:
    fast, exact, x = layers(backend, device)
    along = torch.randn_like(x)

    def energy(layer: gpu_rnn.Recurrent) -> Callable[[Tensor], Tensor]:
        return lambda x: layer(x)[0].square().sum()

    def products(layer: gpu_rnn.Recurrent, x: Tensor, along: Tensor) -> list[Tensor]:
        of = energy(layer)
        _, tangent = torch.func.jvp(of, (x,), (along,))
        _, second = torch.func.jvp(torch.func.grad(of), (x,), (along,))
        each = torch.func.vmap(torch.func.grad(of))(torch.stack([x, 2 * x]))
        return [tangent, second, each]

    found = products(fast, x, along)
    assert all(f.abs().max() > 0 for f in found)
    assert_near(found, products(exact, x.double(), along.double()), 1e-4)


@everywhere
@in_full_precision
def test_vmap_over_weights_is_one_launch(backend: str, device: str) -> None:
    fast, exact, x = layers(backend, device)
    stacked = {name: torch.stack([p, 0.5 * p]) for name, p in fast.state_dict().items()}

    def call(layer: gpu_rnn.Recurrent, weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.vmap(lambda w: torch.func.functional_call(layer, w, (x,))[0])(weights)

    assert operations(lambda: call(fast, stacked, x)).count(f"gpu_rnn::{backend}_forward") == 1
    double = {name: w.double() for name, w in stacked.items()}
    assert_near([call(fast, stacked, x)], [call(exact, double, x.double())])


@everywhere
@in_full_precision
def test_compiled_without_a_break(backend: str, device: str) -> None:
    fast, exact, x = layers(backend, device)
    torch._dynamo.reset()
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    assert_near([compiled(x)[0], *gradients(compiled, x)], [exact(x.double())[0], *gradients(exact, x.double())])


LOADER = """
import sys, torch, gpu_rnn
x, y = torch.load(sys.argv[2])
program = torch.export.load(sys.argv[1]).module()
found = program(x)[0]
torch.testing.assert_close(found, y)
assert "tests.support.loops" not in sys.modules
print("equal", tuple(found.shape))
"""


@everywhere
def test_exported_to_a_process_without_the_users_code(backend: str, device: str, tmp_path: Path) -> None:
    fast, _, x = layers(backend, device)
    free = ({0: torch.export.Dim("T"), 1: torch.export.Dim("B")},)
    torch.export.save(torch.export.export(fast, (x,), dynamic_shapes=free), tmp_path / "layer.pt2")
    other = torch.randn(9, 4, 3, device=device)
    torch.save((other, fast(other)[0].detach()), tmp_path / "pair.pt")
    command = [sys.executable, "-c", LOADER, str(tmp_path / "layer.pt2"), str(tmp_path / "pair.pt")]
    done = subprocess.run(command, env=os.environ, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "equal (9, 4, 10)\n"
