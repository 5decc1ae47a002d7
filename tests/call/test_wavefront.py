# SPDX-License-Identifier: Apache-2.0
"""Stacks as a wavefront: the same numbers as layer after layer and as torch.nn, in fewer launches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import gpu_rnn
from gpu_rnn.backends.problem import Problem
from gpu_rnn.backends.step import launch as step
from gpu_rnn.call import loops
from gpu_rnn.dispatch import choice, wavefront_plan
from gpu_rnn.layers.base import LayerBase
from tests.support.cuda.machines import NEEDS_COMPILER
from tests.support.group import pretend

T, B = 7, 4
Force = Callable[[int], None]


@pytest.fixture
def force(monkeypatch: pytest.MonkeyPatch, uninitialised_memory_is_nan: None) -> Iterator[Force]:
    """A function that makes every stack that can run as a wavefront do so from then on, in chunks of so many steps."""

    def every_stack(chunk: int) -> None:
        def plan(problem: Problem, loop: str) -> choice._Plan:
            return choice._Plan(1.0, chunk, wavefront_plan.launched(problem, chunk, problem.layers))

        monkeypatch.setattr(wavefront_plan, "idles", lambda device: True)
        monkeypatch.setattr(choice, "_plan", plan)
        choice._gain.cache_clear()

    yield every_stack
    choice._gain.cache_clear()


def masks() -> dict[str, dict[str, Any]]:
    generator = torch.Generator().manual_seed(5)
    mask, resets = (torch.rand(T, B, generator=generator) < share for share in (0.7, 0.3))
    return {
        "": {},
        "lengths": {"lengths": torch.tensor([7, 0, 3, 5])},
        "mask": {"mask": mask},
        "resets": {"resets": resets, "mask": mask, "return_all_states": True},
        "all": {"return_all_states": True},
    }


def results(layer: Any, x: Tensor, call: dict[str, Any]) -> list[Tensor]:
    """Every output and every gradient."""
    torch.manual_seed(3)  # of the random masks
    y, states, *every = layer(x, **{name: v.to(x.device) if isinstance(v, Tensor) else v for name, v in call.items()})
    outputs = [y, *(states if isinstance(states, tuple) else [states]), *(every[0] if every else ())]
    grads = [torch.linspace(-1, 1, o.numel(), dtype=o.dtype, device=o.device).view(o.shape) for o in outputs]
    return [*outputs, *torch.autograd.grad(outputs, [x, *layer.parameters()], grads)]


def compare(layer: LayerBase, x: Tensor, call: dict[str, Any], force: Force, chunk: int) -> None:
    """A wavefront beside layer after layer of the same backend."""
    expected = results(layer, x, call)
    force(chunk)
    for found, right in zip(results(layer, x, call), expected, strict=True):
        torch.testing.assert_close(found, right, rtol=0, atol=1e-13 if x.dtype == torch.float64 else 1e-5)


LAYERS: list[tuple[Any, dict[str, Any]]] = [
    (gpu_rnn.LSTM, {}),
    (gpu_rnn.LSTM, {"bias": False, "peephole": True}),
    (gpu_rnn.LSTM, {"dropout": 0.4, "recurrent_dropout": 0.3, "zoneout": (0.2, 0.1)}),
    (gpu_rnn.GRU, {"recurrent_dropout": 0.3, "recurrent_dropout_per_gate": True}),
    (gpu_rnn.GRU, {"reset_after": False, "weight_drop": 0.3}),
    (gpu_rnn.RNN, {"activation": "relu"}),
]


@pytest.mark.parametrize("call", masks())
@pytest.mark.parametrize(("make", "options"), LAYERS)
@pytest.mark.parametrize(("layers", "chunk"), [(2, 1), (3, 2), (4, 7), (2, 5)])
def test_the_same_as_layer_after_layer(
    layers: int, chunk: int, make: Any, options: dict[str, Any], call: str, force: Force
) -> None:
    torch.manual_seed(1)
    layer = make(5, 6, layers, dtype=torch.float64, backend="step", **options)
    compare(layer, torch.randn(T, B, 5, dtype=torch.float64, requires_grad=True), masks()[call], force, chunk)


@pytest.mark.parametrize("chunk", [2, 3])
@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
def test_the_same_as_torch(cell: str, chunk: int, force: Force) -> None:
    torch.manual_seed(0)
    theirs = getattr(torch.nn, cell)(5, 6, 3, dtype=torch.float64)
    ours = getattr(gpu_rnn, cell)(5, 6, 3, dtype=torch.float64, backend="step")
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(T, B, 5, dtype=torch.float64, requires_grad=True)
    force(chunk)
    for found, right in zip(results(ours, x, {}), results(theirs, x, {}), strict=True):
        torch.testing.assert_close(found, right, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("steps", "batch"), [(1, 3), (7, 1), (1, 1)])
def test_one_step_or_one_row(steps: int, batch: int, force: Force) -> None:
    """Along an axis of size 1 the strides of a contiguous tensor may be any."""
    torch.manual_seed(1)
    layer = gpu_rnn.LSTM(5, 6, 3, dtype=torch.float64, backend="step", zoneout=0.3, dropout=0.4)
    call = {"resets": torch.rand(steps, batch) < 0.5, "return_all_states": True}
    compare(layer, torch.randn(steps, batch, 5, dtype=torch.float64, requires_grad=True), call, force, min(2, steps))


@pytest.mark.parametrize("of_steps", [(), (T,)], ids=["learnt", "of each step"])
def test_reset_values(of_steps: tuple[int, ...], force: Force) -> None:
    """Their gradients are sums over all chunks, or stand at the steps of each."""
    torch.manual_seed(2)
    layer = gpu_rnn.LSTM(5, 6, 3, dtype=torch.float64, backend="step")
    values = tuple(torch.randn(*of_steps, 3, B, 6, dtype=torch.float64, requires_grad=True) for _ in "hc")
    x, resets = torch.randn(T, B, 5, dtype=torch.float64), torch.rand(T, B) < 0.4

    def gradients() -> list[Tensor]:
        y, (h, c) = layer(x, resets=resets, reset_state=values)
        return [y, *torch.autograd.grad(y.square().sum() + h.sum() + c.sum(), values)]

    expected = gradients()
    force(2)
    for found, right in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(found, right, rtol=0, atol=1e-13)


TRITON = [pytest.param("cpu", marks=pytest.mark.interpreter), pytest.param("cuda", marks=pytest.mark.gpu)]
CUDA = [pytest.param("cpu", marks=[pytest.mark.cuda_cpu, NEEDS_COMPILER]), pytest.param("cuda", marks=pytest.mark.gpu)]
KERNELS = (
    ("make", "options", "call"),
    [
        (gpu_rnn.LSTM, {"dropout": 0.3, "recurrent_dropout": 0.2, "zoneout": 0.1}, "resets"),
        (gpu_rnn.GRU, {}, "lengths"),
        (gpu_rnn.LSTM, {"peephole": True, "bias": False}, ""),
    ],
)


@pytest.mark.parametrize(*KERNELS)
@pytest.mark.parametrize("backend", ["resident", "step"])
@pytest.mark.parametrize("place", TRITON)
def test_in_triton(place: str, backend: str, make: Any, options: dict[str, Any], call: str, force: Force) -> None:
    on_a_kernel(place, make(5, 20, 3, backend=backend, **options), masks()[call], force)


@pytest.mark.parametrize(*KERNELS)
@pytest.mark.parametrize("place", CUDA)
def test_in_cuda(
    place: str, make: Any, options: dict[str, Any], call: str, force: Force, monkeypatch: pytest.MonkeyPatch
) -> None:
    if place == "cpu":
        pretend(monkeypatch)
    on_a_kernel(place, make(5, 20, 3, backend="group", **options), masks()[call], force)


def on_a_kernel(place: str, layer: LayerBase, call: dict[str, Any], force: Force) -> None:
    """In full float32 as layer after layer, and in bfloat16 as far from float64 as plain PyTorch, twice at most."""
    before = torch.backends.cudnn.rnn.fp32_precision
    torch.backends.cudnn.rnn.fp32_precision = "ieee"
    torch.manual_seed(1)
    layer.to(place)
    x = torch.randn(T, B, 5, device=place)
    compare(layer, x.clone().requires_grad_(), call, force, 3)
    torch.backends.cudnn.rnn.fp32_precision = before
    layer.eval()  # random masks are drawn in the input's dtype
    layer.bfloat16()
    x, backend, found = x.bfloat16(), layer.backend, []
    for name, dtype in (("reference", torch.float64), ("reference", torch.bfloat16), (backend, torch.bfloat16)):
        layer.to(dtype).backend = name
        found.append([value.double() for value in results(layer, x.to(dtype).requires_grad_(), call)])
    for exact, rounded, value in zip(*found, strict=True):
        scale = exact.norm().clamp_min(1e-30)
        assert (value - exact).norm() / scale <= 2 * (rounded - exact).norm() / scale + 4e-3


def test_derivatives_of_higher_order(force: Force) -> None:
    """Second derivatives, and gradients of many outputs at once, which take one member after the other."""
    torch.manual_seed(0)
    layer = gpu_rnn.LSTM(3, 4, 2, dtype=torch.float64, backend="step")
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)

    def second() -> list[Tensor]:
        y, _ = layer(x)
        (d,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        along = torch.stack([torch.ones_like(y), y.detach()])
        (each,) = torch.autograd.grad(y, x, along, is_grads_batched=True, retain_graph=True)
        mapped = torch.func.vmap(lambda v: torch.autograd.grad(y, x, v, retain_graph=True)[0])(along)
        return [each, mapped, *torch.autograd.grad(d.square().sum(), [x, *layer.parameters()])]

    expected = second()
    force(2)
    for found, right in zip(second(), expected, strict=True):
        torch.testing.assert_close(found, right, rtol=0, atol=1e-12)


def test_compiled(force: Force, monkeypatch: pytest.MonkeyPatch) -> None:
    """With T as it comes: the chunk is chosen when the operation runs."""
    torch._dynamo.reset()  # after a test with breaks in its graph, Dynamo would try to trace a generator
    torch.manual_seed(0)
    layer = gpu_rnn.GRU(3, 4, 3, dtype=torch.float64, backend="step", dropout=0.3)
    force(2)
    monkeypatch.setattr(loops, "_staggered", lambda *_: True)  # what is compiled asks for a GPU
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for steps in (5, 8):
        x = torch.randn(steps, 2, 3, dtype=torch.float64, requires_grad=True)
        for found, right in zip(results(compiled, x, {}), results(layer, x, {}), strict=True):
            torch.testing.assert_close(found, right, rtol=0, atol=1e-13)


def test_packed(force: Force) -> None:
    torch.manual_seed(0)
    layer = gpu_rnn.LSTM(3, 4, 2, activation="relu")
    rows = [torch.randn(length, 3) for length in (5, 2, 4)]
    packed = torch.nn.utils.rnn.pack_sequence(rows, enforce_sorted=False)
    expected, (h, _) = layer(packed)
    force(2)
    found, (h_found, _) = layer(packed)
    torch.testing.assert_close(found.data, expected.data)
    torch.testing.assert_close(h_found, h)


def test_number_of_launches(force: Force, monkeypatch: pytest.MonkeyPatch) -> None:
    """K + L - 1 for K chunks of L layers, and one a layer for the odd steps."""
    launches: list[tuple[int, int]] = []
    kernel = step.forward
    monkeypatch.setattr(
        step, "forward", lambda call, gates, *rest: launches.append(gates.shape[:3:2]) or kernel(call, gates, *rest)
    )
    force(3)
    gpu_rnn.LSTM(3, 4, 3, backend="step")(torch.randn(10, 2, 3))
    assert launches == [(1, 1)] * 3 + [(3, 1), (3, 2), (3, 3), (3, 2), (3, 1)]


def test_what_is_handed_out_holds_no_more(force: Force) -> None:
    """A view would keep the outputs of all layers alive, and change with the states of all steps."""
    force(2)
    layer = gpu_rnn.LSTM(3, 4, 3, backend="step")
    y, _, (h, _) = layer(torch.randn(5, 2, 3), return_all_states=True)
    assert y.untyped_storage().nbytes() == y.nbytes
    before = h.clone()
    with torch.no_grad():
        y.zero_()
    assert h.equal(before)


def test_inference_keeps_no_input_products(force: Force, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside those of the lowest layer, which are made at once, only a diagonal's are there."""
    kept: list[bool] = []
    kernel = step.forward
    monkeypatch.setattr(
        step,
        "forward",
        lambda call, gates, *rest: (
            kept.append(gates.untyped_storage().nbytes() > gates.nbytes) or kernel(call, gates, *rest)
        ),
    )
    force(2)
    layer = gpu_rnn.LSTM(3, 4, 3, backend="step")
    with torch.no_grad():
        layer(torch.randn(6, 2, 3))
    assert kept == [False] * 5
    layer(torch.randn(6, 2, 3))
    assert kept == [False] * 5 + [True] * 5


def test_frozen_lower_layers_run_no_backward_pass(force: Force, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which a wavefront would give them: layer after layer, only the layers above run backward."""
    passes: list[int] = []
    kernel = step.backward
    monkeypatch.setattr(step, "backward", lambda call, *rest: passes.append(call.problem.N) or kernel(call, *rest))
    layer, x = gpu_rnn.LSTM(3, 4, 3, backend="step"), torch.randn(4, 2, 3)
    force(2)
    for name, weight in layer.named_parameters():
        weight.requires_grad_(name.endswith("l2"))
    layer(x)[0].sum().backward()
    assert passes == [1]
    layer.weight_hh_l0.requires_grad_()
    layer(x)[0].sum().backward()
    assert passes == [1, *(1, 2, 2, 1)]
