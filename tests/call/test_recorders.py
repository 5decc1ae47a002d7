# SPDX-License-Identifier: Apache-2.0
"""Whoever records torch's operations gets the registered ones, or words that say what to use: never other numbers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.func import functionalize, grad, hessian, jacrev, jvp, vmap

import gpu_rnn
from tests.support.recorded import (
    BACKWARD,
    FORWARD,
    LAYERS,
    SOME,
    B,
    H,
    I,
    Net,
    T,
    close,
    draw,
    every_layer,
    every_mode,
    loss_of,
    make,
    operations,
    recorded,
    some_layers,
)

# What torch itself does at the first use of forward mode; torch.jit is old, and says so in some versions.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


@every_mode
@every_layer
@pytest.mark.parametrize("kept", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_make_fx(kept: bool, name: str, mode: str) -> None:
    """A graph of an example is right for other values, and one of symbols for other sizes."""
    net = make(name)
    with torch.set_grad_enabled(kept):
        graph = recorded(net, mode)
    assert FORWARD in operations(graph) or (name == "reference" and mode == "real")  # which is torch's operations alone
    torch.empty(200_000).fill_(7.0)  # what nobody wrote is this, then
    close(graph(draw(2)), net(draw(2)))
    if mode == "symbolic":
        steps, batch = (1, 7) if "cell" in name else (9, 2)
        close(graph(draw(3, steps, batch)), net(draw(3, steps, batch)))


@every_mode
@some_layers
@pytest.mark.parametrize("kept", [pytest.param(True, marks=pytest.mark.slow), False])
def test_make_fx_before_autograd(kept: bool, name: str, mode: str) -> None:
    net = make(name)
    with torch.set_grad_enabled(kept):
        graph = recorded(net, mode, pre_dispatch=True)
    close(graph(draw(2)), net(draw(2)))
    x, other = (draw(4).requires_grad_() for _ in range(2))
    close(torch.autograd.grad(graph(x).sin().sum(), x), torch.autograd.grad(loss_of(net)(other), other))


@every_mode
@some_layers
def test_gradients_in_a_graph(name: str, mode: str) -> None:
    net = make(name)
    weights = list(net.parameters())

    def by_autograd(x: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss_of(net)(x), weights)

    for function in (grad(loss_of(net)), by_autograd):
        graph = recorded(function, mode)
        assert {FORWARD, BACKWARD} <= operations(graph)
        close(graph(draw(2)), function(draw(2)))
        if mode == "symbolic":
            close(graph(draw(3, 9, 2)), function(draw(3, 9, 2)))


NESTED: dict[str, Callable[[Net], Callable[[Tensor], Any]]] = {
    "vmap": lambda net: lambda x: vmap(net)(torch.stack([x, x.cos()])),
    "jvp": lambda net: lambda x: jvp(net, (x,), (x.cos(),))[1],
    "vmap of grad": lambda net: lambda x: vmap(grad(loss_of(net)))(torch.stack([x, x.cos()])),
    "jacrev": lambda net: lambda x: jacrev(lambda x: net(x)[0, 0, :2])(x),
    "grad of grad": lambda net: lambda x: grad(lambda x: grad(loss_of(net))(x).square().sum())(x),
    "hessian": lambda net: lambda x: hessian(lambda first: loss_of(net)(torch.cat([first, x[1:]])))(x[:1]),
}


@pytest.mark.parametrize("mode", ["real", "fake"])
@pytest.mark.parametrize("way", [pytest.param(way, marks=() if "vmap" in way else pytest.mark.slow) for way in NESTED])
@pytest.mark.parametrize("name", ["lstm", pytest.param("peephole", marks=pytest.mark.slow), "step"])
def test_transforms_in_a_graph(name: str, way: str, mode: str) -> None:
    function = NESTED[way](make(name))
    close(recorded(function, mode)(draw(2)), function(draw(2)))


@pytest.mark.parametrize("name", [*SOME, "reference"])
def test_functionalize(name: str) -> None:
    """Alone, inside and outside of other transforms."""
    net, x, v = make(name), draw(1), draw(2)
    loss, along = loss_of(net), (lambda f: jvp(f, (x,), (v,))[1])
    close(functionalize(net)(x), net(x))
    weights = list(net.parameters())
    close(torch.autograd.grad(functionalize(loss)(x), weights), torch.autograd.grad(loss(x), weights))
    close(functionalize(grad(loss))(x), grad(loss)(x))
    close(grad(functionalize(loss))(x), grad(loss)(x))
    both = torch.stack([x, v])
    close(vmap(functionalize(net))(both), vmap(net)(both))
    close(functionalize(vmap(net))(both), vmap(net)(both))
    close(along(functionalize(net)), along(net))
    graph = recorded(functionalize(net), "symbolic")
    assert FORWARD in operations(graph)
    close(graph(draw(3, 9, 2)), net(draw(3, 9, 2)))


@pytest.mark.parametrize("training", [True, False])
@every_layer
def test_fake_tensors(name: str, training: bool) -> None:
    """As estimators of memory use them: sizes and dtypes of outputs and gradients, and nothing of it is kept."""
    real, x = make(name).train(training), draw(1)
    expected = real(x)
    with FakeTensorMode():
        net, fake = LAYERS[name]().train(training), torch.randn(x.shape, requires_grad=True)
        found = net(fake)
        found.sum().backward()
    assert isinstance(found, FakeTensor) and (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert fake.grad is not None and fake.grad.shape == x.shape
    assert all(p.grad is not None and p.grad.shape == p.shape for p in net.parameters())
    if not net.controls:  # which torch cannot make outside of the mode
        net.zero_grad()
        net(fake).sum().backward()
        assert all(isinstance(p.grad, FakeTensor) for p in net.parameters())
    close(real(x), expected)


@pytest.mark.skipif(
    not torch.backends.cuda.is_built(), reason="this torch is built without CUDA, and indexes no such tensor"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_layer
def test_fake_tensors_of_a_gpu_that_is_not_here(name: str, dtype: torch.dtype) -> None:
    with FakeTensorMode():
        net = LAYERS[name]().requires_grad_(False)
        for module in net.modules():  # Module.to would ask the driver
            for own, p in list(module.named_parameters(recurse=False)):
                module._parameters[own] = nn.Parameter(
                    torch.empty(p.shape, device="cuda", dtype=dtype), requires_grad=False
                )
        found = net(torch.empty(T, B, I, device="cuda", dtype=dtype))
    assert (found.device.type, found.dtype, found.shape[0]) == ("cuda", dtype, B if "cell" in name else T)


def test_fake_tensors_with_noise() -> None:
    with FakeTensorMode():
        net = gpu_rnn.LSTM(I, H, 2, dropout=0.1, recurrent_dropout=0.2, zoneout=0.1, weight_drop=0.3)
        y, _ = net(torch.randn(T, B, I))
        y.sum().backward()
    assert isinstance(y, FakeTensor) and y.shape == (T, B, H)


def test_a_backend_that_no_registered_operation_has() -> None:
    net = gpu_rnn.GRU(I, H, backend="aten")
    close(recorded(lambda x: net(x)[0], "fake")(draw(2)), net(draw(2))[0])  # ATen's operations are recorded themselves
    with pytest.raises(ValueError, match="backend='aten' cannot run this call"):
        functionalize(net)(draw(1))
    with pytest.raises(ValueError, match="backend='aten' cannot run this call where it is recorded"):
        recorded(grad(lambda x: net(x)[0].sum()), "fake")


@pytest.mark.parametrize("name", ["peephole", "step"])
def test_no_forward_mode_of_what_was_recorded(name: str) -> None:
    """A custom operation's tangent would be 0 without a word."""
    net, x = make(name), draw(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        traced = torch.jit.trace(net, (x,))
    for program in (recorded(net, "real"), traced, torch.export.export(net, (x,)).module()):
        with pytest.raises(RuntimeError, match="has no forward-mode derivative: take it of the layer itself"):
            jvp(program, (x,), (draw(2),))
        close(program(x), net(x))
