# SPDX-License-Identifier: Apache-2.0
"""What the short ways in C are given that is no plain tensor in memory, forward or, of what they saved, backward: a
sequence's (`direct`) and one step's (`single_step`), and the long way beside them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import gpu_rnn
from gpu_rnn.call import direct, run, single_step
from tests.support import native

Measure = Callable[[gpu_rnn.GRU, Tensor], Tensor]
WAYS = {"sequence": (5, {}), "step": (1, {}), "norm": (5, {"layer_norm": True}), "long": (5, {})}


@pytest.fixture(autouse=True)
def compiler() -> None:
    native.any_compiler()


@pytest.fixture(params=WAYS)
def agree(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Compares what is measured of a layer in C with the same of the reference."""
    steps, options = WAYS[request.param]
    if request.param == "long":
        monkeypatch.setattr(direct, "run", lambda *arguments: None)

    def compare(measure: Measure, bound: float = 1e-12) -> None:
        torch.manual_seed(0)
        fast, exact = (
            gpu_rnn.GRU(4, 6, backend=backend, dtype=torch.float64, **options) for backend in ("native", "reference")
        )
        exact.load_state_dict(fast.state_dict())
        x = torch.randn(steps, 3, 4, dtype=torch.float64, requires_grad=True)
        torch.testing.assert_close(measure(fast, x), measure(exact, x), rtol=bound, atol=bound)

    return compare


def drawn(like: Tensor, seed: int = 1) -> Tensor:
    return torch.randn(like.shape, dtype=like.dtype, generator=torch.Generator().manual_seed(seed))


def test_a_transform_around_the_backward_pass(agree: Any) -> None:
    def of_directions(layer: gpu_rnn.GRU, x: Tensor) -> Tensor:
        y = layer(x)[0]
        directions = torch.stack([drawn(y, seed) for seed in range(3)])
        return torch.func.vmap(lambda d: torch.autograd.grad(y, x, d, retain_graph=True)[0])(directions)

    agree(of_directions)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, at the first use of forward mode
def test_a_tangent_of_the_gradient_that_comes_in(agree: Any) -> None:
    def tangent(layer: gpu_rnn.GRU, x: Tensor) -> Tensor:
        y = layer(x)[0]
        with fwAD.dual_level():
            incoming = fwAD.make_dual(drawn(y), drawn(y, 2))
            found = fwAD.unpack_dual(torch.autograd.grad(y, x, incoming)[0]).tangent
        assert found is not None
        return found

    agree(tangent)


def test_a_mode_around_the_backward_pass_sees_it() -> None:
    class Counts(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            Counts.seen += "mm" in str(function)
            return function(*args, **(kwargs or {}))

    layer, x = gpu_rnn.GRU(4, 6, backend="native"), torch.randn(1, 3, 4)
    y = layer(x)[0]
    with Counts():
        y.sum().backward()
    assert Counts.seen


class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        return None


@pytest.mark.parametrize("create_graph", [False, True])
def test_no_gradient_at_all_comes_in(create_graph: bool, agree: Any) -> None:
    def gradient(layer: gpu_rnn.GRU, x: Tensor) -> Tensor:
        out = NoGradient.apply(layer(x)[0]).sum() + x.square().sum()
        return torch.autograd.grad(out, x, create_graph=create_graph)[0]

    agree(gradient)


def test_negations_that_torch_keeps_as_a_flag(agree: Any) -> None:
    """As the imaginary part of a conjugate has, where it has no gaps."""

    def outputs(layer: gpu_rnn.GRU, x: Tensor) -> Tensor:
        with torch.no_grad():
            weights = {name: torch._neg_view(weight) for name, weight in layer.named_parameters()}
            h = layer(x)[1]
            first = layer(torch._neg_view(x))[0] + layer(x, torch._neg_view(h))[0]
            return first + torch.func.functional_call(layer, weights, (x,))[0]

    agree(outputs)


@pytest.mark.parametrize("grad", [False, True])
def test_zeros_that_lie_nowhere(grad: bool, agree: Any) -> None:
    """The input, a state, a weight, and the values of resets."""

    def outputs(layer: gpu_rnn.GRU, x: Tensor) -> Tensor:
        def zeros(like: Tensor) -> Tensor:
            return torch._efficientzerotensor(like.shape, dtype=like.dtype)

        with torch.set_grad_enabled(grad):
            bias = {"bias_hh_l0": zeros(layer.bias_hh_l0)}
            h = layer(x)[1]
            resets = torch.ones(x.shape[:2], dtype=torch.bool)
            every = layer(zeros(x))[0] + layer(x, zeros(h))[0] + torch.func.functional_call(layer, bias, (x,))[0]
            every = every + layer(x, h, resets=resets, reset_state=zeros(h))[0]
        return every if not grad else torch.autograd.grad(every.square().sum(), layer.weight_hh_l0)[0]

    agree(outputs)


@pytest.mark.parametrize("of_final", [torch._neg_view, lambda d: torch._efficientzerotensor(d.shape, dtype=d.dtype)])
def test_gradients_whose_values_lie_elsewhere(of_final: Callable[[Tensor], Tensor], agree: Any) -> None:
    def gradient(layer: gpu_rnn.GRU, x: Tensor) -> Tensor:
        y, h = layer(x)
        return torch.autograd.grad([y, h], x, [torch._neg_view(drawn(y)), of_final(drawn(h))])[0]

    agree(gradient)


def test_hooks_that_change_how_saved_tensors_lie(agree: Any) -> None:
    """A dtype with fewer bits, and gaps where there were none."""

    def packed(tensor: Tensor) -> Tensor:
        return tensor.float().mT.contiguous() if tensor.dim() > 1 and tensor.is_floating_point() else tensor

    def unpacked(tensor: Tensor) -> Tensor:
        return tensor.mT if tensor.dim() > 1 and tensor.is_floating_point() else tensor

    def gradient(layer: gpu_rnn.GRU, x: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(packed, unpacked):
            y = layer(x)[0]
        return torch.autograd.grad(y.sum(), x)[0].double()

    agree(lambda layer, x: gradient(layer, x) if layer.backend == "native" else _plain(layer, x), bound=1e-5)


def _plain(layer: gpu_rnn.GRU, x: Tensor) -> Tensor:
    return torch.autograd.grad(layer(x)[0].sum(), x)[0]


class Forgets(dict[Any, Any]):
    """What another thread clears as soon as there is something in it."""

    def __setitem__(self, key: Any, value: Any) -> None: ...


@pytest.mark.parametrize("module, name", [(direct, "_plans"), (single_step, "_plans"), (run, "_predictions")])
def test_caches_that_another_thread_clears(module: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, name, Forgets())
    x = torch.randn(1, 2, 3)
    for backend in ("native", "auto"):
        layer = gpu_rnn.GRU(3, 4, backend=backend)
        assert layer(x)[0].shape == (1, 2, 4) and layer(x.expand(5, -1, -1))[0].shape == (5, 2, 4)
